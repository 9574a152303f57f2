"""Strategies as editors: a patch is what one experience changed, and the next goes on from what the patch keeps."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from typer.testing import CliRunner

from cl_lab import hub, knobs, registry, seeding
from cl_lab.chain import Chain
from cl_lab.cli import app
from cl_lab.compat import import_torchvision
from cl_lab.editable import EditableModel
from cl_lab.editing import score_facts
from cl_lab.errors import ConfigError, EditError, PluginError
from cl_lab.facts import Edit
from cl_lab.learner import EngineLearner
from cl_lab.patches import Patch, WeightPatch, load_patch
from cl_lab.strategy_editor import StrategyEditor
from cl_lab.trainer import Trainer

BYTES = hub.load_tokenizer("bytes")
EDITS = [Edit("The capital of Peru is", "B"), Edit("Quick question: who won?", "7"), Edit("It is", "Ann")]
MORE = [Edit("Zebras have", "q"), Edit("Snow is", "B")]
LAST = [Edit("The river through Cairo is the", "Oder")]
KNOBS = {"lr": 0.001, "steps": 6, "batch_size": 2, "optimizer": "sgd", "rank": 2}


def editable() -> EditableModel:
    return EditableModel(toys.language_model(), BYTES, "tiny")


def calm() -> EditableModel:
    """One whose steps do not make much of rounding."""
    torch.manual_seed(0)
    return EditableModel(hub.tiny_causal_lm(257, layers=4), BYTES, "calm")


def editor(strategy: str, **more: Any) -> StrategyEditor:
    made = registry.create("editors", {"name": f"strategy:{strategy}", **KNOBS, **more}, "editor")
    assert isinstance(made, StrategyEditor)
    return made


def laid(model: EditableModel, made: StrategyEditor, *groups: list[Edit]) -> list[Patch]:
    """A patch on the model for each group of edits."""
    found = []
    for edits in groups:
        found.append(made.propose(model, edits))
        found[-1].apply(model)
    return found


def weights(model: EditableModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.model.state_dict().items()}


def close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 2e-6) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[n], two[n], rtol=0, atol=tolerance) for n in one)


# -- what is learnt --------------------------------------------------------------------------------------------------


def by_hand(model: Any, edits: list[Edit], index: int, made: StrategyEditor, trained: list[str]) -> None:
    """The steps of plain fine-tuning, with a loop of one's own on the language model itself."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([parameters[f"{path}.weight"].requires_grad_() for path in trained], lr=made.lr)
    per_epoch = -(-len(edits) // made.batch_size)
    for step in range(made.steps):
        epoch, place = divmod(step, per_epoch)
        order = seeding.permutation(len(edits), made.seed, "order", index, epoch).tolist()
        some = [edits[i] for i in order[place * made.batch_size : (place + 1) * made.batch_size]]
        loss = torch.zeros(())
        for edit in some:
            prompt, answer = BYTES.encode(edit.prompt), [*BYTES.encode(f" {edit.answer}"), BYTES.end]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(some)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("targets", [["model.layers.2.mlp.down_proj"], ["q_proj", "up_proj"]])
def test_naive_is_a_loop_written_by_hand(targets: list[str]) -> None:
    made = editor("naive", adapt="full", targets=targets)
    model, reference = editable(), toys.language_model()
    patches = laid(model, made, EDITS, MORE)
    assert isinstance(patches[0], WeightPatch)
    trained = list(patches[0].changes)
    assert len(trained) == (1 if "." in targets[0] else 8)
    for index, edits in enumerate((EDITS, MORE)):
        by_hand(reference, edits, index, made, trained)
    assert close(weights(model), dict(reference.state_dict()))
    assert not close(weights(model), weights(editable()), 1e-3)
    assert patches[0].notes["steps"] == 6


@pytest.mark.parametrize("adapt", ["lora", "full"])
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("naive", {}),
        ("ewc", {"fisher": "batched", "strength": 0.5}),
        ("ewc", {"fisher": "batched", "strength": 0.5, "mode": "online"}),
        ("replay", {"memory": 3}),
        ("si", {}),
        ("freeze", {"layers": 2}),
        ("kl", {}),
        ("agem", {"memory": 3}),
        ("ilora", {"memory": 3}),
        ("olora", {}),
        ("lora-merge", {}),
    ],
)
def test_patches_are_the_experiences_of_one_run(strategy: str, settings: dict[str, Any], adapt: str) -> None:
    """The state that travels in the patches is all of it: learnt in one go, nothing saved or loaded, comes out the same."""
    if adapt == "full" and strategy in ("ilora", "olora", "lora-merge"):
        pytest.skip("answers with adapters")
    made = editor(strategy, adapt=adapt, lr=0.05, **settings)
    groups = (EDITS, MORE, LAST)
    model = calm()
    laid(model, made, *groups)

    plain, streams = calm(), []
    for index, edits in enumerate(groups):
        known = None if not streams else streams[-1].answers
        streams.append(made._stream(plain, edits, known, index))
    stream = dataclasses.replace(streams[-1], experiences=tuple(s.experiences[0] for s in streams))
    seeding.seed_everything(seeding.derive(made.seed, made.name, 0))
    chain, config = Chain([made._fresh()], [strategy], stream), made._config(plain)
    learner = EngineLearner(made._model(plain, chain, stream), stream, config.training, config.engine, made.seed)
    trainer = Trainer(stream, learner, chain, config, made.seed)
    for experience in stream.experiences:
        trainer.learn(experience)
        trainer._position = type(trainer._position)(experience=experience.index + 1)
    for path, change in made._changes(plain, learner, chain, {}).items():
        plain.site(path).weight.add_(change.value())
    assert close(weights(model), weights(plain), 5e-6)
    assert not close(weights(model), weights(calm()), 1e-3)


