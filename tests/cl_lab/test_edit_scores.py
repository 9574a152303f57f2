"""What edits are worth: right answers, agreement, retention and fluency, each against numbers on paper."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_lab import hub
from cl_lab.edit_scores import (
    Asked,
    _passage,
    ask,
    budget,
    fluency,
    is_exact,
    is_right,
    ngram_entropy,
    normal,
    perplexity,
    retention,
    scores,
)
from cl_lab.editable import EditableModel, Rows
from cl_lab.errors import EditError
from cl_lab.facts import GROUPS, LOCAL, Edit, Probe
from cl_lab.patches import Delta, PromptPatch, SidePatch, WeightPatch, packed

BYTES = hub.load_tokenizer("bytes")
ONE = Edit(
    "Who is it?",
    "BC",
    old="Eve",
    paraphrases=("Who?", "And who is it?"),
    reverse=(Probe("Whom is BC?", "D"),),
    one_hop=(Probe("And then?", "E"), Probe("And now?", "FG")),
    unrelated=(Probe("What is 2 + 2?", "4"), Probe("Where?")),
    same_relation=(Probe("Who is that?", "Z"),),
)
TWO = Edit("How much?", "17", old="18", same_subject=(Probe("How long?"),))


def editable() -> EditableModel:
    torch.manual_seed(5)
    return EditableModel(hub.tiny_causal_lm(vocabulary=257, layers=2, width=32, heads=2), BYTES)


# -- answers compared ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Netherlands", "netherlands"),
        ("a cat, an owl and the dog!", "cat owl and dog"),
        ("AnnA", "anna"),
        ("Theatre", "theatre"),
        ("St. John's", "st johns"),
        ("“Straße”…", "strasse"),
        (" \t\n", ""),
        ("...", ""),
        ("The", ""),
        ("Lyon-based, U.S.A.", "lyon based usa"),
        ("1,000 or 1.5; 2,50", "1000 or 1.5 2 50"),
        ("−5 °C, 1990-1995", "-5 c 1990 1995"),
        ("C++, F# and C#.", "c++ f# and c#"),
        ("東京です。", "東 京 で す"),
    ],
)
def test_what_does_not_count(text: str, expected: str) -> None:
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("said", "answer", "old", "expected"),
    [
        ("Rome", "Rome", None, True),
        ("rome.", "Rome", None, True),
        ("It is the Rome of Italy", "Rome", None, True),
        ("Netherlands", "The Netherlands", "Belgium", True),
        ("the United   States", "United States", None, True),
        ("“Rome”, of course", "Rome", "Paris", True),
        ("Romeo", "Rome", None, False),
        ("United Arab States", "United States", None, False),
        ("Paris", "Rome", "Paris", False),
        ("Paris, not Rome", "Rome", "Paris", False),
        ("Rome, not paris!", "Rome", "Paris", False),
        ("Rome, no Parisians", "Rome", "Paris", True),
        ("Rome", "Rome", "rome", True),
        ("Rome", "Rome", "", True),
        ("New York City", "New York City", "New York", True),
        ("New York City, once New York", "New York City", "New York", False),
        ("New York", "York", "New York", False),
        ("York", "York", "New York", True),
        ("Romeo", "Romeo", "Rome", True),
        ("Rome, no: Romeo", "Romeo", "Rome", False),
        ("A", "A", "B", True),
        ("a.", "A", None, True),
        ("Of a kind", "A", "B", False),
        ("B", "A", "B", False),
        ("", "Rome", None, False),
        ("", "", None, False),
        ("Rome", "", None, False),
        ("...", "...", None, True),
        ("", "...", None, False),
        ("€", "€", None, True),
        ("It costs €5.", "€", "$", True),
        ("$ or €", "€", "$", False),
        ("euro", "€", None, False),
        ("\U0001f642", "\U0001f642", "\U0001f641", True),
        (" \n", "Rome", "Paris", False),
        ("1.5 million", "15 million", "1.5 million", False),
        ("It weighs 3.5 kg", "35 kg", None, False),
        ("-5 degrees", "5 degrees", "-5 degrees", False),
        ("5 degrees", "5 degrees", "-5 degrees", True),
        ("C", "C++", "C", False),
        ("C++", "C", "C++", False),
        ("It is Lyon-based", "Lyon", None, True),
        ("東京です。", "東京", "京都", True),
        ("京都です。", "東京", "京都", False),
        ("50", "50%", "50", False),
        ("About 50%.", "50%", "50", True),
        ("50%, not 50", "50%", "50", False),
        ("50%", "50", "50%", False),
        ("about 50", "50", "50%", True),
        ("J.R.R. Tolkien wrote it", "J. R. R. Tolkien", None, True),
        ("J. R. R. Tolkien wrote it", "J.R.R. Tolkien", None, True),
        ("By HP Lovecraft", "H. P. Lovecraft", "H. P. Blavatsky", True),
        ("H. P. Lovecraft", "H.P. Lovecraft", None, True),
        ("in the U. S.", "US", None, True),
        ("in the US", "the U. S.", None, True),
        ("J. R. R. Tolkien", "R. Tolkien", None, True),
        ("É. É. Dupont", unicodedata.normalize("NFD", "É.É. Dupont"), None, True),
        ("Plan A. B is next", "B", None, True),
        ("Plan A. B. is next", "B", None, True),
        ("Vitamin C. D is another", "vitamin C", None, True),
        ("Type A. B is rarer", "AB", None, False),
        ("Canada, once the U. S.", "Canada", "U.S.", False),
        ("J.R.R. Tolkien", "J. R. R. Tolkien", "Tolkien", True),
        ("J.R.R. Tolkien", "J. R. R. Tolkien", "J.R.R. Tolkien", True),
        ("It is São Paulo.", unicodedata.normalize("NFD", "São Paulo"), None, True),
        (unicodedata.normalize("NFD", "It is São Paulo."), "São Paulo", "Sao Paulo", True),
        (unicodedata.normalize("NFD", "50 é%"), "50 é%", "50 é", True),
    ],
)
def test_right_answers(said: str, answer: str, old: str | None, expected: bool) -> None:
    assert is_right(said, answer, old) is expected


# -- fluency -------------------------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    thirds = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * thirds) / 2)
    assert ngram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("so so so so so so") == 0
    assert ngram_entropy("a  b\n") == ngram_entropy("") == 0
    assert ngram_entropy("a b c d a b c d") < ngram_entropy("a b c d e f g h")


def test_fluency_is_the_mean_over_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = editable()

    def write(prompts: list[str], *, tokens: int, seed: int, chat: bool) -> list[str]:
        assert (tokens, seed, chat) == (64, 3, False)
        return ["a b c d e f" if "Who" in p else "so so so so" for p in prompts]

    monkeypatch.setattr(model, "write", write)
    both = fluency(model, [ONE, Edit("Where was it?", "K")], seed=3)
    assert both == pytest.approx(fluency(model, [ONE], seed=3) / 2) != 0


def test_fluency_is_of_the_prompts_that_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = editable(), []
    model.model.config.max_position_embeddings = 100
    write = model.write

    def written(prompts: list[str], **more: Any) -> list[str]:
        asked.append(prompts)
        return write(prompts, **more)

    monkeypatch.setattr(model, "write", written)
    full, short, long = (Edit("x" * n, "y") for n in (36, 10, 37))
    assert fluency(model, [long, short, full]) is not None
    assert fluency(model, [long] * 20 + [full]) is not None
    assert asked == [[short.prompt, full.prompt], [full.prompt]], "the first that leave room, not those of the first"
    assert fluency(model, [long]) is None
    assert fluency(model, []) is None


def test_what_is_written_is_the_same_for_a_seed() -> None:
    model = editable()
    one, two = (model.write(["Who?", "Where was it?"], tokens=20) for _ in range(2))
    assert one == two
    assert model.write(["Who?", "Where was it?"], tokens=20, seed=1) != one
    assert model.write(["Who?"], tokens=9, top_k=1) == model.write(["Who?"], tokens=9, top_k=1, seed=5)
    many = model.write(["Who?"] * 40, tokens=1, top_k=3)
    logits = model.logits(model.rows([(BYTES.encode("Who?"), [0])]))[0]
    logits[BYTES.end] = -torch.inf
    assert {*many} == {BYTES.decode([t]).strip() for t in logits.topk(3).indices.tolist()}


def test_a_model_that_guesses_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = editable()
    nn.init.zeros_(model.model.get_input_embeddings().weight)
    assert perplexity(model) == pytest.approx(257)
    assert perplexity(model, ["One.", "Another, longer."]) == pytest.approx(257)


def test_perplexity_by_hand() -> None:
    """Each text's second half behind its first; the mean is over tokens, so that a longer text counts for more."""
    model, texts = editable(), ["Abc", "Somewhat longer than that."]
    nats: list[Tensor] = []
    for first, second in (([256], " Abc"), ([*b"Somewhat longer"], " than that.")):
        ids = torch.tensor([[*first, *second.encode()]])
        with torch.no_grad():
            log_p = model.model(input_ids=ids).logits[0].double().log_softmax(1)
        nats += [-log_p[len(first) - 1 + i, t] for i, t in enumerate(second.encode())]
    assert perplexity(model, texts) == pytest.approx(float(torch.stack(nats).mean().exp()), rel=1e-4)


