"""Editors among strategies: the patched model answers rows of a stream as it answers questions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import checkpoint, hub, registry
from cl_lab.answers import find_answers
from cl_lab.causal_lm import CausalBackbone, VocabularyHead
from cl_lab.comparison import compare
from cl_lab.compat import import_torchvision
from cl_lab.config import RunConfig, parse
from cl_lab.edit_strategy import EditorStrategy
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError, PluginError
from cl_lab.experiment import run
from cl_lab.files import write_atomically
from cl_lab.models import Classifier
from cl_lab.patches import ReleasedMemory, Routed
from cl_lab.records import PAD, Aside, Batch, Stream
from strategies.ft_m import FTM

NAMES = toys.editor_names()
every = pytest.mark.parametrize("name", NAMES)
BYTES = hub.load_tokenizer("bytes")
FACTS = [
    {
        "prompt": "The capital of Peru is",
        "answer": "B",
        "old": "L",
        "subject": "Peru",
        "paraphrases": ["Peru is ruled from"],
        "unrelated": [{"prompt": "Zebras eat", "answer": "g"}],
    },
    {"prompt": "Quick question: who won?", "answer": "7", "subject": "who"},
    {"prompt": "Zebras have", "answer": "q", "subject": "Zebras"},
    {"prompt": "A somewhat longer prompt about Rome says that it is", "answer": "w", "subject": "Rome"},
]


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps(fact) for fact in FACTS))
    return file


def stream_of(facts: Path, **more: Any) -> Stream:
    settings = {"name": "edit-stream", "tokenizer": "bytes", "facts": str(facts), "experiences": 2, "per_experience": 2}
    made: Stream = registry.create("scenarios", settings | more, "scenario").stream(0)
    return made


def knobs_of(name: str) -> dict[str, Any]:
    return toys.editor_knobs(name)


def strategy_of(name: str, **more: Any) -> EditorStrategy:
    made = registry.create("strategies", {"name": f"editor:{name}", **knobs_of(name), **more}, "strategy")
    assert isinstance(made, EditorStrategy)
    return made


def learner_of(stream: Stream, model: Any = None) -> Any:
    """A learner, as far as an editor asks for one."""
    whole = model or toys.language_model()
    prompt, answer = (size for (size,) in stream.layout.values())
    classifier = Classifier(
        CausalBackbone(whole.base_model, prompt, answer), VocabularyHead(whole.lm_head, whole.config)
    )
    return SimpleNamespace(replica=lambda: copy.deepcopy(classifier), stream=stream, model=classifier)


def learnt(strategy: EditorStrategy, learner: Any) -> EditorStrategy:
    strategy.prepare(learner.model, learner.stream)
    for e in learner.stream.experiences:
        strategy.after_experience(e, learner)
    return strategy


def questions(stream: Stream) -> Batch:
    parts = [e.test for e in stream.experiences]
    x, y, t = (torch.cat([getattr(p, field) for p in parts]) for field in ("x", "y", "t"))
    return Batch(x, y, t, 0)


@torch.no_grad()
def said(strategy: EditorStrategy, learner: Any, batch: Batch) -> Tensor:
    return strategy.predict(batch, learner)


def reference(strategy: EditorStrategy, model: Any = None) -> EditableModel:
    """The same patches on a model of its own, outside any stream."""
    made = EditableModel(model or toys.language_model(), BYTES)
    for patch in strategy._patches:
        patch.apply(made)
    return made


def answers_as(model: EditableModel, stream: Stream, found: Tensor) -> None:
    """What is ``found`` for the rows of the stream is what ``model`` says, asked about the edits themselves."""
    edits = [edit for e in stream.experiences for edit in e.edits]
    pairs = [(model.read_prompt(e.prompt), model.encode_answer(e.answer)) for e in edits]
    wanted = model.logits(model.rows(pairs)).split([len(a) for _, a in pairs])
    for row, logits in zip(found, wanted, strict=True):
        assert torch.allclose(row[: len(logits)], logits, atol=1e-3)


# -- what it answers -------------------------------------------------------------------------------------------------


@every
def test_rows_are_answered_as_questions_are(name: str, facts: Path) -> None:
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = learnt(strategy_of(name), learner)
    assert len(strategy._patches) == 4
    answers_as(reference(strategy), stream, said(strategy, learner, questions(stream)))


def test_a_memory_is_asked_what_its_subject_is_named_in(facts: Path) -> None:
    """Rows run through the layers one by one, past the decoder's own hooks: what they say is told beforehand."""
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = learnt(strategy_of("wise"), learner)
    said(strategy, learner, questions(stream))
    hooks: list[Routed] = list(strategy._model(learner).editable.side.values())
    assert [[hook.answering(which) for which in hook.route.tolist()] for hook in hooks if hook.route is not None] == [
        [[patch] for patch in strategy._patches]
    ]


