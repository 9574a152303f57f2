"""Which parts of a transformer are trained: by structure, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from cl_lab.compat import import_torchvision
from cl_lab.errors import ConfigError

FULL = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
LORA = {"name": "causal-lm", "weights": "tiny", "lora_targets": ["*_proj"]}
TRAINING = {"epochs": 1, "lr": 0.02, "optimizer": "adamw", "weight_decay": 0.1}


@pytest.mark.parametrize("model", [FULL, LORA])
@pytest.mark.parametrize(
    ("part", "holds"), [("attention", "self_attn.*_proj"), ("gate-up", "gate_proj up_proj")], ids=lambda v: str(v)
)
def test_nothing_else_moves(model: dict[str, Any], part: str, holds: str) -> None:
    on = toys.stream(form="texts", scoring="first-token")
    trainer = toys.trainer([{"name": "selective", "part": part}], on, model=model, training=TRAINING)
    before = toys.weights_of(trainer)
    trainer.run()
    moved = toys.differing(before, toys.weights_of(trainer))
    assert moved
    inside = ("self_attn",) if part == "attention" else ("gate_proj", "up_proj")
    assert all(any(f".{s}." in name for s in inside) for name in moved)
    assert model is FULL or all("lora_" in name for name in moved)
    layers = {name.split("layers.")[1].split(".")[0] for name in moved}
    assert layers == {"0", "1"}
    every = [n for n in before if any(f".{s}." in n for s in inside) and (model is FULL or "lora_" in n)]
    assert set(moved) == set(every), "all of the part is trained"


def test_norms_inside_attention_are_norms(tmp_path: Path) -> None:
    """Qwen 3 normalises queries and keys in there."""
    import_torchvision()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=257, num_key_value_heads=2, **size)).save_pretrained(tmp_path)
    on = toys.stream(form="texts", scoring="first-token")
    trainer = toys.trainer([{"name": "selective"}], on, model={**FULL, "weights": str(tmp_path)}, training=TRAINING)
    before = toys.weights_of(trainer)
    trainer.run()
    moved = toys.differing(before, toys.weights_of(trainer))
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_without_the_part_is_one_line() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    model = LORA | {"lora_targets": ["q_proj"]}
    with pytest.raises(
        ConfigError, match=r"part = 'gate-up': nothing that is trained lies in gate_proj or up_proj"
    ) as e:
        toys.trainer([{"name": "selective", "part": "gate-up"}], on, model=model, training=TRAINING).run()
    assert "\n" not in str(e.value)


def test_one_adapter_for_all_is_naive_by_its_name() -> None:
    on = toys.stream(form="texts", scoring="first-token")
    one, two = (toys.trainer([{"name": n}], on, model=LORA, training=TRAINING) for n in ("lora-seq", "naive"))
    one.run()
    two.run()
    assert one.record.matrix == two.record.matrix
    assert not toys.differing(toys.weights_of(one), toys.weights_of(two))
    with pytest.raises(ConfigError, match=r"lora-seq trains a low-rank adapter, but Classifier has none"):
        toys.trainer([{"name": "lora-seq"}], on, model=FULL)