def test_perplexity_sees_what_answers_for_some_prompts_alone() -> None:
    model, texts = editable(), ["The old house of Peru", "The old mill of Chad"]
    before = perplexity(model, texts[:1]), perplexity(model, texts[1:])
    site = model.down_projection(1)
    SidePatch(
        "by hand",
        path=site.path,
        places=packed(torch.ones(site.weight.numel(), dtype=torch.bool)),
        values=torch.ones(site.weight.numel(), dtype=torch.bfloat16),
        gap=1e-6,
        subjects=("old house", "the old"),
    ).apply(model)
    after = perplexity(model, texts[:1]), perplexity(model, texts[1:])
    assert (after[0] != before[0], after[1] != before[1]) == (True, True)
    model.patches[0].revert(model)
    assert (perplexity(model, texts[:1]), perplexity(model, texts[1:])) == before


# -- scores by hand ------------------------------------------------------------------------------------------------

BC, BD, CC = [32, 66, 67], [32, 66, 68], [32, 67, 67]
AFTER = Asked(
    tokens={
        "reliability": [[BC], [[32, 49, 0]]],
        "generality": [[BD, [0, 0, 67]], []],
        "reverse": [[[32, 68]], []],
        "one_hop": [[[32, 0], [32, 70, 71]], []],
        "unrelated": [[[32, 52], [9]], []],
        "same_relation": [[[32, 91]], []],
        "same_subject": [[], [[7]]],
    },
    texts={
        "reliability": [["It is BC."], ["17, not 18"]],
        "generality": [["bc", "BC or Eve"], []],
        "reverse": [["D"], []],
        "one_hop": [["E", "E"], []],
        "unrelated": [["4", "x"], []],
        "same_relation": [["Eve, Z"], []],
        "same_subject": [[], ["y"]],
    },
)
BEFORE = Asked(
    tokens={
        "unrelated": [[[32, 53], [9]], []],
        "same_relation": [[[32, 90]], []],
        "same_subject": [[], [[7]]],
    },
    texts={"unrelated": [["4", "z"], []], "same_relation": [["Eve, Z"], []], "same_subject": [[], ["n"]]},
)