@every
def test_an_answer_that_stands_there_decides_nothing(name: str, facts: Path) -> None:
    if not registry.load("editors", name)[0].routes_once:
        pytest.skip(f"{name} says that it may")
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = learnt(strategy_of(name), learner)
    batch = questions(stream)
    prompt, answer = (size for (size,) in stream.layout.values())
    routes = []
    for tokens in ([PAD] * answer, [32, 66, 256][:answer], [90, 90, 90][:answer]):
        batch.x[:, prompt:] = torch.tensor(tokens, dtype=torch.int32)
        said(strategy, learner, batch)
        hooks: list[Routed] = list(strategy._model(learner).editable.side.values())
        routes.append([None if h.route is None else h.route.tolist() for h in hooks])
    assert routes[0] == routes[1] == routes[2]
    first = said(strategy, learner, batch)[:, 0]
    batch.x[:, prompt:] = PAD
    assert torch.allclose(said(strategy, learner, batch)[:, 0], first, atol=1e-4)


def gpt2() -> Any:
    """A decoder that is run whole, with an answer a row."""
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=256
    )
    return GPT2LMHeadModel(shape).eval()


def windowed() -> Any:
    """A decoder whose layers look back over fewer tokens than the texts have: it is run whole, too."""
    import_torchvision()
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=257, num_key_value_heads=2, sliding_window=6, tie_word_embeddings=True, **shape)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, toys.language_model) for name in NAMES]
    + [(name, family) for name in ("wise", "grace", "prompt-memory") for family in (gpt2, windowed)],
)
def test_several_answers_behind_a_prompt(name: str, family: Callable[[], Any], facts: Path) -> None:
    """As each of them by itself, also where a decoder is run whole: what decides is the prompt."""
    stream = stream_of(facts)
    learner = learner_of(stream, family())
    strategy = learnt(strategy_of(name), learner)
    assert learner.model.backbone.layered == (family is toys.language_model)
    batch = questions(stream)
    assert stream.answers is not None
    prompt, n = stream.layout["prompt"][0], len(batch)
    head, table = batch.x[:, :prompt], stream.answers.int()
    together = Batch(torch.cat([head, table.flatten().expand(n, -1)], 1), batch.y, batch.t, 0)
    found = said(strategy, learner, together).unflatten(1, (len(table), -1))
    for i, tokens in enumerate(table):
        alone = Batch(torch.cat([head, tokens.expand(n, -1)], 1), batch.y, batch.t, 0)
        assert torch.allclose(said(strategy, learner, alone), found[:, i], atol=1e-3)


