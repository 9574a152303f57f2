"""The episodic memory: which rows stay, how many per class, in how many bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from cl_lab import checkpoint
from cl_lab.errors import ConfigError
from strategies import _memory
from strategies._memory import Memory, parse_bytes, quotas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(labels: Tensor, start: int = 0) -> dict[str, Tensor]:
    """Rows that know their own number: ``x`` and ``id`` are it."""
    number = torch.arange(start, start + len(labels))
    return {"x": number.float().view(-1, 1).repeat(1, 3), "y": labels, "id": number}


def kept(memory: Memory) -> list[int]:
    held = memory.columns["id"][: len(memory)]
    assert torch.equal(memory.columns["x"][: len(memory), 0], held.float()), "columns stay in step"
    assert len(held.unique()) == len(held), "no row twice"
    return sorted(held.tolist())


def per_class(memory: Memory) -> list[int]:
    return memory.columns["y"][: len(memory)].unique(return_counts=True)[1].tolist()


# -- quotas ----------------------------------------------------------------------------------------------------------


def test_quotas_are_as_equal_as_can_be() -> None:
    generator = rng(1)
    for _ in range(300):
        counts = torch.randint(0, 30, (int(torch.randint(1, 8, (), generator=generator)),), generator=generator)
        capacity = int(torch.randint(0, 100, (), generator=generator))
        shares = quotas(counts, capacity)
        assert int(shares.sum()) == min(capacity, int(counts.sum()))
        assert bool((shares <= counts).all())
        assert bool((shares >= 0).all())
        # A class that got less than another has nothing more to give, or is one short of the level.
        assert int(shares[shares < counts].min()) >= int(shares.max()) - 1 if (shares < counts).any() else True


@pytest.mark.parametrize(
    ("counts", "capacity", "expected"),
    [
        ([10, 10], 10, [5, 5]),
        ([10, 10, 10], 10, [4, 3, 3]),
        ([1, 10, 10], 11, [1, 5, 5]),
        ([0, 10], 4, [0, 4]),
        ([2, 3], 10, [2, 3]),
        ([5], 3, [3]),
        ([9, 9, 9], 2, [1, 1, 0]),
        ([3, 3], 0, [0, 0]),
    ],
)
def test_quotas_by_hand(counts: list[int], capacity: int, expected: list[int]) -> None:
    assert quotas(torch.tensor(counts), capacity).tolist() == expected


# -- reservoir -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [40, 7, 1])
def test_reservoir_is_uniform_however_rows_arrive(chunk: int) -> None:
    n, capacity, repetitions = 40, 8, 500 if chunk == 1 else 1500
    hits = torch.zeros(n)
    generator = rng(chunk)
    for _ in range(repetitions):
        memory = Memory(capacity, "reservoir")
        for start in range(0, n, chunk):
            memory.add(rows(torch.zeros(min(chunk, n - start), dtype=torch.int64), start), generator)
        assert len(memory) == capacity
        hits[kept(memory)] += 1
    # Draws within one repetition are without replacement, which scales the statistic by (n - capacity)/(n - 1).
    expected = repetitions * capacity / n
    statistic = float(((hits - expected) ** 2 / expected).sum()) * (n - 1) / (n - capacity)
    assert stats.chi2.sf(statistic, n - 1) > 1e-3


def test_reservoir_pairs_are_uniform_too() -> None:
    # A scheme may keep each row equally often and yet keep neighbours together.
    generator, n, repetitions = rng(9), 6, 1500
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(repetitions):
        memory = Memory(2, "reservoir")
        for start in range(n):
            memory.add(rows(torch.zeros(1, dtype=torch.int64), start), generator)
        pair = tuple(kept(memory))
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 15
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "ring"])
def test_holds_everything_until_full(policy: Any) -> None:
    memory = Memory(10, policy)
    memory.add(rows(torch.arange(6) % 2), rng())
    assert kept(memory) == list(range(6))
    memory.add(rows(torch.arange(4) % 2, 6), rng())
    assert kept(memory) == list(range(10))
    memory.add(rows(torch.arange(30) % 2, 10), rng())
    assert len(memory) == 10
    assert memory.seen == 40


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "ring"])
def test_any_chunks_keep_the_memory_sound(policy: Any) -> None:
    generator = rng(2)
    for capacity in (1, 3, 16):
        memory, start = Memory(capacity, policy), 0
        for _ in range(60):
            n = int(torch.randint(0, 9, (), generator=generator))
            memory.add(rows(torch.randint(0, 5, (n,), generator=generator), start), generator)
            start += n
            assert len(memory) == min(capacity, start)
            assert all(0 <= i < start for i in kept(memory))


# -- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["class-balanced", "ring"])
@pytest.mark.parametrize("chunk", [1, 11, 1000])
def test_classes_stay_within_one_of_each_other(policy: Any, chunk: int) -> None:
    memory, generator = Memory(23, policy), rng(3)
    labels = torch.cat([torch.full((50,), c) for c in (4, 1, 7, 0, 2)])  # class after class, as in a stream
    for start in range(0, len(labels), chunk):
        memory.add(rows(labels[start : start + chunk], start), generator)
        sizes = per_class(memory)
        met = labels[: start + chunk].unique(return_counts=True)[1].tolist()
        assert sum(sizes) == min(23, sum(met))
        level = max(sizes)
        assert all(size >= min(level - 1, count) for size, count in zip(sizes, met, strict=True))
    assert sorted(per_class(memory)) == [4, 4, 5, 5, 5]


def test_a_small_class_leaves_its_share_to_others() -> None:
    memory = Memory(20, "class-balanced")
    memory.add(rows(torch.tensor([0] * 2 + [1] * 50 + [2] * 50)), rng())
    assert per_class(memory) == [2, 9, 9]
    memory.add(rows(torch.tensor([0] * 50), 102), rng(1))
    assert per_class(memory) == [7, 7, 6], "and takes it back when it grows"


@pytest.mark.parametrize("chunk", [60, 13, 1])
def test_class_balanced_is_uniform_within_a_class(chunk: int) -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1] * 10)
    of_class = torch.nonzero(labels == 0).flatten().tolist()
    hits = dict.fromkeys(of_class, 0)
    generator, repetitions = rng(chunk), 300 if chunk == 1 else 1000
    for _ in range(repetitions):
        memory = Memory(16, "class-balanced")
        for start in range(0, len(labels), chunk):
            memory.add(rows(labels[start : start + chunk], start), generator)
        for i in kept(memory):
            if i in hits:
                hits[i] += 1
    n, taken = len(of_class), 8
    observed = torch.tensor(list(hits.values()), dtype=torch.float64)
    expected = repetitions * taken / n
    assert float(observed.sum()) == repetitions * taken
    statistic = float(((observed - expected) ** 2 / expected).sum()) * (n - 1) / (n - taken)
    assert stats.chi2.sf(statistic, n - 1) > 1e-3


@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_ring_keeps_the_newest_of_each_class(chunk: int) -> None:
    labels = torch.tensor([0, 1, 1, 2] * 25)
    memory = Memory(12, "ring")
    for start in range(0, len(labels), chunk):
        memory.add(rows(labels[start : start + chunk], start), rng())
    newest = [i for c in range(3) for i in torch.nonzero(labels == c).flatten()[-4:].tolist()]
    assert kept(memory) == sorted(newest)


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [50, 51, 1000, 4096])
def test_budget_counts_every_tensor(budget: int) -> None:
    per_row = 3 * 4 + 8 + 8 + 8  # x, y, id and the key
    memory = Memory(None, "reservoir", budget)
    memory.add(rows(torch.zeros(500, dtype=torch.int64)), rng())
    assert len(memory) == budget // per_row
    assert budget - per_row < memory.nbytes <= budget


def test_a_budget_for_no_sample_is_an_error() -> None:
    memory = Memory(None, "reservoir", 35)
    with pytest.raises(ConfigError, match=r"memory_bytes = 35: holds no sample, one takes 36 bytes"):
        memory.add(rows(torch.zeros(5, dtype=torch.int64)), rng())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1234, 1234),
        ("1234", 1234),
        ("10B", 10),
        ("5MB", 5_000_000),
        ("5 MB", 5_000_000),
        ("5mb", 5_000_000),
        ("64KiB", 65_536),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("1e3KB", 1_000_000),
    ],
)
def test_sizes_are_read(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "five", "5XB", "5MBs", "5 5MB", "-5MB", "0", 0, -3, "nan", "inf", "infGB", "5KM"]
)
def test_what_is_no_size_is_an_error(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^memory_bytes = .*: not a size; write for example 5MB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_more_than_the_machine_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available = 36 * 10

    monkeypatch.setattr(_memory.psutil, "virtual_memory", Machine)
    memory = Memory(11, "reservoir")
    with pytest.raises(ConfigError, match=r"memory = 11 samples: needs .* are free; keep at most 10 samples"):
        memory.add(rows(torch.zeros(5, dtype=torch.int64)), rng())
    Memory(10, "reservoir").add(rows(torch.zeros(5, dtype=torch.int64)), rng())


def test_a_memory_beyond_any_machine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"are free; keep at most"):
        Memory(10**14, "ring").add(rows(torch.zeros(1, dtype=torch.int64)), rng())


# -- drawing and state -----------------------------------------------------------------------------------------------


def test_draws_are_without_replacement_and_uniform() -> None:
    memory, generator = Memory(20, "reservoir"), rng(4)
    memory.add(rows(torch.arange(20) % 3), generator)
    hits = torch.zeros(20)
    for _ in range(1500):
        drawn = memory.draw(5, generator)
        assert len(drawn["id"].unique()) == 5
        assert torch.equal(drawn["x"][:, 0], drawn["id"].float())
        hits[drawn["id"]] += 1
    expected = 1500 * 5 / 20
    assert stats.chi2.sf(float(((hits - expected) ** 2 / expected).sum()) * 19 / 15, 19) > 1e-3
    everything = memory.draw(100, generator)["id"]
    assert sorted(everything.tolist()) == list(range(20))
    assert everything.tolist() != list(range(20)), "in random order"


def test_drawn_rows_are_copies() -> None:
    memory = Memory(4, "reservoir")
    memory.add(rows(torch.zeros(4, dtype=torch.int64)), rng())
    memory.draw(4, rng())["x"].zero_()
    assert kept(memory) == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced", "ring"])
@pytest.mark.parametrize("before", [0, 5, 50])
def test_state_goes_on_as_if_never_stopped(policy: Any, before: int, tmp_path: Any) -> None:
    labels = torch.arange(90) % 4
    one, generator = Memory(None, policy, 700), rng(5)
    if before:
        one.add(rows(labels[:before]), generator)
    state = checkpoint.read(checkpoint.save(tmp_path, 0, one.state_dict(), keep=1))
    two, other = Memory(None, policy, 700), torch.Generator()
    other.set_state(generator.get_state())
    two.load_state_dict(state)
    assert checkpoint.equal(two.state_dict(), one.state_dict())
    for memory, own in ((one, generator), (two, other)):
        memory.add(rows(labels[before:70], before), own)
        memory.add(rows(labels[70:], 70), own)
    assert checkpoint.equal(two.state_dict(), one.state_dict())
    assert one.nbytes == two.nbytes
    assert kept(one) == kept(two)
