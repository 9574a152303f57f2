"""Cures for breakages of the packages we stand on; each names its cause and when it may go.

``torchvision``: the wheel on the registry carries a compiled extension for one torch build only. With another (a CPU
build, say) ``import torchvision`` fails with "operator torchvision::nms does not exist", and Avalanche and Transformers
import torchvision. Nothing here uses those two operators, so declaring their schemas is enough to import the rest.

``deepspeed``: on a CPU machine every process group compiles a shared-memory reduction that inference alone calls. That
takes a compiler and half a minute, and torch guards it by a lock file: a process killed in between leaves it there, and
every later run on that machine waits for it for ever. Until DeepSpeed compiles it where it is called, it is declared
impossible.

``glibc``: memory above 32 MB goes back to the system with every tensor that is freed, and comes again page by page. A
network's larger activations pay more for that than for their arithmetic: 256 pictures through EfficientNet-Lite0 took 44
ms of a core each, and take 13 where freed memory is used again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable

_SHARED_MEMORY = "deepspeed_shm_comm"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, from malloc.h

_libraries: list[object] = []  # torch drops a schema when its Library object is collected


def import_torchvision() -> None:
    """Import torchvision; where its extension does not load, declare the schemas of ``nms`` and ``qnms`` first.

    Does nothing when torchvision is not installed or already imported.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            library.define(schema)
        _libraries.append(library)
        import torchvision

    assert torchvision is not None


def use_freed_memory_again() -> None:
    """Keep what tensors have freed for the next ones, up to 2 GB; does nothing where the C library is not glibc."""
    setting = _of_glibc("mallopt")
    if setting is not None:
        setting(_MMAP_THRESHOLD, 2**30)
        setting(_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back() -> None:
    """Return to the system what is kept for use again, so that the next run is not charged for it."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def compile_nothing_for_deepspeed() -> None:
    """Keep DeepSpeed from compiling on a CPU what training never calls; to be called before its first process group."""
    import deepspeed

    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
