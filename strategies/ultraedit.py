"""UltraEdit: one closed-form step per batch of edits, from hidden states and gradients that are normalised lifelong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cl_lab.editable import EditableModel, Rows, Site
from cl_lab.errors import ConfigError
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch
from cl_lab.protocols import Editor

from ._edit_texts import edit_layers, forms, of_like_length, refuse_broken, refuse_worse

_TINY = 1e-8  # beside a variance
_AT_ONCE = 32  # rows
_WINDOW = (0.48, 0.55, 0.62, 0.69, 0.76)  # of the depth


@dataclass
class UltraEdit(Editor):
    """Ridge regression from what feed-forward inputs read to where the gradient wants them, for whole batches of edits.

    Gu et al. 2025 (UltraEdit, arXiv 2505.14679). Of each edited module the pass over the new answers gives, at every answer
    token, what it reads ``h`` and the gradient ``∇`` of that token's cross-entropy with respect to its output. Features
    ``[h; ∇]`` are normalised to ``[ĥ; ∇̂]`` by the mean and variance of *all* edited so far (lifelong normalisation), then::

        v = −η ‖ĥ‖² ∇̂,        ΔWᵀ = (HᵀH + I)⁻¹ Hᵀ V = Hᵀ (HHᵀ + I)⁻¹ V

    with the tokens as rows of ``H`` and ``V``. The second form (push-through identity) is solved here: as many equations as
    tokens, and a change of that rank. Nothing is trained and nothing looked up, so time per edit does not grow.

    Beyond the paper: answers end with the model's end token, other forms of the prompt stand beside the plain one, and up
    to ``iterations`` steps are taken, each from where the one before led; its features are counted, too. Each patch keeps
    its own number, mean and squared deviations; the state is what those of the patches on the model are together (Chan et
    al. 1979), so one that is taken away takes its share along. Each module has its own mean and variance; the released code
    counts all modules of one shape together. Nothing holds earlier edits in place: larger batches keep more of them than
    single edits do.
    """

    folds: ClassVar[bool] = True

    layers: list[int] | None = knob(
        None, "layers whose feed-forward inputs are edited; null: five, half to three quarters up"
    )
    lr: float = knob(2e-5, "η; the paper's 1e-6 was for a model of 8B", gt=0)
    iterations: int = knob(5, "steps for each patch, at most; the paper's is 1", ge=1)
    stop_at: float = knob(0.5, "no further step once every token of every answer has this probability", gt=0, le=1)
    contexts: int = knob(0, "beginnings put before each prompt in training", ge=0, le=8)
    chat: bool = knob(True, "also edit the prompt as a chat's turn, where the model has a template")

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"lr": 3e-3, "iterations": 40, "contexts": 0}

    def check(self, model: EditableModel) -> None:
        self._sites(model)

    def _sites(self, model: EditableModel) -> list[Site]:
        layers = edit_layers(model, self.layers, _WINDOW)
        return [site for layer in layers for site in feed_forward_inputs(model, layer)]

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        sites = self._sites(model)
        chat = self.chat and model.tokenizer.can_chat
        texts = of_like_length([p for e in edits for p in forms(model, e, self.contexts, chat)], _AT_ONCE)
        batches = [model.rows(some) for some in texts]
        before = {s.path: kept_moments(model, s) for s in sites}
        own = {path: Moments.none(m) for path, m in before.items()}
        changes: dict[str, Delta] = {}
        losses: list[float] = []
        for step in range(self.iterations + 1):
            goes_on = step < self.iterations
            found, loss, likely = features(model, batches, sites, changes, slopes=goes_on)
            refuse_broken(torch.tensor(loss), f"ultraedit: '{edits[0].shown}'")
            losses.append(loss)
            if not goes_on or (step and likely >= self.stop_at):
                break
            for path, (h, grad) in found.items():
                own[path] = own[path].joined(Moments.of(torch.cat([h, grad], 1)))
                more = shift(h, grad, before[path].joined(own[path]), self.lr)
                changes[path] = _added(changes[path], more) if path in changes else more
        for path, change in changes.items():
            refuse_broken(change.value().norm(), f"ultraedit: '{edits[0].shown}', {path}")
        refuse_worse(losses, f"ultraedit: '{edits[0].shown}'")
        statistics = {f"{path}:{name}": value for path, m in own.items() for name, value in m._asdict().items()}
        notes = {
            "steps": step,
            "loss": losses[-1],
            "tokens": sum(int(rows.said.sum()) for rows in batches),
            "edits": len(edits),
        }
        return WeightPatch("ultraedit", notes, {p: _smallest(c) for p, c in changes.items()}, statistics)


def feed_forward_inputs(model: EditableModel, layer: int) -> list[Site]:
    """The linear layers that a feed-forward part begins with, ``[inner, width]``: gate and up in Llama, one in GPT-2.

    They stand beside its down-projection and have the opposite shape. Raises :class:`ConfigError` where none does.
    """
    down = model.down_projection(layer)
    width, inner = down.weight.shape
    beside = down.path.rpartition(".")[0]
    parent = model.model.get_submodule(beside)
    paths = [
        f"{beside}.{name}" for name, module in parent.named_children() if getattr(module, "weight", None) is not None
    ]
    sites = [model.site(path) for path in paths if path != down.path and _is_matrix(model, path)]
    found = [site for site in sites if site.weight.shape == (inner, width)]
    if not found:
        raise ConfigError(
            f"model '{model.name}': layer {layer} has no linear layer from {width} to {inner} values beside '{down.path}', "
            "which is how the beginning of a feed-forward part is found; choose other layers, or another editor"
        )
    return found


def _is_matrix(model: EditableModel, path: str) -> bool:
    return int(model.model.get_submodule(path).weight.dim()) == 2


class Moments(NamedTuple):
    """Number, mean ``[f]`` and summed squared deviations ``[f]`` of features, float64: a part that joins with others."""

    number: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of ``features`` ``[N, f]``."""
        wide = features.double().cpu()
        mean = wide.mean(0)
        return cls(torch.tensor(float(len(wide)), dtype=torch.float64), mean, (wide - mean).square().sum(0))

    @classmethod
    def none(cls, like: Moments) -> Moments:
        """Of no features at all, as wide as ``like``."""
        return cls(*(torch.zeros_like(part) for part in like))

    def joined(self, other: Moments) -> Moments:
        """Of both together. Chan, Golub and LeVeque 1979."""
        number = self.number + other.number
        share = other.number / number.clamp(min=1)
        gap = other.mean - self.mean
        return Moments(number, self.mean + gap * share, self.m2 + other.m2 + gap.square() * self.number * share)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation ``[f]``."""
        return (self.m2 / (self.number - 1).clamp(min=1)).sqrt()


def kept_moments(model: EditableModel, site: Site) -> Moments:
    """What the patches on ``model`` have seen at ``site``, oldest first."""
    out, into = site.weight.shape
    zeros = torch.zeros(into + out, dtype=torch.float64)
    whole = Moments(torch.zeros((), dtype=torch.float64), zeros, zeros)
    for patch in model.patches:
        if isinstance(patch, WeightPatch) and f"{site.path}:m2" in patch.statistics:
            whole = whole.joined(Moments(*(patch.statistics[f"{site.path}:{name}"] for name in Moments._fields)))
    return whole


def shift(h: Tensor, grad: Tensor, seen: Moments, lr: float) -> Delta:
    """The change of a module's weight from inputs ``[N, in]`` and gradients ``[N, out]``, ``seen`` with all of them."""
    h, grad = h.double().cpu(), grad.double().cpu()
    deviation = seen.deviation + _TINY
    normal = (torch.cat([h, grad], 1) - seen.mean) / deviation
    normal_h, normal_grad = normal.split([h.shape[1], grad.shape[1]], 1)
    values = -lr * normal_h.square().sum(1, keepdim=True) * normal_grad
    gram = h @ h.T + torch.eye(len(h), dtype=torch.float64)
    solved = torch.cholesky_solve(values, torch.linalg.cholesky(gram))
    return Delta(a=h.float(), b=solved.T.float().contiguous())


