"""Checkpoints: whole or absent, damage noticed, the one before used, nothing lost when the disk is full."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_lab import checkpoint, files
from cl_lab.errors import CheckpointError
from cl_lab.records import State


def state(n: int = 0) -> State:
    """One of every kind that a plug-in may save."""
    return {
        "step": n,
        "weights": {"a.b": torch.full((2, 3), float(n)), "flag": torch.tensor([True, False])},
        "rng": torch.get_rng_state(),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "half": torch.randn(3, generator=torch.Generator().manual_seed(n)).bfloat16(),
        "empty": {},
        "deep": {"er": {"still": {}, "list": [1, [2.5, None], {"k": "v"}]}},
        "text": "λ/θ",
        "none": None,
        "yes": True,
        "tiny": 5e-324,
        "odd/name": {"~tilde": 1, "~1": 2, "": 3, "a/b~c": torch.ones(1)},
    }


# -- flattening ------------------------------------------------------------------------------------------------------


def test_flatten_has_an_inverse() -> None:
    tensors, values = checkpoint.flatten(state())
    assert all(isinstance(v, torch.Tensor) for v in tensors.values())
    json.dumps(values)
    back = checkpoint.unflatten(tensors, values)
    assert checkpoint.equal(back, state())
    assert back["empty"] == {}
    assert back["deep"]["er"]["still"] == {}
    assert back["odd/name"].keys() == {"~tilde", "~1", "", "a/b~c"}


def test_names_that_look_alike_stay_apart() -> None:
    alike: State = {"a/b": 1, "a": {"b": 2}, "a~1b": 3, "a~b": 4, "a~0b": 5}
    assert checkpoint.unflatten(*checkpoint.flatten(alike)) == alike


@pytest.mark.parametrize(
    "other",
    [{"x": torch.ones(2).double()}, {"x": torch.ones(3)}, {"x": torch.zeros(2)}, {"y": torch.ones(2)}, {"x": 1}, {}],
)
def test_equal_tells_states_apart(other: State) -> None:
    one: State = {"x": torch.ones(2)}
    assert checkpoint.equal(one, {"x": torch.ones(2)})
    assert not checkpoint.equal(one, other)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new" / "folder", 123, state(), keep=1)
    assert path.name == "step-000000123"
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    assert checkpoint.equal(checkpoint.read(path), state())


def test_views_and_transposes_are_saved_as_seen(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    saved: State = {"view": whole[1:3], "turned": whole.t(), "column": whole[:, 2], "expanded": whole[:1].expand(5, 6)}
    read = checkpoint.read(checkpoint.save(tmp_path, 0, saved, keep=1))
    assert checkpoint.equal(read, saved)


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    shared = torch.arange(5.0)
    saved: State = {"one": shared, "two": {"again": shared}}
    read = checkpoint.read(checkpoint.save(tmp_path, 0, saved, keep=1))
    assert checkpoint.equal(read, saved)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 5, 10, 200, 1000):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000200", "step-000001000"]


def test_experiences_without_steps_are_told_apart(tmp_path: Path) -> None:
    # Joint training adds no step after the first experience.
    for experience in range(4):
        checkpoint.save(tmp_path, 30, state(experience), keep=2, suffix=f"-{experience:05d}")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, state(1), keep=2)
    checkpoint.save(tmp_path, 7, state(2), keep=2)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 2


def test_left_over_temporary_folders_are_ignored_and_cleaned(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    left = tmp_path / ".step-000000002.99999.tmp"
    left.mkdir()
    (left / "state.json").write_text("half a fi")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 1
    checkpoint.save(tmp_path, 3, state(3), keep=2)
    assert not left.exists()


@pytest.mark.slow
def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = (
        "import sys, torch, pathlib\n"
        "from cl_lab import checkpoint\n"
        "for step in range(1, 10**6):\n"
        "    state = {'step': step, 'x': torch.full((20000,), float(step))}\n"
        "    checkpoint.save(pathlib.Path(sys.argv[1]), step, state, keep=2)\n"
        "    print(step, flush=True)\n"
    )
    for i in range(4):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        done = 0
        for _ in range(5 + 3 * i):
            done = int(child.stdout.readline())
        child.kill()
        child.wait()
        child.stdout.close()
        found = checkpoint.load_newest(tmp_path)
        assert found is not None
        step = found[0]["step"]
        assert step >= done
        assert torch.equal(found[0]["x"], torch.full((20000,), float(step)))


# -- what can go wrong -----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x20
    path.write_bytes(data)


def edit(path: Path) -> None:
    document = json.loads(path.read_text())
    document["body"] = document["body"].replace('"step": 2', '"step": 3')
    path.write_text(json.dumps(document))


DAMAGE: list[tuple[str, str, Callable[[Path], object]]] = [
    ("truncated tensors", "tensors.safetensors", truncate),
    ("flipped tensor bit", "tensors.safetensors", flip),
    ("empty tensors", "tensors.safetensors", lambda p: p.write_bytes(b"")),
    ("no tensors", "tensors.safetensors", Path.unlink),
    ("truncated values", "state.json", truncate),
    ("flipped value bit", "state.json", flip),
    ("edited values", "state.json", edit),
    ("empty values", "state.json", lambda p: p.write_text("")),
    ("no values", "state.json", Path.unlink),
    ("other json", "state.json", lambda p: p.write_text("[1, 2]")),
    ("no hash", "state.json", lambda p: p.write_text('{"body": "{}"}')),
    ("number for a body", "state.json", lambda p: p.write_text('{"body": 1, "sha256": ""}')),
    ("not text", "state.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
]


@pytest.mark.parametrize(("file", "damage"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_noticed_and_the_one_before_used(
    file: str, damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    newest = checkpoint.save(tmp_path, 2, state(2), keep=2)
    damage(newest / file)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        checkpoint.read(newest)
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "cl_lab"):
        found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert checkpoint.equal(found[0], state(1))
    assert found[1].name == "step-000000001"
    assert "using checkpoint step-000000001 instead of damaged step-000000002" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(checkpoint.save(tmp_path, step, state(step), keep=2) / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(step-000000002, step-000000001\)"):
        checkpoint.load_newest(tmp_path)


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "absent") is None
    (tmp_path / "step-notes.txt").write_text("not a checkpoint")
    assert checkpoint.load_newest(tmp_path) is None


def test_damaged_later_ones_take_no_place(tmp_path: Path) -> None:
    """After going on from an earlier checkpoint, the damaged later one must not push whole ones out."""
    for step in (10, 20):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    flip(tmp_path / "step-000000020" / "tensors.safetensors")
    for step in (13, 16):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000013", "step-000000016"]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["safetensors.torch.save_file", "pathlib.Path.write_text", "os.fsync", "pathlib.Path.rename"]
)
def test_a_full_disk_loses_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(where, no_space)
        with pytest.raises(
            CheckpointError, match=r"cannot write checkpoint .*step-000000003: No space left on device"
        ) as e:
            checkpoint.save(tmp_path, 3, state(3), keep=2)
    assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert checkpoint.equal(found[0], state(2))


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits")
def test_a_file_that_cannot_grow_is_an_error(tmp_path: Path) -> None:
    """As a full disk really shows: an error from inside safetensors, which is no OSError."""
    program = (
        "import pathlib, resource, signal, sys, torch\n"
        "from cl_lab import checkpoint, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    checkpoint.save(pathlib.Path(sys.argv[1]), 2, {'x': torch.zeros(10_000)}, keep=2)\n"
        "except errors.CheckpointError as error:\n"
        "    print(error)\n"
    )
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot write checkpoint" in done.stdout
    assert "File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*file/step-000000001: Not a directory"):
        checkpoint.save(tmp_path / "file", 1, state(), keep=1)


# -- single files ----------------------------------------------------------------------------------------------------


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    files.write_atomically(path, "one λ")
    assert path.read_text() == "one λ"
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            files.write_atomically(path, "three")
    assert path.read_text() == "two"
    files.write_atomically(path, "four")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
