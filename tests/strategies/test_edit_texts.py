"""What editors train on: none of what an edited model is asked or read later, and in batches without much padding."""

from __future__ import annotations

import torch

from cl_lab import hub
from cl_lab.compat import import_torchvision
from cl_lab.editable import EditableModel
from cl_lab.probe_texts import PARAGRAPHS, QUESTIONS
from strategies._edit_texts import CONTEXTS, of_like_length, row_loss, rows_loss, unrelated_prompts

import_torchvision()  # in the way that does not fail where its operators are missing; Transformers reaches for it


def test_no_score_is_taken_on_what_editors_train_on() -> None:
    trained = {text.casefold().rstrip(".?") for text in (*unrelated_prompts(), *CONTEXTS)}
    read = {s.strip().casefold() for paragraph in PARAGRAPHS for s in paragraph.split(".")}
    asked = {question.casefold().rstrip("?") for topic in QUESTIONS.values() for question, _ in topic}
    assert len(asked) == 40
    assert trained.isdisjoint(read | asked)


def test_texts_of_like_length_share_a_batch() -> None:
    pairs = [([0] * prompt, [1] * answer) for prompt, answer in ((30, 4), (7, 3), (1, 2), (12, 6), (5, 5), (18, 2))]
    lengths = [[len(p) + len(a) for p, a in group] for group in of_like_length(pairs)]
    assert lengths == [[3], [10, 10, 18, 20], [34]]
    assert of_like_length(pairs)[1][:2] == [pairs[1], pairs[4]], "in their order, where they are as long"
    assert [len(group) for group in of_like_length(pairs, 2)] == [1, 2, 2, 1]
    assert of_like_length([]) == []


def test_the_loss_of_batches_is_that_of_their_rows() -> None:
    model = EditableModel(hub.tiny_causal_lm(257, layers=2), hub.load_tokenizer("bytes"), "tiny")
    pairs = [(model.encode_prompt(p), model.encode_answer(a)) for p, a in (("Who?", "I"), ("A much longer one", "we"))]
    whole = model.rows(pairs)
    expected = row_loss(model.logits(whole), whole.labels, whole.length - whole.prompt)
    found = rows_loss((model.logits(rows), rows) for rows in (model.rows([pair]) for pair in pairs))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_unrelated_prompts_are_many_different_ones_and_always_the_same() -> None:
    texts = unrelated_prompts()
    assert len(set(texts)) == len(texts) >= 256 + 64, "256 can be trained on, and the threshold needs others"
    assert unrelated_prompts() == texts
