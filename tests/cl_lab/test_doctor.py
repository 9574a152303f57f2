"""The doctor: finds what is there, and survives whatever is broken."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from cl_lab import doctor, registry
from cl_lab.errors import DataError, PluginError


def by_name() -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in doctor.examine()["checks"]}


def test_this_machine_is_fit() -> None:
    findings = doctor.examine()
    json.dumps(findings)  # what --json prints
    assert findings["environment"]["packages"]["torch"]
    for check in findings["checks"]:
        assert set(check) == {"name", "ok", "needed", "detail"}
        assert check["detail"]
        assert "\n" not in check["detail"]
        assert check["ok"] or not check["needed"], check
    names = [c["name"] for c in findings["checks"]]
    assert len(names) == len(set(names))
    assert {"python", "cores", "memory", "disk", "gpu", "gloo", "deepspeed", "git", "mlflow store"} <= set(names)
    assert {"package torch", "import torch", "import torchvision", "scenarios", "strategies", "models"} <= set(names)
    assert "package pytest" not in names  # extras are not needed


def test_a_broken_plugin_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str, name: str) -> Any:
        raise PluginError(f"{kind} '{name}' cannot be\nimported")

    monkeypatch.setattr(registry, "load", refuse)
    checks = by_name()
    assert not checks["strategies"]["ok"]
    assert checks["strategies"]["needed"]
    assert checks["strategies"]["detail"].startswith("PluginError: strategies")
    assert checks["peers"]["ok"]


def test_a_missing_package_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = by_name()["package scipy"]
    assert not check["ok"]
    assert check["needed"]
    assert "pip install scipy" in check["detail"]


def test_data_is_looked_for_where_a_scenario_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        @classmethod
        def find(cls) -> Path:
            return Path("/data/here")

    class Away:
        @classmethod
        def find(cls) -> Path:
            raise DataError("away: not found")

    class Named:
        @classmethod
        def find(cls) -> None:
            return None

    classes = {"here": Here, "away": Away, "silent": object, "named": Named}
    monkeypatch.setattr(registry, "names", lambda kind: sorted(classes) if kind == "scenarios" else [])
    monkeypatch.setattr(registry, "load", lambda kind, name: (classes[name], {}))
    checks = by_name()
    assert checks["data of here"] == {"name": "data of here", "ok": True, "needed": False, "detail": "/data/here"}
    assert not checks["data of away"]["ok"]
    assert not {"data of silent", "data of named"} & checks.keys()
