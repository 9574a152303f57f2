"""Product quantisation (Jégou, Douze & Schmid, PAMI 2011): vectors as short codes of codebook indices.

A vector of ``d`` numbers is cut into ``M`` pieces, and each piece is replaced by the nearest of ``K`` centroids learnt by
k-means, so ``M·⌈log₂K / 8⌉`` bytes stand for ``4d``. *OPQ* (Ge et al., CVPR 2013) first rotates the vectors so that pieces
are as independent as can be. faiss learns and encodes where it is installed, scikit-learn and torch otherwise; decoding
is one lookup in torch either way, so equal codebooks give equal values.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cl_lab.errors import ConfigError, DataError
from cl_lab.records import State

VERSION = 1
Backend = Literal["auto", "faiss", "scikit-learn"]

_CHUNK = 2**16  # vectors encoded at a time
_ITERATIONS = 25  # of k-means
_PER_CENTROID = 256  # vectors that k-means looks at, at most; faiss's own limit


def faiss_or_none() -> Any:
    """The faiss module, single-threaded like the process around it, or ``None`` where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())  # its own default is every core, whoever else is running
    return faiss


class Loss(NamedTuple):
    """What codes lose of vectors, as shares of their power; zeros in place of codes would give 1, no vectors give NaN.

    ``power`` is ``Σ‖x − x̂‖² / Σ‖x‖²``, which long vectors decide; ``vectors`` is the mean of each vector's own share, at
    most 1, zeros left out. They differ where a few vectors hold nearly all of the power: a language model's first token.
    """

    power: float
    vectors: float

    @classmethod
    def of(cls, missed: float, power: float, shares: float, count: float) -> Loss:
        """The shares of the sums that :meth:`ProductQuantizer.lost` gives."""
        return cls(missed / power if power else math.nan, shares / count if count else math.nan)


