"""Plug-ins by name: entry points and files, unknown names, the fence, and listing without importing anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_lab import registry
from cl_lab.errors import ConfigError, PluginError
from cl_lab.protocols import ModelSpec, Scenario, Strategy


@pytest.fixture
def fresh() -> Iterator[None]:
    """A registry that has not looked around yet, before and after."""
    caches = (registry.fence, registry._entry_points, registry._source)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "some", "base"),
    [
        ("strategies", {"naive", "joint", "cumulative", "ewc", "replay", "freeze"}, Strategy),
        (
            "scenarios",
            {"split-digits", "split-mnist", "permuted-mnist", "split-cifar10", "core50", "avalanche"},
            Scenario,
        ),
        ("models", {"mlp", "simple-mlp", "convnet", "resnet18", "slim-resnet18"}, ModelSpec),
    ],
)
def test_built_ins_come_through_the_door(kind: str, some: set[str], base: type) -> None:
    names = registry.names(kind)
    assert set(names) >= some
    assert names == sorted(names)
    for name in some:
        cls, preset = registry.load(kind, name)
        assert issubclass(cls, base)
        assert preset == {}
    summaries = registry.summaries(kind)
    assert [s["name"] for s in summaries] == names
    assert all(s["summary"] for s in summaries if s["name"] in some)


def test_metrics_are_plain_functions() -> None:
    names = registry.names("metrics")
    assert {"average_accuracy", "forgetting", "bwt", "fwt"} <= set(names)
    assert all(s["summary"] for s in registry.summaries("metrics"))


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("strategies", "ewcc", r"^unknown strategy 'ewcc'; did you mean 'ewc'\?$"),
        ("strategies", "zzzzz", r"^unknown strategy 'zzzzz'; known: .*cumulative, .*ewc, .*freeze"),
        ("scenarios", "split-mnits", r"^unknown scenario 'split-mnits'; did you mean 'split-mnist'\?$"),
        ("models", "renset18", r"^unknown model 'renset18'; did you mean 'resnet18'\?$"),
        ("models", "", r"^unknown model ''"),
        ("strategies", "nope:x", r"^unknown strategy 'nope:x'"),
        ("strategies", "strategy:naive", r"^'strategy:naive' is an editor made of a strategy, .*; write 'naive'$"),
        ("strategies", "strategi", r"^unknown strategy 'strategi'; known: "),
        ("strategies", "ewc:3", r"^strategy 'ewc' takes no argument after the colon \(got 'ewc:3'\); write 'ewc'$"),
    ],
)
def test_unknown_names(kind: str, name: str, why: str) -> None:
    with pytest.raises(PluginError, match=why):
        registry.load(kind, name)


def test_an_argument_after_the_colon() -> None:
    cls, preset = registry.load("scenarios", "avalanche:SplitOmniglot")
    assert preset == {"benchmark": "SplitOmniglot"}
    assert registry.create("scenarios", {"name": "avalanche:SplitOmniglot"}, "scenario").benchmark == "SplitOmniglot"
    with pytest.raises(ConfigError, match=r"^scenario\.benchmark: given twice, in the name 'avalanche:A' and as a key"):
        registry.create("scenarios", {"name": "avalanche:A", "benchmark": "B"}, "scenario")
    assert cls.argument == "benchmark"


# -- files -----------------------------------------------------------------------------------------------------------

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass, field
from cl_lab.knobs import knob
from cl_lab.protocols import Strategy
from cl_lab.records import State

@dataclass
class Mine(Strategy):
    """A strategy of one file."""

    strength: float = knob(1.0, doc="a weight", ge=0)
    _steps: int = field(default=0, init=False)

class Bare:
    pass

number = 3
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_a_class_in_a_file(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = registry.create("strategies", {"name": f"{plugin}:Mine", "strength": 2}, "strategy")
    assert made.strength == 2.0
    again, _ = registry.load("strategies", f"{plugin}:Mine")
    assert type(made) is again, "one file is one module"
    monkeypatch.chdir(plugin.parent)
    assert registry.load("strategies", "mine.py:Mine")[0] is again, "by whatever path"
    with pytest.raises(ConfigError, match=r"^strategy\.strenght: unknown key; did you mean 'strength'"):
        registry.create("strategies", {"name": "mine.py:Mine", "strenght": 2}, "strategy")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "absent.py:Mine",
            r"plug-in file 'absent\.py' does not exist \(from 'absent\.py:Mine'\); paths are relative to",
        ),
        ("mine.py", r"plug-in 'mine\.py' names no class; write 'mine\.py:ClassName'"),
        ("mine.py:", r"names no class"),
        ("mine.py:Mien", r"plug-in file 'mine\.py' has no class 'Mien'; did you mean 'Mine'\?"),
        ("mine.py:number", r"has no class 'number'; known: Bare, Mine"),
        ("mine.py:Bare", r"strategy 'mine\.py:Bare' is no dataclass; decorate Bare with @dataclass"),
        ("broken.py:Mine", r"plug-in file 'broken\.py' cannot be imported: SyntaxError"),
        ("raises.py:Mine", r"plug-in file 'raises\.py' cannot be imported: ZeroDivisionError"),
        ("needs.py:Mine", r"plug-in file 'needs\.py' cannot be imported: ModuleNotFoundError: .*no_such_module"),
    ],
)
def test_files_that_do_not_serve(name: str, why: str, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin.parent)
    Path("broken.py").write_text("def f(:\n")
    Path("raises.py").write_text("1 / 0\n")
    Path("needs.py").write_text("import no_such_module\n")
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(PluginError, match=why) as caught:
            registry.create("strategies", {"name": name}, "strategy")
        assert "\n" not in str(caught.value)


# -- distributions ---------------------------------------------------------------------------------------------------


def install(folder: Path, name: str, *, top_level: str | None = None, files: str = "", entry_points: str = "") -> None:
    """A made-up installed distribution."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(files)
    for line in files.splitlines():  # the backport importlib_metadata, once imported, looks for them
        listed = folder / line.partition(",")[0]
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.touch()
    if top_level is not None:
        (info / "top_level.txt").write_text(top_level)
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("package", ["strategies", "scenarios"])
@pytest.mark.parametrize("says_so", ["top_level", "package files", "module file"])
def test_another_owner_is_fenced_off(
    package: str, says_so: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says_so == "top_level":
        install(tmp_path, "game-theory", top_level=f"games\n{package}\n")
    elif says_so == "package files":
        install(tmp_path, "game-theory", files=f"games/x.py,,\n{package}/__init__.py,,\n")
    else:
        install(tmp_path, "game-theory", files=f"{package}.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=rf"'game-theory' also owns the top-level package '{package}'.*pip uninstall"):
        registry.names("strategies")


@pytest.mark.usefixtures("fresh")
def test_harmless_distributions_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "harmless", top_level="game\nmy_strategies\n", files="game/strategies/__init__.py,,\n")
    install(tmp_path, "cl_lab", top_level="cl_lab\nstrategies\nscenarios\n")  # ourselves, by the other spelling
    monkeypatch.syspath_prepend(tmp_path)
    registry.fence()


@pytest.mark.usefixtures("fresh")
def test_a_strangers_plugin_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_plugin.py").write_text(PLUGIN)
    install(
        tmp_path,
        "stranger",
        entry_points="[cl_lab.strategies]\nmine = stranger_plugin:Mine\nbroken = stranger_plugin:Absent\n"
        "gone = no_such_module:X\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"name": "mine", "summary": "A strategy of one file."} in registry.summaries("strategies")
    assert registry.create("strategies", {"name": "mine", "strength": 4}, "strategy").strength == 4.0
    for name, cause in (("broken", "Absent"), ("gone", "no_such_module")):
        with pytest.raises(PluginError, match=rf"strategy '{name}' .*cannot be imported: .*{cause}.*; reinstall"):
            registry.load("strategies", name)
        assert {"name": name, "summary": ""} in registry.summaries("strategies")
    del sys.modules["stranger_plugin"]


@pytest.mark.usefixtures("fresh")
def test_two_plugins_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "stranger", entry_points="[cl_lab.strategies]\newc = stranger:EWC\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"two plug-ins are called 'ewc' in cl_lab\.strategies: .*; uninstall one"):
        registry.names("strategies")


def test_listing_imports_nothing_heavy() -> None:
    program = (
        "import json, sys\n"
        "from cl_lab import registry\n"
        "found = {kind: registry.summaries(kind) for kind in registry.KINDS}\n"
        "heavy = ['torch', 'numpy', 'scipy', 'avalanche', 'mlflow', 'pydantic', 'strategies', 'scenarios']\n"
        "print(json.dumps([found, [m for m in heavy if m in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert found["strategies"]
    assert found["scenarios"]
    assert found["metrics"]
    assert set(loaded) <= {"strategies", "scenarios"}, "their empty __init__ at most"


def test_kinds_in_messages() -> None:
    assert [registry.singular(k) for k in registry.KINDS] == ["scenario", "strategy", "model", "editor", "metric"]
