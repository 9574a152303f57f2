"""Texts as tokens: answers behind prompts, rows of unequal length, and a vocabulary of whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cl_lab.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from cl_lab.hub import Tokenizer


def space_between(tokenizer: Tokenizer) -> tuple[str, str]:
    """Where the space between a prompt and its answer goes: what ends the prompt, and what the answer begins with.

    Most tokenizers have `` World`` as one token, so that the space is the answer's; others keep it apart, and it is no
    part of what is to be found.
    """
    space, joined = tokenizer.encode_all(["Answer: ", "Answer: Answer"])
    return (" ", "") if joined[: len(space)] == space else ("", " ")


def ragged(rows: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All tokens one behind the other, and where each row starts, int64 ``[N + 1]``."""
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter((t for row in rows for t in row), np.int32, int(starts[-1])), starts


_PIECES = re.compile(r"\n|\w+|[^\w\s]")
_BEFORE, _AFTER = re.compile(r" ([,.?:]|\n)"), re.compile(r"\n ")


@dataclass(frozen=True)
class WordTokenizer:
    """A closed vocabulary: a token is a word, a mark or a line's end, and token 0 the end of a text.

    A :class:`~cl_lab.hub.Tokenizer` for texts in which words are divided by one space, marks by none from the word before.
    """

    words: tuple[str, ...]
    end: int = 0
    can_chat: bool = False
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {word: i for i, word in enumerate(self.words, 1)})

    @staticmethod
    def of(texts: Iterable[str]) -> WordTokenizer:
        """The vocabulary of ``texts``, in the order of the alphabet."""
        return WordTokenizer(tuple(sorted({piece for text in texts for piece in _PIECES.findall(text)})))

    @property
    def size(self) -> int:
        """See :class:`~cl_lab.hub.Tokenizer`."""
        return len(self.words) + 1

    @property
    def key(self) -> str:
        """See :class:`~cl_lab.hub.Tokenizer`."""
        return " ".join(self.words)

    def encode(self, text: str) -> list[int]:
        """See :class:`~cl_lab.hub.Tokenizer`; :class:`DataError` for a word that is not in the vocabulary."""
        try:
            return [self._numbers[piece] for piece in _PIECES.findall(text)]
        except KeyError as error:
            word = str(error.args[0])
            raise DataError(
                f"tokenizer 'words': '{word}' is none of its {len(self.words)} words{nearest(word, self.words)}; take "
                "a model's tokenizer for texts of your own"
            ) from None

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """:meth:`encode` of each."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`~cl_lab.hub.Tokenizer`."""
        text = " ".join(self.words[t - 1] for t in tokens if 0 < t < self.size)
        return _AFTER.sub("\n", _BEFORE.sub(r"\1", text))

    def chat(self, said: object) -> str:
        """Raises :class:`ConfigError`: words know no turns."""
        raise ConfigError("tokenizer 'words': has no chat template; leave chat off")