class ProductQuantizer:
    """Codebooks ``[M, K, d/M]`` float32 for vectors of ``dim`` numbers; ``rotation`` ``[d, d]`` is applied before (OPQ).

    Raises :class:`ConfigError` for sizes that do not fit each other.
    """

    def __init__(self, dim: int, codebooks: int, size: int) -> None:
        if dim % codebooks:
            fits = [m for m in range(1, dim + 1) if dim % m == 0]
            nearest = min(fits, key=lambda m: abs(m - codebooks))
            raise ConfigError(
                f"codebooks = {codebooks}: must divide the {dim} channels of the latents; the nearest that does is {nearest}"
            )
        self.dim, self.count, self.size = dim, codebooks, size
        self.centroids = torch.empty(0)
        self.rotation: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: as few bytes as the codebooks need."""
        return torch.uint8 if self.size <= 256 else torch.int16

    @property
    def code_bytes(self) -> int:
        """Bytes that stand for one vector."""
        return self.count * (1 if self.size <= 256 else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of codebooks and rotation."""
        rotation = 0 if self.rotation is None else self.rotation.numel() * 4
        return self.centroids.numel() * 4 + rotation

    def fit(self, x: Tensor, *, seed: int, opq: bool = False, backend: Backend = "auto") -> None:
        """Learn the codebooks from ``x`` ``[N, d]`` float32.

        Raises :class:`DataError` for fewer vectors than centroids (OPQ: than the next power of two), :class:`ConfigError`
        where faiss is asked for (OPQ asks for it, too) and not installed.
        """
        needed = 2 ** _bits(self.size) if opq else self.size  # faiss learns the rotation with whole bits
        if len(x) < needed:
            wanted = f", with opq no fewer than {needed}" if needed > self.size else ""
            raise DataError(
                f"codebooks of {self.size} centroids cannot be learnt from {len(x)} vectors{wanted}; lower codebook_size or "
                "give more base samples"
            )
        faiss = None if backend == "scikit-learn" else faiss_or_none()
        if faiss is None and (backend == "faiss" or opq):
            what = "opq=true" if opq else "backend=faiss"
            raise ConfigError(f"{what} needs faiss, which is not installed; pip install faiss-cpu, or leave it out")
        x = x.detach().to("cpu", torch.float32).contiguous()
        if faiss is None:
            self.centroids = _k_means(x, self.count, self.size, seed)
            return
        if opq:
            matrix = faiss.OPQMatrix(self.dim, self.count)
            matrix.pq = faiss.ProductQuantizer(self.dim, self.count, _bits(self.size))  # owned below, so not collected
            kept = matrix.pq
            matrix.train(x.numpy())
            self.rotation = torch.from_numpy(faiss.vector_to_array(matrix.A).reshape(self.dim, self.dim)).clone()
            del kept
            x = x @ self.rotation.T
        # One k-means per piece: faiss's own ProductQuantizer takes powers of two only.
        parts = []
        for part in x.view(len(x), self.count, -1).unbind(dim=1):
            kmeans = faiss.Kmeans(
                part.shape[1], self.size, niter=_ITERATIONS, seed=seed % 2**31, min_points_per_centroid=1
            )
            kmeans.train(part.contiguous().numpy())
            parts.append(torch.from_numpy(kmeans.centroids).clone())
        self.centroids = torch.stack(parts)

    def encode(self, x: Tensor) -> Tensor:
        """Codes ``[N, M]`` of ``x`` ``[N, d]``: the nearest centroid of each piece, the first of equals."""
        centroids = self.centroids.to(x.device)
        half_norms = centroids.square().sum(dim=2) / 2  # ‖x − c‖² = ‖x‖² − 2(x·c − ‖c‖²/2)
        codes = []
        for chunk in x.to(torch.float32).split(_CHUNK):
            if self.rotation is not None:
                chunk = chunk @ self.rotation.to(x.device).T
            pieces = chunk.view(len(chunk), self.count, -1).transpose(0, 1)
            nearest = torch.baddbmm(half_norms.unsqueeze(1), pieces, centroids.transpose(1, 2), alpha=-1).argmin(dim=2)
            codes.append(nearest.T.to(self.dtype))
        return torch.cat(codes) if codes else torch.empty(0, self.count, dtype=self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors ``[N, d]`` float32 of ``codes`` ``[N, M]``."""
        centroids = self.centroids.to(codes.device)
        index = codes.to(torch.int64).add_(torch.arange(self.count, device=codes.device) * self.size)
        found = torch.nn.functional.embedding(index, centroids.flatten(0, 1)).flatten(1)
        return found if self.rotation is None else found @ self.rotation.to(codes.device)

    def lost(self, x: Tensor, codes: Tensor) -> Tensor:
        """What ``codes`` ``[N, M]`` of ``x`` ``[N, d]`` lose, as sums ``[4]`` float64 that may be added up over batches.

        They are ``Σ‖x − x̂‖²``, ``Σ‖x‖²``, ``Σ min(1, ‖x − x̂‖² / ‖x‖²)`` and the number of vectors that are not zero;
        :meth:`Loss.of` makes shares of them.
        """
        missed, power = (v.square().sum(dim=1).to(torch.float64) for v in (x - self.decode(codes), x))
        there = power > 0
        share = (missed[there] / power[there]).clamp(max=1)
        return torch.stack([missed.sum(), power.sum(), share.sum(), there.sum().to(share)])

    def error(self, x: Tensor) -> Loss:
        """What the codes of ``x`` ``[N, d]`` lose of it."""
        return Loss.of(*self.lost(x, self.encode(x)).tolist())

    def state_dict(self) -> State:
        """Codebooks, rotation and the version of this format."""
        return {"version": VERSION, "centroids": self.centroids, "rotation": self.rotation}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` gave. Raises :class:`DataError` for codebooks of another version."""
        version, centroids, rotation = state["version"], state["centroids"], state["rotation"]
        if version != VERSION:
            raise DataError(f"codebooks have version {version}, this cl-lab reads {VERSION}; learn them again")
        assert isinstance(centroids, Tensor)
        self.centroids = centroids
        self.rotation = rotation if isinstance(rotation, Tensor) else None


def _bits(size: int) -> int:
    return max(1, math.ceil(math.log2(size)))


def _k_means(x: Tensor, count: int, size: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    if len(x) > _PER_CENTROID * size:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: _PER_CENTROID * size]]
    parts = []
    for m, part in enumerate(x.view(len(x), count, -1).unbind(dim=1)):
        model = KMeans(size, random_state=(seed + m) % 2**31, n_init=1, max_iter=_ITERATIONS)
        model.fit(part.contiguous().numpy())
        parts.append(torch.from_numpy(model.cluster_centers_).to(torch.float32))
    return torch.stack(parts)