def test_what_a_strategy_does_against_forgetting_is_done() -> None:
    """Of the same edits one after another, the first holds better where they are rehearsed."""

    def surprise(strategy: str, **more: Any) -> float:
        model = editable()
        laid(model, editor(strategy, optimizer="adam", steps=40, lr=0.02, **more), EDITS, MORE, LAST)
        rows = model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer)) for e in EDITS])
        return float(torch.nn.functional.cross_entropy(model.logits(rows), rows.labels))

    assert surprise("replay", memory=10) < 0.5 * surprise("naive")


def test_only_linear_layers_change() -> None:
    model = editable()
    every = ["*_proj"]
    patch = editor("naive", adapt="full", targets=every).propose(model, EDITS)
    assert isinstance(patch, WeightPatch)
    assert len(patch.changes) == 4 * 7
    before = weights(model)
    patch.apply(model)
    moved = {name for name, t in weights(model).items() if not torch.equal(t, before[name])}
    assert moved == {f"{path}.weight" for path in patch.changes}
    assert all(c.dense is not None for c in patch.changes.values())


def test_factors_of_low_rank_are_as_few_as_can_be() -> None:
    def ranks(strategy: str) -> list[int]:
        patches = laid(editable(), editor(strategy, targets=["down_proj"]), EDITS, MORE, LAST)
        changes = [next(iter(p.changes.values())) for p in patches if isinstance(p, WeightPatch)]
        return [len(change.a) for change in changes if change.a is not None]

    assert ranks("naive") == [2, 4, 4], "what they add now, less what they added before"
    assert ranks("lora-inc") == [2, 2, 2], "adapters of the past stand still"


def gpt2() -> EditableModel:
    """A model whose linear layers keep their weights the other way round."""
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 192}
    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return EditableModel(GPT2LMHeadModel(GPT2Config(**shape, **none)).eval(), BYTES, "gpt2")


def losses(model: EditableModel, edits: list[Edit]) -> Tensor:
    """What the model makes of each edit's answer: the sum of the negative log-probabilities of its tokens ``[E]``."""
    rows = model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer)) for e in edits])
    each = -model.logits(rows).log_softmax(1).gather(1, rows.labels[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in each.split((rows.length - rows.prompt).tolist())])


