"""Finding plug-ins by name: entry points, or ``file.py:Class`` without packaging.

Built-ins come through the same door as a stranger's plug-in. Listing names imports none of them: a summary is read from
the class's docstring with :mod:`ast`, so that ``cl-lab list`` answers before torch could be imported.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cl_lab.errors import ConfigError, PluginError, nearest

KINDS = ("scenarios", "strategies", "models", "editors", "metrics")
"""What ``cl-lab list`` knows; each is the entry-point group ``cl_lab.<kind>``, but for metrics (plain functions)."""

_METHOD = {"scenarios": "stream", "strategies": "before_experience", "models": "build", "editors": "propose"}
"""What a class of each kind cannot do without."""

_FENCED = ("strategies", "scenarios")


@cache
def fence() -> None:
    """Refuse to start when another distribution also owns ``strategies`` or ``scenarios``.

    Our two plug-in packages have generic names; a second owner in site-packages would shadow files silently. Raises
    :class:`PluginError` naming the other distribution.
    """
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or name.lower().replace("_", "-") == "cl-lab":
            continue
        top_level = distribution.read_text("top_level.txt")
        owned = (
            set(top_level.split())
            if top_level is not None
            else {f.parts[0].removesuffix(".py") for f in distribution.files or ()}
        )
        for package in _FENCED:
            if package in owned:
                raise PluginError(
                    f"the installed distribution '{name}' also owns the top-level package '{package}', which cl-lab needs; "
                    f"uninstall it (pip uninstall {name}) or use a separate environment"
                )


@cache
def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    fence()
    points: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=f"cl_lab.{kind}"):
        known = points.get(point.name)
        if known is not None and known.value != point.value:
            raise PluginError(
                f"two plug-ins are called '{point.name}' in cl_lab.{kind}: {known.value} and {point.value}; "
                "uninstall one or rename its entry point"
            )
        points[point.name] = point
    return points


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    if kind == "metrics":
        return sorted(_metric_summaries())
    return sorted(_entry_points(kind))


def summaries(kind: str) -> list[dict[str, str]]:
    """``{"name", "summary"}`` of every registered plug-in of a kind, without importing any."""
    if kind == "metrics":
        return [{"name": n, "summary": s} for n, s in sorted(_metric_summaries().items())]
    return [{"name": name, "summary": _summary(point)} for name, point in sorted(_entry_points(kind).items())]


def load(kind: str, name: str) -> tuple[type, dict[str, Any]]:
    """The class called ``name`` and the knobs that the name itself sets (``avalanche:SplitOmniglot``).

    Raises :class:`PluginError` with the nearest name when unknown, or with the cause when it cannot be imported.
    """
    points = _entry_points(kind)
    head, colon, rest = name.partition(":")
    if head.endswith(".py"):
        return _from_file(Path(head), rest, name), {}
    point = points.get(name) or (points.get(head) if colon else None)
    if point is None:
        known = [*points, *_entry_points("editors").keys() - {_STRATEGY}] if kind == "strategies" else points
        if name in known:
            raise PluginError(f"'{name}' is an editor, which a run takes as a strategy; see cl-lab show editor {name}")
        if kind == "strategies" and (meant := _strategy(name)) is not None:
            raise PluginError(f"'{name}' is an editor made of a strategy, which a run takes as it is; write '{meant}'")
        if kind == "editors" and name in _entry_points("strategies"):
            raise PluginError(f"'{name}' is a strategy, which edits as editor {_STRATEGY}:{name}")
        raise PluginError(f"unknown {singular(kind)} '{name}'{nearest(name, known)}")
    try:
        cls = point.load()
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{singular(kind)} '{name}' ({point.value}) cannot be imported: {error}; reinstall the package that provides it"
        ) from error
    assert isinstance(cls, type)
    if not colon:
        return cls, {}
    argument = getattr(cls, "argument", None)
    if argument is None:
        raise PluginError(f"{singular(kind)} '{head}' takes no argument after the colon (got '{name}'); write '{head}'")
    return cls, {argument: rest}


def create(kind: str, config: Mapping[str, Any], path: str) -> Any:
    """An instance of the plug-in that ``config["name"]`` names, its knobs validated; ``path`` is where the config stood.

    Among strategies an editor may be named, too (``wise``, or ``editor:wise`` where a strategy has its name): what comes is
    an :class:`~cl_lab.edit_strategy.EditorStrategy`, whose knobs stand beside the editor's. Among editors ``strategy:ewc``
    is a strategy that edits, a :class:`~cl_lab.strategy_editor.StrategyEditor`, whose knobs stand beside the strategy's.
    """
    from cl_lab import knobs

    if kind == "strategies" and (editor := _editor(config["name"])) is not None:
        return _editor_as_strategy(editor, config, path)
    if kind == "editors" and _strategy(config["name"]) is not None:
        return _strategy_as_editor(config, path)
    values = dict(config)
    cls, preset = load(kind, values.pop("name"))
    for key in preset:
        if key in values:
            raise ConfigError(f"{path}.{key}: given twice, in the name '{config['name']}' and as a key; keep one")
    if not dataclasses.is_dataclass(cls):
        raise PluginError(
            f"{singular(kind)} '{config['name']}' is no dataclass; decorate {cls.__name__} with @dataclass"
        )
    if not hasattr(cls, method := _METHOD[kind]):
        raise PluginError(
            f"'{config['name']}' is no {singular(kind)}: it has no method '{method}'; derive it from cl_lab.protocols"
        )
    return knobs.build(cls, {**values, **preset}, path)


_EDITOR = "editor:"


def _editor(name: str) -> str | None:
    """The editor that ``name`` means among strategies; ``None`` where it means a strategy."""
    if name.startswith(_EDITOR):
        return name.removeprefix(_EDITOR)
    known = name not in _entry_points("strategies") and name in _entry_points("editors")
    return name if known else None


def _editor_as_strategy(name: str, config: Mapping[str, Any], path: str) -> Any:
    from cl_lab.edit_strategy import EditorStrategy

    own, rest = _parted(EditorStrategy, config)
    return EditorStrategy.wrap(create("editors", {**rest, "name": name}, path), config["name"], own, path)


_STRATEGY = "strategy"


def _strategy(name: str) -> str | None:
    """The strategy that ``name`` means among editors; ``None`` where it means an editor."""
    head, colon, rest = name.partition(":")
    return rest if head == _STRATEGY and colon else None


def _strategy_as_editor(config: Mapping[str, Any], path: str) -> Any:
    cls: Any = load("editors", config["name"])[0]
    if cls.argument in config:
        raise ConfigError(f"{path}.{cls.argument}: given twice, in the name '{config['name']}' and as a key; keep one")
    own, rest = _parted(cls, config)
    del rest["name"]
    return cls.wrap({**own, cls.argument: _strategy(config["name"])}, rest, path)


def _parted(cls: type, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What in ``config`` are knobs of ``cls``, and the rest."""
    from cl_lab import knobs

    ours = {field.name for field in knobs.public_fields(cls)}
    return {k: v for k, v in config.items() if k in ours}, {k: v for k, v in config.items() if k not in ours}