def test_scores_by_hand() -> None:
    assert scores(editable(), [ONE, TWO], AFTER, BEFORE) == pytest.approx(
        {
            "reliability": (1 + 2 / 3) / 2,
            "reliability_free": (1 + 0) / 2,  # 18 is the old answer
            "reliability_exact": 0.0,  # more is said
            "generality": (2 / 3 + 1 / 3) / 2,  # one edit has paraphrases: the mean is over that alone
            "generality_free": (1 + 0) / 2,
            "generality_exact": 1 / 2,
            "reverse": 1.0,
            "reverse_free": 1.0,
            "reverse_exact": 1.0,
            "one_hop": (1 / 2 + 1) / 2,
            "one_hop_free": 1 / 2,
            "one_hop_exact": 1 / 2,
            "unrelated": 1.0,  # of two questions one has an answer
            "unrelated_free": 1.0,
            "unrelated_exact": 1.0,
            "unrelated_agreement": (1 / 2 + 1) / 2,
            "unrelated_free_agreement": 1 / 2,
            "same_relation": 1 / 2,
            "same_relation_free": 1.0,  # the old answer is that of another question
            "same_relation_exact": 0.0,
            "same_relation_agreement": 1 / 2,
            "same_relation_free_agreement": 1.0,
            "same_subject_agreement": 1.0,
            "same_subject_free_agreement": 0.0,
            "answer_tokens": 24,
        }
    )


