"""Finding and reading data sets: made-up folders of every layout, and every way in which files are wrong."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cl_lab.errors import DataError
from scenarios import _cache, _sources
from scenarios._readers import read_cifar, unpickle

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHARED = Path(os.environ.get("CL_LAB_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data of this machine is seen, and the cache is a folder of the test."""
    monkeypatch.delenv("CL_LAB_DATA", raising=False)
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_sources, "SYSTEM_ROOT", tmp_path / "system")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool = True, train: int = 40, test: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, count in zip(IDX, (train, train, test, test), strict=True):
        array = np.arange(count) % 10 if "labels" in name else rng.integers(0, 256, (count, 6, 6))
        arrays[name] = array.astype(np.uint8)
        raw = idx_bytes(arrays[name])
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return arrays


def png(size: int, level: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), level if mode == "L" else (level, 0, 255 - level)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(folder: Path, into: Path) -> Path:
    """Pack a folder into a zip or tar archive, by its name."""
    into.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if into.suffix == ".zip":
        with zipfile.ZipFile(into, "w") as packed:
            for f in files:
                packed.write(f, f.relative_to(folder))
    else:
        with tarfile.open(into, f"w:{into.suffix[1:]}") as packed_tar:
            for f in files:
                packed_tar.add(f, "./" + f.relative_to(folder).as_posix())
    return into


# -- idx -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", ["", "mnist", "vision/mnist", "MNIST/raw"])
def test_idx_layouts(tmp_path: Path, inside: str, zipped: bool) -> None:
    arrays = write_idx(tmp_path / "root" / inside, zipped)
    images = _sources.load("mnist", str(tmp_path / "root"))
    assert images.train_x.shape == (40, 1, 6, 6)
    assert images.train_x.dtype == torch.uint8
    assert images.train_y.dtype == torch.int64
    assert np.array_equal(images.train_x[:, 0].numpy(), arrays[IDX[0]])
    assert np.array_equal(images.test_y.numpy(), arrays[IDX[3]])


def test_order_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / "mine", tmp_path / "env", tmp_path / "cache" / "data", tmp_path / "system"]
    monkeypatch.setenv("CL_LAB_DATA", str(places[1]))
    for count, place in zip((40, 30, 20, 10), places, strict=True):
        write_idx(place / "fashion-mnist", train=count)
    for count, place in zip((40, 30, 20, 10), places, strict=True):
        assert len(_sources.load("fashion-mnist", str(places[0])).train_y) == count
        shutil.rmtree(place)
    with pytest.raises(DataError, match="not found"):
        _sources.load("fashion-mnist", str(places[0]))


def test_a_folder_of_mnist_is_not_fashion_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST")
    with pytest.raises(DataError, match="fashion-mnist: not found"):
        _sources.load("fashion-mnist", str(tmp_path / "MNIST"))


