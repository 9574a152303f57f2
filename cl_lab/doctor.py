"""``cl-lab doctor``: what this machine has of what the laboratory needs. Looks, changes nothing, and never raises."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cl_lab import environment, registry
from cl_lab.errors import DataError, PluginError

Finding = tuple[bool, str]
"""Whether it is as it should be, and one line that says how it is."""

_GIB = 2**30
_LITTLE = _GIB  # bytes of memory or disk below which it is worth a note


def examine() -> dict[str, Any]:
    """Every check as ``{"name", "ok", "needed", "detail"}``, and the environment as it is saved with runs.

    A check that is ``needed`` and not ``ok`` means that runs will fail; the others are notes.
    """
    checks = [
        {"name": name, **seen, "needed": needed}
        for name, needed, probe in (*_machine(), *_packages(), *_plugins(), *_services(), *_data())
        if (seen := _look(probe))
    ]
    return {"checks": checks, "environment": environment.snapshot()}


Check = tuple[str, bool, Callable[[], Finding | None]]


def _look(probe: Callable[[], Finding | None]) -> dict[str, Any]:
    """What a probe found; nothing where there is nothing to find."""
    try:
        found = probe()
        if found is None:
            return {}
        ok, detail = found
    except Exception as error:  # noqa: BLE001  # a broken package may raise anything; that is the finding
        ok, detail = False, f"{type(error).__name__}: {error}"
    return {"ok": ok, "detail": " ".join(detail.split())}


# -- the machine ---------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    yield "python", True, _python
    yield "cores", False, _cores
    yield "memory", False, _memory
    yield "disk", False, _disk
    yield "gpu", False, _gpu


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return ok, platform.python_version() + ("" if ok else "; 3.11 or newer is needed")


def _cores() -> Finding:
    import torch

    asked = os.environ.get("OMP_NUM_THREADS")
    limit = f", OMP_NUM_THREADS={asked}" if asked else ""
    return True, f"{environment.cores()} usable, torch takes {torch.get_num_threads()} threads{limit}"


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return memory.available >= _LITTLE, f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"


def _disk() -> Finding:
    usage = shutil.disk_usage(".")
    return usage.free >= _LITTLE, f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free in {Path.cwd()}"


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return False, f"none that torch {torch.__version__} can use; runs take the CPU"
    return True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


# -- packages and plug-ins -----------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    try:
        required = importlib.metadata.requires("cl-lab") or []
    except importlib.metadata.PackageNotFoundError:
        required = list(environment.PACKAGES)
    for line in required:
        if "extra ==" not in line and (name := re.match(r"[\w.-]+", line)):
            yield f"package {name[0]}", True, partial(_installed, name[0])
    yield "import torch", True, _import_torch
    yield "import torchvision", True, _import_torchvision


def _installed(name: str) -> Finding:
    try:
        return True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False, f"not installed; run `pip install {name}`"


def _import_torch() -> Finding:
    import torch

    return True, torch.__version__


def _import_torchvision() -> Finding:
    from cl_lab.compat import import_torchvision

    import_torchvision()
    ok = "torchvision" in sys.modules
    return ok, str(sys.modules["torchvision"].__version__) if ok else "not installed; run `pip install torchvision`"


def _plugins() -> Iterator[Check]:
    yield "plug-in packages", True, _fence
    for kind in registry.KINDS:
        if kind != "metrics":
            yield kind, True, partial(_load, kind)
    yield "peers", False, _peers


def _fence() -> Finding:
    registry.fence()
    return True, "no other distribution owns strategies or scenarios"


def _load(kind: str) -> Finding:
    names = registry.names(kind)
    for name in names:
        registry.load(kind, name)
    return True, f"{len(names)} load: {', '.join(names)}" if names else "none installed"


def _peers() -> Finding:
    points = sorted(importlib.metadata.entry_points(group="cl_lab.peers"), key=lambda p: p.name)
    for point in points:
        point.load()
    return True, ", ".join(p.name for p in points) or "none; cl-lab bench has nothing to compare with"


# -- services and data ---------------------------------------------------------------------------------------------


def _services() -> Iterator[Check]:
    yield "gloo", False, _gloo
    yield "deepspeed", False, _deepspeed
    yield "git", False, _git
    yield "mlflow store", False, _store


def _gloo() -> Finding:
    import torch.distributed as dist

    ok = dist.is_available() and dist.is_gloo_available()
    return ok, "several processes can train on CPUs" if ok else "this torch has no gloo; engine.processes must be 1"


def _deepspeed() -> Finding:
    # Importing it takes seconds and may probe for compilers; that its package can be found is enough here.
    found = importlib.util.find_spec("deepspeed") is not None
    return found, importlib.metadata.version("deepspeed") if found else "not installed; engine.zero must be 0"


def _git() -> Finding:
    path = shutil.which("git")
    if path is None:
        return False, "not installed; runs will not record a commit"
    return True, f"{path}, this code: {environment.git_commit() or 'not a checkout'}"


def _store() -> Finding:
    from cl_lab.config import TrackingConfig
    from cl_lab.tracking import resolve

    uri = resolve(TrackingConfig().uri)
    if uri is None or not uri.startswith("sqlite:///"):
        return True, str(uri)
    file = Path(uri.removeprefix("sqlite:///"))
    # sqlite writes a journal beside the file, so both must be writable.
    ok = os.access(file.parent, os.W_OK) and (not file.exists() or os.access(file, os.W_OK))
    return ok, f"{file} is{'' if ok else ' not'} writable" + ("" if ok else "; set tracking.uri")


def _data() -> Iterator[Check]:
    """One check per data set of scenarios whose class can say where it lies (a classmethod ``find``) without reading it.

    Where that gives ``None`` each configuration names a folder of its own.
    """
    try:
        classes = {name: registry.load("scenarios", name)[0] for name in registry.names("scenarios")}
    except PluginError:
        return  # found and told by the checks of plug-ins
    told = set()
    for name, cls in classes.items():
        find, source = getattr(cls, "find", None), getattr(cls, "source", name)
        if find is not None and source not in told:  # several scenarios may be made of one set
            told.add(source)
            yield f"data of {source}", False, partial(_found, find)


def _found(find: Callable[[], object]) -> Finding | None:
    try:
        place = find()
        return None if place is None else (True, str(place))
    except DataError as error:
        return False, str(error)
