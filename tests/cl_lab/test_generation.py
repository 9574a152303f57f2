"""The thread that answers: many texts of several states at once, each as if it were alone; ends, limits and faults."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cl_lab import hub
from cl_lab.editable import Batch, EditableModel, Prompt
from cl_lab.editing import load_editable
from cl_lab.generation import Ask, Done, Engine, Failed, Full, Piece, Speech
from cl_lab.patches import Delta, PromptPatch, SidePatch, WeightPatch, packed

BYTES = hub.load_tokenizer("bytes")
PROMPTS = ["The capital of Peru is", "Q", "Who wrote it, and when was that?", "Two", "Some more words", "Zebras have"]


class Heard:
    """What came of a question."""

    def __init__(self) -> None:
        self.events: list[Piece | Done | Failed] = []
        self.over = threading.Event()

    def told(self, event: Piece | Done | Failed) -> None:
        self.events.append(event)
        if not isinstance(event, Piece):
            self.over.set()

    def text(self) -> str:
        assert self.over.wait(60)
        return "".join(e.text for e in self.events if isinstance(e, Piece))

    @property
    def end(self) -> Any:
        assert self.over.wait(60)
        return self.events[-1]


@pytest.fixture(scope="module")
def states() -> list[EditableModel]:
    """The tiny model, and twins of it with other weights."""
    base = load_editable("tiny")
    found = [base]
    for seed in (1, 2):
        twin = base.twin()
        site = twin.down_projection(1)
        change = 0.2 * torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(seed))
        WeightPatch("by hand", {}, {site.path: Delta(dense=change)}).apply(twin)
        found.append(twin)
    return found


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(rows=4, queue=200, prompt_tokens=60)
    made.start()
    yield made
    made.close(20)
    assert not made.alive


def ask(engine: Engine, model: EditableModel, prompt: Any, **given: Any) -> Heard:
    heard = Heard()
    engine.submit(Ask(model, prompt, heard.told, **given))
    return heard


def alone(model: EditableModel, prompt: str, tokens: int) -> str:
    ids = BYTES.encode(prompt)
    said: list[int] = []
    with torch.no_grad():
        while len(said) < tokens and BYTES.end not in said:
            said.append(int(model.model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
    return BYTES.decode(said)


def test_many_of_several_states_are_answered_as_if_alone(engine: Engine, states: list[EditableModel]) -> None:
    drawn = random.Random(0)
    asked = [(drawn.randrange(3), drawn.choice(PROMPTS), drawn.randrange(1, 14)) for _ in range(40)]
    heard = [ask(engine, states[s], prompt, max_tokens=n) for s, prompt, n in asked]
    expected = [alone(states[s], prompt, n) for s, prompt, n in asked]
    assert [h.text() for h in heard] == expected
    assert len({alone(model, PROMPTS[0], 12) for model in states}) == 3, "the states differ"
    for (_, prompt, n), h in zip(asked, heard, strict=True):
        assert h.end.prompt_tokens == len(prompt)
        assert h.end.tokens == n or h.end.reason == "stop"
    assert (engine.running, engine.waiting) == (0, 0)


def test_states_of_the_same_weights_are_stepped_together(engine: Engine) -> None:
    """Each text is answered by its own state's side memories, though all are one batch."""
    base = load_editable("tiny")
    found = [base]
    for seed in (1, 2, 3):
        twin = found[-1].twin()
        drawn = torch.Generator().manual_seed(seed)
        path = twin.down_projection(seed % 2).path
        shape = twin.site(path).weight.shape
        places = packed(torch.ones(shape.numel(), dtype=torch.bool))
        values = 0.3 * torch.randn(shape.numel(), generator=drawn)
        SidePatch("by hand", path=path, shard=seed, places=places, values=values.bfloat16(), gap=1e-6).apply(twin)
        found.append(twin)
    asked = [(i % 4, PROMPTS[i % len(PROMPTS)]) for i in range(24)]
    expected = {(s, p): found[s].twin().answer([p], max_new_tokens=9)[0] for s, p in asked}
    assert len({expected[s, PROMPTS[0]] for s in range(4) if (s, PROMPTS[0]) in expected}) > 1, "the states differ"
    heard = [ask(engine, found[s], p, max_tokens=9) for s, p in asked]
    assert [h.text().partition("\n")[0].strip() for h in heard] == [expected[s, p] for s, p in asked]
    assert [h.end.fired for h in heard] == [found[s].fired(p) for s, p in asked]
    assert engine.steps < 24 / 4 * 9 * 1.5, "four at a time, whichever state they are of"


