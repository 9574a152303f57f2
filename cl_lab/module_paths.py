"""Modules and parameters of a model by their paths, as a user writes them: by structure, never by a piece of a name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cl_lab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

_LISTED = 12  # modules named in a message


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that ``pattern`` names, by structure.

    A pattern is a dotted path whose segments may hold wildcards: ``backbone.layers.0``, ``backbone.layers.[0-3]``,
    ``*.norm``. Segments are matched one to one, so ``layers.1`` never matches ``layers.10``.
    """
    wanted = pattern.split(".")
    return [
        path
        for path in paths
        if len(parts := path.split(".")) == len(wanted)
        and all(fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))
    ]


def named_by(model: nn.Module, pattern: str) -> set[str]:
    """Names of the parameters that a freezing ``pattern`` (:func:`matching`) names, or that lie below what it names.

    A tensor that two modules share goes by its first name, whichever of them is named. Raises :class:`ConfigError` for a
    pattern that matches nothing, or nothing that holds a parameter.
    """
    shared = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(shared.items())}
    modules = [name for name, _ in model.named_modules() if name]
    paths = matching(pattern, [*modules, *shared])
    if not paths:
        tree = ", ".join(modules[:_LISTED]) + (f" and {len(modules) - _LISTED} more" if len(modules) > _LISTED else "")
        near = nearest(pattern, modules)
        raise ConfigError(f"freeze: pattern '{pattern}' matches no module or parameter{near}; the model has: {tree}")
    named = {first[id(p)] for n, p in shared.items() for path in paths if n == path or n.startswith(path + ".")}
    if not named:
        raise ConfigError(f"freeze: pattern '{pattern}' matches {', '.join(paths)}, which hold no parameter")
    return named
