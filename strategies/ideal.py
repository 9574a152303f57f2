"""The ideal continual learner by gradient projection (Peng, Giampouras & Vidal, ICML 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Experience, Objective, State, TensorData

_BATCH = 256
_CHUNK = 2**24  # numbers of unfolded patches held at once


@dataclass
class Ideal(Strategy):
    """Never forget: change each layer only in directions in which no past input has a component (null-space projection).

    The ideal continual learner goes through nested sets of minimisers (Peng et al., arXiv 2305.00316),

        ``K_0 = W``,   ``K_t = argmin_{w ∈ K_{t−1}} L_t(w)``.

    For a linear model with least squares ``K_t`` is an affine space, and gradient descent stays in it when the gradient
    ``G`` ``[outputs, inputs]`` is projected on the null space of past inputs, ``G ← G (I − B Bᵀ)`` with ``B`` an orthonormal
    basis of all of them, a bias counting as the weight of an input that is always 1. For softmax regression the same
    projection keeps all past logits, which is sufficient for the minimisers of past losses. Either way past outputs do not
    change at all, and what the stream leaves no room for is not learnt.

    With hidden layers the projection is made in every linear and convolutional layer on that layer's own inputs (patches),
    as OWM (Zeng et al. 2019) and GPM (Saha et al. 2021) do. Layer after layer, the outputs on past samples stay, but that
    is more than ``K_t`` demands: an approximation that gives up plasticity. ``energy`` below 1 trades: a basis then covers
    only that share of the squared norm of each experience's inputs (GPM's criterion), and forgetting is no longer zero.
    After the first experience parameters of other layers (normalisation) stand still; running statistics do not. Rows of
    a head that are impossible for all past task labels are free.

    It is the gradient that is projected, so the optimiser must step along it: plain SGD, or momentum that starts afresh
    with each experience. Weight decay, momentum kept over experiences, Adam and strategies that stand behind this one in a
    chain leave the null space; ``strict`` makes the first step that does so an error.
    """

    needs_boundaries: ClassVar[bool] = True
    objectives: ClassVar[frozenset[Objective]] = frozenset({"classification", "regression"})

    energy: float = knob(1.0, doc="share of the squared norm of past inputs to protect; 1: all of it", gt=0, le=1)
    tolerance: float = knob(
        1e-6, doc="directions with less than this share of the norm of a layer's inputs count as rounding", gt=0, lt=1
    )
    samples: int | None = knob(None, doc="samples of an experience whose inputs are protected; null: all", ge=1)
    strict: bool = knob(True, doc="refuse an optimiser that steps out of the null space")

    _bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # by name of the weight, [d, k]
    _biases: dict[str, str | None] = field(default_factory=dict, init=False, repr=False)
    _labels: list[int] = field(default_factory=list, init=False, repr=False)  # task labels of the past
    # Not state, but made of it once per experience: what to project with, and which rows of the head are free.
    _projectors: dict[str, tuple[Tensor, bool]] = field(default_factory=dict, init=False, repr=False)
    _free: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _before: dict[str, Tensor] | None = field(default=None, init=False, repr=False)
    _watching: bool = field(default=True, init=False, repr=False)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"energy": 0.95, "strict": False}

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        self._forget_made()

    def adjust_gradients(self, learner: Learner) -> None:
        if not self._bases:
            return
        if not self._projectors:
            self._make(learner)
        if self.strict and self._watching:
            self._before = {n: p.clone() for n, p in learner.parameters().items()}
        with learner.gradients() as gradients:
            for name, removed in self._components(gradients).items():
                gradients[name].sub_(removed)

    def after_step(self, learner: Learner) -> None:
        if self._before is None:
            return
        moved = {n: p - self._before[n] for n, p in learner.parameters().items()}
        for name, outside in self._components(moved).items():
            # Rounding of parameters and of the projection stays below these.
            allowed = 1e-4 * float(moved[name].norm()) + 1e-6 * float(self._before[name].norm())
            if float(outside.norm()) > allowed:
                raise ConfigError(
                    f"strategy ideal: the optimiser moved '{name}' along past inputs by {float(outside.norm()):.1e}; use "
                    "training.optimizer=sgd, weight_decay=0 and optimizer_state=fresh, put ideal last in a strategy chain, "
                    "or set strict=false and accept forgetting"
                )
        self._before, self._watching = None, False

    def _components(self, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name, the part of each of ``changes`` that past inputs forbid."""
        forbidden: dict[str, Tensor] = {}
        for weight, (basis, complement) in self._projectors.items():
            bias = self._biases[weight]
            names = [n for n in (weight, bias) if n is not None]
            if not all(n in changes for n in names):  # one of the two is frozen: the other alone must not move at all
                forbidden |= {n: changes[n] for n in names if n in changes}
                continue
            change = changes[weight].reshape(len(changes[weight]), -1)
            d = change.shape[1]
            along = change @ basis[:d]
            if bias is not None:
                along.addr_(changes[bias], basis[d])
            parts = {weight: (along @ basis[:d].T).view_as(changes[weight])}
            if bias is not None:
                parts[bias] = along @ basis[d]
            for name, part in parts.items():
                if complement:
                    torch.sub(changes[name], part, out=part)
                if weight in self._free:
                    part[self._free[weight]] = 0
            forbidden |= parts
        covered = {n for w, b in self._biases.items() for n in (w, b)}
        return forbidden | {n: v for n, v in changes.items() if n not in covered}

    def _forget_made(self) -> None:
        self._projectors.clear()
        self._free.clear()
        self._before, self._watching = None, True

    def _make(self, learner: Learner) -> None:
        for name, basis in self._bases.items():
            basis = self._bases[name] = basis.to(learner.device)
            complement = 2 * basis.shape[1] > len(basis)
            if complement:  # the smaller of the two spaces is cheaper; of none, nothing is left
                basis = torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :].contiguous()
            self._projectors[name] = basis, complement
        weight = "head.linear.weight"
        if learner.stream.task_labels and weight in self._bases:
            labels = torch.tensor(self._labels, device=learner.device)
            nothing = torch.zeros(len(labels), *learner.stream.input_shape, device=learner.device)
            with torch.no_grad():
                possible = learner.replica()(learner.prepare_input(nothing), labels).isfinite()
            self._free[weight] = ~possible.any(dim=0)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        data = experience.train
        self._labels = sorted({*self._labels, *data.t.unique().tolist()})
        if self.samples is not None and self.samples < len(data):
            data = data.take(torch.randperm(len(data), generator=learner.rng)[: self.samples])
        grams, self._biases = gram_matrices(learner.replica(), data, learner)
        for name, gram in grams.items():
            old = self._bases.get(name)
            self._bases[name] = grown(
                gram.new_zeros(len(gram), 0) if old is None else old.to(gram), gram, self.energy, self.tolerance
            ).float()
        self._forget_made()

    def measures(self) -> dict[str, float]:
        """Of every layer's input space, the share that past inputs take up."""
        return {f"used.{n.removesuffix('.weight')}": b.shape[1] / len(b) for n, b in self._bases.items()}

    def state_dict(self) -> State:
        return {"bases": dict(self._bases), "biases": dict(self._biases), "labels": list(self._labels)}

    def load_state_dict(self, state: State) -> None:
        bases, biases, labels = (state[k] for k in ("bases", "biases", "labels"))
        assert isinstance(bases, dict)
        assert isinstance(biases, dict)
        assert isinstance(labels, list)
        self._bases = {n: v for n, v in bases.items() if isinstance(v, Tensor)}
        self._biases = {n: None if v is None else str(v) for n, v in biases.items()}
        self._labels = [int(t) for t in labels]
        self._forget_made()


