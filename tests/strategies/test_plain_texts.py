"""What editors train on is none of what an edited model is asked or read later."""

from __future__ import annotations

from cl_lab.probe_texts import PARAGRAPHS, QUESTIONS
from strategies._edit_texts import CONTEXTS, unrelated_prompts


def test_no_score_is_taken_on_what_editors_train_on() -> None:
    trained = {text.casefold().rstrip(".?") for text in (*unrelated_prompts(), *CONTEXTS)}
    read = {s.strip().casefold() for paragraph in PARAGRAPHS for s in paragraph.split(".")}
    asked = {question.casefold().rstrip("?") for topic in QUESTIONS.values() for question, _ in topic}
    assert len(asked) == 40
    assert trained.isdisjoint(read | asked)


def test_unrelated_prompts_are_many_different_ones_and_always_the_same() -> None:
    texts = unrelated_prompts()
    assert len(set(texts)) == len(texts) >= 256 + 64, "256 can be trained on, and the threshold needs others"
    assert unrelated_prompts() == texts