def test_what_is_drawn_hangs_on_the_seed_alone(engine: Engine, states: list[EditableModel]) -> None:
    def drawn(**given: Any) -> list[str]:
        heard = [ask(engine, states[0], PROMPTS[0], max_tokens=16, temperature=1.0, **given) for _ in range(3)]
        others = [ask(engine, states[0], p, max_tokens=9, temperature=1.0) for p in PROMPTS]
        assert all(isinstance(h.end, Done) for h in others)
        return [h.text() for h in heard]

    one, two = drawn(seed=7), drawn(seed=7)
    assert len({*one, *two}) == 1
    assert drawn(seed=8)[0] != one[0]
    assert len(set(drawn())) == 3, "without a seed each is another"
    assert set(drawn(top_p=1e-6)) == {alone(states[0], PROMPTS[0], 16)}, "the likeliest alone are the likeliest"


@pytest.mark.parametrize("given", [{"temperature": 1e-45}, {"temperature": 1e-3}, {"temperature": 1.0, "top_p": 1e-60}])
def test_what_is_drawn_with_next_to_no_freedom_is_the_likeliest(
    engine: Engine, states: list[EditableModel], given: Any
) -> None:
    other = ask(engine, states[0], PROMPTS[2], max_tokens=40)
    drawn = ask(engine, states[0], PROMPTS[0], max_tokens=12, **given)
    assert drawn.text() == alone(states[0], PROMPTS[0], 12)
    assert isinstance(drawn.end, Done)
    assert other.text() == alone(states[0], PROMPTS[2], 40)


@pytest.mark.parametrize(
    ("logits", "temperature"),
    [([3e38, 1.0, -3e38], 1e-3), ([0.0, 1.0, -3e38], 1e-4), ([2.0, 2.0 - 1e-6, -torch.inf], 1e-4)],
)
def test_no_finite_logits_are_too_much_to_draw_from(logits: list[float], temperature: float) -> None:
    from cl_lab.generation import _draw

    generator = torch.Generator().manual_seed(0)
    found = {_draw(torch.tensor(logits), temperature, 1.0, generator) for _ in range(20)}
    assert found <= {i for i, x in enumerate(logits) if x >= max(logits) - 1e-5}


def test_a_row_whose_token_cannot_be_had_fails_alone(
    engine: Engine, states: list[EditableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four in one batch: one of them draws, where all logits but one's are numbers, the other does not."""
    step = Batch.step

    def broken(self: Batch, tokens: torch.Tensor) -> torch.Tensor:
        logits = step(self, tokens)
        bad = torch.tensor([len(text.by) > 0 for text in self._texts])
        logits[bad, 7] = torch.nan
        return logits

    monkeypatch.setattr(Batch, "step", broken)
    read = EditableModel.read
    marked: Any = object()

    def told(self: EditableModel, prompt: Any, **given: Any) -> Prompt:
        one = read(self, prompt, **given)
        return dataclasses.replace(one, by=[marked] if prompt in PROMPTS[:2] else [])

    monkeypatch.setattr(EditableModel, "read", told)
    bad = [
        ask(engine, states[0], p, max_tokens=20, temperature=t) for p, t in zip(PROMPTS[:2], (0.0, 1.0), strict=True)
    ]
    good = [ask(engine, states[0], p, max_tokens=20) for p in PROMPTS[2:4]]
    assert [h.text() for h in good] == [alone(states[0], p, 20) for p in PROMPTS[2:4]]
    for heard in bad:
        assert heard.end == Failed(
            500, "the model failed (FloatingPointError: its highest logit is nan); the service's log says more"
        )


def test_a_share_of_the_probability_is_drawn_from() -> None:
    from cl_lab.generation import _draw

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    found = [_draw(logits, 1.0, 0.7, generator) for _ in range(2000)]
    assert set(found) == {0, 1}
    assert found.count(0) / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
    cold = [_draw(logits, 0.5, 1.0, generator) for _ in range(2000)]
    assert cold.count(0) / 2000 == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.05)


def test_an_answer_ends_before_a_stop(engine: Engine, states: list[EditableModel]) -> None:
    whole = alone(states[1], PROMPTS[2], 20)
    stop = whole[4:6]
    heard = ask(engine, states[1], PROMPTS[2], max_tokens=20, stop=[stop, "never"])
    assert heard.text() == whole[: whole.index(stop)]
    assert heard.end.reason == "stop"


def test_a_question_that_is_given_up_makes_room(states: list[EditableModel]) -> None:
    engine = Engine(rows=1, queue=1)
    first = Heard()
    gone = Ask(states[0], "Q", first.told, max_tokens=400)
    engine.submit(gone)
    with pytest.raises(Full):
        ask(engine, states[0], "Q")
    engine.start()
    while not engine.running:
        time.sleep(0.01)
    second = ask(engine, states[0], "Two", max_tokens=3)
    gone.gone = True
    assert second.text() == alone(states[0], "Two", 3)
    assert not first.over.is_set(), "nobody is told any more"
    engine.close(10)
    with pytest.raises(Full):
        ask(engine, states[0], "Q")


def test_what_takes_too_long_is_told_so(engine: Engine, states: list[EditableModel]) -> None:
    heard = ask(engine, states[0], "Q", max_tokens=450, deadline=time.monotonic() + 0.05)
    late = ask(engine, states[0], "Q", deadline=time.monotonic() - 1)
    for failed in (heard.end, late.end):
        assert failed == Failed(504, "the answer took longer than the service allows; ask for fewer tokens")


@pytest.mark.parametrize(
    ("prompt", "given", "what"),
    [
        ("", {}, "prompt: has no tokens"),
        ("x" * 600, {}, "are more than the 512 that the model reads"),
        ("x" * 500, {"max_tokens": 13}, "max_tokens: 13 behind a prompt of 500 tokens are more than the 512"),
        ([{"role": "user", "content": "Hello"}], {}, "has no chat template"),
    ],
)
def test_what_cannot_be_read_is_told_so(
    engine: Engine, states: list[EditableModel], prompt: Any, given: Any, what: str
) -> None:
    failed = ask(engine, states[0], prompt, **given).end
    assert failed.status == 400
    assert what in failed.message
    assert ask(engine, states[0], "Two", max_tokens=3).text() == alone(states[0], "Two", 3)


def test_a_fact_for_which_there_is_no_room_is_left_out(engine: Engine, states: list[EditableModel]) -> None:
    model = states[0].twin()
    width = model.model.config.hidden_size
    PromptPatch("by hand", texts=["It is."], keys=torch.eye(1, width), centre=torch.zeros(width), least=-1.0).apply(
        model
    )
    prompt = "x" * 495
    for tokens, before in ((10, "It is.\n"), (11, "")):  # of 512
        heard = ask(engine, model, prompt, max_tokens=tokens)
        assert heard.text() == alone(states[0], before + prompt, tokens)
        assert heard.end.prompt_tokens == len(before + prompt)


def test_a_model_that_fails_takes_none_of_other_weights_with_it(engine: Engine, states: list[EditableModel]) -> None:
    broken = states[1].twin()
    passes = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) > 3:
            raise ValueError("the third step")

    broken.model.register_forward_hook(fail)
    broken.decoder.register_forward_hook(fail)
    bad = [ask(engine, broken, p, max_tokens=30) for p in PROMPTS[:2]]
    good = ask(engine, states[0], "Two", max_tokens=8)
    assert good.text() == alone(states[0], "Two", 8)
    for heard in bad:
        assert heard.end.status == 500
        assert "ValueError: the third step" in heard.end.message


