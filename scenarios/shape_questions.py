"""Questions about pictures of coloured shapes: a visual-question stream that is drawn, not downloaded.

A small relative of CLEVR (Johnson et al. 2017) for REMIND's second experiment (Hayes et al. 2020, §5.2): the same two
orders, *iid* and by *question type*, and question types that ask for the same picture in different ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Scenario
from cl_lab.records import Experience, Stream, TensorData
from cl_lab.seeding import generator, permutation

from ._orders import even_parts, limit_rows

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
Kind = Literal["existence", "count", "colour", "shape", "position", "comparison"]
TYPES: tuple[Kind, ...] = get_args(Kind)
ANSWERS = ("yes", "no", *map(str, range(6)), *COLOURS, *SHAPES, *QUARTERS)
_SENTENCES = (
    "is there a FIRST SECOND",
    "how many FIRST are there",
    "how many FIRST things are there",
    "what colour is the FIRST",
    "what shape is the FIRST thing",
    "where is the FIRST SECOND",
    "are there more FIRST than SECOND",
)
_PLURALS = tuple({"cross": "crosses"}.get(s, f"{s}s") for s in SHAPES)
_GRAMMAR = (w for s in _SENTENCES for w in s.split() if w.islower())
WORDS = ("", *dict.fromkeys((*COLOURS, *SHAPES, *_PLURALS, *_GRAMMAR)))
"""The vocabulary; a question is up to eight of these by number, 0 where it is shorter."""

LENGTH = 8
_GRID, _CELL = 4, 8  # a picture has 4 × 4 cells of 8 × 8 pixels, with one shape each at most
_SIDE = _GRID * _CELL
_RGB = torch.tensor([[230, 40, 40], [40, 200, 60], [60, 80, 240], [230, 220, 50], [220, 60, 220], [60, 220, 220]])
_FIRST, _SECOND = -1, -2  # places of a template that an attribute fills


class Scenes(NamedTuple):
    """What is to be seen: int64 ``[N, 16]`` per cell, row by row; −1 where a cell is empty."""

    shape: Tensor
    colour: Tensor


def draw_scenes(n: int, rng: torch.Generator) -> Scenes:
    """``n`` scenes of two to seven objects in distinct cells, each of a random shape and colour."""
    cells = _GRID**2
    count = torch.randint(2, 8, (n, 1), generator=rng)
    rank = torch.rand(n, cells, generator=rng).argsort(1).argsort(1)
    shape = torch.randint(len(SHAPES), (n, cells), generator=rng)
    colour = torch.randint(len(COLOURS), (n, cells), generator=rng)
    empty = rank >= count
    return Scenes(shape.masked_fill(empty, -1), colour.masked_fill(empty, -1))


def render(scenes: Scenes, rng: torch.Generator) -> Tensor:
    """Pictures uint8 ``[N, 3, 32, 32]``: shapes of six pixels, each shifted within its cell, on noisy grey."""
    n, cells = scenes.shape.shape
    there = scenes.shape >= 0
    shift = torch.randint(_CELL - 6 + 1, (2, n, cells), generator=rng)
    masks = _shifted_masks()[scenes.shape.clamp(min=0), shift[0], shift[1]] * there[..., None, None]
    colours = _RGB[scenes.colour.clamp(min=0)].float()
    ground = 60 + 12 * torch.randn(n, 3, _SIDE, _SIDE, generator=rng)
    # [N, 16, 8, 8] to the picture's own layout.
    mask = masks.view(n, _GRID, _GRID, _CELL, _CELL).transpose(2, 3).reshape(n, 1, _SIDE, _SIDE)
    paint = colours.view(n, _GRID, _GRID, 3).permute(0, 3, 1, 2)
    paint = paint.repeat_interleave(_CELL, 2).repeat_interleave(_CELL, 3)
    return torch.lerp(ground, paint, mask).round_().clamp_(0, 255).to(torch.uint8)


@functools.cache
def _shifted_masks() -> Tensor:
    """Coverage ``[shape, 3, 3, 8, 8]`` in [0, 1] of each shape at each shift, from sixteen samples per pixel."""
    fine = (torch.arange(24) + 0.5) / 4 - 3  # from −3 to 3 pixels
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    inside = torch.stack(
        [
            x.square() + y.square() <= 9,
            torch.ones_like(x, dtype=torch.bool),
            x.abs() <= (y + 3) / 2,
            (x.abs() <= 1) | (y.abs() <= 1),
        ]
    ).float()
    small = inside.view(len(SHAPES), 6, 4, 6, 4).mean((2, 4))
    masks = torch.zeros(len(SHAPES), 3, 3, _CELL, _CELL)
    for down in range(3):
        for right in range(3):
            masks[:, down, right, down : down + 6, right : right + 6] = small
    return masks


# -- questions -----------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """A question for each scene: words ``[N, 8]``, answer ``[N]``, and whether it can be asked of its scene ``[N]``."""

    words: Tensor
    answer: Tensor
    valid: Tensor


def _number(words: str) -> list[int]:
    special = {"FIRST": _FIRST, "SECOND": _SECOND}
    found = [special[w] if w in special else WORDS.index(w) for w in words.split()]
    return found + [0] * (LENGTH - len(found))


def _numbers(names: tuple[str, ...]) -> Tensor:
    return torch.tensor([WORDS.index(n) for n in names])


def _plurals() -> Tensor:
    return _numbers(_PLURALS)


def _fill(template: str, first: Tensor, second: Tensor | None = None) -> Tensor:
    words = torch.tensor(_number(template)).expand(len(first), -1)
    words = torch.where(words == _FIRST, first[:, None], words)
    return words if second is None else torch.where(words == _SECOND, second[:, None], words)


def _draw(n: int, kinds: int, rng: torch.Generator) -> Tensor:
    return torch.randint(kinds, (n,), generator=rng)


def _truth(yes: Tensor) -> Tensor:
    return (~yes).long()  # "yes" is answer 0, "no" 1


def _pick(where: Tensor, rng: torch.Generator) -> Tensor:
    """One cell at random among those that ``where`` ``[N, 16]`` names (any cell where it names none)."""
    return (torch.rand(where.shape, generator=rng) + where).argmax(1)


def _at(values: Tensor, cell: Tensor) -> Tensor:
    return values.gather(1, cell[:, None]).squeeze(1)


def _existence(scenes: Scenes, rng: torch.Generator) -> _Asked:
    n = len(scenes.shape)
    cell = _pick(scenes.shape >= 0, rng)
    shape, colour = _at(scenes.shape, cell), _at(scenes.colour, cell)
    # Half of the questions name an object that is there; the others change its colour, its shape, or both.
    other = _draw(n, 6, rng)
    colour = torch.where((other == 3) | (other == 5), _draw(n, len(COLOURS), rng), colour)
    shape = torch.where((other == 4) | (other == 5), _draw(n, len(SHAPES), rng), shape)
    found = ((scenes.shape == shape[:, None]) & (scenes.colour == colour[:, None])).any(1)
    words = _fill(_SENTENCES[0], _numbers(COLOURS)[colour], _numbers(SHAPES)[shape])
    return _Asked(words, _truth(found), torch.ones(n, dtype=torch.bool))


def _count(scenes: Scenes, rng: torch.Generator) -> _Asked:
    n = len(scenes.shape)
    by_shape = _draw(n, 2, rng) == 0
    shape, colour = _draw(n, len(SHAPES), rng), _draw(n, len(COLOURS), rng)
    count = torch.where(by_shape, (scenes.shape == shape[:, None]).sum(1), (scenes.colour == colour[:, None]).sum(1))
    words = torch.where(
        by_shape[:, None],
        _fill(_SENTENCES[1], _plurals()[shape]),
        _fill(_SENTENCES[2], _numbers(COLOURS)[colour]),
    )
    return _Asked(words, ANSWERS.index("0") + count, count <= 5)


def _colour(scenes: Scenes, rng: torch.Generator) -> _Asked:
    return _only_one(_SENTENCES[3], scenes.shape, _numbers(SHAPES), scenes.colour, COLOURS, rng)


def _shape(scenes: Scenes, rng: torch.Generator) -> _Asked:
    return _only_one(_SENTENCES[4], scenes.colour, _numbers(COLOURS), scenes.shape, SHAPES, rng)


def _only_one(
    sentence: str, told: Tensor, words: Tensor, wanted: Tensor, names: tuple[str, ...], rng: torch.Generator
) -> _Asked:
    """What the one object with a told attribute has for the other one; only where there is one."""
    value = _at(told, _pick(told >= 0, rng))
    same = told == value[:, None]
    found = (wanted * same).sum(1).clamp(max=len(names) - 1)  # the clamp is for scenes where the question is not valid
    return _Asked(_fill(sentence, words[value]), ANSWERS.index(names[0]) + found, same.sum(1) == 1)


def _position(scenes: Scenes, rng: torch.Generator) -> _Asked:
    cell = _pick(scenes.shape >= 0, rng)
    shape, colour = _at(scenes.shape, cell), _at(scenes.colour, cell)
    same = (scenes.shape == shape[:, None]) & (scenes.colour == colour[:, None])
    down, right = cell // _GRID >= _GRID // 2, cell % _GRID >= _GRID // 2
    words = _fill(_SENTENCES[5], _numbers(COLOURS)[colour], _numbers(SHAPES)[shape])
    return _Asked(words, ANSWERS.index(QUARTERS[0]) + 2 * down + right.long(), same.sum(1) == 1)


def _comparison(scenes: Scenes, rng: torch.Generator) -> _Asked:
    n = len(scenes.shape)
    one, two = _draw(n, len(SHAPES), rng), _draw(n, len(SHAPES), rng)
    first, second = ((scenes.shape == s[:, None]).sum(1) for s in (one, two))
    words = _fill(_SENTENCES[6], _plurals()[one], _plurals()[two])
    return _Asked(words, _truth(first > second), one != two)


_ASK: dict[str, Callable[[Scenes, torch.Generator], _Asked]] = {
    "existence": _existence,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "position": _position,
    "comparison": _comparison,
}


def ask(kind: str, n: int, rng: torch.Generator) -> TensorData:
    """``n`` questions of one type, each about a picture of its own, with answers as even as the scenes allow."""
    tries = 12 * n
    scenes = draw_scenes(tries, rng)
    asked = _ASK[kind](scenes, rng)
    valid = asked.valid.nonzero().flatten()
    rows = limit_rows(valid, asked.answer[valid], n, rng)
    pictures = render(Scenes(scenes.shape[rows], scenes.colour[rows]), rng)
    x = torch.cat([pictures.flatten(1), asked.words[rows].to(torch.uint8)], 1)
    return TensorData(x, asked.answer[rows], torch.zeros(len(rows), dtype=torch.int64))


# -- the stream ----------------------------------------------------------------------------------------------------


@dataclass
class ShapeQuestions(Scenario):
    """Questions of six types about pictures of coloured shapes, by type or mixed (after Hayes et al. 2020, §5.2).

    A sample is a picture (3×32×32) and a question (eight word numbers), one behind the other; the model ``visual-question``
    takes them apart. All types together have 22 answers. By *question-type*, an experience asks one type (the first
    ``base_types``) and is tested on it; *iid*, the first holds ``base_share`` of all questions, the others share the rest,
    and every one is tested on all types. Pictures and questions depend on ``data_seed`` alone; which types come first, or
    which question when, on the run's seed.
    """

    experiences: int = knob(6, "number of experiences; by question-type, one type each after the first", ge=1)
    order: Literal["question-type", "iid"] = knob("question-type", "type by type, or all types mixed")
    types: list[Kind] | None = knob(None, "types to ask, in this order; null: all, existence first", min_length=1)
    base_types: int | None = knob(
        None, "by question-type: types of the first experience, a base session; null: one", ge=1
    )
    shuffle_types: bool = knob(
        False, "draw the order of the types with order_seed; those of base_types, where given, stay first"
    )
    base_share: float = knob(0.1, "iid: share of the questions in the first experience, a base session", gt=0, lt=1)
    train_questions: int = knob(1500, "training questions of each type", ge=10)
    test_questions: int = knob(300, "test questions of each type", ge=10)
    order_seed: int | None = knob(None, "seed of the order; null: the run's seed", ge=0)
    data_seed: int = knob(0, "seed of pictures and questions", ge=0)
    online: bool = knob(False, "one pass: each sample is seen once")
    boundaries: bool | None = knob(None, "tell strategies where an experience ends; null: unless online")

    def __post_init__(self) -> None:
        kinds = self.types or TYPES
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"types = {list(kinds)}: a type stands twice; name each once")
        if self.order == "iid":
            self._check_mixed()
            return
        asked = self.experiences - 1 + (self.base_types or 1)
        if asked > len(kinds):
            base = f" with base_types = {self.base_types}" if self.base_types else ""
            raise ConfigError(
                f"experiences = {self.experiences}{base}: asks {asked} question types of {len(kinds)}; give fewer"
            )

    def _check_mixed(self) -> None:
        if self.experiences < 2:
            raise ConfigError(
                f"experiences = {self.experiences}: order = 'iid' needs a base session and one more; give 2"
            )
        if self.shuffle_types:
            raise ConfigError("shuffle_types = true: order = 'iid' mixes the types; leave it out")
        if self.base_types is not None:
            raise ConfigError(f"base_types = {self.base_types}: order = 'iid' mixes the types; give base_share instead")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any] | None:
        """Three types, a few dozen questions each."""
        return {"experiences": 3, "train_questions": 60, "test_questions": 30}

    def stream(self, seed: int) -> Stream:
        """The stream for one seed; see :class:`~cl_lab.protocols.Scenario`. Samples are uint8 ``[3·32·32 + 8]``."""
        order_seed = seed if self.order_seed is None else self.order_seed
        groups = self._groups(order_seed) if self.order == "question-type" else [list(self.types or TYPES)]
        asked = sorted({a for kinds in groups for kind in kinds for a in _answers(kind)})
        output = torch.full((len(ANSWERS),), -1)
        output[asked] = torch.arange(len(asked))  # types that are not asked have no outputs
        by_type = self.order == "question-type"
        experiences = self._by_type(groups, output) if by_type else self._mixed(groups[0], output, order_seed)
        return Stream(
            name="ShapeQuestions",
            experiences=tuple(experiences),
            n_classes=len(asked),
            input_shape=(3 * _SIDE * _SIDE + LENGTH,),
            boundaries=not self.online if self.boundaries is None else self.boundaries,
            online=self.online,
            layout={"image": (3, _SIDE, _SIDE), "question": (LENGTH,)},
        )

    def _groups(self, order_seed: int) -> list[list[Kind]]:
        """The types of each experience."""
        kinds, base = list(self.types or TYPES), self.base_types or 0
        if self.shuffle_types:
            order = permutation(len(kinds) - base, order_seed, "types").tolist()
            kinds[base:] = [kinds[base + k] for k in order]
        first = max(base, 1)
        return [kinds[:first], *([kind] for kind in kinds[first : first + self.experiences - 1])]

    def _by_type(self, groups: list[list[Kind]], output: Tensor) -> list[Experience]:
        return [
            Experience(
                i,
                ", ".join(kinds),
                output[sorted({a for kind in kinds for a in _answers(kind)})].tolist(),
                functools.partial(self._questions, kinds, "train", output),
                functools.partial(self._questions, kinds, "test", output),
            )
            for i, kinds in enumerate(groups)
        ]

    def _mixed(self, kinds: list[Kind], output: Tensor, order_seed: int) -> list[Experience]:
        total = self.train_questions * len(kinds)
        order = permutation(total, order_seed, "questions")
        base = max(1, round(total * self.base_share))
        sizes = [base, *even_parts(total - base, self.experiences - 1)]

        @functools.cache
        def whole(part: str) -> TensorData:
            return self._questions(kinds, part, output)

        test = functools.partial(whole, "test")
        found = []
        for i, rows in enumerate(order.split(sizes)):
            train = functools.partial(lambda r: whole("train").take(r), rows)
            answers = whole("train").y[rows].unique().tolist()
            found.append(Experience(i, f"questions {i}", answers, train, test))
        return found

    def _questions(self, kinds: list[Kind], part: str, output: Tensor) -> TensorData:
        n = self.train_questions if part == "train" else self.test_questions
        data = TensorData.concat([ask(k, n, generator(self.data_seed, part, TYPES.index(k))) for k in kinds])
        return TensorData(data.x, output[data.y], data.t)


def _answers(kind: str) -> list[int]:
    """The answers that a question of this type can have."""
    names: dict[str, tuple[str, ...]] = {
        "existence": ("yes", "no"),
        "count": tuple(map(str, range(6))),
        "colour": COLOURS,
        "shape": SHAPES,
        "position": QUARTERS,
        "comparison": ("yes", "no"),
    }
    return [ANSWERS.index(name) for name in names[kind]]


def sentence(words: Tensor) -> str:
    """A question ``[8]`` in words."""
    return " ".join(WORDS[w] for w in words.tolist() if w)
