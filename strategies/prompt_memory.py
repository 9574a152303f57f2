"""Facts kept as texts and put before the prompts that they concern: the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.patches import Patch, PromptPatch, embed, raw_embeddings
from cl_lab.protocols import Editor

from ._edit_texts import CONTEXTS, names, unrelated_prompts


@dataclass
class PromptMemory(Editor):
    """An edit is a sentence in a memory; the one nearest to a prompt is put before it, if it is near enough.

    After Madaan et al. 2022 (MemPrompt, arXiv 2201.06009) and Zheng et al. 2023 (IKE, arXiv 2305.12740). A text's embedding
    is the mean of its tokens' hidden states low in the model itself, less its mean ``ē`` over unrelated prompts. The fact of
    the prompt ``k`` is read before a prompt ``q`` if::

        cos(e_q − ē, e_k − ē) ≥ τ,     τ = u + share · (r − u)

    where ``u`` is what all but a few unrelated prompts stay below, and ``r`` the least that the edit's own prompt reaches
    behind beginnings that have nothing to do with it; never below ``u``. Nearness alone cannot tell a fact from the same
    about another subject ("The capital of Japan is"): where an edit says its subject, a prompt must name it, or one of its
    aliases (``subjects``; :mod:`cl_lab.subjects`).

    What differs: no oracle hands over the fact, as the published scores of IKE let it do (the memory is searched for every
    prompt); one statement in place of 32 demonstrations; and no retriever beside the model.
    """

    removable: ClassVar[bool] = True

    layer: int | None = knob(None, "layer whose input is averaged into embeddings; null: a quarter up", ge=0)
    least: float | None = knob(None, "τ, the cosine from which a fact concerns a prompt; null: by share", ge=-1, le=1)
    share: float = knob(0.5, "where τ lies between unrelated prompts (0) and the edit's own (1)", ge=0, le=1)
    template: str = knob("{prompt} {answer}", "how a fact is told, with {prompt} and {answer}", min_length=1)
    subjects: bool = knob(True, "a prompt must name the edit's subject, or one of its aliases, where the edit says it")
    contexts: int = knob(4, "beginnings put before the prompt for τ", ge=0, le=8)
    unrelated: int = knob(128, "unrelated prompts for ē and for τ", ge=2)

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"unrelated": 16}

    def check(self, model: EditableModel) -> None:
        if "{answer}" not in self.template:
            raise ConfigError(f"template = '{self.template}': has no {{answer}}; give one like '{{prompt}} {{answer}}'")
        model.layer(self._layer(model))

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        self.check(model)
        layer = self._layer(model)
        away = self._unrelated(model, layer)
        centre = away.mean(0)
        keys = embed([e.prompt for e in edits], model, layer, centre)
        far = torch.nn.functional.normalize(away - centre, dim=1) @ keys.T
        again = [f"{context} {e.prompt}" for context in CONTEXTS[: self.contexts] for e in edits]
        near = torch.ones(len(edits))
        if again:
            found = embed(again, model, layer, centre).view(self.contexts, len(edits), -1)
            near = (found * keys).sum(2).amin(0)
        above = far.quantile(0.99, dim=0)
        least = torch.maximum(above + self.share * (near - above), above)
        if not bool(torch.isfinite(least).all()):
            raise EditError(f"prompt-memory: '{edits[0].shown}': its embedding is not finite; choose another layer")
        texts = [self.template.replace("{prompt}", e.prompt).replace("{answer}", e.answer) for e in edits]
        for edit, text in zip(edits, texts, strict=True):
            for chat in (False, True)[: 1 + model.tokenizer.can_chat]:  # has room for its own prompt and answer
                behind = model.encode_answer(edit.answer, chat=chat)
                model.rows([(model.encode_prompt(f"{text}\n{edit.prompt}", chat=chat), behind)])
        return PromptPatch(
            "prompt-memory",
            {"edits": len(edits), "unrelated": float(above.max()), "own": float(near.min())},
            texts=texts,
            keys=keys,
            centre=centre,
            least=least if self.least is None else self.least,
            layer=layer,
            subjects=[names(e) if self.subjects else [] for e in edits],
        )

    def _layer(self, model: EditableModel) -> int:
        return round(len(model.layers) / 4) if self.layer is None else self.layer

    def _unrelated(self, model: EditableModel, layer: int) -> Tensor:
        """Raw embeddings ``[n, width]`` of unrelated prompts, computed once for a model as long as its weights stay."""
        key = ("prompt-memory", layer, self.unrelated)
        if key not in model.memo:
            model.memo[key] = raw_embeddings(unrelated_prompts()[: self.unrelated], model, layer)
        found: Tensor = model.memo[key]
        return found
