"""The built wheel holds exactly the three packages, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.checkout]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source") / "cl-lab"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "__pycache__", "build", "runs", ".*_cache"),
    )
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_exactly_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cl_lab", "strategies", "scenarios"}
    packages = ("cl_lab", "strategies", "scenarios")
    held = {n for n in names if ".dist-info/" not in n}
    there = {p.relative_to(ROOT).as_posix() for d in packages for p in (ROOT / d).rglob("*") if p.is_file()}
    assert {n for n in there if "__pycache__" not in n} == held, "templates, pages and facts travel along"


def test_what_users_type_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Files are all that a wheel and the checkout could differ in; so the tests of commands and scenarios are enough."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(installed),
            str(wheel),
        ],
        check=True,
        timeout=300,
    )
    shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", elsewhere)  # pytest's settings; the package itself is not here
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import cl_lab, strategies, scenarios; print(cl_lab.__file__, strategies.__file__)"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(Path(p).is_relative_to(installed) for p in where.stdout.split()), where.stdout
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "not slow and not checkout", "-p", "no:cacheprovider"),
            *("tests/e2e", "tests/scenarios"),
        ],
        cwd=elsewhere,
        env={k: v for k, v in environment.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
