"""Who may import whom: the layers of DESIGN, kept true by reading every import statement."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.checkout

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cl_lab", "strategies", "scenarios")

# Modules of the core from the ground up; a module imports only from its own layer or below.
LAYERS = [
    {"cl_lab", "cl_lab.errors", "cl_lab.compat", "cl_lab.files"},
    {
        "cl_lab.facts",
        "cl_lab.hub",
        "cl_lab.records",
        "cl_lab.knobs",
        "cl_lab.environment",
        "cl_lab.adapters",
        "cl_lab.module_paths",
        "cl_lab.subjects",
    },
    {
        "cl_lab.protocols",
        "cl_lab.seeding",
        "cl_lab.display",
        "cl_lab.checkpoint",
        "cl_lab.editable",
        "cl_lab.metrics",
        "cl_lab.names",
        "cl_lab.overlap",
        "cl_lab.patches",
        "cl_lab.probe_texts",
    },
    {
        "cl_lab.config",
        "cl_lab.registry",
        "cl_lab.models",
        "cl_lab.pretrained",
        "cl_lab.image_libraries",
        "cl_lab.visual_questions",
        "cl_lab.answers",
        "cl_lab.causal_lm",
        "cl_lab.drift",
        "cl_lab.edit_scores",
        "cl_lab.generation",
        "cl_lab.edit_strategy",
        "cl_lab.latents",
        "cl_lab.launch",
        "cl_lab.chain",
        "cl_lab.augmentation",
        "cl_lab.results",
    },
    {"cl_lab.learner", "cl_lab.tracking", "cl_lab.reporting", "cl_lab.doctor"},
    {"cl_lab.editing", "cl_lab.strategy_editor", "cl_lab.trainer"},
    {"cl_lab.deployment", "cl_lab.experiment", "cl_lab.known_facts"},
    {"cl_lab.edit_worker"},
    {"cl_lab.serving"},
    {"cl_lab.server"},
    {"cl_lab.bench_serving"},
    {"cl_lab.comparison", "cl_lab.rank", "cl_lab.bench", "cl_lab.diagnosis"},
    {"cl_lab.cli"},
    {"cl_lab.__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}

# What a plug-in may lean on.
LEAVES = {
    "cl_lab.adapters",
    "cl_lab.compat",
    "cl_lab.editable",
    "cl_lab.errors",
    "cl_lab.facts",
    "cl_lab.files",
    "cl_lab.hub",
    "cl_lab.knobs",
    "cl_lab.module_paths",
    "cl_lab.names",
    "cl_lab.patches",
    "cl_lab.probe_texts",
    "cl_lab.protocols",
    "cl_lab.records",
    "cl_lab.seeding",
    "cl_lab.subjects",
}

# Heavy or replaceable third parties: each in one place only.
HOMES = {
    "avalanche": "scenarios/",
    "mlflow": "cl_lab/tracking.py",
    "deepspeed": ("cl_lab/learner.py", "cl_lab/compat.py"),
    "accelerate": "cl_lab/learner.py",
    "faiss": "strategies/",
    "fastapi": "cl_lab/server.py",
    "uvicorn": "cl_lab/server.py",
    "prometheus_client": "cl_lab/server.py",
    "matplotlib": ("cl_lab/reporting.py", "cl_lab/tracking.py"),
    "omegaconf": "cl_lab/config.py",
    "peft": "cl_lab/causal_lm.py",
    "timm": "cl_lab/image_libraries.py",
    "transformers": "cl_lab/hub.py",
    "tokenizers": "cl_lab/hub.py",
    "huggingface_hub": "cl_lab/hub.py",
    "gguf": "cl_lab/hub.py",
}

# Too slow to import before a command needs them.
HEAVY = {"torch", "numpy", "scipy", "matplotlib", "mlflow", "avalanche", "accelerate", "deepspeed", "transformers"}
LIGHT = {
    "cl_lab",
    "cl_lab.cli",
    "cl_lab.hub",
    "cl_lab.facts",
    "cl_lab.errors",
    "cl_lab.registry",
    "cl_lab.knobs",
    "cl_lab.display",
    "cl_lab.launch",
}


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute dotted names that a file imports (relative ones resolved), anywhere or at module top only."""
    tree = ast.parse(path.read_text())
    package = module_of(path).rpartition(".")[0] if path.name != "__init__.py" else module_of(path)
    names: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([package, *([base] if base else [])])
            for alias in node.names:
                inside = (ROOT / Path(*base.split(".")) / f"{alias.name}.py").exists()
                names.add(f"{base}.{alias.name}" if inside else base)
    return names


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_downwards(path: Path) -> None:
    module = module_of(path)
    for name in imports(path):
        root = name.partition(".")[0]
        if module.startswith("cl_lab"):
            assert module in LEVEL, f"{module} has no layer yet; add it to LAYERS"
            assert root not in ("strategies", "scenarios"), (
                f"{module} imports {name}; plug-ins are reached by entry point"
            )
            if root == "cl_lab":
                assert LEVEL[name] <= LEVEL[module], f"{module} imports {name} from a layer above"
        else:
            own = module.partition(".")[0]
            if root == "cl_lab":
                assert name in LEAVES, f"{module} imports {name}; a plug-in may use {sorted(LEAVES)}"
            assert root not in PACKAGES or root in ("cl_lab", own), (
                f"{module} imports {name} of another plug-in package"
            )


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_third_parties_have_one_home(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        home = HOMES.get(name.partition(".")[0])
        assert home is None or where.startswith(home), f"{where} imports {name}, which belongs in {home}"


def test_sources_are_found() -> None:
    assert len(sources()) > 20


def test_command_line_starts_light() -> None:
    for path in sources():
        if module_of(path) in LIGHT:
            heavy = {n.partition(".")[0] for n in imports(path, top_level=True)} & HEAVY
            assert not heavy, f"{module_of(path)} imports {heavy} before any command runs"


def test_no_module_imports_two_layers_in_a_circle() -> None:
    graph = {module_of(p): {n for n in imports(p, top_level=True) if n in LEVEL} for p in sources()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in graph.get(start, set()) - {start}
        )

    for module in graph:
        if module.startswith("cl_lab."):
            assert not reaches(module, module, {module}), f"{module} imports itself through others"