def test_an_answer_that_decides_does_so_for_itself_alone(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap of released routing is a mean over the whole text: of several answers behind a prompt, over its own."""
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = learnt(strategy_of("wise-released"), learner)
    gaps: list[float] = []
    real = ReleasedMemory.gap

    def gap(self: ReleasedMemory, *args: Any) -> Tensor:
        found = real(self, *args)
        gaps.extend(found.tolist())
        return found

    monkeypatch.setattr(ReleasedMemory, "gap", gap)
    batch = questions(stream)
    prompt, answer = (size for (size,) in stream.layout.values())
    few = torch.full((3, answer), PAD, dtype=torch.int32)
    few[0, :2], few[1, :1], few[2] = torch.tensor([32, 66]), 90, torch.arange(60, 60 + answer)

    def asked(answers: Tensor) -> tuple[Tensor, list[float]]:
        gaps.clear()
        x = torch.cat([batch.x[:1, :prompt], answers.flatten()[None]], 1)
        found = said(strategy, learner, Batch(x, batch.y[:1], batch.t[:1], 0))
        return found.unflatten(1, (len(answers), -1))[0], list(gaps)

    together, seen = asked(few)
    each = [asked(one[None]) for one in few]
    assert seen == pytest.approx([gap for _, found in each for gap in found], rel=1e-5)
    assert len({round(gap, 4) for gap in seen}) > 1, "the answer does decide"
    for found, (own, _) in zip(together, each, strict=True):
        assert torch.allclose(found[: own.shape[1]], own[0], atol=1e-5)


@every
def test_texts_to_be_read_have_no_prompt(name: str, facts: Path) -> None:
    """As drift has them: before the whole text stands the end of another."""
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = learnt(strategy_of(name), learner)
    batch, prompt = questions(stream), stream.layout["prompt"][0]
    batch.x[:, : prompt - 1], batch.x[:, prompt - 1] = PAD, BYTES.end
    found = said(strategy, learner, batch)
    assert bool(found.isfinite().all())
    if strategy._patches[0].kind != "weights":
        with torch.no_grad():
            plain = learner.model(batch.x, batch.t)
        routes = [hook.route.tolist() for hook in strategy._model(learner).editable.side.values()]
        assert torch.allclose(found, plain, atol=1e-4) == all(set(r) == {-1} for r in routes)


def test_of_a_family_whose_layers_are_not_known(facts: Path) -> None:
    """Answers are then read one after another; the routes of each are the prompt's."""
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=3, n_head=2, n_positions=128)).eval()
    stream = stream_of(facts)
    learner = learner_of(stream, copy.deepcopy(model))
    strategy = learnt(strategy_of("grace"), learner)
    assert strategy.measures()["edits"] == 4
    answers_as(reference(strategy, model), stream, said(strategy, learner, questions(stream)))


@pytest.mark.parametrize("name", ["ft-m", "grace"])
def test_new_answers_are_written(name: str, facts: Path) -> None:
    stream = stream_of(facts)
    learner = learner_of(stream)
    strategy = strategy_of(name)
    strategy.prepare(learner.model, stream)
    first = stream.experiences[0].test
    batch = Batch(first.x, first.y, first.t, 0)

    def found() -> Tensor:
        return find_answers(batch, lambda b: said(strategy, learner, b), stream)

    assert not bool((found() == first.y).any())
    strategy.after_experience(stream.experiences[0], learner)
    assert torch.equal(found(), first.y)


def test_the_learners_own_model_stays_as_it_is(facts: Path) -> None:
    stream = stream_of(facts)
    learner = learner_of(stream)
    before = copy.deepcopy(learner.model.state_dict())
    learnt(strategy_of("ft-m"), learner)
    assert not toys.differing(before, learner.model.state_dict())


# -- its knobs and its names -----------------------------------------------------------------------------------------


def test_edits_of_a_patch(facts: Path) -> None:
    stream = stream_of(facts)
    counts = {}
    for size in (1, 2, None):
        strategy = learnt(strategy_of("ft-m", edits_per_patch=size), learner_of(stream))
        counts[size] = (strategy.measures()["patches"], strategy.measures()["edits"])
    assert counts == {1: (4, 4), 2: (2, 4), None: (2, 4)}


def test_an_editor_is_found_by_its_name() -> None:
    made = registry.create("strategies", {"name": "ft-m", "lr": 0.5, "edits_per_patch": 3}, "strategy")
    assert isinstance(made, EditorStrategy)
    assert isinstance(made._editor, FTM)
    assert (made.edits_per_patch, made._editor.lr) == (3, 0.5)


