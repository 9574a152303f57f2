"""Cures for breakages of others: what can be seen of them from outside."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
if sys.argv[1:] == ["cured"]:
    from cl_lab.compat import use_freed_memory_again
    use_freed_memory_again()
for _ in range(20):  # small things settle in between at first
    torch.ones(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    """Pages that the system handed out for ten more tensors of 64 MB, one after another, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _FAULTS, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_freed_memory_is_used_again() -> None:
    assert faults("cured") < 1000 < faults()