def describe(kind: str, name: str) -> list[dict[str, Any]]:
    """The knobs that ``name`` takes (:func:`cl_lab.knobs.describe`); of ``strategy:ewc`` the strategy's behind the editor's.

    Raises as :func:`load` does.
    """
    from cl_lab import knobs

    cls, preset = load(kind, name)
    rows = [row for row in knobs.describe(cls) if row["name"] not in preset]
    if kind == "editors" and (strategy := _strategy(name)) is not None:
        rows += knobs.describe(load("strategies", strategy)[0])
    return rows


def singular(kind: str) -> str:
    """``strategies`` → ``strategy``: a kind as it is called in messages."""
    return {"strategies": "strategy"}.get(kind, kind.removesuffix("s"))


def _from_file(file: Path, attribute: str, name: str) -> type:
    if not file.is_file():
        raise PluginError(
            f"plug-in file '{file}' does not exist (from '{name}'); paths are relative to the working directory"
        )
    if not attribute:
        raise PluginError(f"plug-in '{name}' names no class; write '{file}:ClassName'")
    module_name = "cl_lab_file_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise PluginError(f"plug-in file '{file}' cannot be imported: {type(error).__name__}: {error}") from error
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type):
        known = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name]
        raise PluginError(f"plug-in file '{file}' has no class '{attribute}'{nearest(attribute, known)}")
    return cls


def _summary(point: importlib.metadata.EntryPoint) -> str:
    """First line of the class's docstring, read from the source without running it."""
    source = _source(point.module)
    if source is None:
        return ""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


@cache
def _source(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def _metric_summaries() -> dict[str, str]:
    source = _source("cl_lab.metrics") or ""
    return {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and node.name not in ("summary", "interval")
    }
