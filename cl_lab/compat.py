"""Cures for breakages of the packages we stand on; each names its cause and when it may go.

``torchvision``: the wheel on the registry carries a compiled extension for one torch build only. With another (a CPU
build, say) ``import torchvision`` fails with "operator torchvision::nms does not exist", and Avalanche and Transformers
import torchvision. Nothing here uses those two operators, so declaring their schemas is enough to import the rest.

``deepspeed``: on a CPU machine every process group compiles a shared-memory reduction that inference alone calls. That
takes a compiler and half a minute, and torch guards it by a lock file: a process killed in between leaves it there, and
every later run on that machine waits for it for ever. Until DeepSpeed compiles it where it is called, it is declared
impossible.
"""

from __future__ import annotations

import importlib.util
import sys

_SHARED_MEMORY = "deepspeed_shm_comm"

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


def compile_nothing_for_deepspeed() -> None:
    """Keep DeepSpeed from compiling on a CPU what training never calls; to be called before its first process group."""
    import deepspeed

    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