def test_a_stop_answers_first(states: list[EditableModel]) -> None:
    engine = Engine(rows=2)
    heard = [ask(engine, states[0], p, max_tokens=6) for p in PROMPTS]
    engine.start()
    engine.close(30)
    assert [h.text() for h in heard] == [alone(states[0], p, 6) for p in PROMPTS]


def test_a_stop_does_not_wait_for_ever(states: list[EditableModel]) -> None:
    engine = Engine(rows=1)
    heard = [ask(engine, states[0], p, max_tokens=450) for p in ("Q", "Two")]
    engine.start()
    engine.close(0.1)
    assert [h.end.status for h in heard] == [503, 503]


# -- text as it comes ----------------------------------------------------------------------------------------------


def spoken(tokens: list[int], stop: list[str]) -> tuple[str, list[str]]:
    speech, pieces = Speech(BYTES, stop), []
    for token in tokens:
        pieces.append(speech.push(token))
        if speech.stopped:
            break
    return "".join(pieces) + speech.finish(), pieces


@pytest.mark.parametrize("text", ["Grüße, 世界! 🦓 ok", "abc", "ab\nc\n\nd", "", "aab aab aac"])
@pytest.mark.parametrize("stop", [[], ["\n"], ["aac"], ["世", "\n\n"], ["🦓 ok"], ["ok!"]])
def test_pieces_are_the_text(text: str, stop: list[str]) -> None:
    found, pieces = spoken(list(text.encode()), stop)
    assert found == text[: min([text.index(s) for s in stop if s in text], default=len(text))]
    assert not any("�" in piece for piece in pieces), "no half characters"


def test_what_is_no_text_is_said_in_the_end() -> None:
    for tokens in ([0xF0, 0x9F], [0x80] * 40, [65, 0xFF, 66], [0xE4, 0xB8]):
        assert spoken(tokens, [])[0] == BYTES.decode(tokens)
    assert len("".join(spoken([0x80] * 40, [])[1])) >= 16, "it is not held back for ever"


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    _, pieces = spoken(list(b"one two"), ["two!"])
    assert pieces == ["o", "n", "e", " ", "", "", ""]