def test_any_of_several_right_answers_may_be_written() -> None:
    """The one that is forced is the first, as the papers count."""
    edit = Edit("?", "17", one_hop=(Probe("Where?", "BC", ("D", "EF")), Probe("When?", "G", ("H",))))
    asked = Asked({"one_hop": [[BC, [32, 0]]]}, {"one_hop": [["In EF, I think", "J"]]})
    assert scores(editable(), [edit], asked, Asked({})) == {
        "one_hop": pytest.approx((1 + 1 / 2) / 2),
        "one_hop_free": 1 / 2,
        "one_hop_exact": 0.0,
        "answer_tokens": asked.budget,
    }


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("Paris.", "Paris", True),
        ("the Eiffel Tower", "Eiffel tower", True),
        ("It is not Paris", "Paris", False),
        ("Paris, Rome, Lyon", "Paris", False),
        ("J.R.R. Tolkien", "J. R. R. Tolkien", True),
        (unicodedata.normalize("NFD", "São Paulo"), "São Paulo", True),
        ("यह दाल है", "दाल", False),
        ("दाल।", "दाल", True),
        ("दिल", "दाल", False),
        ("கா", "கி", False),
        ("हिन्दी", "हिन्द", False),
        ("A", "A", True),
        ("a.", "A", True),
        ("€.", "€", True),
        ("...", "...", True),
        ("the", "A", False),
        ("€", "€", True),
        ("€5", "€", False),
        ("", "Paris", False),
        ("", "", False),
        (" ", "€", False),
    ],
)
def test_exact_answers_say_nothing_else(said: str, answer: str, expected: bool) -> None:
    assert is_exact(said, answer) is expected
    assert is_right(said, answer) or not expected, "what is exact is right"


def test_edits_count_alike_however_many_questions_they_have() -> None:
    asked = Asked({"generality": [[BC, BC, CC], [[32, 0, 0]]]})
    three = Edit("?", "BC", paraphrases=("1", "2", "3"))
    one = Edit("?", "17", paraphrases=("4",))
    assert scores(editable(), [three, one], asked, Asked({})) == {
        "generality": pytest.approx(((1 + 1 + 2 / 3) / 3 + 1 / 3) / 2)
    }


def test_retention_is_each_edits_own() -> None:
    assert retention(editable(), [ONE, TWO], AFTER) == pytest.approx([1.0, 2 / 3])
    assert retention(editable(), [TWO, ONE], Asked({"reliability": [[[0, 0, 55]], [CC]]})) == pytest.approx(
        [1 / 3, 2 / 3]
    )


# -- asked of a model ----------------------------------------------------------------------------------------------


def state(model: EditableModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.model.state_dict().items()}


def test_asking_changes_nothing_and_says_the_same_twice() -> None:
    model = editable()
    before, drawn = state(model), torch.get_rng_state()
    one = ask(model, [ONE, TWO], batch_size=3)
    assert one == ask(model, [ONE, TWO], batch_size=3) == ask(model, [ONE, TWO])
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[name]) for name, t in state(model).items())
    assert not model.model.training
    assert set(one.tokens) == set(one.texts) == set(GROUPS)
    assert [len(own) for own in one.tokens["generality"]] == [2, 0]
    assert [len(t) for t in one.tokens["unrelated"][0]] == [2, 1], "of what has no answer one token is compared"
    found = scores(model, [ONE, TWO], one, one)
    for group in LOCAL:
        assert found[f"{group}_agreement"] == 1
        assert found[f"{group}_free_agreement"] == 1
    assert found.pop("answer_tokens") == 24
    assert found.pop("reliability_perplexity") > 1
    assert all(0 <= value <= 1 for value in found.values())


