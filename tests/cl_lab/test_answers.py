"""How answers in words are found: against hand-made logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import answers
from cl_lab.answers import BROKEN, NONE, find_answers
from cl_lab.errors import DataError
from cl_lab.records import PAD, Batch, Scoring, Stream

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


@pytest.mark.parametrize(
    ("said", "found"),
    [([10, 9, 1], 0), ([11, 1], 1), ([10, 1], NONE), ([11, 9, 1], NONE), ([10, 9, 9], NONE), ([12, 9, 1], 2)],
)
def test_written_freely_every_token_must_be_right(said: list[int], found: int) -> None:
    assert (
        find_answers(asked(toys.stream(form="texts")), saying(said), toys.stream(form="texts")).tolist() == [found] * 4
    )


def test_writing_goes_on_from_what_was_written() -> None:
    """A model that copies the last token plus one shows what stood before each place."""
    on = toys.stream(form="texts")
    seen = []

    def say(batch: Batch) -> Tensor:
        seen.append(batch.x[0, toys.PROMPT :].tolist())
        return saying([10, 9, 1])(batch)

    find_answers(asked(on), say, on)
    assert seen == [[PAD, PAD, PAD], [10, PAD, PAD], [10, 9, PAD]], "the right answer in the batch is not looked at"


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


@pytest.mark.parametrize("places", [1, 24, 1024])
def test_answers_may_be_asked_for_together(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two or all at a time: the same log-probabilities, those of the tokens one after another."""
    monkeypatch.setattr(answers, "_PLACES", places)
    on = toys.stream(form="texts", scoring="constrained", incremental="domain")
    assert on.answers is not None
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY + 1, VOCABULARY)  # what is said after a token; after PAD or a prompt: the last row
    calls = []

    def say(batch: Batch) -> Tensor:
        given = batch.x[:, toys.PROMPT :].long().unflatten(1, (-1, toys.ANSWER))
        calls.append(given.shape[1])
        before = torch.cat([torch.full_like(given[:, :, :1], VOCABULARY), given[:, :, :-1]], 2)
        return table[before.clamp(min=0)].flatten(1, 2)

    batch = asked(on)
    found = answers._likelihoods(batch, say, on.answers, toys.PROMPT)
    log_p = table.log_softmax(1)
    expected = [log_p[VOCABULARY, 10] + log_p[10, 9] + log_p[9, 1], log_p[VOCABULARY, 11] + log_p[11, 1]]
    assert torch.allclose(found, torch.stack(expected).expand(4, -1), atol=1e-5)
    assert sum(calls) == 2
    assert len(calls) == (1 if places >= 24 else 2)


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


def test_writing_stops_where_the_longest_right_answer_would_have_ended() -> None:
    """A stream may hold whole texts beside short answers: nobody waits for a model that writes on and on."""
    on = toys.stream(form="texts")
    batch = asked(on).rows(torch.tensor([1, 3]), None)
    calls = []

    def say(batch: Batch) -> Tensor:
        calls.append(int((batch.x[0, toys.PROMPT :] != PAD).sum()))
        return saying([11, 9, 9])(batch)

    assert batch.y.tolist() == [1, 1]
    assert find_answers(batch, say, on).tolist() == [NONE, NONE]
    assert calls == [0, 1], "the answer is one token and its end"
    assert find_answers(batch, saying([13, 1]), on).tolist() == [3, 3], "another's answer is still known"
