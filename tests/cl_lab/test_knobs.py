"""Knobs: a dataclass's public fields as a strict schema, described and validated."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from cl_lab.errors import ConfigError
from cl_lab.knobs import build, default_of, describe, knob, public_fields


@dataclass
class Plugin:
    """One of every kind."""

    needed: list[str] = knob(doc="must be given", min_length=1)
    strength: float = knob(1.0, doc="a weight", ge=0)
    count: int | None = knob(None, doc="how many", ge=1)
    size: int | str | None = knob(None, doc="a size")
    kind: Literal["near", "far"] = knob("near", doc="which")
    flag: bool = knob(False, doc="whether")
    options: dict[str, Any] = knob({}, doc="anything")
    plain: int = 3

    _state: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.size == "bad":
            raise ConfigError("size = 'bad': is bad")


def test_only_public_fields_are_knobs() -> None:
    names = ["needed", "strength", "count", "size", "kind", "flag", "options", "plain"]
    assert [f.name for f in public_fields(Plugin)] == names
    with pytest.raises(TypeError):
        public_fields(int)


def test_describe() -> None:
    rows = {row["name"]: row for row in describe(Plugin)}
    told = {"type": "list[str]", "range": "at least 1 long", "default": "required", "doc": "must be given"}
    assert rows["needed"] == {"name": "needed", **told}
    assert rows["strength"] == {"name": "strength", "type": "float", "range": ">= 0", "default": 1.0, "doc": "a weight"}
    assert rows["plain"]["range"] == ""
    assert rows["count"]["type"] == "int | None"
    assert rows["kind"]["type"] == "Literal['near', 'far']"
    assert rows["options"]["default"] == {}
    json.dumps(list(rows.values()))


def test_build() -> None:
    made = build(Plugin, {"needed": ["a"], "count": 2, "size": "5MB", "strength": 3}, "strategy")
    assert (made.needed, made.count, made.size, made.strength, made.kind) == (["a"], 2, "5MB", 3.0, "near")


def test_mutable_defaults_are_not_shared() -> None:
    one, two = (build(Plugin, {"needed": ["a"]}, "") for _ in range(2))
    one.options["x"] = 1
    assert two.options == {}
    assert default_of(public_fields(Plugin)[6]) == {}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, r"^s\.needed: missing; it has no default and must be given$"),
        ({"needed": []}, r"^s\.needed = \[\]: list should have at least 1 item"),
        ({"needed": "a"}, r"^s\.needed = 'a': input should be a valid list$"),
        ({"needed": ["a", 3]}, r"^s\.needed\.1 = 3: input should be a valid string$"),
        ({"needed": ["a"], "strenght": 1}, r"^s\.strenght: unknown key; did you mean 'strength'\?$"),
        (
            {"needed": ["a"], "zzz": 1},
            r"^s\.zzz: unknown key; known: count, flag, kind, needed, options, plain, size, stren",
        ),
        ({"needed": ["a"], "_state": {}}, r"^s\._state: unknown key"),
        ({"needed": ["a"], "strength": -1}, r"^s\.strength = -1: input should be greater than or equal to 0$"),
        ({"needed": ["a"], "strength": "1"}, r"^s\.strength = '1': input should be a valid number$"),
        ({"needed": ["a"], "strength": float("inf")}, r"^s\.strength = inf: input should be a finite number$"),
        ({"needed": ["a"], "strength": None}, r"^s\.strength = None: input should be a valid number$"),
        ({"needed": ["a"], "count": 0}, r"^s\.count = 0: input should be greater than or equal to 1$"),
        ({"needed": ["a"], "count": 1.0}, r"^s\.count = 1\.0: input should be a valid integer$"),
        ({"needed": ["a"], "count": True}, r"^s\.count = True: input should be a valid integer$"),
        ({"needed": ["a"], "size": 1.5}, r"^s\.size = 1\.5: input should be a valid integer$"),
        ({"needed": ["a"], "kind": "nera"}, r"^s\.kind = 'nera': input should be 'near' or 'far'$"),
        ({"needed": ["a"], "flag": 1}, r"^s\.flag = 1: input should be a valid boolean$"),
        ({"needed": ["a"], "options": 1}, r"^s\.options = 1: input should be a valid dictionary$"),
        ({"needed": ["a"], "size": "bad"}, r"^s\.size = 'bad': is bad$"),
    ],
)
def test_one_line_says_what_is_wrong(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        build(Plugin, values, "s")
    assert "\n" not in str(caught.value)


def test_a_path_is_not_needed() -> None:
    with pytest.raises(ConfigError, match=r"^needed: missing"):
        build(Plugin, {}, "")
    with pytest.raises(ConfigError, match=r"^size = 'bad'"):
        build(Plugin, {"needed": ["a"], "size": "bad"}, "")