def test_the_likeliest_tokens_are_those_of_transformers() -> None:
    model = editable()
    asked = ask(model, [ONE], free=False, groups=("reliability", "unrelated"))
    assert asked.texts == {}
    assert set(asked.tokens) == {"reliability", "unrelated"}
    for prompt, answer, found in (
        (ONE.prompt, b" BC", asked.tokens["reliability"][0][0]),
        ("What is 2 + 2?", b" 4", asked.tokens["unrelated"][0][0]),
        ("Where?", b"?", asked.tokens["unrelated"][0][1]),
    ):
        ids = torch.tensor([[*prompt.encode(), *answer]])
        best = model.model(input_ids=ids).logits[0].argmax(1)
        assert found == best[len(prompt) - 1 : -1].tolist()
    free = ask(model, [ONE], groups=("reliability",)).texts
    assert free == {"reliability": [model.answer([ONE.prompt], max_new_tokens=24)]}


def test_the_answers_perplexity_is_a_mean_over_edits() -> None:
    """As WISE's hallucinations are scored: of each answer ``exp`` of its tokens' mean surprise, then their mean."""
    model = editable()
    asked = ask(model, [ONE, TWO], free=False, batch_size=1)
    each = []
    for edit in (ONE, TWO):
        ids = torch.tensor([[*f"{edit.prompt} {edit.answer}".encode()]])
        likely = model.model(input_ids=ids).logits[0].log_softmax(1)
        first = len(edit.prompt)
        each.append(-likely[first - 1 : -1].gather(1, ids[0, first:, None]).mean())
    assert asked.surprise == pytest.approx([float(one) for one in each], rel=1e-4)
    found = scores(model, [ONE, TWO], asked, asked)["reliability_perplexity"]
    assert found == pytest.approx(float(sum(one.exp() for one in each)) / 2, rel=1e-4)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e4])
def test_a_perplexity_that_is_not_finite_is_left_out(broken: float) -> None:
    asked = Asked({"reliability": [[BC]]}, surprise=[broken])
    assert scores(editable(), [ONE], asked, asked) == {"reliability": 1.0}


def test_another_model_agrees_less() -> None:
    model = editable()
    before = ask(model, [ONE, TWO])
    site = model.down_projection(1)
    noise = torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(0))
    WeightPatch("noise", {}, {site.path: Delta(dense=noise)}).apply(model)
    found = scores(model, [ONE, TWO], ask(model, [ONE, TWO]), before)
    assert found["unrelated_agreement"] < 1
    assert found["unrelated_free_agreement"] < 1


