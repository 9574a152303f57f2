"""Knobs: the public fields of a plug-in's dataclass are its configuration schema.

A plug-in is a dataclass. Each public field written with :func:`knob` is a parameter a user may set in YAML, with a type,
a default, bounds and a line of documentation. Fields that start with an underscore are state and never configurable.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from cl_lab.errors import ConfigError, nearest


def knob(default: Any = dataclasses.MISSING, doc: str = "", **bounds: Any) -> Any:
    """A documented dataclass field. ``bounds`` are pydantic's (``ge``, ``gt``, ``le``, ``lt``, ``min_length`` …).

    A mutable default (list, dict) is copied for each instance; no default makes the knob required.
    """
    metadata = {"doc": doc, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def public_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The knobs of a plug-in class, in order of declaration. Raises :class:`TypeError` if it is not a dataclass."""
    return [f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a knob, or :data:`dataclasses.MISSING` where the user must give one."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def describe(cls: type) -> list[dict[str, Any]]:
    """Name, type, range (``>= 0, < 1``; empty where any value will do), default and documentation of each knob, for JSON."""
    rows = []
    hints = typing.get_type_hints(cls)
    for f in public_fields(cls):
        default = default_of(f)
        rows.append(
            {
                "name": f.name,
                "type": _type_name(hints[f.name]),
                "range": ", ".join(_range(f.metadata.get("bounds", {}))),
                "default": "required" if default is dataclasses.MISSING else default,
                "doc": f.metadata.get("doc", ""),
            }
        )
    return rows


def _range(bounds: Mapping[str, Any]) -> Iterator[str]:
    """What :func:`knob` was told a value must be, a phrase each."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for name, bound in bounds.items():
        if name in signs:
            yield f"{signs[name]} {bound}"
        elif name in _LENGTHS:
            yield f"{_LENGTHS[name]} {bound} long"


_LENGTHS = {"min_length": "at least", "max_length": "at most"}


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of the plug-in ``cls`` from the knobs in ``values``, strictly validated.

    Raises :class:`ConfigError`, one line with the dotted path, the value and the nearest known name.
    """
    from pydantic import ConfigDict, Field, ValidationError, create_model

    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {}
    for f in public_fields(cls):
        default = default_of(f)
        info = Field(... if default is dataclasses.MISSING else default, **f.metadata.get("bounds", {}))
        fields[f.name] = (hints[f.name], info)
    schema = create_model(
        cls.__name__, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
    )
    try:
        checked = schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, path, fields)) from None
    try:
        return cls(**{name: getattr(checked, name) for name in fields})
    except ConfigError as error:  # what only the plug-in can check; its message begins with the knob's name
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def explain(error: Any, path: str, known: Any) -> str:
    """The first complaint of a pydantic ``ValidationError`` as one line: path, value, reason, nearest name."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in (*([path] if path else []), *first["loc"]) if not _is_union_tag(str(p)))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where}: missing; it has no default and must be given"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":  # pydantic would name our classes
        message = "must be a mapping, or a name where a plug-in is meant"
    value = (
        "" if isinstance(first["input"], (dict, list)) and first["type"] == "value_error" else f" = {first['input']!r}"
    )
    message = f"{message[0].lower()}{message[1:]}"
    return f"{where}{value}: {message}" if where or value else message


def _is_union_tag(part: str) -> bool:
    # pydantic names the branch of a union it tried ("list[int]", "int", "literal[...]"); the user typed no such key.
    return part in {"int", "float", "str", "bool", "none"} or part.startswith(("list[", "dict[", "literal[", "tuple["))


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")