def test_a_strategy_comes_before_an_editor_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = dict(registry._entry_points("editors"))
    monkeypatch.setattr(
        registry, "_entry_points", lambda kind, real=registry._entry_points: points if kind == "editors" else real(kind)
    )
    points["naive"] = points["ft-m"]
    assert not isinstance(registry.create("strategies", {"name": "naive"}, "strategy"), EditorStrategy)
    assert isinstance(registry.create("strategies", {"name": "editor:naive"}, "strategy"), EditorStrategy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "ft-m", "lrr": 1}, r"^strategy\.lrr: unknown key; did you mean 'lr'\?$"),
        ({"name": "ft-m", "lr": -1.0}, r"^strategy\.lr = -1\.0: "),
        ({"name": "ft-m", "edits_per_patch": 0}, r"^strategy\.edits_per_patch = 0: "),
    ],
)
def test_wrong_knobs_are_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.create("strategies", config, "strategy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ft-mm", r"^unknown strategy 'ft-mm'; did you mean 'ft-m'\?$"),
        ("editor:ft-mm", r"^unknown editor 'ft-mm'; did you mean 'ft-m'\?$"),
    ],
)
def test_unknown_names_are_told(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        registry.create("strategies", {"name": name}, "strategy")


def test_a_stream_without_edits_is_told_on_one_line(tmp_path: Path) -> None:
    for scenario, model in (
        ({"name": "split-digits", "experiences": 2}, "mlp"),
        (
            {"name": "text-stream", "tasks": ["toy-colours"], "tokenizer": "bytes"},
            {"name": "causal-lm", "weights": "tiny"},
        ),
    ):
        config = parse({"scenario": scenario, "model": model, "strategy": "ft-m", "tracking": {"uri": None}}, "test")
        with pytest.raises(
            ConfigError, match=r"^strategy 'ft-m': is an editor, but stream '\w+' has no edits; use"
        ) as e:
            run(config, tmp_path / str(model)[:3])
        assert "\n" not in str(e.value)


# -- what cannot be made ---------------------------------------------------------------------------------------------


def test_a_refused_edit_costs_itself_alone(
    facts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(facts)
    strategy = strategy_of("ft-m")
    real, refused = strategy._editor.propose, stream.experiences[0].edits[0]

    def propose(model: Any, edits: Any, earlier: Any = ()) -> Any:
        if refused in edits:
            raise EditError(f"ft-m: '{refused.prompt}': came to nan")
        assert refused not in earlier
        return real(model, edits, earlier)

    monkeypatch.setattr(strategy._editor, "propose", propose)
    learner = learner_of(stream)
    learnt(strategy, learner)
    assert {k: strategy.measures()[k] for k in ("edits", "patches", "refused")} == {
        "edits": 3,
        "patches": 3,
        "refused": 1,
    }
    assert "came to nan; left out" in caplog.text


def test_a_bad_edit_takes_no_other_of_its_patch_with_it(
    facts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(facts, experiences=1, per_experience=4)
    strategy = strategy_of("ft-m", edits_per_patch=3)
    real, refused = strategy._editor.propose, stream.experiences[0].edits[1]
    asked: list[list[str]] = []

    def propose(model: Any, edits: Any, earlier: Any = ()) -> Any:
        asked.append([edit.prompt for edit in edits])
        if refused in edits:
            raise EditError(f"ft-m: '{refused.prompt}': came to nan")
        return real(model, edits, earlier)

    monkeypatch.setattr(strategy._editor, "propose", propose)
    learnt(strategy, learner_of(stream))
    prompts = [edit.prompt for edit in stream.experiences[0].edits]
    assert asked == [prompts[:3], *([prompt] for prompt in prompts)]
    assert strategy._made == [[0, 0], [0, 2], [0, 3]]
    assert strategy.measures()["refused"] == 1
    assert "the 3 edits of its batch are tried one by one" in caplog.text


# -- its state -------------------------------------------------------------------------------------------------------


@every
def test_it_goes_on_as_if_never_stopped(name: str, facts: Path, tmp_path: Path) -> None:
    stream = stream_of(facts)
    learner = learner_of(stream)
    whole = strategy_of(name)
    whole.prepare(learner.model, stream)
    whole.after_experience(stream.experiences[0], learner)
    state = checkpoint.read(checkpoint.save(tmp_path / "state", 1, whole.state_dict(), keep=1))
    whole.after_experience(stream.experiences[1], learner)

    other = learner_of(stream)
    resumed = strategy_of(name)
    resumed.prepare(other.model, stream)
    resumed.load_state_dict(state)
    assert checkpoint.equal(resumed.state_dict(), state)
    resumed.after_experience(stream.experiences[1], other)
    assert checkpoint.equal(resumed.state_dict(), whole.state_dict())
    batch = questions(stream)
    assert torch.equal(said(resumed, other, batch), said(whole, learner, batch))


# -- a comparison ----------------------------------------------------------------------------------------------------

EDITORS = ["wise", "ft-m", "grace", "ultraedit"]
TRAINED = ["naive", "replay"]


@pytest.fixture
def comparison(facts: Path, tmp_path: Path) -> RunConfig:
    folder = tmp_path / "model"
    toys.language_model().save_pretrained(folder)
    document = {
        "scenario": {
            "name": "edit-stream",
            "tokenizer": "bytes",
            "facts": str(facts),
            "experiences": 2,
            "per_experience": 2,
        },
        # Adapters on the very layers that are edited: to an editor they must not be there.
        "model": {"name": "causal-lm", "weights": str(folder), "lora_targets": ["q_proj", "up_proj", "down_proj"]},
        "training": {"epochs": 30, "batch_size": 2, "lr": 0.02, "optimizer": "adamw"},
        "engine": {"threads": 1, "device": "cpu"},
        "tracking": {"uri": None},
        "strategies": [
            *({"name": n, **knobs_of(n)} | ({"steps": 20} if n == "wise" else {}) for n in EDITORS),
            *TRAINED,
        ],
        "seeds": [0],
    }
    return parse(document, "test")


def matrices(found: dict[str, Any]) -> dict[str, Any]:
    """By strategy, the score matrix and what the asides were worth."""
    return {row["strategy"]: (row["runs"][0]["matrix"], row["runs"][0]["asides"]) for row in found["rows"]}


@pytest.mark.slow
def test_a_comparison_ranks_editors_and_strategies(comparison: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compare(comparison, out)
    for row in found["rows"]:
        (document,) = row["runs"]
        assert document["status"] == "finished", document["error"]
        assert len(document["matrix"]) == 2
    made = matrices(found)
    assert list(made) == [*EDITORS, *TRAINED]
    for name in ("ft-m", "grace", "naive"):  # a random model takes these well
        matrix, asides = made[name]
        assert matrix[0][0] == matrix[1][1] == 1
        assert [set(found["scores"]) for found in asides] == [{"generality", "unrelated_opening"}] * 2
    report = next(out.glob("report*.md")).read_text()
    assert all(name in report for name in made)
    assert "| Strategy | generality | unrelated opening |" in report

    again = compare(comparison, tmp_path / "again")
    assert matrices(again) == made, "the same configuration and seed give the same matrix"

    for name in EDITORS:  # killed after the first experience
        folder = tmp_path / "again" / "runs" / f"{name}-seed0"
        document = json.loads((folder / "run.json").read_text())
        write_atomically(folder / "run.json", json.dumps(document | {"status": "running", "matrix": []}))
        newest = max((folder / "checkpoints").iterdir())
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    resumed = compare(comparison, tmp_path / "again", resume=True)
    assert matrices(resumed) == made, "asides, too, though the first were asked before the kill"
    for row in resumed["rows"][: len(EDITORS)]:
        assert row["runs"][0]["resumed"] == 1


def test_asides_say_what_else_moved(facts: Path) -> None:
    """Against each question asked by itself: written whole in other words, the opening of what should have stayed."""
    stream = stream_of(facts)
    made = toys.trainer(
        [{"name": "ft-m", **knobs_of("ft-m")}],
        stream,
        model={"name": "causal-lm", "weights": "tiny", "adapt": "full"},
        training={"batch_size": 2},
    )
    record = made.run()
    assert "trainable_parameters" not in record.cost(), "the trainer took no step"
    before, after = record.asides
    assert [before["learnt"], after["learnt"]] == [0, 2]
    assert set(before["scores"]) == set(after["scores"]) == {"generality", "unrelated_opening"}
    chain = made.strategy

    def right(aside: Aside, stream: Stream) -> list[bool]:
        data = aside.questions
        batch = Batch(data.x, data.y, data.t, 0)
        with torch.no_grad():
            found = find_answers(batch, lambda b: chain.predict(b, made.learner), stream)
        return (found == data.y).tolist()

    for name, aside in stream.asides.items():
        own = right(aside, aside.stream)
        assert after["scores"][name] == sum(own) / len(own)

    eats = stream.asides["unrelated_opening"]
    assert stream.answers is not None
    prompt = stream.layout["prompt"][0]
    for blank in (False, True):  # of all that may begin the answer, the likeliest is right, also behind a blank
        data = eats.questions
        x = data.x.clone()
        x[:, prompt:] = PAD
        if blank:
            x[:, prompt] = 32
        with torch.no_grad():
            said = chain.predict(Batch(x, data.y, data.t, 0), made.learner)[0].argmax(1).tolist()
        for token in range(33, 256):
            table = torch.full_like(stream.answers, PAD)
            tokens = [*[32] * blank, token, *b"x"[: table.shape[1] - 2 - blank], 256]
            table[:, : len(tokens)] = torch.tensor(tokens)
            other = replace(eats.stream, answers=table)
            assert other.openings.tolist() == [1 + blank] * len(table) or token > 127, "half a character says nothing"
            if token <= 127:
                wanted = said[blank] == token and (not blank or said[0] == 32)
                assert right(eats, other) == [wanted]
