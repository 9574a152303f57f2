"""An episodic memory of samples, shared by every rehearsal strategy.

Each row that enters gets a key, and the memory keeps the rows with the smallest keys. That one rule gives three policies
without a per-sample loop:

- *reservoir*: keys are uniform random numbers, so the memory is at any time a uniform sample without replacement of all
  rows seen (bottom-k sampling; the same distribution as Vitter's algorithm R);
- *class-balanced*: the same within each class, the capacity shared out evenly between the classes seen;
- *ring*: the newest rows of each class (a first-in-first-out buffer per class).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor

from cl_lab.errors import ConfigError
from cl_lab.records import State

Policy = Literal["reservoir", "class-balanced", "ring"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """``"5MB"``, ``"64KiB"`` or a plain number as bytes; raises :class:`ConfigError` for anything else."""
    digits = str(text).rstrip("BbKkMmGgIi ")
    unit = str(text)[len(digits) :].strip().upper() or "B"
    try:
        size = int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"memory_bytes = {text!r}: not a size; write for example 5MB, 64KiB or a number of bytes")
    return size


def quotas(counts: Tensor, capacity: int) -> Tensor:
    """How many rows each class may keep: as equal as possible, what a small class leaves going to the others.

    ``counts`` is int64 ``[C]``; returns int64 ``[C]`` with sum ``min(capacity, counts.sum())``.
    """
    if int(counts.sum()) <= capacity:
        return counts.clone()
    low, high = 0, capacity
    while low < high:  # the largest level q with Σ min(count, q) ≤ capacity
        middle = (low + high + 1) // 2
        if int(counts.clamp(max=middle).sum()) <= capacity:
            low = middle
        else:
            high = middle - 1
    shares = counts.clamp(max=low)
    left = capacity - int(shares.sum())
    more = torch.nonzero(counts > low).flatten()[:left]
    shares[more] += 1
    return shares


@dataclass
class Memory:
    """At most ``capacity`` rows of any named columns, all tensors with the row axis first; ``y`` decides the class.

    ``capacity`` may be ``None`` with ``budget`` bytes instead: the first rows to enter then set it, keys and labels counted.
    """

    capacity: int | None
    policy: Policy
    budget: int | None = None

    def __post_init__(self) -> None:
        self.columns: dict[str, Tensor] = {}
        self.keys = torch.empty(0, dtype=torch.float64)
        self.size = 0
        self.seen = 0
        self._largest = 0.0  # of the keys held; not state, it follows from them

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes held now, unused slots included."""
        return sum(v.numel() * v.element_size() for v in (*self.columns.values(), self.keys))

    def add(self, rows: dict[str, Tensor], rng: torch.Generator) -> None:
        """Offer rows to the memory, in order. Raises :class:`ConfigError` where the memory cannot be had."""
        if not self.columns:
            self._allocate(rows)
        n = len(rows["y"])
        if self.policy == "ring":
            keys = -torch.arange(self.seen, self.seen + n, dtype=torch.float64)
        else:
            keys = torch.rand(n, generator=rng, dtype=torch.float64)
        self.seen += n
        assert self.capacity is not None
        if self.policy == "reservoir" and self.size == self.capacity:
            self._compete(rows, keys)
            return
        survives = self._survivors(
            torch.cat([self.keys[: self.size], keys]), torch.cat([self.columns["y"][: self.size], rows["y"].cpu()])
        )
        entering = torch.nonzero(survives[self.size :]).flatten()
        freed = torch.nonzero(~survives[: self.size]).flatten()
        grown = max(0, len(entering) - len(freed))
        slots = torch.cat([freed, torch.arange(self.size, self.size + grown)])
        if len(slots) > len(entering):  # never more leave than enter: a class's quota only shrinks when another grows
            raise AssertionError("memory would shrink")
        self.size += grown
        self._store(slots, rows, keys, entering)

    def _compete(self, rows: dict[str, Tensor], keys: Tensor) -> None:
        """A full reservoir: the newcomers with keys below the largest held change places with the largest held."""
        chosen = torch.nonzero(keys < self._largest).flatten()  # late in a stream, mostly none
        if len(chosen) == 0:
            return
        assert self.capacity is not None
        k = min(len(chosen), self.capacity)
        held, slots = torch.topk(self.keys, k)
        stays = torch.zeros(k + len(chosen), dtype=torch.bool)
        stays[torch.topk(torch.cat([held, keys[chosen]]), k, largest=False).indices] = True
        self._store(slots[~stays[:k]], rows, keys, chosen[stays[k:]])

    def _store(self, slots: Tensor, rows: dict[str, Tensor], keys: Tensor, entering: Tensor) -> None:
        for name, column in self.columns.items():
            column[slots] = rows[name][entering].to(column.device)
        self.keys[slots] = keys[entering]
        self._largest = float(self.keys[: self.size].max()) if self.size else 0.0

    def draw(self, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """``n`` rows without replacement (all of them where fewer are held), in random order."""
        index = torch.randperm(self.size, generator=rng)[:n]
        return {name: column.index_select(0, index) for name, column in self.columns.items()}

    def _survivors(self, keys: Tensor, labels: Tensor) -> Tensor:
        assert self.capacity is not None
        survives = torch.zeros(len(keys), dtype=torch.bool)
        if len(keys) <= self.capacity:
            survives[:] = True
        elif self.policy == "reservoir":
            survives[torch.topk(keys, self.capacity, largest=False).indices] = True
        else:
            by_key = torch.argsort(keys)
            order = by_key[torch.argsort(labels[by_key], stable=True)]  # by class, within a class by key
            _, counts = torch.unique_consecutive(labels[order], return_counts=True)
            first = counts.cumsum(0) - counts
            place = torch.arange(len(order)) - first.repeat_interleave(counts)
            survives[order[place < quotas(counts, self.capacity).repeat_interleave(counts)]] = True
        return survives

    def _allocate(self, rows: dict[str, Tensor]) -> None:
        per_row = 8 + sum(math.prod(v.shape[1:]) * v.element_size() for v in rows.values())
        if self.capacity is None:
            assert self.budget is not None
            self.capacity = self.budget // per_row
            if self.capacity < 1:
                raise ConfigError(
                    f"memory_bytes = {self.budget}: holds no sample, one takes {per_row} bytes; give at least that"
                )
        needed, free = self.capacity * per_row, psutil.virtual_memory().available
        if needed > free:
            raise ConfigError(
                f"memory = {self.capacity} samples: needs {needed / 2**30:.1f} GiB ({per_row} bytes each) but "
                f"{free / 2**30:.1f} GiB are free; keep at most {free // per_row} samples"
            )
        self.columns = {n: torch.empty((self.capacity, *v.shape[1:]), dtype=v.dtype) for n, v in rows.items()}
        self.keys = torch.empty(self.capacity, dtype=torch.float64)

    def state_dict(self) -> State:
        """Rows held, their keys, and the counters."""
        return {
            "columns": {n: v[: self.size] for n, v in self.columns.items()},
            "keys": self.keys[: self.size],
            "capacity": self.capacity,
            "seen": self.seen,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave."""
        columns, keys, capacity, seen = (state[k] for k in ("columns", "keys", "capacity", "seen"))
        assert isinstance(columns, dict)
        assert isinstance(keys, Tensor)
        assert isinstance(seen, int)
        self.seen, self.size = seen, len(keys)
        self.columns, self.keys = {}, torch.empty(0, dtype=torch.float64)
        if not columns:
            return
        assert isinstance(capacity, int)
        self.capacity = capacity
        rows = {n: v for n, v in columns.items() if isinstance(v, Tensor)}
        if self.size:
            self._allocate(rows)
            for name, value in rows.items():
                self.columns[name][: self.size] = value
            self.keys[: self.size] = keys
            self._largest = float(keys.max())
