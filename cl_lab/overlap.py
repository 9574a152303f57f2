"""How much of a reference text another text says: ROUGE-L, the F1 of words, or whether the first line is right.

For answers that may be worded in many ways, where an exact match would tell nothing: each in [0, 1]. The former two take
whole texts, and of scripts that put no space between words, Chinese and Japanese, each character as a word.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and ideographs, for a character class: each is a word."""
_WORDS = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")
_SIGN = re.compile(rf"[{ALONE}]")
_PIECES = re.compile(rf"[{ALONE}]|[^\s{ALONE}]+")
ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(said: str, reference: str) -> float:
    """ROUGE-L: how long the longest common subsequence of words is, as an F-measure.

    With ``l`` its length, ``P = l / words said`` and ``R = l / words of the reference``, ``F = 2PR / (P + R)``. Lin 2004,
    "ROUGE: a package for automatic evaluation of summaries", §3.1, with β = 1. Words are as the package ``rouge_score``
    has them without a stemmer: lower case, letters and digits; but letters of any alphabet (``[a-z0-9]`` would divide
    *für*), so that only texts in ASCII are sure to get that package's number. Two texts without a word are alike: 1.
    """
    one, other = (matches(_WORDS, _folded(text)) for text in (said, reference))
    if not one or not other:
        return float(one == other)
    return 2 * _common(one, other) / (len(one) + len(other))


def word_f1(said: str, reference: str) -> float:
    """F1 of the words that both texts have, each as often as both have it, in whatever order.

    With ``n`` of them, ``2n / (words said + words of the reference)``, words being as in SQuAD's script: lower case, without
    punctuation and without *a*, *an*, *the*. Rajpurkar et al. 2016 (SQuAD), §6.1 "(macro-averaged) F1 score". Two texts
    without a word are alike: 1.
    """
    one, other = (Counter(_answer_words(text)) for text in (said, reference))
    if not one or not other:
        return float(one == other)
    return 2 * (one & other).total() / (one.total() + other.total())


def first_line(said: str, reference: str) -> float:
    """1 where the first lines are the same up to capitals and spaces, else 0; what stands behind them is not looked at.

    Of a choice with its reasons (ScienceQA: ``B``, a line's end, why) this is whether the choice is right, as in TRACE (Wang
    et al. 2023, arXiv 2310.06762), whose script looks at the first letter alone: "B because" is right there, and not here.
    Lines with nothing in them are passed over.
    """
    one, other = (
        next(filter(None, map(str.strip, _folded(text).splitlines())), "").split() for text in (said, reference)
    )
    return float(one == other)


OVERLAPS: Mapping[str, Callable[[str, str], float]] = {"rouge-l": rouge_l, "f1": word_f1, "first-line": first_line}
"""By the names of :data:`cl_lab.records.Measure`."""


def matches(words: re.Pattern[str], text: str) -> list[str]:
    """All that ``words`` matches in ``text``, where a mark is of its letter's kind.

    A vowel in Hindi or Tamil is a mark on the consonant before it: to Python's ``\\w`` it is none, and divides words.
    """
    if text.isascii():
        return words.findall(text)
    plain = ""
    for c in text:
        behind = plain[-1:].isalpha() and not _SIGN.match(plain[-1:])
        plain += "a" if behind and unicodedata.category(c).startswith("M") and not _VARIANTS.match(c) else c
    return [text[m.start() : m.end()] for m in words.finditer(plain)]


_VARIANTS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Marks that say how a sign looks, not which it is."""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def _answer_words(text: str) -> list[str]:
    return [w for w in _PIECES.findall(_folded(text).translate(_NO_PUNCTUATION)) if w not in ARTICLES]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    Bit by bit in whole numbers (Hyyrö 2004), which for texts of hundreds of words is far quicker than a table: behind each
    word of ``other``, the zeros of ``row`` are the words of ``one`` at which the subsequence found so far grows.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(one):
        where[word] = where.get(word, 0) | 1 << i
    every = row = (1 << len(one)) - 1
    for word in other:
        met = row & where.get(word, 0)
        row = (row + met | row - met) & every
    return len(one) - row.bit_count()
