"""Whether a prompt names the subject of an edit: by what the subject's tokens are low in the model, whatever is asked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, eq=False)
class SubjectKeys:
    """The subjects of some edits, as they reach a layer low in the model, and how near a prompt must come to each.

    ``tokens`` ``[N, width]`` are the subjects' tokens, of length 1, ``of`` ``[N]`` int64 says whose each is, and ``least``
    ``[edits]`` is the least resemblance. ``centre`` and ``spread`` ``[width]`` are the mean and the standard deviation of
    what unrelated texts bring there: all tokens have much in common that says nothing.
    """

    tokens: Tensor
    of: Tensor
    least: Tensor
    centre: Tensor
    spread: Tensor

    def resemblance(self, h: Tensor, asked: Tensor) -> Tensor:
        """``[B, edits]``: the mean over a subject's tokens of the greatest cosine with a token of the prompt.

        ``h`` ``[B, T, width]`` is what reaches the layer, ``asked`` ``[B, T]`` bool says which tokens are the prompt's.
        """
        near = normalize((h.to(self.tokens) - self.centre) / self.spread, dim=2) @ self.tokens.T
        best = near.masked_fill(~asked[..., None], -1.0).amax(1)
        total = torch.zeros(len(h), len(self.least), device=best.device).index_add(1, self.of, best)
        return total / torch.bincount(self.of, minlength=len(self.least))

    def to(self, device: torch.device) -> SubjectKeys:
        """The same on a device."""
        return SubjectKeys(*(getattr(self, f.name).to(device) for f in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`read` reads."""
        return {f"subject_{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> SubjectKeys | None:
        """What :meth:`tensors` gave; None where nothing of it is there."""
        names = [f"subject_{f.name}" for f in fields(cls)]
        return cls(*(tensors[name] for name in names)) if names[0] in tensors else None


class NamedSubjects:
    """The subjects of what may answer, brought together so that one product compares a prompt with all of them.

    Each of ``several`` that may answer has some keys, and where each is read; it is open to all prompts if one is None.
    """

    def __init__(self, several: Sequence[Sequence[tuple[str, SubjectKeys | None]]]) -> None:
        self._open = torch.tensor([any(keys is None for _, keys in some) for some in several], dtype=torch.bool)
        alike: dict[tuple[str, bytes], list[tuple[int, SubjectKeys]]] = {}
        for n, some in enumerate(several):
            for path, keys in some:
                if keys is not None and not self._open[n]:
                    standard = keys.centre.cpu().numpy().tobytes()
                    alike.setdefault((path, standard), []).append((n, keys))
        self._together = [(path, *_joined(some)) for (path, _), some in alike.items()]

    @property
    def paths(self) -> list[str]:
        """The layers whose inputs :meth:`among` wants."""
        return list(dict.fromkeys(path for path, _, _ in self._together))

    def among(self, low: Mapping[str, Tensor], asked: Tensor) -> Tensor:
        """``[several, B]`` bool: which may answer, as each prompt names one of its subjects or it is open to all.

        ``low`` is what reaches the layers, ``[B, T, width]``, and ``asked`` ``[B, T]`` bool says which tokens are prompts.
        """
        found = self._open.to(asked.device)[:, None].repeat(1, len(asked))
        for path, keys, whose in self._together:
            here = keys.to(asked.device)
            near = (here.resemblance(low[path], asked) >= here.least).T.float()
            found |= torch.zeros(found.shape, device=asked.device).index_add(0, whose.to(asked.device), near) > 0
        return found


def _joined(some: Sequence[tuple[int, SubjectKeys]]) -> tuple[SubjectKeys, Tensor]:
    """Several keys of one standard as one, and whose each of its edits is."""
    keys = [key for _, key in some]
    before = itertools.accumulate((len(key.least) for key in keys), initial=0)
    of = torch.cat([key.of + n for key, n in zip(keys, before, strict=False)])
    tokens, least = torch.cat([key.tokens for key in keys]), torch.cat([key.least for key in keys])
    whose = torch.tensor([n for n, key in some for _ in key.least])
    return SubjectKeys(tokens, of, least, keys[0].centre, keys[0].spread), whose


def standardised(h: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """Directions ``[N, width]``, of length 1, of what reaches the layer ``[N, width]``."""
    return normalize((h - centre) / spread, dim=1)
