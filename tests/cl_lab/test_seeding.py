"""Randomness from one seed: derived, independent, saved and restored."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_lab import checkpoint, seeding


def draws() -> tuple[list[float], list[float], list[float]]:
    """From every global generator, normal deviates too (they keep half a pair in hand)."""
    return (
        [random.random(), random.gauss(0, 1), random.random()],
        [float(np.random.rand()), float(np.random.randn()), float(np.random.rand())],
        [*torch.rand(2).tolist(), *torch.randn(3).tolist(), float(torch.rand(()))],
    )


@pytest.fixture(autouse=True)
def leave_generators_alone() -> object:
    state = seeding.global_state()
    yield
    seeding.restore_global_state(state)


def test_global_state_survives_the_disk(tmp_path: Path) -> None:
    seeding.seed_everything(3)
    random.gauss(0, 1), np.random.randn()  # now both hold a second normal deviate
    state = seeding.global_state()
    expected = draws()
    read = checkpoint.read(checkpoint.save(tmp_path, 0, state, keep=1))
    seeding.seed_everything(4)
    assert draws() != expected
    seeding.restore_global_state(read)
    assert draws() == expected
    seeding.restore_global_state(read)
    assert checkpoint.equal(seeding.global_state(), state)


def test_seed_everything() -> None:
    outcomes = []
    for seed in (0, 0, 1, 2**63 - 1):
        seeding.seed_everything(seed)
        outcomes.append(draws())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2] != outcomes[3]


def test_derived_seeds_are_fixed_for_ever() -> None:
    # Changing these changes every published number.
    assert seeding.derive(0) == 2033344993903900207
    assert seeding.derive(0, "order", 1, 2) == seeding.derive(0, "order", "1", 2)
    seeds = [seeding.derive(s, *keys) for s in range(20) for keys in ((), ("a",), ("b",), ("a", 0), ("a", 1), (1, "a"))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_and_permutations() -> None:
    a, b, c = (seeding.generator(1, *k) for k in (("x",), ("x",), ("y",)))
    one, two, three = (torch.rand(5, generator=g) for g in (a, b, c))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    before = torch.get_rng_state()
    order = seeding.permutation(50, 3, "order", 0)
    assert order.sort().values.tolist() == list(range(50))
    assert order.dtype == torch.int64
    assert torch.equal(order, seeding.permutation(50, 3, "order", 0))
    assert not torch.equal(order, seeding.permutation(50, 3, "order", 1))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not touched"