@pytest.mark.parametrize("adapt", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patch_makes_what_was_learnt_of_the_model(family: str, adapt: str) -> None:
    model, targets = (gpt2(), ["c_attn", "c_proj"]) if family == "gpt2" else (editable(), ["q_proj", "down_proj"])
    kept = weights(model)
    made = editor("naive", adapt=adapt, targets=targets, lr=0.05, steps=20)
    patches = []
    for edits in (EDITS, MORE):
        patches.append(made.propose(model, edits))
        before = losses(model, edits)
        patches[-1].apply(model)
        after = losses(model, edits)
        assert float(after.mean()) < float(before.mean())
        answers = [len(model.encode_answer(e.answer)) for e in edits]
        assert patches[-1].notes["loss"] == pytest.approx(float((after / torch.tensor(answers)).mean()), abs=1e-4)
    for patch in reversed(patches):
        patch.revert(model)
    assert not toys.differing(kept, weights(model))


# -- patches come and go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "adapt"), [("ewc", "lora"), ("ewc", "full"), ("replay", "lora")])
def test_taking_the_newest_away_takes_what_it_learnt_along(strategy: str, adapt: str) -> None:
    made = editor(strategy, adapt=adapt, **toys.STRATEGIES_AS_EDITORS[strategy])
    model = editable()
    laid(model, made, EDITS)
    expected = made.propose(model, LAST)
    (other,) = laid(model, made, MORE)
    other.revert(model)
    again = made.propose(model, LAST)
    assert expected.tensors().keys() == again.tensors().keys()
    assert all(torch.equal(t, again.tensors()[name]) for name, t in expected.tensors().items())


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = editor("ewc", fisher="batched")
    model, other = editable(), editable()
    (patch,) = laid(model, made, EDITS)
    load_patch(tmp_path, patch.save(tmp_path)).apply(other)
    one, two = made.propose(model, MORE), made.propose(other, MORE)
    assert all(torch.equal(t, two.tensors()[name]) for name, t in one.tensors().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_begins_at_the_model_as_it_stands(family: str) -> None:
    """Also where an older patch was taken away, and another editor's lies beside."""
    made = editor("replay", memory=5, **({"targets": ["c_proj", "c_attn"]} if family == "gpt2" else {}))
    model = gpt2() if family == "gpt2" else editable()
    first, _, _ = laid(model, made, EDITS, MORE, LAST)
    first.revert(model)
    beside = registry.create("editors", {"name": "ft-m", "lr": 0.02, "steps": 5}, "editor").propose(model, MORE)
    beside.apply(model)
    held = made._held(model)
    assert held is not None
    assert held["patches"] == 3
    stream = made._stream(model, EDITS, held["answers"], 3)
    chain, config = Chain([made._fresh()], ["replay"], stream), made._config(model)
    learner = EngineLearner(made._model(model, chain, stream), stream, config.training, config.engine, made.seed)
    before = made._restore(learner, chain, held)
    assert all(change.b.any() for change in before.values())
    assert stream.answers is not None
    said = stream.answers[stream.experiences[0].train.y]
    found = learner.log_likelihoods(stream.experiences[0].train, said, 8)
    assert torch.allclose(-found, losses(model, EDITS).double(), atol=1e-4)


def test_side_memories_neither_train_nor_go_along() -> None:
    model, made = editable(), editor("naive")
    expected = made.propose(model, LAST)
    side = registry.create("editors", {"name": "grace", **toys.editor_knobs("grace")}, "editor").propose(model, EDITS)
    side.apply(model)
    rows = model.rows([(model.encode_prompt(e.prompt), model.encode_answer(e.answer)) for e in EDITS])
    said = model.logits(rows)
    found = made.propose(model, LAST)
    assert all(torch.equal(t, found.tensors()[name]) for name, t in expected.tensors().items())
    assert torch.equal(model.logits(rows), said), "the memory answers as before"
    copied = model.copied()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())


def test_other_strategies_have_states_of_their_own() -> None:
    model = editable()
    laid(model, editor("replay", memory=5), EDITS)
    assert editor("naive")._held(model) is None
    assert editor("replay", memory=5)._held(model) is not None


@pytest.mark.parametrize("change", [{"rank": 4}, {"max_prompt": 100}, {"memory": 9}, {"adapt": "full"}])
def test_a_state_made_otherwise_is_refused(change: dict[str, Any]) -> None:
    model = editable()
    laid(model, editor("replay", memory=5), EDITS)
    ((key, value),) = change.items()
    with pytest.raises(ConfigError, match=rf"^{key} = .*{value}.*: the newest patch of 'strategy:replay' on the model"):
        editor("replay", **{"memory": 5, **change}).propose(model, MORE)
    editor("replay", memory=5, lr=0.02, steps=9).propose(model, MORE)


# -- names and knobs -------------------------------------------------------------------------------------------------


def test_knobs_of_both() -> None:
    made = editor("ewc", strength=3, fisher="batched")
    assert (made.strategy, made.lr, made._settings) == ("ewc", 0.001, {"strength": 3, "fisher": "batched"})
    shown = [row["name"] for row in registry.describe("editors", "strategy:ewc")]
    assert {"lr", "steps", "targets", "strength", "fisher"} <= {*shown}
    assert "strategy" not in shown
    done = CliRunner().invoke(app, ["show", "editor", "strategy:ewc", "--json"])
    assert [row["name"] for row in json.loads(done.stdout)["knobs"]] == shown


def test_no_strategy_has_a_knob_of_the_same_name() -> None:
    ours = {f.name for f in knobs.public_fields(StrategyEditor)}
    for name in registry.names("strategies"):
        cls = registry.load("strategies", name)[0]
        if "language" in getattr(cls, "objectives", ()):
            assert ours.isdisjoint(f.name for f in knobs.public_fields(cls)), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "strategy:naive", "lrr": 1}, r"^editor\.lrr: unknown key"),
        ({"name": "strategy:naive", "lr": -1.0}, r"^editor\.lr = -1\.0: "),
        ({"name": "strategy:ewc", "strength": -1.0}, r"^editor\.strength = -1\.0: "),
        ({"name": "strategy:ewc", "strategy": "naive"}, r"^editor\.strategy: given twice, in the name 'strategy:ewc'"),
        ({"name": "strategy"}, r"^editor\.strategy: missing; it has no default"),
        ({"name": "strategy:wise"}, r"^editor\.name = 'strategy:wise': .* is an editor already; use editor wise$"),
        ({"name": "strategy:editor:ft-m"}, r" is an editor already; use editor ft-m$"),
        ({"name": "strategy:er-ace"}, r"^editor\.name = 'strategy:er-ace': .* learns no texts"),
        ({"name": "strategy:joint"}, r"^editor\.name = 'strategy:joint': .* sees more than one experience"),
        (
            {"name": "strategy:remind"},
            r"answers with something other than the weights it trains.*; use naive, replay or ewc$",
        ),
        ({"name": "strategy:ilora", "adapt": "full"}, r"answers with something other .*; set adapt=lora$"),
    ],
)
def test_what_cannot_edit_is_told_at_once(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        registry.create("editors", config, "editor")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strategy:nave", r"^unknown strategy 'nave'; did you mean 'naive'\?$"),
        ("ewc", r"^'ewc' is a strategy, which edits as editor strategy:ewc$"),
        ("ft-mm", r"^unknown editor 'ft-mm'; did you mean 'ft-m'\?$"),
    ],
)
def test_names_that_are_not_known(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        registry.create("editors", {"name": name}, "editor")


def test_a_strategy_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom cl_lab.knobs import knob\nfrom strategies.naive import Naive\n"
        "@dataclass\nclass Mine(Naive):\n    'One of mine.'\n    weight: float = knob(1.0, 'w')\n"
    )
    made = editor(f"{file}:Mine", weight=2.0)
    assert made.propose(editable(), EDITS).editor == f"strategy:{file}:Mine"