def grown(basis: Tensor, gram: Tensor, energy: float, tolerance: float) -> Tensor:
    """``basis`` ``[d, k]`` with as many orthonormal directions added as inputs with this ``gram`` matrix ``[d, d]`` ask for.

    Directions come in the order of their share in what the basis leaves uncovered; they are added until the basis covers
    the share ``energy`` of the trace, and none that has less than ``tolerance²`` of it. float64 throughout.
    """
    shared = basis.T @ gram
    rest = gram - basis @ shared - shared.T @ basis.T + basis @ (shared @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = gram.diagonal().sum()
    covered = total - values.sum() + values.cumsum(0) - values  # before each direction
    wanted = (values > tolerance**2 * total) & (covered < energy * total)
    new = vectors[:, wanted]
    new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
    return torch.cat([basis, new], dim=1)


@torch.no_grad()
def gram_matrices(
    model: nn.Module, data: TensorData, learner: Learner
) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """``Σ a aᵀ`` (float64, over all ranks) of the inputs of each linear and convolutional layer, by name of its weight.

    A layer with a bias has a 1 behind its inputs. Also returns the name of each layer's bias, or ``None``.
    """
    layers = _layers(model)
    if not layers:
        raise ConfigError(
            f"strategy ideal: {type(model).__name__} has no linear or convolutional layer to project; use a model that has, "
            "and no strategy chain that puts another model in its place"
        )
    grams: dict[str, Tensor] = {}
    handles = []
    for module, weight, bias in layers:

        def add(module: nn.Module, args: tuple[Tensor, ...], weight: str = weight, bias: str | None = bias) -> None:
            for rows in _input_rows(module, args[0]):
                a = rows.double()
                if bias is not None:
                    a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
                if weight not in grams:
                    grams[weight] = a.new_zeros(a.shape[1], a.shape[1])
                grams[weight].addmm_(a.T, a)

        handles.append(module.register_forward_pre_hook(add))
    mine = learner.shard(data)
    try:
        for start in range(0, len(mine), _BATCH):
            rows = slice(start, start + _BATCH)
            model(learner.prepare_input(mine.x[rows]), mine.t[rows].to(learner.device))
    finally:
        for handle in handles:
            handle.remove()
    biases: dict[str, str | None] = {}
    for module, weight, bias in layers:
        biases[weight] = bias
        if weight not in grams:  # no sample on this rank, or a layer that is not called
            assert isinstance(module.weight, Tensor)
            d = module.weight[0].numel() + (bias is not None)
            grams[weight] = torch.zeros(d, d, dtype=torch.float64, device=learner.device)
    return {n: learner.reduce(grams[n]) for n in biases}, biases


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, str | None]]:
    """Layers with the names of their weight and bias, as the engine knows them (tied ones by their first name)."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: list[tuple[nn.Module, str, str | None]] = []
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)  # a subclass may compute something else
        if isinstance(module, nn.Conv2d):
            plain = plain and module.groups == 1 and module.padding_mode == "zeros"
        if plain and id(module.weight) in names:
            found.append((module, names[id(module.weight)], None if module.bias is None else names[id(module.bias)]))
    return found


def _input_rows(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the rows of the layer's weight matrix are multiplied with, as pieces ``[n, d]``."""
    if not isinstance(module, nn.Conv2d):
        return [x.reshape(-1, x.shape[-1])]
    kernel = module.weight[0].numel()
    step = max(1, _CHUNK // (kernel * x.shape[2] * x.shape[3]))
    return [
        F.unfold(
            F.pad(part, module._reversed_padding_repeated_twice),
            module.kernel_size,
            dilation=module.dilation,
            stride=module.stride,
        )
        .transpose(1, 2)
        .reshape(-1, kernel)
        for part in x.split(step)
    ]
