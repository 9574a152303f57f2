"""How answers in words are found: against hand-made logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import answers
from cl_lab.answers import BROKEN, NONE, find_answers, grade_answers
from cl_lab.errors import DataError
from cl_lab.records import PAD, Batch, Experience, Measure, Scoring, Stream

VOCABULARY = 40


def asked(on: Stream, n: int = 4, part: int = 0) -> Batch:
    return on.experiences[part].test.batch(torch.arange(n))


def saying(tokens: list[int], *, strength: float = 10.0) -> Callable[[Batch], Tensor]:
    """A model that says ``tokens`` whatever it reads, and says nothing of what stands behind the places it is asked for."""

    def say(batch: Batch) -> Tensor:
        given = batch.x[:, toys.PROMPT :].unflatten(1, (-1, toys.ANSWER))
        places = min(toys.ANSWER, int((given != PAD).any(0).any(0).sum()) + 1)
        out = torch.zeros(len(batch), given.shape[1], places, VOCABULARY)
        for place, token in enumerate(tokens[:places]):
            out[:, :, place, token] = strength
        return out.flatten(1, 2)

    return say


@pytest.mark.parametrize("way", [answers._write, answers._compare])
@pytest.mark.parametrize(
    ("said", "found"),
    [([10, 9, 1], 0), ([11, 1], 1), ([10, 1], NONE), ([11, 9, 1], NONE), ([10, 9, 9], NONE), ([12, 9, 1], 2)],
)
def test_written_freely_every_token_must_be_right(said: list[int], found: int, way: Callable[..., Tensor]) -> None:
    on = toys.stream(form="texts")
    assert on.answers is not None
    assert way(asked(on), saying(said), on.answers, toys.PROMPT).tolist() == [found] * 4


@pytest.mark.parametrize("places", [1, 1024])
def test_comparing_finds_what_is_written(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On models that say something else behind every prompt and every token."""
    monkeypatch.setattr(answers, "_PLACES", places)
    on = toys.stream(form="texts", test=200)
    assert on.answers is not None
    rng = torch.Generator().manual_seed(0)
    mixed = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=rng)
    mixed[:, :, 9:14] += 3.0  # what answers are made of comes often enough
    mixed[:, 9:, 1] += 5.0

    def say(batch: Batch) -> Tensor:
        prompts = batch.x[:, : toys.PROMPT].clamp(min=0).sum(1) % VOCABULARY
        given = batch.x[:, toys.PROMPT :].long().unflatten(1, (-1, toys.ANSWER))
        before = torch.cat([torch.zeros_like(given[:, :, :1]), given[:, :, :-1].clamp(min=0)], 2)
        return mixed[prompts[:, None, None], before].flatten(1, 2)

    batch = on.experiences[0].test.batch(torch.arange(200))
    written = answers._write(batch, say, on.answers, toys.PROMPT)
    assert torch.equal(answers._compare(batch, say, on.answers, toys.PROMPT), written)
    assert {NONE} < set(written.tolist()), "some of the stream's answers were written"


def test_few_answers_are_compared_and_many_written(monkeypatch: pytest.MonkeyPatch) -> None:
    on = toys.stream(form="texts")
    assert on.answers is not None
    used = []
    none = torch.zeros(4, dtype=torch.int64)
    for name in ("_write", "_compare"):
        monkeypatch.setattr(answers, name, lambda *_, name=name: used.append(name) or none)
    for columns in (2, 100):  # of the prompt, which writing reads for each token
        shape = (columns + toys.ANSWER,)
        find_answers(
            asked(on),
            saying([10]),
            replace(on, layout={"prompt": (columns,), "answer": (toys.ANSWER,)}, input_shape=shape),
        )
    assert used == ["_write", "_compare"]


def test_writing_goes_on_from_what_was_written() -> None:
    """A model that copies the last token plus one shows what stood before each place."""
    on = toys.stream(form="texts")
    seen = []

    def say(batch: Batch) -> Tensor:
        seen.append(batch.x[0, toys.PROMPT :].tolist())
        return saying([10, 9, 1])(batch)

    assert on.answers is not None
    answers._write(asked(on), say, on.answers, toys.PROMPT)
    assert seen == [[PAD, PAD, PAD], [10, PAD, PAD], [10, 9, PAD]], "the right answer in the batch is not looked at"


def test_what_is_written_to_its_end_is_not_read_again() -> None:
    """The first two rows say 11 and the end, the others 10, 9 and the end."""
    on = toys.stream(form="texts")
    assert on.answers is not None
    batch, rows = asked(on), []
    batch.x[:, 0] = torch.arange(4)

    def say(some: Batch) -> Tensor:
        rows.append(some.x[:, 0].tolist())
        both = [saying(tokens)(some) for tokens in ([11, 1, 1], [10, 9, 1])]
        return torch.where((some.x[:, 0] < 2)[:, None, None], *both)

    assert answers._write(batch, say, on.answers, toys.PROMPT).tolist() == [1, 1, 0, 0]
    assert rows == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]


