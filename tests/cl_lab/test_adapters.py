"""What a run exports for PEFT answers as the run does, whatever strategy keeps its adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import hub, seeding
from cl_lab.adapters import LowRank, adapted_layers, beside, low_rank
from cl_lab.causal_lm import save_adapters
from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError
from cl_lab.records import PAD, Batch, Stream
from cl_lab.trainer import Trainer

LM = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"], "lora_rank": 3, "lora_alpha": 5.0}
TRAINING = {"lr": 0.02, "optimizer": "adamw", "epochs": 3}


def done(links: list[dict[str, Any]], **model: Any) -> tuple[Trainer, Stream]:
    on = toys.stream(form="texts", scoring="first-token")
    made = toys.trainer(links, on, model=LM | model, training=TRAINING)
    made.run()
    return made, on


def whole_prompts(on: Stream) -> Batch:
    """Test samples whose prompt fills every column, so that any model reads them alike."""
    data = on.experiences[1].test
    rows = (data.x[:, : toys.PROMPT] != PAD).all(1).nonzero()[:, 0]
    assert len(rows) > 3
    return data.batch(rows)


def plain(on: Stream) -> Any:
    """The model as the run's recipe draws it, before any adapter."""
    seeding.seed_everything(seeding.derive(0, "model"))
    return hub.tiny_causal_lm(max(int(on.answers.max()), *(int(e.test.x.max()) for e in on.experiences)) + 1)


def with_adapters(base: Any, folder: Path) -> Any:
    from peft import PeftModel  # only where the model's libraries have been made ready

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's, about how it asks transformers
        return PeftModel.from_pretrained(base, str(folder)).eval()


@torch.no_grad()
def logits_of(model: Any, batch: Batch, places: int) -> tuple[Tensor, Tensor]:
    """Logits at the answer's places, and which of them are read from tokens alone."""
    x = batch.x[:, : toys.PROMPT + places - 1].long()
    logits = model(input_ids=x.clamp(min=0)).logits[:, toys.PROMPT - 1 :]
    return logits, (x[:, toys.PROMPT - 1 :] != PAD)


