"""LoRA as an editor: a low-rank change of every matrix in some layers, trained on the new answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab import seeding
from cl_lab.adapters import is_linear
from cl_lab.editable import EditableModel, Rows, Site
from cl_lab.errors import ConfigError, nearest
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Delta, Patch, WeightPatch
from cl_lab.protocols import Editor

from ._edit_texts import descend, edit_layers, forms, of_like_length, rows_loss
from ._key_values import changed

_WINDOW = (0.48, 0.55, 0.62, 0.69, 0.76)  # of the depth


@dataclass
class LoRAEdit(Editor):
    """Low-rank adaptation: ``W + B A`` in the linear layers of some layers, for each patch its own ``A`` and ``B``.

    Hu et al. 2021 (LoRA, arXiv 2106.09685), trained as FT-M is: Adam on the cross-entropy of the new answers and their end,
    the prompts masked out of it, until every answer token is likely enough. ``A`` ``[rank, in]`` is drawn with variance
    ``1/in``, ``B`` ``[out, rank]`` begins at zero, and there is no further scale (alpha = rank). A patch keeps the factors:
    it is far smaller than the matrices, adds to the weights when the model is saved, and is a PEFT adapter in form.

    The change holds for every prompt, and nothing keeps other answers in place.
    """

    folds: ClassVar[bool] = True

    layers: list[int] | None = knob(None, "layers that are changed; null: five, half to three quarters up")
    modules: list[str] | None = knob(
        None, "names of the linear layers in them that are changed (q_proj, v_proj); null: all", min_length=1
    )
    rank: int = knob(8, "rank of each change", ge=1)
    lr: float = knob(5e-4, "Adam's learning rate", gt=0, le=1000)
    steps: int = knob(40, "steps for each patch, at most", ge=1)
    stop_at: float = knob(0.9, "stop when every token of every answer has this probability; 1: never", gt=0, le=1)
    contexts: int = knob(2, "beginnings put before each prompt in training", ge=0, le=8)
    chat: bool = knob(True, "also train the prompt as a chat's turn, where the model has a template")
    seed: int = knob(0, "of what A begins with", ge=0)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"lr": 0.02, "steps": 80, "contexts": 0}

    def check(self, model: EditableModel) -> None:
        for layer in edit_layers(model, self.layers, _WINDOW):
            self._sites(model, layer)

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        layers = edit_layers(model, self.layers, _WINDOW)
        sites = [site for layer in layers for site in self._sites(model, layer)]
        chat = self.chat and model.tokenizer.can_chat
        texts = of_like_length([p for e in edits for p in forms(model, e, self.contexts, chat)])
        with model.unrouted():  # what answers for some prompts only, and goes by them, is not told of these
            parts = [(rows, _logits_from(model, rows, layers[0])) for rows in map(model.rows, texts)]
            factors = self._factors(model, sites, edits)
            optimizer = torch.optim.Adam([f for c in factors.values() for f in (c.a, c.b) if f is not None], lr=self.lr)

            def losses() -> tuple[Tensor, Tensor, bool]:
                with changed(model, factors):
                    each, likely = rows_loss((logits(), rows) for rows, logits in parts)
                return each.mean(), each.mean(), float(likely.min()) >= self.stop_at

            notes = descend(losses, optimizer, self.steps, f"lora: '{edits[0].shown}'") | {"edits": len(edits)}
            return WeightPatch("lora", notes, {path: _detached(c) for path, c in factors.items()})

    def _sites(self, model: EditableModel, layer: int) -> list[Site]:
        inside = linear_layers(model, layer)
        names = {site.path.rpartition(".")[2] for site in inside}
        for name in self.modules or ():
            if name not in names:
                raise ConfigError(f"modules: no linear layer of layer {layer} is called '{name}'{nearest(name, names)}")
        return [s for s in inside if self.modules is None or s.path.rpartition(".")[2] in self.modules]

    def _factors(self, model: EditableModel, sites: Sequence[Site], edits: Sequence[Edit]) -> dict[str, Delta]:
        # Drawn anew for each patch: from the same rows each would write over what the one before it had written.
        generator = seeding.generator(self.seed, "lora", len(model.patches), edits[0].prompt)
        found = {}
        for site in sites:
            out, into = site.weight.shape
            a = torch.randn(self.rank, into, generator=generator) / into**0.5
            b = torch.zeros(out, self.rank)
            found[site.path] = Delta(*(f.to(model.device).requires_grad_() for f in (a, b)))
        return found


def linear_layers(model: EditableModel, layer: int) -> list[Site]:
    """The linear layers inside a layer, in the order in which it keeps them. :class:`ConfigError` where there is none."""
    whole = model.layer(layer)
    found = []
    for name, module in whole.module.named_modules():
        if is_linear(module):
            found.append(model.site(f"{whole.path}.{name}"))
    if not found:
        raise ConfigError(f"model '{model.name}': layer {layer} has no linear layer; choose others (layers: [1, 2])")
    return found


def _logits_from(model: EditableModel, rows: Rows, layer: int) -> Callable[[], Tensor]:
    """What gives the logits of the answers' tokens again and again, with what lies below ``layer`` computed once."""
    if layer:
        return model.above(rows, linear_layers(model, layer - 1)[-1]).logits
    said, ids = rows.said.to(model.device), rows.ids.to(model.device)

    def whole() -> Tensor:
        return model.project(model.decoder(input_ids=ids, use_cache=False).last_hidden_state[said])

    return whole


def _detached(change: Delta) -> Delta:
    return Delta(*(f.detach().cpu() for f in (change.a, change.b) if f is not None))