def test_read_once_per_process_until_the_files_change(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    first = _sources.load("mnist", str(tmp_path))
    assert _sources.load("mnist", str(tmp_path)) is first
    write_idx(tmp_path / "mnist", train=50)
    assert len(_sources.load("mnist", str(tmp_path)).train_y) == 50


def test_absent_data_says_where_what_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_LAB_DATA", str(tmp_path / "env"))
    with pytest.raises(DataError) as caught:
        _sources.load("cifar100", str(tmp_path / "mine"))
    line = str(caught.value)
    assert "\n" not in line
    for part in ("mine", "env", "cache", "system", "cifar-100-python", "cl-lab fetch split-cifar100", "CL_LAB_DATA="):
        assert part in line


def test_incomplete_data_names_the_missing_file(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / f"{IDX[3]}.gz").unlink()
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte\[.gz\]"):
        _sources.load("mnist", str(tmp_path))


def _flip_official_size(folder: Path) -> None:
    images = np.zeros((60000, 28, 28), np.uint8)
    (folder / f"{IDX[0]}.gz").write_bytes(gzip.compress(idx_bytes(images), 1))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / f"{IDX[0]}.gz").write_bytes(b"not gzip at all"), r"train-images-idx3-ubyte.gz: damaged"),
        (
            lambda f: (f / f"{IDX[0]}.gz").write_bytes((f / f"{IDX[0]}.gz").read_bytes()[:-200]),
            r"train-images-idx3-ubyte.gz: damaged",
        ),
        (lambda f: (f / f"{IDX[1]}.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(60))), "wrong magic number"),
        (lambda f: (f / f"{IDX[1]}.gz").write_bytes(gzip.compress(b"\0\0")), "wrong magic number 0x0000"),
        (
            lambda f: (f / f"{IDX[2]}.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((9, 4, 4), np.uint8))[:-7])),
            "truncated, 7 bytes of 144",
        ),
        (
            lambda f: (f / f"{IDX[3]}.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(20, np.uint8)) + b"x")),
            "1 bytes follow the 20 entries",
        ),
        (
            lambda f: (f / f"{IDX[3]}.gz").write_bytes(gzip.compress(idx_bytes(np.arange(10, dtype=np.uint8)))),
            "20 images, but 10 labels",
        ),
        (
            lambda f: (f / f"{IDX[3]}.gz").write_bytes(gzip.compress(idx_bytes(np.arange(20, dtype=np.uint8)))),
            "test label 19",
        ),
        (
            lambda f: (f / f"{IDX[1]}.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(40, np.uint8)))),
            "no training samples of class 1",
        ),
        (_flip_official_size, "checksum mismatch"),
    ],
)
def test_damaged_idx(tmp_path: Path, spoil: Callable[[Path], None], complaint: str) -> None:
    write_idx(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=complaint) as caught:
        _sources.load("mnist", str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "cl-lab fetch split-mnist" in str(caught.value)


def test_statistics_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    write_idx(tmp_path)
    images = _sources.load("mnist", str(tmp_path))
    scaled = images.train_x.double() / 255
    assert images.mean == pytest.approx([scaled.mean().item()])
    assert images.std == pytest.approx([scaled.std(correction=0).item()])


# -- CIFAR's pickles -----------------------------------------------------------------------------------------------


def write_cifar(folder: Path, hundred: bool = False) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    n = 100 if hundred else 10
    for name in names:
        entry = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels" if hundred else "labels": list(range(n)),
        }
        # The official files were written by numpy 1, whose modules had other names.
        raw = pickle.dumps(entry, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        assert b"cnumpy.core.multiarray\n" in raw
        (folder / name).write_bytes(raw)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "inner"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_pickles(tmp_path: Path, name: str, inner: str, packed: bool) -> None:
    hundred = name == "cifar100"
    write_cifar(tmp_path / "made" / inner, hundred)
    expected = np.asarray(
        unpickle((tmp_path / "made" / inner / ("test" if hundred else "test_batch")).read_bytes())["data"]
    )
    root = tmp_path / "made"
    if packed:
        root = tmp_path / "packed"
        archive(tmp_path / "made", root / f"{'cifar-100' if hundred else 'cifar-10'}-python.tar.gz")
    images = _sources.load(name, str(root))
    assert images.train_x.shape == (100 if hundred else 50, 3, 32, 32)
    assert images.n_classes == (100 if hundred else 10)
    assert np.array_equal(images.test_x.flatten(1).numpy(), expected)


def test_pickles_may_not_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(DataError, match=r"data_batch_3: damaged .*only numpy arrays"):
        _sources.load("cifar10", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_as_long_as_the_official_one_must_be_it(tmp_path: Path) -> None:
    (tmp_path / "test").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"test: checksum mismatch, MD5 is \w+, the official file's is feed"):
        read_cifar(tmp_path, {"test": (100, "feed")}, "fix")


@pytest.mark.parametrize("spoil", ["cut", "labels", "archive", "missing"])
def test_damaged_cifar(tmp_path: Path, spoil: str) -> None:
    folder = tmp_path / "made" / "cifar-100-python"
    write_cifar(folder, hundred=True)
    root = tmp_path / "made"
    if spoil == "cut":
        (folder / "train").write_bytes((folder / "train").read_bytes()[:1000])
    elif spoil == "labels":
        entry = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1]}
        (folder / "test").write_bytes(pickle.dumps(entry))
    else:
        if spoil == "missing":
            (folder / "test").unlink()
        root = tmp_path / "packed"
        packed = archive(tmp_path / "made", root / "cifar-100-python.tar.gz")
        if spoil == "archive":
            packed.write_bytes(packed.read_bytes()[:-1000])
    with pytest.raises(DataError) as caught:
        _sources.load("cifar100", str(root))
    expected = {"cut": "train", "labels": "4 images, 2 labels", "archive": "tar.gz", "missing": "test: missing"}
    assert expected[spoil] in str(caught.value)
    assert "\n" not in str(caught.value)


# -- image files ---------------------------------------------------------------------------------------------------


def write_tree(root: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for label in range(10):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                grey = i == 1  # must come out as RGB all the same
                (folder / f"{i:04}.png").write_bytes(png(8, 20 * label + i, "L" if grey else "RGB"))


@pytest.mark.parametrize("form", ["folder", "cifar10_jpeg/cifar10_jpeg.tar.xz", "cifar10.zip"])
def test_cifar_image_files(tmp_path: Path, form: str) -> None:
    write_tree(tmp_path / "tree" / "cifar10")
    root = tmp_path / "tree"
    if form != "folder":
        root = tmp_path / "packed"
        archive(tmp_path / "tree" / "cifar10", root / form)
    images = _sources.load("cifar10", str(root))
    assert images.train_x.shape == (30, 3, 8, 8)
    assert images.train_y.tolist() == [label for label in range(10) for _ in range(3)]
    assert images.train_x[6, :, 0, 0].tolist() == [40, 0, 215]
    assert images.train_x[7, :, 0, 0].tolist() == [41, 41, 41]


def test_decoded_images_are_mapped_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "tree")
    archive(tmp_path / "tree", tmp_path / "root" / "cifar10.zip")
    first = _sources.load("cifar10", str(tmp_path / "root"))
    kept = sorted((tmp_path / "cache" / "decoded").iterdir())
    assert len(kept) == 1
    assert sorted(p.stem for p in kept[0].iterdir()) == sorted(_sources.readers.PARTS)
    _sources._read.cache_clear()

    def not_again(*_: object) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr(_sources.readers, "_decode", not_again)
    second = _sources.load("cifar10", str(tmp_path / "root"))
    assert torch.equal(first.train_x, second.train_x)
    second.train_x.zero_()  # copy on write: the file stays as it is
    _sources._read.cache_clear()
    assert torch.equal(first.train_x, _sources.load("cifar10", str(tmp_path / "root")).train_x)


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree" / "cifar10")
    first = _sources.load("cifar10", str(tmp_path / "tree")).train_x.clone()
    (kept,) = (tmp_path / "cache" / "decoded").iterdir()
    (kept / "train_x.npy").write_bytes(b"junk")
    _sources._read.cache_clear()
    assert torch.equal(first, _sources.load("cifar10", str(tmp_path / "tree")).train_x)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CL_LAB_CACHE", str(tmp_path / "file"))
    write_tree(tmp_path / "tree" / "cifar10")
    assert _sources.load("cifar10", str(tmp_path / "tree")).train_x.shape == (30, 3, 8, 8)


def test_a_full_disk_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "posix_fallocate", full)
    write_tree(tmp_path / "tree" / "cifar10")
    assert _sources.load("cifar10", str(tmp_path / "tree")).train_x.shape == (30, 3, 8, 8)
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [("0000.png", b"no image", "image train/class3/0000.png"), ("0000.png", png(9, 0), "is 9×9, the others 8×8")],
)
def test_damaged_image(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    write_tree(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "train" / "class3" / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        _sources.load("cifar10", str(tmp_path))
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


def test_wrong_number_of_class_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10")
    shutil.rmtree(tmp_path / "cifar10" / "train" / "class9")
    shutil.rmtree(tmp_path / "cifar10" / "test" / "class9")
    with pytest.raises(DataError, match="9 class folders in train/ and test/, expected 10"):
        _sources.load("cifar10", str(tmp_path))


# -- Tiny-ImageNet and CORe50 --------------------------------------------------------------------------------------

WNIDS = ["n03", "n01", "n02"]


def write_tiny(root: Path, lists_beside: Path | None = None) -> None:
    lines = []
    for label, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{wnid}_{i}.JPEG").write_bytes(png(8, 40 * label + i, "L" if i == 3 else "RGB"))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (root / "val" / "images").mkdir(parents=True)
    for i in range(6):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(png(8, 100 + i))
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t8\t8\n")
    lists = lists_beside or root
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "wnids.txt").write_text("\n".join([*WNIDS, "n99"]))
    (lists_beside / "val3.tsv" if lists_beside else root / "val" / "val_annotations.txt").write_text("".join(lines))


@pytest.mark.parametrize("form", ["folder", "zip", "tar with the lists beside it"])
def test_tiny_imagenet(tmp_path: Path, form: str) -> None:
    root = tmp_path / "root"
    if form == "folder":
        write_tiny(root / "tiny-imagenet-200")
    elif form == "zip":
        write_tiny(tmp_path / "made" / "tiny-imagenet-200")
        archive(tmp_path / "made", root / "tiny-imagenet-200.zip")
    else:
        write_tiny(tmp_path / "made" / "tiny-imagenet-200", root / "vision" / "tinyimagenet")
        archive(tmp_path / "made", root / "vision" / "tinyimagenet" / "tiny_imagenet_3c.tar.xz")
    images = _sources.load("tiny-imagenet", str(root))
    assert images.n_classes == 3
    assert images.train_x.shape == (12, 3, 8, 8)
    first = images.train_x[images.train_y == 0]  # n03 is the first of wnids.txt
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert images.test_y.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.test_x[:, 0, 0, 0].tolist() == list(range(100, 106))


@pytest.mark.parametrize("lost", ["list", "line"])
def test_tiny_imagenet_without_its_validation_list(tmp_path: Path, lost: str) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    if lost == "list":
        annotations.unlink()
    else:
        annotations.write_text(annotations.read_text().replace("val_4.JPEG", "val_9.JPEG"))
    with pytest.raises(
        DataError, match=r"lacks val/val_annotations.txt" if lost == "list" else r"val_4.JPEG has no line"
    ):
        _sources.load("tiny-imagenet", str(tmp_path))


def write_core50(root: Path, objects: int = 4) -> None:
    for session in range(1, 12):
        for thing in range(1, objects + 1):
            folder = root / f"s{session}" / f"o{thing}"
            folder.mkdir(parents=True)
            for i in range(2):
                (folder / f"C_{session:02}_{thing:02}_{i:03}.png").write_bytes(png(8, 10 * session + thing))


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_core50(tmp_path: Path, form: str) -> None:
    write_core50(tmp_path / "made" / "core50_128x128")
    root = tmp_path / "made"
    if form == "zip":
        root = tmp_path / "packed"
        archive(tmp_path / "made", root / "core50" / "core50_128x128.zip")
    images = _sources.load("core50", str(root))
    assert images.n_classes == 4
    assert images.train_domain is not None
    assert images.test_domain is not None
    assert images.train_domain.unique().tolist() == [1, 2, 4, 5, 6, 8, 9, 11]
    assert images.test_domain.unique().tolist() == [3, 7, 10]
    assert torch.equal(images.train_x[:, 0, 0, 0].long(), 10 * images.train_domain + images.train_y + 1)
    small = _sources.load("core50", str(root), pixels=4)
    assert small.train_x.shape[-2:] == (4, 4)


def test_core50_with_a_gap_in_its_objects(tmp_path: Path) -> None:
    write_core50(tmp_path / "core50_128x128")
    for session in range(1, 12):
        shutil.rmtree(tmp_path / "core50_128x128" / f"s{session}" / "o2")
    with pytest.raises(DataError, match="without gaps"):
        _sources.load("core50", str(tmp_path))


# -- digits, unknown names, downloads ------------------------------------------------------------------------------


def test_digits() -> None:
    images = _sources.digits()
    assert (len(images.train_y), len(images.test_y)) == (1442, 355)
    assert images.train_x.shape[1:] == (1, 8, 8)
    assert images.train_x.max() == 255
    assert int(torch.bincount(images.test_y).min()) >= 34
    assert torch.equal(images.test_x, _sources.digits().test_x)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        _sources.load("cifar1")


def test_fetch_ends_where_load_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_lab.compat import import_torchvision

    import_torchvision()
    import torchvision

    seen = []

    def downloaded(root: str, train: bool, download: bool) -> None:
        seen.append((train, download))
        write_idx(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", downloaded)
    assert _sources.fetch("fashion-mnist", tmp_path / "cache" / "data") == tmp_path / "cache" / "data"
    assert seen == [(True, True), (False, True)]
    assert len(_sources.load("fashion-mnist").train_y) == 40


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_lab.compat import import_torchvision

    import_torchvision()
    import torchvision

    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading\nTried many mirrors")

    monkeypatch.setattr(torchvision.datasets, "MNIST", unreachable)
    with pytest.raises(DataError, match=r"download to .* failed .*Tried many mirrors.*by hand") as caught:
        _sources.fetch("mnist", tmp_path)
    assert "\n" not in str(caught.value)


# -- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "vision" / "mnist").is_dir(), reason=f"no MNIST in {SHARED}")
def test_real_mnist() -> None:
    images = _sources.load("mnist", str(SHARED))
    assert images.train_x.shape == (60000, 1, 28, 28)
    assert images.mean == pytest.approx([0.1307], abs=1e-4)
    assert images.std == pytest.approx([0.3081], abs=1e-4)


@pytest.mark.skipif(not (SHARED / "vision" / "tinyimagenet").is_dir(), reason=f"no Tiny-ImageNet in {SHARED}")
@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_real_archives_are_recognised(name: str) -> None:
    """Without decoding them: that takes seconds."""
    _, files = _sources._locate(_sources.SOURCES[name], str(SHARED))
    assert files[0].name.endswith(".tar.xz")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "vision" / "cifar10_jpeg").is_dir(), reason=f"no CIFAR-10 in {SHARED}")
def test_real_cifar10() -> None:
    images = _sources.load("cifar10", str(SHARED))
    assert images.train_x.shape == (50000, 3, 32, 32)
    assert images.train_y.bincount().tolist() == [5000] * 10
    assert images.test_y.bincount().tolist() == [1000] * 10
    assert images.mean == pytest.approx([0.491, 0.482, 0.447], abs=2e-3)