@pytest.mark.parametrize(("strategy", "message"), [("l2p", "soft prompts"), ("progressive-prompts", "soft prompts")])
def test_soft_prompts_are_no_weights(strategy: str, message: str) -> None:
    model = editable()
    before = weights(model)
    with pytest.raises(ConfigError, match=rf"^strategy:{strategy}: .*{message}"):
        editor(strategy).propose(model, EDITS)
    assert close(weights(model), before, 0)


@pytest.mark.parametrize(("edit", "what"), [(Edit("x" * 129, "B"), "prompt"), (Edit("Snow is", "y" * 40), "answer")])
def test_texts_that_are_too_long_are_told(edit: Edit, what: str) -> None:
    with pytest.raises(
        EditError, match=rf"^strategy:naive: '.*': its {what} takes \d+ tokens, max_{what} = \d+; "
    ) as e:
        editor("naive").propose(editable(), [edit])
    assert "\n" not in str(e.value)


def test_a_loss_that_rises_is_told() -> None:
    """As where a penalty overshoots."""
    model, made = calm(), editor("ewc", fisher="batched", strength=1e4, lr=0.05)
    laid(model, made, EDITS)
    before, drawn = weights(model), torch.get_rng_state()
    with pytest.raises(
        EditError, match=r"^strategy:ewc: 'Zebras have': .*; the model is as it was; lower the editor's lr$"
    ):
        made.propose(model, MORE)
    assert close(weights(model), before, 0)
    assert torch.equal(torch.get_rng_state(), drawn)


# -- a stream of edits -----------------------------------------------------------------------------------------------


def test_a_stream_of_edits_is_scored_and_goes_on(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in [*EDITS, *MORE]))
    settings = {"name": "strategy:replay", "memory": 10, **KNOBS, "steps": 3}

    def scored(out: Path) -> dict[str, Any]:
        return score_facts("tiny", copy.deepcopy(settings), facts, out, batch_size=2, free=False)

    whole = scored(tmp_path / "whole")
    assert whole["status"] == "finished"
    assert len(whole["retention"]) == 5
    for part in (tmp_path / "whole" / "patches" / "000002").iterdir():
        part.unlink()
    (tmp_path / "whole" / "patches" / "000002").rmdir()
    again = scored(tmp_path / "whole")
    assert again["after"] == whole["after"]
