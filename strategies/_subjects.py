"""What tells an edit's subject from others like it, found for an editor that asks whether a prompt names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_lab import names
from cl_lab.editable import EditableModel, Site
from cl_lab.facts import Edit
from cl_lab.subjects import SubjectKeys, standardised

_DEPTH = 0.2  # where a name is itself already and does not yet say what follows from it
_JUDGED = 8  # most similar names, from which the least resemblance is counted
_ROOM = 0.9  # of the least resemblance that the edit's own prompts have

Hear = Callable[[Site, Sequence[str]], list[Tensor]]
"""What prompts bring to a site: ``[T_i, width]`` for each."""


def subject_site(model: EditableModel) -> Site:
    """The layer at whose input subjects are looked for."""
    return model.layer(round(_DEPTH * len(model.layers)))


def subject_keys(
    model: EditableModel, edits: Sequence[Edit], own: Sequence[Sequence[Tensor]], away: Tensor, hear: Hear, share: float
) -> SubjectKeys | None:
    """Keys of the edits' subjects; None where one has none, or it is not in its prompt.

    ``own`` are, for each edit, what its own prompts bring to :func:`subject_site`, ``[T_i, width]``, the plain one first,
    and ``away`` ``[N, width]`` is what unrelated texts do. A prompt must come ``share`` of the way from the resemblance of
    the most similar of :data:`cl_lab.names.JUDGED`, in the subject's place, to that of the subject itself.
    """
    places = [_place(model, e, len(forms[0])) for e, forms in zip(edits, own, strict=True)]
    if any(end <= begin for begin, end in places):
        return None
    centre, spread = away.mean(0), away.std(0) + 1e-3 * away.std()
    tokens = [
        standardised(forms[0][begin:end], centre, spread) for forms, (begin, end) in zip(own, places, strict=True)
    ]
    of = torch.repeat_interleave(torch.arange(len(edits)), torch.tensor([len(t) for t in tokens])).to(away.device)
    least = []
    for edit, key, forms in zip(edits, tokens, own, strict=True):
        assert edit.subject is not None
        alone = SubjectKeys(key, torch.zeros_like(of[: len(key)]), torch.zeros(1, device=away.device), centre, spread)
        others = names.alike(model, edit.subject, _JUDGED, names.JUDGED)
        judged = hear(subject_site(model), [edit.prompt.replace(edit.subject, name) for name in others])
        nearest = max((_resemblance(alone, h) for h in judged), default=0.0)
        least.append(min(nearest + share * (1 - nearest), _ROOM * min(_resemblance(alone, h) for h in forms)))
    return SubjectKeys(torch.cat(tokens), of, torch.tensor(least, device=away.device), centre, spread)


def _resemblance(key: SubjectKeys, h: Tensor) -> float:
    return float(key.resemblance(h[None], torch.ones(1, len(h), dtype=torch.bool, device=h.device)))


def _place(model: EditableModel, edit: Edit, heard: int) -> tuple[int, int]:
    """Where the subject begins and ends among the last ``heard`` tokens of the prompt; nowhere if it is not there."""
    if not edit.subject or edit.subject not in edit.prompt:
        return 0, 0
    begin = edit.prompt.index(edit.subject)
    before = edit.prompt[:begin].rstrip()
    left_out = len(model.encode_prompt(edit.prompt)) - heard
    first = len(model.encode_prompt(before)) if before else 0
    end = len(model.encode_prompt(edit.prompt[: begin + len(edit.subject)]))
    return max(0, first - left_out), max(0, end - left_out)
