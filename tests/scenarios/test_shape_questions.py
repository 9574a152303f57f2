"""The visual-question stream: answers checked against the drawn scene, pictures against the scene, both orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_lab.errors import ConfigError
from scenarios import shape_questions as questions
from scenarios.shape_questions import ANSWERS, COLOURS, QUARTERS, SHAPES, TYPES, ShapeQuestions, sentence

PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


def answer(words: list[str], objects: list[tuple[int, str, str]]) -> str:
    """What is right, read word by word: objects are (cell, colour, shape). Written apart from the generator."""
    kind, rest = words[:2], [w for w in words if w in (*COLOURS, *SHAPES, *PLURALS)]

    def having(*attributes: str) -> list[tuple[int, str, str]]:
        wanted = [PLURALS.get(a, a) for a in attributes]
        return [o for o in objects if all(w in o[1:] for w in wanted)]

    if kind == ["is", "there"]:
        return "yes" if having(*rest) else "no"
    if kind == ["how", "many"]:
        return str(len(having(rest[0])))
    if kind == ["are", "there"]:
        return "yes" if len(having(rest[0])) > len(having(rest[1])) else "no"
    (only,) = having(*rest)  # a question about one thing is asked where there is one
    if kind == ["what", "colour"]:
        return only[1]
    if kind == ["what", "shape"]:
        return only[2]
    assert words[0] == "where"
    return ("top" if only[0] < 8 else "bottom") + ("-left" if only[0] % 4 < 2 else "-right")


@pytest.mark.parametrize("kind", TYPES)
def test_every_answer_is_right(kind: str) -> None:
    rng = torch.Generator().manual_seed(3)
    scenes = questions.draw_scenes(400, rng)
    asked = questions._ASK[kind](scenes, rng)
    assert asked.valid.float().mean() > 0.3
    for row in asked.valid.nonzero().flatten().tolist():
        there = [
            (cell, COLOURS[colour], SHAPES[shape])
            for cell, (colour, shape) in enumerate(
                zip(scenes.colour[row].tolist(), scenes.shape[row].tolist(), strict=True)
            )
            if shape >= 0
        ]
        words = sentence(asked.words[row]).split()
        assert ANSWERS[asked.answer[row]] == answer(words, there), (words, there)


def test_a_picture_shows_its_scene() -> None:
    rng = torch.Generator().manual_seed(0)
    scenes = questions.draw_scenes(50, rng)
    pictures = questions.render(scenes, rng)
    assert (pictures.shape, pictures.dtype) == ((50, 3, 32, 32), torch.uint8)
    cells = pictures.view(50, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(50, 16, 3, 64)
    there = scenes.shape >= 0
    bright = cells.float().amax((2, 3))
    assert bool((bright[there] > 190).all())
    assert bool((bright[~there] < 140).all())
    for colour in range(len(COLOURS)):
        mine = cells[scenes.colour == colour].float()  # [n, 3, 64]
        ground = torch.tensor(60.0)
        mean, pure = mine.mean((0, 2)), questions._RGB[colour].float()
        covered = ((mean - ground) @ (pure - ground)) / (pure - ground).square().sum()
        assert 0.2 < covered < 0.6
        assert torch.allclose(mean, ground + covered * (pure - ground), atol=6), (
            "the mean lies between ground and colour"
        )


def test_shapes_differ_and_stay_within_their_cells() -> None:
    masks = questions._shifted_masks()
    assert masks.shape == (4, 3, 3, 8, 8)
    areas = masks.sum((3, 4))
    assert torch.equal(areas, areas[:, :1, :1].expand_as(areas)), "a shift loses nothing"
    assert areas[1, 0, 0] == 36
    assert abs(areas[0, 0, 0] - 28.27) < 1
    assert len({round(a, 3) for a in areas[:, 0, 0].tolist()}) == 4


def test_by_question_type() -> None:
    stream = ShapeQuestions(train_questions=60, test_questions=40).stream(0)
    assert [e.name for e in stream.experiences] == list(TYPES)
    for e in stream.experiences:
        assert set(e.train.y.tolist()) | set(e.test.y.tolist()) <= set(e.classes)
        assert (len(e.train), len(e.test)) == (60, 40)
        assert (e.train.x.dtype, e.train.x.shape[1]) == (torch.uint8, 3 * 32 * 32 + 8)
    where = stream.experiences[4].train
    assert sorted(where.y.bincount()[ANSWERS.index(QUARTERS[0]) :].tolist()) == [15, 15, 15, 15]
    assert sentence(where.x[0, -8:]).startswith("where is the ")
    assert stream.fingerprint() == ShapeQuestions(train_questions=60, test_questions=40).stream(1).fingerprint()
    names = {
        tuple(e.name for e in ShapeQuestions(shuffle_types=True, train_questions=10).stream(seed).experiences)
        for seed in range(4)
    }
    assert len(names) > 1


def test_a_base_session_of_several_types() -> None:
    knobs: dict[str, Any] = {"train_questions": 24, "test_questions": 12}
    order: list[questions.Kind] = ["shape", "colour", "position", "existence", "comparison"]
    stream = ShapeQuestions(experiences=3, types=order, base_types=2, **knobs).stream(0)
    assert [e.name for e in stream.experiences] == ["shape, colour", "position", "existence"]
    base, position, existence = stream.experiences
    assert [len(d) for d in (base.train, base.test, position.train)] == [48, 24, 24]
    assert stream.n_classes == len(COLOURS) + len(SHAPES) + len(QUARTERS) + 2
    assert [list(e.classes) for e in (existence, base, position)] == [[0, 1], [*range(2, 12)], [*range(12, 16)]]
    assert sorted(base.train.y.unique().tolist()) == list(base.classes)
    whole = ShapeQuestions(**knobs).stream(0)
    assert torch.equal(base.train.x, torch.cat([whole.experiences[3].train.x, whole.experiences[2].train.x]))

    shuffled = [
        [
            e.name
            for e in ShapeQuestions(experiences=4, types=order, base_types=2, shuffle_types=True).stream(s).experiences
        ]
        for s in range(4)
    ]
    assert {names[0] for names in shuffled} == {"shape, colour"}
    assert {frozenset(names[1:]) for names in shuffled} == {frozenset(order[2:])}
    assert len({tuple(names) for names in shuffled}) > 1


def test_iid_asks_only_the_named_types() -> None:
    stream = ShapeQuestions(order="iid", experiences=2, types=["position", "shape"], train_questions=40).stream(0)
    assert stream.n_classes == len(SHAPES) + len(QUARTERS)
    for e in stream.experiences:
        assert {sentence(x[-8:]).split()[1] for x in e.train.x} == {"is", "shape"}
        assert set(e.train.y.tolist()) <= set(range(8))


def test_iid_holds_every_question_once() -> None:
    knobs: dict[str, Any] = {"train_questions": 50, "test_questions": 20}
    mixed = ShapeQuestions(order="iid", experiences=4, base_share=0.2, **knobs).stream(5)
    typed = ShapeQuestions(**knobs).stream(5)
    assert [len(e.train) for e in mixed.experiences] == [60, 80, 80, 80]

    def rows(stream: questions.Stream) -> list[bytes]:
        return sorted(x.numpy().tobytes() for e in stream.experiences for x in e.train.x)

    assert rows(mixed) == rows(typed)
    assert len(mixed.experiences[0].test) == 120
    assert mixed.experiences[0].test is mixed.experiences[3].test


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"experiences": 7}, "experiences = 7: asks 7 question types of 6; give fewer"),
        ({"experiences": 5, "base_types": 3}, "with base_types = 3: asks 7 question types of 6; give fewer"),
        ({"experiences": 2, "types": ["shape"]}, "asks 2 question types of 1"),
        ({"types": ["shape", "shape"]}, "a type stands twice"),
        ({"order": "iid", "base_types": 2}, "give base_share instead"),
        ({"order": "iid", "experiences": 1}, "needs a base session"),
        ({"order": "iid", "shuffle_types": True}, "mixes the types"),
    ],
)
def test_what_cannot_be_is_one_line(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ShapeQuestions(**knobs)