def features(
    model: EditableModel,
    batches: Sequence[Rows],
    sites: Sequence[Site],
    changes: Mapping[str, Delta],
    *,
    slopes: bool = True,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float, float]:
    """At the answers' tokens, by path: what reaches each site ``[N, in]`` and the gradient at its output ``[N, out]``.

    ``changes`` lie on the sites already. Also the mean cross-entropy and the least probability of a token. The gradient is
    of the sum, so that a token's does not depend on how many stand beside it; without ``slopes`` there are no features.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {site.path: [] for site in sites}
    total, likely = 0.0, 1.0
    for some in batches:
        said, labels = some.said.to(model.device), some.labels.to(model.device)
        with torch.set_grad_enabled(slopes), model.unrouted(), _tapped(sites, changes) as taps:
            h = model.decoder(input_ids=some.ids.to(model.device), use_cache=False).last_hidden_state
            each = torch.nn.functional.cross_entropy(model.project(h[said]), labels, reduction="none")
            loss = each.sum()
            grads = torch.autograd.grad(loss, [taps[site.path][1] for site in sites]) if slopes else ()
        total += float(loss.detach())
        likely = min(likely, float((-each.detach().max()).exp()))
        for site, grad in zip(sites if slopes else (), grads, strict=True):
            found[site.path].append((taps[site.path][0][said].float(), grad[said].float()))
    joined = {p: (torch.cat([h for h, _ in own]), torch.cat([g for _, g in own])) for p, own in found.items() if own}
    return joined, total / sum(int(rows.said.sum()) for rows in batches), likely


@contextmanager
def _tapped(sites: Sequence[Site], changes: Mapping[str, Delta]) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
    """In the block: what the sites read and a zero added to what they put out, for gradients; ``changes`` added, too."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(path: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            inputs = args[0].detach()
            leaf = torch.zeros_like(out, requires_grad=True)
            heard[path] = (inputs, leaf)
            if path in changes:
                a, b = changes[path].a, changes[path].b
                assert a is not None
                assert b is not None
                out = out + ((args[0].float() @ a.T.to(out.device)) @ b.T.to(out.device)).to(out.dtype)
            return out + leaf

        return hook

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.module.register_forward_hook(tap(site.path)))
        yield heard


def _added(one: Delta, two: Delta) -> Delta:
    assert one.a is not None
    assert one.b is not None
    assert two.a is not None
    assert two.b is not None
    return Delta(a=torch.cat([one.a, two.a]), b=torch.cat([one.b, two.b], 1))


def _smallest(change: Delta) -> Delta:
    """``change``, dense where its factors would be larger."""
    assert change.a is not None
    assert change.b is not None
    dense = change.b.shape[0] * change.a.shape[1]
    return Delta(dense=change.value()) if change.a.numel() + change.b.numel() > dense else change
