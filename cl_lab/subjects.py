"""Whether a text names what an edit is about: by the name's words, in any case, whatever is asked of it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(8192)
def words(text: str) -> str:
    """The words of a text, as they are compared: in lower case, without accents, one blank before and behind each.

    What is neither a letter, with its marks, nor a digit parts words, but for the :data:`SIGNS` that end a name (C++, F#).
    In Chinese, Japanese and Korean, where no blank ends a name, each sign is a word.
    """
    # Accents are put above and below letters; marks of other classes make another letter (か and が, vowels in Hindi).
    plain = "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if unicodedata.combining(c) < _ACCENTS)
    found, behind = "", 0
    for signs in _SIGNS.finditer(plain):
        found += "".join(map(_apart, plain[behind : signs.start()])) + signs[0] + " "
        behind = signs.end()
    found += "".join(map(_apart, plain[behind:]))
    return f" {' '.join(found.split())} "


SIGNS = r"(?<=[^\W\d_])(?:\+\++|[+#](?!\w))|(?<=\b[^\W\d_])#"
"""Directly behind a letter: several plus signs; one, or a ``#``, where a word ends; a ``#`` behind a lone letter (C#7)."""

_SIGNS = re.compile(SIGNS)
_ACCENTS = 200  # the least of Unicode's combining classes that say where a mark is put


def _apart(c: str) -> str:
    if unicodedata.east_asian_width(c) == "W":
        return f" {c} "
    return c if c.isalnum() or unicodedata.category(c).startswith("M") else " "


class NamedSubjects:
    """Which of several may answer a text: those of whose names it holds one, and those that have none.

    ``several`` are the names of each that may answer; :data:`None` opens it to all texts.
    """

    def __init__(self, several: Sequence[Sequence[str] | None]) -> None:
        self._names = [
            None if names is None else {own for n in names if (own := words(n)).strip()} for names in several
        ]

    @property
    def all_open(self) -> bool:
        """Whether texts need not be looked at."""
        return all(names is None for names in self._names)

    def among(self, texts: Sequence[str]) -> Tensor:
        """``[several, len(texts)]`` bool."""
        asked = [words(text) for text in texts]
        found = [[names is None or any(name in text for name in names) for text in asked] for names in self._names]
        return torch.tensor(found, dtype=torch.bool).view(len(found), len(asked))
