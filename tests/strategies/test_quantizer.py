"""Product quantisation: nearest codes, equal values from equal codebooks whoever learnt them, faiss as an oracle."""

from __future__ import annotations

import math

import pytest
import torch

from cl_lab import checkpoint
from cl_lab.errors import ConfigError, DataError
from strategies._quantizer import ProductQuantizer, faiss_or_none


def vectors(n: int = 600, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        d, d, generator=torch.Generator().manual_seed(seed + 1)
    )


BACKENDS = ["faiss", "scikit-learn"]


def fitted(backend: str, *, codebooks: int = 4, size: int = 32, opq: bool = False) -> ProductQuantizer:
    if backend == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    quantizer = ProductQuantizer(12, codebooks, size)
    quantizer.fit(vectors(), seed=3, opq=opq, backend=backend)  # type: ignore[arg-type]
    return quantizer


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_piece_gets_its_nearest_centroid(backend: str) -> None:
    quantizer = fitted(backend)
    x = vectors(50, seed=9)
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == (50, 4)
    pieces = x.view(50, 4, 3)
    distances = (pieces.unsqueeze(2) - quantizer.centroids).square().sum(dim=3)
    assert torch.equal(codes.long(), distances.argmin(dim=2))
    decoded = torch.stack([quantizer.centroids[m][codes[:, m].long()] for m in range(4)], dim=1).flatten(1)
    assert torch.equal(quantizer.decode(codes), decoded)
    relative = float((x - decoded).square().sum() / x.square().sum())
    each = ((x - decoded).square().sum(dim=1) / x.square().sum(dim=1)).clamp(max=1)
    assert quantizer.error(x) == pytest.approx((relative, float(each.mean())))
    assert relative < 0.5


def test_backends_agree_on_what_can_be_reached() -> None:
    faiss, scikit = fitted("faiss"), fitted("scikit-learn")
    assert faiss.error(vectors()).power == pytest.approx(scikit.error(vectors()).power, rel=0.1)


def test_faiss_decodes_the_same_codebooks_to_the_same_values() -> None:
    """faiss's own ProductQuantizer, given codebooks that scikit-learn learnt, gives our codes and our values."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    ours = ProductQuantizer(12, 4, 256)
    ours.fit(vectors(3000), seed=0, backend="scikit-learn")
    theirs = faiss.ProductQuantizer(12, 4, 8)
    faiss.copy_array_to_vector(ours.centroids.flatten().numpy(), theirs.centroids)
    x = vectors(500, seed=5)
    codes = theirs.compute_codes(x.numpy())
    assert torch.equal(ours.encode(x), torch.from_numpy(codes))
    assert torch.equal(ours.decode(torch.from_numpy(codes)), torch.from_numpy(theirs.decode(codes)))


def test_a_rotation_helps_where_pieces_are_correlated() -> None:
    plain, rotated = fitted("faiss", size=16), fitted("faiss", size=16, opq=True)
    assert rotated.rotation is not None
    torch.testing.assert_close(rotated.rotation @ rotated.rotation.T, torch.eye(12), atol=1e-4, rtol=0)
    assert rotated.error(vectors()).power < plain.error(vectors()).power
    assert rotated.nbytes == plain.nbytes + 12 * 12 * 4 == 16 * 12 * 4 + 12 * 12 * 4


def test_as_many_codes_as_vectors_lose_nothing() -> None:
    few = vectors(16)
    quantizer = ProductQuantizer(12, 1, 16)
    quantizer.fit(few, seed=0, backend="scikit-learn")
    assert max(quantizer.error(few)) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_decides_the_codebooks(backend: str) -> None:
    assert torch.equal(fitted(backend).centroids, fitted(backend).centroids)


def test_large_codebooks_take_two_bytes() -> None:
    quantizer = ProductQuantizer(12, 2, 300)
    quantizer.fit(vectors(400), seed=0, backend="scikit-learn")
    codes = quantizer.encode(vectors(400))
    assert codes.dtype == torch.int16
    assert quantizer.code_bytes == 4
    assert int(codes.max()) > 255


def test_state_survives_and_names_its_version() -> None:
    quantizer = fitted("scikit-learn")
    state = checkpoint.unflatten(*checkpoint.flatten(quantizer.state_dict()))
    other = ProductQuantizer(12, 4, 32)
    other.load_state_dict(state)
    codes = quantizer.encode(vectors(5))
    assert torch.equal(other.decode(codes), quantizer.decode(codes))
    with pytest.raises(DataError, match="codebooks have version 7, this cl-lab reads 1"):
        other.load_state_dict({**state, "version": 7})


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^codebooks = 5: must divide the 12 channels of the latents; .* is [46]$"):
        ProductQuantizer(12, 5, 32)
    with pytest.raises(DataError, match=r"^codebooks of 32 centroids cannot be learnt from 20 vectors"):
        ProductQuantizer(12, 4, 32).fit(vectors(20), seed=0)


def test_a_rotation_wants_as_many_vectors_as_the_next_power_of_two() -> None:
    with pytest.raises(DataError, match=r"^codebooks of 20 centroids cannot be learnt from 31 vectors, .* than 32;"):
        ProductQuantizer(12, 4, 20).fit(vectors(31), seed=0, opq=True)
    ProductQuantizer(12, 4, 20).fit(vectors(31), seed=0)
    pytest.importorskip("faiss", reason="faiss is not installed")
    ProductQuantizer(12, 4, 20).fit(vectors(32), seed=0, opq=True)


def test_without_faiss_its_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    assert faiss_or_none() is None
    quantizer = ProductQuantizer(12, 4, 32)
    with pytest.raises(ConfigError, match=r"^opq=true needs faiss, which is not installed; pip install faiss-cpu"):
        quantizer.fit(vectors(), seed=0, opq=True)
    quantizer.fit(vectors(), seed=0)
    assert quantizer.error(vectors()).power < 0.5


def test_the_error_of_nothing_is_undefined() -> None:
    assert all(math.isnan(share) for share in fitted("scikit-learn").error(torch.zeros(3, 12)))


def test_zeros_do_not_count_among_vectors_and_a_worthless_code_counts_once() -> None:
    quantizer = fitted("scikit-learn")
    x = torch.cat([1000 * torch.ones(1, 12), 0.001 * torch.ones(2, 12), torch.zeros(5, 12)])
    power, each = quantizer.error(x)
    missed = (x - quantizer.decode(quantizer.encode(x))).square().sum(dim=1)
    assert power == pytest.approx(float(missed.sum() / x.square().sum()))
    assert each == pytest.approx((float(missed[0] / x[0].square().sum()) + 2) / 3)