def test_the_likeliest_answer_counts_its_end() -> None:
    """Token 10 is likelier than 11, but its answer goes on with 9, which is never said."""

    def say(batch: Batch) -> Tensor:
        m = (batch.x.shape[1] - toys.PROMPT) // toys.ANSWER
        out = saying([10, 1, 1])(batch).unflatten(1, (m, -1))
        out[:, :, 0, 11] = 9.0
        return out.flatten(1, 2)

    on = toys.stream(form="texts", scoring="constrained")
    assert find_answers(asked(on), say, on).tolist() == [1] * 4
    first = replace(on, scoring="first-token")
    assert find_answers(asked(first), say, first).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("places", "asked_for"),
    [
        (1, [(1, 1)] * 8),
        (6, [(1, 2)] * 4),
        (12, [(2, 2)] * 2),
        (18, [(3, 2), (1, 2)]),
        (24, [(4, 2)]),
        (1024, [(4, 2)]),
    ],
)
def test_answers_may_be_asked_for_together(
    places: int, asked_for: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers behind as few prompts as need be, one by one only where even one prompt's are too many: the same
    log-probabilities, those of the tokens one after another."""
    monkeypatch.setattr(answers, "_PLACES", places)
    on = toys.stream(form="texts", scoring="constrained", incremental="domain")
    assert on.answers is not None
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY + 1, VOCABULARY)  # what is said after a token; after PAD or a prompt: the last row
    calls = []

    def say(batch: Batch) -> Tensor:
        given = batch.x[:, toys.PROMPT :].long().unflatten(1, (-1, toys.ANSWER))
        calls.append(tuple(given.shape[:2]))
        before = torch.cat([torch.full_like(given[:, :, :1], VOCABULARY), given[:, :, :-1]], 2)
        return table[before.clamp(min=0)].flatten(1, 2)

    batch = asked(on)
    found = answers._likelihoods(batch, say, on.answers, toys.PROMPT)
    log_p = table.log_softmax(1)
    expected = [log_p[VOCABULARY, 10] + log_p[10, 9] + log_p[9, 1], log_p[VOCABULARY, 11] + log_p[11, 1]]
    assert torch.allclose(found, torch.stack(expected).expand(4, -1), atol=1e-5)
    assert calls == asked_for


@pytest.mark.parametrize("scoring", ["constrained", "first-token"])
def test_only_answers_of_the_task_are_taken(scoring: Scoring) -> None:
    on = toys.stream(form="texts", scoring=scoring)
    assert find_answers(asked(on, part=1), saying([11, 1]), on).max() >= 2
    assert find_answers(asked(on, part=0), saying([13, 1]), on).max() <= 1


@pytest.mark.parametrize("scoring", ["generation", "constrained", "first-token", "opening"])
def test_outputs_that_are_not_finite_are_no_answer(scoring: Scoring) -> None:
    on = toys.stream(form="texts", scoring=scoring)

    def broken(batch: Batch) -> Tensor:
        return saying([10, 9, 1])(batch) * float("nan")

    assert find_answers(asked(on), broken, on).tolist() == [BROKEN] * 4


def test_first_tokens_must_differ() -> None:
    on = toys.stream(form="texts")
    assert on.answers is not None
    same = on.answers.clone()
    same[:, 0] = 10
    with pytest.raises(DataError, match=r"answers of 'toy 0' begin with the same token; take 'constrained'"):
        replace(on, answers=same, scoring="first-token")


def test_a_language_stream_says_what_it_needs() -> None:
    on = toys.stream(form="texts")
    with pytest.raises(DataError, match="it needs prompt and answer"):
        replace(on, answers=None)
    with pytest.raises(DataError, match="its table is"):
        replace(on, n_classes=on.n_classes + 1)
    assert on.chance is None
    assert replace(on, scoring="constrained").chance == 1 / toys.CLASSES
    assert replace(on, scoring="opening").chance is None


@pytest.mark.parametrize(("said", "found"), [(10, [0, NONE, 0, NONE]), (11, [NONE, 1, NONE, 1]), (12, [NONE] * 4)])
def test_an_opening_is_right_where_the_likeliest_token_begins_the_right_answer(said: int, found: list[int]) -> None:
    on = toys.stream(form="texts", scoring="opening")
    batch = asked(on)
    assert batch.y.tolist() == [0, 1, 0, 1]
    assert find_answers(batch, saying([said, 5]), on).tolist() == found
    assert not on.reads_on
    assert replace(on, scoring="generation").reads_on


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(
    ("said", "right"),
    [([10, 9], [True, False]), ([10, 8], [False, False]), ([11, 9], [False, True]), ([9, 9], [False, False])],
)
def test_of_an_opening_that_is_but_a_blank_the_next_token_counts_too(
    latent: bool, said: list[int], right: list[bool]
) -> None:
    """Token 10 is a blank: the answer that begins with it is right where what stands behind it is likeliest, too."""

    class Blank:
        size, end = VOCABULARY, 1

        def decode(self, tokens: list[int]) -> str:
            return "".join(" " if token == 10 else "x" for token in tokens)

    on = replace(toys.stream(form="texts", scoring="opening"), tokenizer=Blank())
    assert on.answers is not None
    first, second = on.experiences[0].classes[:2]
    assert on.answers[first, :2].tolist() == [10, 9]
    assert int(on.answers[second, 0]) == 11
    assert on.openings[[first, second]].tolist() == [2, 1]
    batch = asked(on, 2)
    batch.y = torch.tensor([first, second])
    say = saying(said)
    if latent:  # which hold the right answer, so that the place behind its first token is there anyway
        batch.x = torch.cat([batch.x[:, : toys.PROMPT], on.answers[batch.y].int()], 1)
        tokens, batch.x = batch.x, torch.zeros(2, 3)
        told = say(replace(batch, x=tokens))
        assert torch.equal(find_answers(batch, lambda _: told, on) == batch.y, torch.tensor(right))
    else:
        assert (find_answers(batch, say, on) == batch.y).tolist() == right


def test_writing_stops_at_a_length() -> None:
    """A stream may hold whole texts beside short answers: nobody waits for a model that writes on and on.

    Prompts are so short here that writing is cheaper than to have all answers read.
    """
    on = toys.stream(form="texts")
    assert on.answers is not None
    table = torch.nn.functional.pad(on.answers, (0, 17), value=PAD)
    table[2, :19] = 15  # of another task
    table[2, 19] = 1
    long = replace(on, answers=table, layout={"prompt": (2,), "answer": (20,)}, input_shape=(22,))
    batch = asked(on)
    batch = replace(batch, x=torch.nn.functional.pad(batch.x[:, toys.PROMPT - 2 :], (0, 17), value=PAD))
    calls = []

    def say(batch: Batch) -> Tensor:
        calls.append(int((batch.x[0, 2:] != PAD).sum()))
        out = torch.zeros(len(batch), calls[-1] + 1, VOCABULARY)
        out[:, :, 9] = 1.0
        return out

    assert find_answers(batch, say, long, 3).tolist() == [NONE] * 4
    assert calls == [0, 1, 2], "two tokens and their end"
    calls.clear()
    first = on.experiences[0]
    every = Experience(0, first.name, range(4), lambda: first.train, lambda: first.test)
    whole = replace(long, experiences=(every, *long.experiences[1:]))
    assert find_answers(batch, say, whole, 3).tolist() == [NONE] * 4
    assert calls == [0, 1, 2], "also where the task has the long one"


def test_an_answer_of_another_task_is_none() -> None:
    on = toys.stream(form="texts")
    assert find_answers(asked(on), saying([13, 1]), on).tolist() == [NONE] * 4
    assert find_answers(asked(on, part=1), saying([13, 1]), on).tolist() == [3] * 4


class Spoken:
    """A tokenizer that says the tokens of the toy texts as words."""

    end, size, key = toys.END, VOCABULARY, "spoken"

    def encode(self, text: str) -> list[int]:
        return [int(word.removeprefix("w")) for word in text.split()]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(f"w{t}" for t in tokens if t != toys.END)

    def chat(self, said: object) -> str:
        return str(said)


def compared(*measures: Measure) -> Stream:
    """Toy texts whose answers are compared; the references go on behind what the table holds of an answer."""
    on = toys.stream(form="texts", experiences=2)
    references = ("w10 w9 w20 w21", "w11", "w12 w9", "w13")
    return replace(on, measures=measures, references=references, tokenizer=Spoken())


@pytest.mark.parametrize(
    ("measure", "said", "worth"),
    [
        ("rouge-l", [10, 9, 1], [2 * 2 / 6, 0.0]),  # of four words of the whole reference; of one
        ("rouge-l", [9, 10, 1], [2 * 1 / 6, 0.0]),
        ("f1", [9, 10, 1], [2 * 2 / 6, 0.0]),
        ("f1", [11, 9, 10], [2 * 2 / 7, 2 * 1 / 4]),  # it did not end by itself
        ("exact", [11, 1], [0.0, 1.0]),
        ("rouge-l", [1], [0.0, 0.0]),
    ],
)
def test_a_written_answer_is_worth_what_it_has_of_the_reference(
    measure: Measure, said: list[int], worth: list[float]
) -> None:
    on = compared(measure, "rouge-l")
    grades = grade_answers(asked(on), saying(said), on)
    assert grades.value.tolist() == pytest.approx([*worth, *worth])
    assert not grades.broken.any()


def test_tasks_of_one_batch_are_each_measured_in_their_way() -> None:
    on = compared("exact", "f1")
    both = [asked(on, 2, part) for part in (0, 1)]
    batch = replace(both[0], **{k: torch.cat([getattr(b, k) for b in both]) for k in ("x", "y", "t")})
    grades = grade_answers(batch, saying([12, 11, 1]), on)
    assert grades.value.tolist() == [0.0, 0.0, 0.5, 0.0]  # of "w12 w9" half, of "w13" nothing
    broken = grade_answers(batch, lambda b: saying([12])(b) * float("nan"), on)
    assert broken.broken.tolist() == [True] * 4


def test_a_score_is_the_mean_and_says_what_it_is() -> None:
    on = compared("rouge-l", "rouge-l")
    made = toys.trainer([{"name": "naive"}], on, model={"name": "causal-lm", "weights": "tiny"})
    data = on.experiences[0].test
    score = made.learner.score(data, 16, saying([10, 9, 1]))
    assert score.value == pytest.approx((2 * 2 / 6) / 2), "half of the rows have an answer of other words"
    assert score.valid is None
    assert on.score == made.record.score == "ROUGE-L"
    assert compared("f1", "f1").score == "word F1"
    assert compared("exact", "f1").score == "answer score"
    assert compared("exact", "exact").score == toys.stream(form="texts").score == "accuracy"
    exact = replace(on, measures=(), references=())
    assert exact.fingerprint() != on.fingerprint()
    assert made.learner.score(data, 16, saying([11, 1])).value == 0.0 + 0.5


@pytest.mark.parametrize("predict", [False, True])
def test_what_is_written_is_read_on_from_prompts_read_once(predict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a strategy answers by the model; the scores are those of reading all again for every token."""
    on = compared("rouge-l", "rouge-l")
    made = toys.trainer([{"name": "naive"}], on, model={"name": "causal-lm", "weights": "tiny"})
    backbone: Any = made.learner.model.backbone
    own = made.strategy.predict if predict else None
    way = None if own is None else (lambda batch: own(batch, made.learner))
    columns: list[int] = []
    backbone.model.layers[0].register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    data = on.experiences[0].test
    read_once = made.learner.score(data, 16, way)
    once = list(columns)
    columns.clear()
    monkeypatch.setattr(backbone, "remembering_prompts", nullcontext)
    assert made.learner.score(data, 16, way) == read_once
    batches, longest = math.ceil(len(data) / 16), toys.ANSWER
    assert sum(columns) == batches * sum(toys.PROMPT + place for place in range(longest))
    tried = 2 * (toys.PROMPT + 2 * toys.ANSWER)  # whether it can, once
    assert sum(once) <= tried + batches * (toys.PROMPT + sum(range(longest)))


def test_exact_scores_are_shares_of_right_answers() -> None:
    on = toys.stream(form="texts", test=39)
    made = toys.trainer([{"name": "naive"}], on, model={"name": "causal-lm", "weights": "tiny"})
    for said, right in (([10, 9, 1], 20), ([11, 1], 19), ([10, 1], 0)):
        score = made.learner.score(on.experiences[0].test, 16, saying(said))
        assert score == (right / 39, 0.0 if not right else 1.0)


def test_a_label_longer_than_all_that_are_right_is_a_valid_answer() -> None:
    on = toys.stream(form="texts")
    made = toys.trainer([{"name": "naive"}], on, model={"name": "causal-lm", "weights": "tiny"})
    data = on.experiences[0].test
    short = data.take((data.y == 1).nonzero().squeeze(1))
    for said, score in (([11, 1], (1.0, 1.0)), ([10, 9, 1], (0.0, 1.0)), ([10, 9, 9], (0.0, 0.0))):
        assert made.learner.score(short, 16, saying(said)) == score


def test_comparing_needs_references_and_a_tokenizer() -> None:
    on = compared("f1", "f1")
    for lacking in ({"references": ()}, {"tokenizer": None}, {"measures": ("f1",)}, {"scoring": "opening"}):
        with pytest.raises(DataError, match="it needs one for each, a tokenizer, and generation"):
            replace(on, **lacking)
