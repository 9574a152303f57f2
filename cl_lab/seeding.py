"""Randomness: every generator is derived from one seed, and all of them can be saved and restored."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from cl_lab.records import State


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the purpose named by ``keys``, independent of every other purpose (SHA-256 of all of them)."""
    digest = hashlib.sha256("/".join([str(seed), *map(str, keys)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def permutation(n: int, seed: int, *keys: str | int) -> torch.Tensor:
    """A permutation of ``range(n)``, int64 ``[n]``, a pure function of the seed and keys: it need not be saved."""
    return torch.randperm(n, generator=generator(seed, *keys))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (models and augmentation draw from them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_state() -> State:
    """The state of every global generator, in tensors and plain values."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    state: State = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_version": version,
        "python_gauss": gauss,
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_position": int(numpy_state[2]),
        "numpy_has_gauss": int(numpy_state[3]),
        "numpy_gauss": float(numpy_state[4]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for device, value in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda{device}"] = value
    return state


def restore_global_state(state: State) -> None:
    """Restore what :func:`global_state` gave. CUDA states are restored for the devices that exist now."""
    python, numpy_keys, torch_state = state["python"], state["numpy"], state["torch"]
    assert isinstance(python, torch.Tensor)
    assert isinstance(numpy_keys, torch.Tensor)
    assert isinstance(torch_state, torch.Tensor)
    random.setstate((state["python_version"], tuple(python.tolist()), state["python_gauss"]))
    np.random.set_state(
        (
            "MT19937",
            numpy_keys.numpy().astype(np.uint32),
            int(state["numpy_position"]),  # type: ignore[arg-type]
            int(state["numpy_has_gauss"]),  # type: ignore[arg-type]
            float(state["numpy_gauss"]),  # type: ignore[arg-type]
        )
    )
    torch.set_rng_state(torch_state)
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            value = state.get(f"cuda{device}")
            if isinstance(value, torch.Tensor):
                torch.cuda.set_rng_state(value, device)