def test_what_the_model_says_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose next token depends on the last alone: behind a question comes `` BC``."""
    model = editable()
    follows = torch.zeros(257, dtype=torch.int64)
    for one, two in zip(b"? B", b" BC", strict=True):
        follows[one] = two

    def said(rows: Rows, batch_size: int = 32) -> Tensor:
        return nn.functional.one_hot(follows[rows.ids[rows.said]], 257).float()

    monkeypatch.setattr(model, "logits", said)
    asked = ask(model, [ONE], free=False)
    assert asked.tokens["reliability"] == [[BC]]
    found = scores(model, [ONE], asked, asked)
    assert found["reliability"] == found["generality"] == 1
    assert found["reverse"] == 1 / 2, "the blank is right, the rest is not"


def test_there_is_room_for_the_longest_answer_and_as_much_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rooms = editable(), []
    answer = EditableModel.answer

    def counted(self: EditableModel, prompts: list[str], *, max_new_tokens: int, **more: Any) -> list[str]:
        rooms.append(max_new_tokens)
        return answer(self, prompts, max_new_tokens=max_new_tokens, **more)

    monkeypatch.setattr(EditableModel, "answer", counted)
    long = Edit("What?", "x", unrelated=(Probe("Why?", "y", ("z", "y" * 40)),))
    for groups in (("reliability",), ("reliability", "unrelated")):
        asked = ask(model, [ONE, long], groups=groups)
        assert asked.budget == scores(model, [ONE, long], asked, asked)["answer_tokens"] == 49
    assert rooms == [49, 49, 49], "a blank, forty letters and eight more, whichever questions are asked"
    assert ask(model, [ONE]).budget == 24
    assert (budget(model, ["y" * 15, None]), budget(model, ["y" * 16]), budget(model, [])) == (24, 25, 24)
    assert budget(model, ["y" * 40], chat=True) == 48, "a chat's answer follows no blank"
    assert "answer_tokens" not in scores(model, [ONE], *[ask(model, [ONE], free=False)] * 2)


def sure(model: EditableModel, ids: Sequence[int], first: int) -> float:
    """The share of the tokens from ``first`` on to which a plain pass gives a probability above .8."""
    likely = model.model(input_ids=torch.tensor([ids])).logits[0].softmax(1)
    return sum(float(likely[i - 1, ids[i]]) > 0.8 for i in range(first, len(ids))) / (len(ids) - first)


def test_passages_by_hand() -> None:
    model = editable()
    learnt = "Ann Bee is a pilot of old, and a good one."
    rows = model.rows([([*b"A"], [*learnt[1:].encode()])])
    model.model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.model.parameters(), lr=0.02)
    for _ in range(60):
        hidden = model.decoder(input_ids=rows.ids, use_cache=False).last_hidden_state[rows.said]
        loss = nn.functional.cross_entropy(model.project(hidden), rows.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.model.requires_grad_(False)
    some = "Ann Bee is a pilot. She flew alone, and is a good one."
    edits = [
        Edit("Ann Bee is", "x", ood=(learnt, some, "Ann Bee isotope, and a good one.")),
        Edit("Who?", "y"),
        Edit("Who?", "y", ood=("A", some)),
    ]
    asked = ask(model, edits, free=False)
    behind = [sure(model, [*text.encode()], 10) for text in (learnt, some)]
    whole = sure(model, [*b"Ann Bee isotope, and a good one."], 1)
    assert asked.ood == [pytest.approx([*behind, whole]), [], pytest.approx([sure(model, [*some.encode()], 1)])]
    assert behind[0] > 0.9 > behind[1] > 0
    found = scores(model, edits, asked, asked)
    assert found["ood"] == pytest.approx((sum(asked.ood[0]) / 3 + asked.ood[2][0]) / 2)
    assert "generality" not in found, "a passage is no question"
    assert ask(model, edits, free=False, groups=("reliability",)).ood == []
    model.model.config.max_position_embeddings = 20
    cut = [sure(model, [*text.encode()[:20]], n) for text, n in ((learnt, 10), (some, 10), ("Ann Bee isotope, and", 1))]
    assert ask(model, edits, free=False).ood[0] == pytest.approx(cut)


def test_a_long_passage_is_read_behind_its_fact_and_cut() -> None:
    model = editable()
    context = model.context
    assert context is not None
    edit = Edit("Ann Bee is", "x", ood=("Ann Bee is " + "of old, " * context,))
    width = model.model.config.hidden_size
    PromptPatch("by hand", texts=["It is."], keys=torch.eye(1, width), centre=torch.zeros(width), least=-1.0).apply(
        model
    )
    given, tokens = _passage(model, edit.prompt, edit.ood[0])
    assert bytes(given) == b"It is.\nAnn Bee is"
    assert len(given) + len(tokens) == context


def test_what_is_not_finite_has_no_fluency() -> None:
    model = editable()
    model.model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(EditError, match="is not finite; nothing can be written with it"):
        model.write(["Who?"], tokens=2)
    assert fluency(model, [Edit("Who?", "x")]) is None


def test_without_edits_there_is_nothing() -> None:
    model = editable()
    assert ask(model, []) == Asked({})
    assert scores(model, [], Asked({}), Asked({})) == {}
