"""ROUGE-L and F1 of words: against values worked out by hand, published examples, and a plain table."""

from __future__ import annotations

import random

import pytest

from cl_lab.overlap import _common, first_line, rouge_l, word_f1


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        # Lin 2004, §3.1: S1 against S2 and S3.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # The example of the package rouge_score: P = 5/8, R = 5/9.
        ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 10 / 17),
        ("yes", "Yes.", 1.0),
        ("snake_case names", "snake case names", 1.0),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("...", "", 1.0),
        ("für alle", "fur alle", 1 / 2),  # a letter with dots is a letter of its own
        ("fu\u0308r alle", "für alle", 1.0),  # however it is put together
        ("A。支持", "B。支持", 2 / 3),  # Chinese: character by character
        ("支持", "不支持", 4 / 5),
        ("दाल", "दिल", 0.0),  # what is above and below a letter belongs to its word
        ("कुल दिल", "दिल", 2 / 3),
        ("I ❤\ufe0f NY", "i ny", 1.0),
        ("葛\U000e0100城", "葛城", 1.0),
    ],
)
def test_rouge_l_by_hand(said: str, reference: str, expected: float) -> None:
    assert rouge_l(said, reference) == pytest.approx(expected)
    assert rouge_l(reference, said) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("the Eiffel Tower!", "Eiffel tower in Paris", 4 / 6),
        ("tower Eiffel", "Eiffel tower", 1.0),  # order is no matter
        ("no no no", "no", 2 / 4),  # each as often as both have it
        ("a theme", "theme", 1.0),
        ("U.S.A.", "usa", 1.0),
        ("the", "a", 1.0),
        ("the", "cat", 0.0),
        ("支持", "不支持", 4 / 5),
    ],
)
def test_word_f1_by_hand(said: str, reference: str, expected: float) -> None:
    assert word_f1(said, reference) == pytest.approx(expected)
    assert word_f1(reference, said) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("B\nA fact can be proved.", "B\nFelipe VI is the king.", 1.0),
        (" b ", "B\nFelipe VI is the king.", 1.0),
        ("\n\nB\nwhy", "B", 1.0),  # empty lines are passed over
        ("B A fact can be proved.", "B\nA fact can be proved.", 0.0),  # the line goes on
        ("A\nB", "B\nA", 0.0),
        ("", "B", 0.0),
        ("two  words", "Two words\nand why", 1.0),
        ("BB", "B", 0.0),
        ("e\u0301te\r\n", "\u00e9te", 1.0),
    ],
)
def test_first_lines_by_hand(said: str, reference: str, expected: float) -> None:
    assert first_line(said, reference) == expected
    assert first_line(reference, said) == expected


def by_table(one: str, other: str) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        above = row
        row = [0]
        for j, b in enumerate(other):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
    return row[-1]


def test_the_longest_common_subsequence_is_that_of_a_table() -> None:
    rng = random.Random(0)
    for letters in ("ab", "abcdefgh"):
        for _ in range(200):
            one, other = ("".join(rng.choices(letters, k=rng.randrange(1, 90))) for _ in range(2))
            assert _common(one, other) == by_table(one, other)
