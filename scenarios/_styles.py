"""A task's rows asked for in other ways, so that a model does not take one form of answer for the task itself.

After the answer-style diversification of SEFE ("Superficial and Essential Forgetting Eliminator for multimodal continual
instruction tuning", ICML 2025), which rewrites a share of every task's samples into five forms. Four need no more than a
label; the fifth, a detailed explanation, would have to be written by another model and is left out.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cl_lab.seeding import generator, permutation

from ._texts import REPLY

STYLES = ("yes-no", "choice", "short", "brief")
"""Is the answer so? Which letter has it? The answer alone; the answer in a sentence."""

_LETTERS = string.ascii_uppercase


class Restyled(NamedTuple):
    """A row in another style: its ``number`` among those given, what stands before and behind its text, its answer."""

    number: int
    style: str
    before: str
    after: str
    answer: str


def answers_of(labels: Sequence[str]) -> list[str]:
    """Every answer that a task with ``labels`` can have in any style."""
    return ["yes", "no", *_LETTERS[: len(labels)], *labels, *map(_sentence, labels)]


def restyle(
    answers: Sequence[str], labels: Sequence[str], instruction: str, share: float, seed: int, task: str
) -> list[Restyled]:
    """A ``share`` of the rows with the given ``answers``, drawn by ``seed`` and ``task``, equally many in each style.

    What is asked with *yes-no* is as often a wrong label as the right one. *choice* puts the options in a drawn order; of
    more than there are letters, the right one and some of the others.
    """
    rng = generator(seed, "styles", task)
    drawn = permutation(len(answers), seed, "style_mix", task)[: round(share * len(answers))].tolist()
    question = instruction.replace(REPLY, "").strip()
    head = f"{question}\n" if question else ""
    listed = f"{head}Option: {', '.join(labels)}\n"
    made = []
    for place, number in enumerate(drawn):
        style, right = STYLES[place % len(STYLES)], answers[number]
        wrong = [label for label in labels if label != right]
        wrong = [wrong[i] for i in torch.randperm(len(wrong), generator=rng).tolist()]
        if style == "yes-no":
            true = not wrong or place // len(STYLES) % 2 == 0
            after = f'\nIs the answer "{right if true else wrong[0]}"? Reply with yes or no.'
            before, answer = head, "yes" if true else "no"
        elif style == "choice":
            options = [right, *wrong][: len(_LETTERS)]
            options = [options[i] for i in torch.randperm(len(options), generator=rng).tolist()]
            before = head + " ".join(f"({letter}) {o}" for letter, o in zip(_LETTERS, options, strict=False)) + "\n"
            after, answer = "\nReply with the letter of the right option.", _LETTERS[options.index(right)]
        elif style == "short":
            before, after, answer = listed, "\nReply with the answer alone.", right
        else:
            before, after, answer = listed, "\nReply with a sentence.", _sentence(right)
        made.append(Restyled(number, style, before, f"{after}\nAnswer:", answer))
    return made


def _sentence(label: str) -> str:
    return f"The answer is {label}."