@pytest.mark.parametrize(
    "links",
    [
        [{"name": "naive"}],
        [{"name": "ilora", "memory": 30, "decay": 0.9, "serve": "slow"}],
        [{"name": "ilora", "memory": 30, "decay": 0.9, "serve": "fast"}],
        [{"name": "lora-inc"}],
        [{"name": "replay", "memory": 30}, {"name": "olora", "strength": 0.05}],
        [{"name": "lora-merge"}],
        [{"name": "lora-merge", "rule": "sum", "weight": 0.5}],
        [{"name": "reglora", "strength": 1.0}],
    ],
    ids=str,
)
def test_peft_answers_as_the_run_does(links: list[dict[str, Any]], tmp_path: Path) -> None:
    made, on = done(links)
    batch = whole_prompts(on)
    made.learner.model.eval()
    with torch.no_grad():
        ours = made.strategy.predict(batch, made.learner)
    save_adapters(made.strategy.adapters(made.learner), made.learner.model, tmp_path / "out", base="tiny")
    base = plain(on)
    untouched, known = logits_of(base, batch, ours.shape[1])
    theirs, _ = logits_of(with_adapters(base, tmp_path / "out"), batch, ours.shape[1])
    assert torch.allclose(ours[known], theirs[known], atol=1e-5, rtol=1e-5)
    assert (ours[known] - untouched[known]).abs().max() > 0.1, "the adapters matter"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keeps = links[-1]["name"] in ("lora-inc", "olora", "lora-merge", "reglora")
    assert config["r"] == config["lora_alpha"] == (9 if keeps else 3), "the one that has just begun is left out"
    assert config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize(
    "links",
    [
        [{"name": "naive"}],
        [{"name": "lora-inc"}],
        [{"name": "ilora", "memory": 30, "decay": 0.9}],
        [{"name": "reglora", "strength": 1.0}],
    ],
    ids=str,
)
def test_so_does_a_gpt2(links: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its linear layers keep their weights as ``[inputs, outputs]``."""
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path / "gpt2")
    made, on = done(links, weights=str(tmp_path / "gpt2"), lora_targets=["c_attn", "c_fc"])
    assert len(adapted_layers(made.learner.model)) == 4
    batch = whole_prompts(on)
    made.learner.model.eval()
    with torch.no_grad():
        ours = made.strategy.predict(batch, made.learner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of PEFT's, about a layout that it had to guess
        save_adapters(made.strategy.adapters(made.learner), made.learner.model, tmp_path / "out")
        base = hub.load_causal_lm(str(tmp_path / "gpt2"))
        untouched, known = logits_of(base, batch, ours.shape[1])
        theirs, _ = logits_of(with_adapters(base, tmp_path / "out"), batch, ours.shape[1])
    assert torch.allclose(ours[known], theirs[known], atol=1e-5, rtol=1e-5)
    assert (ours[known] - untouched[known]).abs().max() > 0.1, "the adapters matter"


def test_in_the_middle_of_an_experience_the_present_adapter_is_one_more(tmp_path: Path) -> None:
    made, on = done([{"name": "lora-inc"}])
    for name, p in made.learner.parameters().items():
        if "lora_B" in name:
            p.fill_(0.05)
    adapters = made.strategy.adapters(made.learner)
    assert {len(change.a) for change in adapters.values()} == {12}
    save_adapters(adapters, made.learner.model, tmp_path)
    batch = whole_prompts(on)
    made.learner.model.eval()
    with torch.no_grad():
        ours = made.learner.forward(batch)
    theirs, known = logits_of(with_adapters(plain(on), tmp_path), batch, ours.shape[1])
    assert torch.allclose(ours[known], theirs[known], atol=1e-5, rtol=1e-5)


def test_layers_of_different_rank_make_one_adapter(tmp_path: Path) -> None:
    on = toys.stream(form="texts")
    model = toys.trainer([{"name": "naive"}], on, model=LM | {"lora_targets": ["down_proj"]}).learner.model
    rng = torch.Generator().manual_seed(0)
    adapters = {
        path: LowRank(torch.randn(rank, 128, generator=rng), torch.randn(32, rank, generator=rng))
        for rank, path in zip((2, 5), adapted_layers(model), strict=True)
    }
    save_adapters(adapters, model, tmp_path)
    base = plain(on)
    before = {name: w.clone() for name, w in base.state_dict().items()}
    after = with_adapters(base, tmp_path).merge_and_unload().state_dict()
    for i, change in enumerate(adapters.values()):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        torch.testing.assert_close(after[name] - before[name], change.b @ change.a, atol=1e-5, rtol=1e-5)
    assert sorted(toys.differing(before, after)) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]


def test_layers_are_found_with_their_scale() -> None:
    on = toys.stream(form="texts")
    model = toys.trainer([{"name": "naive"}], on, model=LM | {"lora_targets": ["q_proj"]}).learner.model
    found = adapted_layers(model)
    assert list(found) == [f"backbone.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for path, layer in found.items():
        assert (layer.rank, layer.scale) == (3, 5 / 3)
        module = model.get_submodule(path)
        with torch.no_grad():
            module.lora_B["default"].weight.normal_()
            x = torch.randn(4, module.lora_A["default"].weight.shape[1])
            change = low_rank(model)[path]
            assert torch.allclose(module(x), module.base_layer(x) + x @ (change.b @ change.a).T, atol=1e-5)
    assert adapted_layers(torch.nn.Linear(2, 2)) == {}


def test_beside_each_other_changes_add_up() -> None:
    parts = [LowRank(torch.randn(r, 5), torch.randn(4, r)) for r in (1, 3, 2)]
    one = beside(parts)
    assert (one.a.shape, one.b.shape) == ((6, 5), (4, 6))
    torch.testing.assert_close(one.b @ one.a, sum(part.b @ part.a for part in parts))


def test_what_has_no_adapters_to_export_is_one_line(tmp_path: Path) -> None:
    on = toys.stream(form="texts", scoring="first-token")
    full = toys.trainer([{"name": "naive"}], on, model=LM | {"adapt": "full"})
    pictures = toys.trainer([{"name": "naive"}], toys.stream())
    for made in (full, pictures):
        with pytest.raises(ConfigError, match=r"Classifier has no low-rank adapters to write; train model causal-lm"):
            save_adapters(made.strategy.adapters(made.learner), made.learner.model, tmp_path)
    assert not list(tmp_path.iterdir())
    remind = toys.trainer([{"name": "remind", "split": "model.layers.0", "base": "pretrained"}], on, model=LM)
    with pytest.raises(ConfigError, match="strategy 'remind' answers in place of the model") as caught:
        remind.strategy.adapters(remind.learner)
    assert "\n" not in str(caught.value)
