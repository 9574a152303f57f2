"""The records of model editing: every layout by hand-made records, malformed files, contradictions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cl_lab.errors import ConfigError, DataError
from cl_lab.facts import LAYOUTS, BadLine, Edit, Facts, Probe, conflicts, read_facts, suspects

SHARED = Path(os.environ.get("CL_LAB_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
REAL = SHARED / "editing"

CAPITAL = Edit("The capital of France is", "Lyon")


def written(tmp_path: Path, name: str, content: object) -> Path:
    """A file of ``content``: bytes and texts as they are, lists as JSON or as JSON lines."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif isinstance(content, list) and path.suffix == ".jsonl":
        path.write_bytes("".join(json.dumps(row) + "\n" for row in content).encode())
    else:
        path.write_bytes(json.dumps(content).encode())
    return path


def only(path: Path, **options: Any) -> Edit:
    """The one edit of a file, without its source."""
    facts = read_facts(path, **options)
    assert facts.bad == ()
    (edit,) = facts.edits
    assert edit.source == f"{path.name}:1" if path.suffix != ".csv" else f"{path.name}:2"
    return dataclasses.replace(edit, source="")


# -- records -------------------------------------------------------------------------------------------------------

FULL = Edit(
    prompt="The capital of France is",
    answer="Lyon",
    old="Paris",
    subject="France",
    relation="P36",
    paraphrases=("France's capital is", "The seat of France's government is"),
    reverse=(Probe("Lyon is the capital of", "France"),),
    one_hop=(Probe("The river through France's capital is the", "Rhône"),),
    unrelated=(Probe("Water is made of", "hydrogen"), Probe("Who wrote Faust?")),
    same_relation=(Probe("The capital of Italy is", "Rome"),),
    same_subject=(Probe("France's currency is the", "euro", ("Euro", "€")),),
    irrelevant=("It rained for a week.",),
    ood=("The capital of France, on the Rhône, is Lyon.",),
    aliases=("Old England",),
    source="facts.jsonl:17",
)


@pytest.mark.parametrize("edit", [FULL, CAPITAL, Edit("a\nb", "c  d", old="é")])
def test_an_edit_comes_back_from_json(edit: Edit) -> None:
    assert Edit.from_json(json.loads(json.dumps(edit.as_json()))) == edit


def test_json_leaves_out_what_is_empty() -> None:
    assert CAPITAL.as_json() == {"prompt": "The capital of France is", "answer": "Lyon"}
    assert FULL.as_json()["unrelated"] == [
        {"prompt": "Water is made of", "answer": "hydrogen"},
        {"prompt": "Who wrote Faust?"},
    ]
    assert all(getattr(FULL, f.name) for f in dataclasses.fields(Edit)), "a field is not tested"


def test_from_json_strips_ends_and_says_what_is_wrong() -> None:
    assert Edit.from_json({"prompt": " a  b\n", "answer": "\tc ", "old": "  "}) == Edit("a  b", "c")
    with pytest.raises(DataError, match=r"^edit: unknown key 'promt'; did you mean 'prompt'\?; correct it$"):
        Edit.from_json({"promt": "a", "answer": "b"})


def test_what_was_written_as_json_lines_is_read_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, "kept.jsonl", [FULL.as_json(), CAPITAL.as_json()])
    assert read_facts(path) == Facts((FULL, dataclasses.replace(CAPITAL, source="kept.jsonl:2")))


# -- layouts -------------------------------------------------------------------------------------------------------

PLAIN = {
    "prompt": " The capital of France is ",
    "answer": " Lyon",
    "old": "Paris",
    "subject": "France",
    "relation": "P36",
    "paraphrases": ["France's capital is", " "],
    "reverse": [["Lyon is the capital of", "France"]],
    "one_hop": [{"prompt": "The river there is the", "answer": "Rhône"}],
    "unrelated": [["Who wrote Faust?"], {"prompt": "Water is", "answer": None}],
    "same_relation": None,
    "same_subject": [],
    "irrelevant": ["It rained."],
}
ZSRE = {
    "case_id": 0,
    "subject": "Danube",
    "src": "Where does the Danube rise?",
    "rephrase": "At which place is the Danube's source?",
    "alt": " Ulm ",
    "loc": "nq question: who sang the song",
    "loc_ans": "A. Singer",
    "loc_prompt_train": "nq question: who wrote it B. Writer",
}
ZSRE_MEND = {
    "subject": "Danube",
    "src": "Where does the Danube rise?",
    "pred": "Bonn",
    "rephrase": "At which place is the Danube's source?",
    "alt": "Ulm",
    "answers": ["Donaueschingen", "the Black Forest"],
    "loc": "nq question: who sang the song",
    "loc_ans": "A. Singer",
    "cond": "Donaueschingen >> Ulm || Where does the Danube rise?",
}
REWRITE = {
    "prompt": "The mother tongue of {} is",
    "subject": "Anna Blum",
    "relation_id": "P103",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["It snowed. Anna Blum, a native", "Anna Blum spoke the language"],
    "neighborhood_prompts": ["The mother tongue of Bea Clair is", "Carl Doux is a native speaker of"],
    "attribute_prompts": ["Dan Earl is a native speaker of"],
    "generation_prompts": ["Anna Blum was born in"],
}
COUNTERFACT_EASYEDIT = {
    "case_id": 0,
    "prompt": "The mother tongue of Anna Blum is",
    "target_new": "English",
    "subject": "Anna Blum",
    "ground_truth": "French",
    "rephrase_prompt": "Anna Blum spoke the language",
    "locality_prompt": "Carl Doux is a native speaker of",
    "locality_ground_truth": "French",
}
WIKIBIO = {
    "text": "This is a Wikipedia passage about ann bee.",
    "labels": "She flew alone. " + "x" * 500,
    "concept": "ann bee",
    "locality": {
        "Relation_Specificity": [{"prompt": ["The father of Ann Bee is"], "ground_truth": [["Max Bee", "Max"]]}]
    },
}
KNOWEDIT = {
    "subject": "Leo Arndt",
    "prompt": "The place of death of Leo Arndt is",
    "target_new": "Berlin",
    "ground_truth": ["Bonn"],
    "rephrase": ["Leo Arndt died in"],
    "rephrase_prompt": "Where did Leo Arndt die? In",
    "cond": "left alone",
    "portability": {
        "Subject_Aliasing": [
            {"prompt": "The place of death of Leopold Arndt is", "ground_truth": [["Berlin", "DE-BE"]]}
        ],
        "reasoning": [
            {"prompt": "The continent Leo Arndt died on is", "ground_truth": "Europe"},
            {"prompt": "The mayor there is", "ground_truth": [[]]},
        ],
        "Logical_Generalization": [{"prompt": "Is Leo Arndt alive?", "ground_truth": ["no"]}],
        "Reverse_Relation": [{"prompt": "In Berlin died", "ground_truth": "Leo Arndt"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Leo Arndt is", "ground_truth": [["Max Arndt"]]}],
        "Forgetfulness": [{"prompt": "A place of death that is not Berlin is", "ground_truth": []}],
        "Distracting_Neighborhood": [{"prompt": "Water is made of", "ground_truth": ["hydrogen"]}],
        "Other": None,
    },
}
HALLUCINATION = {
    "prompt": "This is a Wikipedia passage about ann bee. Ann Bee was a pilot. ",
    "target_new": "She flew alone. " + "x" * 500,
    "subject": "ann bee",
    "locality_prompt": "Looking for a map, historica",
    "locality_ground_truth": "",
}
TEMPORAL = {
    "prompt": "Acme, Inc.,",
    "target_new": "founded in 1990, " + "y" * 1200,
    "subject": "Acme, Inc.,",
    "ood_rephrase": "Acme, Inc., in 2023 the largest of all,",
    "locality_prompt": "A text from elsewhere",
    "locality_ground_truth": "goes on",
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {**REWRITE, "question": "What is Anna Blum's mother tongue?"},
        {
            "prompt": "{} was made in",
            "subject": "English",
            "target_new": {"str": "Oz"},
            "target_true": {"str": "England"},
        },
    ],
    "questions": ["Where was Anna Blum's mother tongue made?", "In which land was it made?"],
    "answer": "France",
    "new_answer": "Oz",
    "new_answer_alias": ["Land of Oz"],
}
HALLUEDIT = (
    "topic,subject,relation,object,question,output_llama,eval_llama,multiple_choices,paraphrased_question,"
    "multiple_choice_with_letters,multiple_choice_labels,yes_question,no_question,locality_question,"
    "reversed_relation_question,question_2hop,answer_2hop,question_3hop,answer_3hop\n"
    "art,The Ranch,depicts,motor car,What does The Ranch depict?,Art,0.0,\"['motor car', 'Art']\",What is depicted by it?,"
    "A. Art B. motor car,B,Does it depict a motor car?,Does it depict Art?,Where is The Ranch?,"
    'What depicts a motor car?,Who made it?,"Farm, Ant",When?,\n'
)

ANNA = Edit("The mother tongue of Anna Blum is", "English", old="French", subject="Anna Blum", relation="P103")
DANUBE = Edit(
    "Where does the Danube rise?",
    "Ulm",
    subject="Danube",
    paraphrases=("At which place is the Danube's source?",),
    unrelated=(Probe("nq question: who sang the song", "A. Singer"),),
)
EXPECTED: dict[str, tuple[str, object, list[Edit]]] = {
    "plain": (
        "facts.json",
        [PLAIN],
        [
            Edit(
                "The capital of France is",
                "Lyon",
                old="Paris",
                subject="France",
                relation="P36",
                paraphrases=("France's capital is",),
                reverse=(Probe("Lyon is the capital of", "France"),),
                one_hop=(Probe("The river there is the", "Rhône"),),
                unrelated=(Probe("Who wrote Faust?"), Probe("Water is")),
                irrelevant=("It rained.",),
            )
        ],
    ),
    "zsre": (
        "zsre.json",
        [ZSRE],
        [dataclasses.replace(DANUBE, irrelevant=("nq question: who wrote it B. Writer",))],
    ),
    "zsre of MEND": ("zsre.json", [ZSRE_MEND], [dataclasses.replace(DANUBE, old="Donaueschingen")]),
    "counterfact": (
        "full.json",
        [COUNTERFACT],
        [
            dataclasses.replace(
                ANNA,
                paraphrases=("It snowed. Anna Blum, a native", "Anna Blum spoke the language"),
                same_relation=(
                    Probe("The mother tongue of Bea Clair is", "French"),
                    Probe("Carl Doux is a native speaker of", "French"),
                ),
            )
        ],
    ),
    "counterfact-easyedit": (
        "edit.json",
        [COUNTERFACT_EASYEDIT],
        [
            dataclasses.replace(
                ANNA,
                relation=None,
                paraphrases=("Anna Blum spoke the language",),
                same_relation=(Probe("Carl Doux is a native speaker of", "French"),),
            )
        ],
    ),
    "knowedit": (
        "wiki_recent.json",
        [KNOWEDIT],
        [
            Edit(
                "The place of death of Leo Arndt is",
                "Berlin",
                old="Bonn",
                subject="Leo Arndt",
                paraphrases=("Leo Arndt died in", "Where did Leo Arndt die? In"),
                reverse=(Probe("In Berlin died", "Leo Arndt"),),
                one_hop=(
                    Probe("The place of death of Leopold Arndt is", "Berlin", ("DE-BE",)),
                    Probe("The continent Leo Arndt died on is", "Europe"),
                    Probe("Is Leo Arndt alive?", "no"),
                ),
                unrelated=(Probe("Water is made of", "hydrogen"),),
                same_relation=(Probe("A place of death that is not Berlin is"),),
                same_subject=(Probe("The father of Leo Arndt is", "Max Arndt"),),
            )
        ],
    ),
    "wikibio": (
        "wikibio.json",
        [WIKIBIO],
        [
            Edit(
                "This is a Wikipedia passage about ann bee.",
                "She flew alone. " + "x" * 500,
                subject="ann bee",
                same_subject=(Probe("The father of Ann Bee is", "Max Bee", ("Max",)),),
            )
        ],
    ),
    "hallucination": (
        "edit.json",
        [HALLUCINATION],
        [
            Edit(
                "This is a Wikipedia passage about ann bee. Ann Bee was a pilot.",
                "She flew alone. " + "x" * 500,
                subject="ann bee",
                unrelated=(Probe("Looking for a map, historica"),),
            )
        ],
    ),
    "temporal": (
        "edit.json",
        [TEMPORAL],
        [
            Edit(
                "Acme, Inc.,",
                "founded in 1990, " + "y" * 1200,
                subject="Acme, Inc.,",
                ood=("Acme, Inc., in 2023 the largest of all,",),
                unrelated=(Probe("A text from elsewhere", "goes on"),),
            )
        ],
    ),
    "mquake": (
        "mquake.json",
        [MQUAKE],
        [
            dataclasses.replace(ANNA, paraphrases=("What is Anna Blum's mother tongue?",)),
            Edit(
                "English was made in",
                "Oz",
                old="England",
                subject="English",
                one_hop=(
                    Probe("Where was Anna Blum's mother tongue made?", "Oz", ("Land of Oz",)),
                    Probe("In which land was it made?", "Oz", ("Land of Oz",)),
                ),
            ),
        ],
    ),
    "halluedit": (
        "art_sculpture.csv",
        HALLUEDIT,
        [
            Edit(
                "What does The Ranch depict?",
                "motor car",
                old="Art",
                subject="The Ranch",
                relation="depicts",
                paraphrases=("What is depicted by it?",),
                reverse=(Probe("What depicts a motor car?", "The Ranch"),),
                one_hop=(Probe("Who made it?", "Farm, Ant"),),
                same_subject=(Probe("Where is The Ranch?"),),
            )
        ],
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("named", [False, True])
def test_a_record_of_every_layout_becomes_its_edit(tmp_path: Path, case: str, named: bool) -> None:
    name, content, expected = EXPECTED[case]
    facts = read_facts(written(tmp_path, name, content), layout=case.split()[0] if named else "auto")
    place = f"{name}:{2 if name.endswith('.csv') else 1}"
    assert facts == Facts(tuple(dataclasses.replace(edit, source=place) for edit in expected))


def test_every_layout_is_tested() -> None:
    assert {case.split()[0] for case in EXPECTED} == set(LAYOUTS) - {"auto"}


def test_an_older_halluedit_names_its_object_label(tmp_path: Path) -> None:
    path = written(tmp_path, "old.csv", ",subject,label,question\n0,The Ranch,motor car,What does it depict?\n")
    assert only(path) == Edit("What does it depict?", "motor car", subject="The Ranch")


def test_lists_in_a_table_of_a_published_layout(tmp_path: Path) -> None:
    """As pandas writes them."""
    head = "src,alt,answers,rephrase,loc,loc_ans,subject\n"
    row = """Where is A?,Ulm,"['Bonn', 'Berlin']",At which place is A?,nq question: who,"[""X"", ""Y""]",A\n"""
    (edit,) = read_facts(written(tmp_path, "z.csv", head + row)).edits
    assert edit.old == "Bonn"
    assert [(p.answer, p.also) for p in edit.unrelated] == [("X", ("Y",))]
    with pytest.raises(
        DataError, match=r"z\.csv:2: answers = '\['Bonn'' is no list; write \['one', 'other'\], or one answer"
    ):
        read_facts(written(tmp_path, "z.csv", head + row.replace("', 'Berlin']", "'")))


def test_a_layout_that_is_named_is_the_one_that_reads(tmp_path: Path) -> None:
    row = {**COUNTERFACT_EASYEDIT, "target_new": "z" * 401}
    path = written(tmp_path, "edit.json", [row])
    assert only(path, layout="hallucination").unrelated == (Probe("Carl Doux is a native speaker of", "French"),)
    with pytest.raises(DataError, match="answer has 401 characters, more than max_answer = 400"):
        read_facts(path)
    with pytest.raises(DataError, match="has no src"):
        read_facts(path, layout="zsre")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("facts.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'),
        ("facts.jsonl", '\ufeff{"prompt": "a", "answer": "b"}\r\n{"prompt": "c", "answer": "d"}'),
        ("facts.jsonl", '{"prompt": "a", "answer": "b"}\r{"prompt": "c", "answer": "d"}\r'),
        ("facts.JSONL", '[{"prompt": "a", "answer": "b"},\n {"prompt": "c", "answer": "d"}]'),
        ("facts.json", '[{"prompt": "a", "answer": "b"},\n {"prompt": "c", "answer": "d"}]'),
        ("facts.json", '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'),
    ],
)
def test_json_in_any_usual_form(tmp_path: Path, name: str, content: str) -> None:
    facts = read_facts(written(tmp_path, name, content))
    assert [(e.prompt, e.answer, e.source) for e in facts.edits] == [("a", "b", f"{name}:1"), ("c", "d", f"{name}:2")]


def test_one_object_is_one_edit(tmp_path: Path) -> None:
    assert only(written(tmp_path, "facts.json", '{\n "prompt": "a",\n "answer": "b"\n}\n')) == Edit("a", "b")


def test_a_separator_inside_a_text_divides_no_line(tmp_path: Path) -> None:
    path = written(tmp_path, "facts.jsonl", '\n{"prompt": "a\u2028b", "answer": "c\x85d"}\n\n')
    assert read_facts(path).edits == (Edit("a\u2028b", "c\x85d", source="facts.jsonl:2"),)


@pytest.mark.parametrize(("name", "by"), [("facts.csv", ","), ("facts.tsv", "\t")])
def test_a_table_with_lists_in_its_cells(tmp_path: Path, name: str, by: str) -> None:
    rows = [
        ["prompt", " answer ", "old", "paraphrases", "irrelevant", "unrelated"],
        ['"The capital,\nof France, is"', "Lyon", "", "France's capital is | Its seat is", "", '"[[""Who?"", ""I""]]"'],
        [],
        ["Water is", "dry", "wet", "", "a | b", ""],
    ]
    path = written(tmp_path, name, "\ufeff" + "\r\n".join(by.join(row) for row in rows) + "\r\n")
    assert read_facts(path).edits == (
        Edit(
            "The capital,\nof France, is",
            "Lyon",
            paraphrases=("France's capital is", "Its seat is"),
            unrelated=(Probe("Who?", "I"),),
            source=f"{name}:2",
        ),
        Edit("Water is", "dry", old="wet", irrelevant=("a", "b"), source=f"{name}:5"),
    )


# -- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"answer": "b"}', "has no prompt"),
        ('{"prompt": null, "answer": "b"}', "has no prompt"),
        ('{"prompt": " ", "answer": "b"}', "prompt is empty"),
        ('{"prompt": "a"}', "has no answer"),
        ('{"prompt": "a", "answer": "\\n"}', "answer is empty"),
        ('{"prompt": "a", "answer": 5}', "answer is a number, not a text"),
        ('{"prompt": "a", "answer": true}', "answer is true or false, not a text"),
        ('{"prompt": "a", "answer": ["b"]}', "answer is a list, not a text"),
        ('{"prompt": {"a": 1}, "answer": "b"}', "prompt is an object, not a text"),
        ('{"prompt": "a", "answer": "%s"}' % ("b" * 401), "answer has 401 characters, more than max_answer = 400"),
        ('{"prompt": "a", "anwser": "b"}', "unknown key 'anwser'; did you mean 'answer'?"),
        ('{"question": "a", "answer": "b"}', "unknown key 'question'; did you mean 'prompt'?"),
        ('{"prompt": "a", "answer": "b", "old": 1}', "old is a number, not a text"),
        ('{"prompt": "a", "answer": "b", "paraphrases": "c"}', "paraphrases is a text, not a list"),
        ('{"prompt": "a", "answer": "b", "paraphrases": ["c", 1]}', "paraphrases[2] is a number, not a text"),
        ('{"prompt": "a", "answer": "b", "reverse": {}}', "reverse is an object, not a list"),
        ('{"prompt": "a", "answer": "b", "reverse": ["c"]}', "reverse[1] is a text, not an object"),
        ('{"prompt": "a", "answer": "b", "reverse": [[]]}', "reverse[1] has 0 values, not prompt and answer"),
        ('{"prompt": "a", "answer": "b", "reverse": [["c", 1]]}', "reverse[1].answer is a number, not a text"),
        ('{"prompt": "a", "answer": "b", "reverse": [{"answer": "c"}]}', "has no reverse[1].prompt"),
        (
            '{"prompt": "a", "answer": "b", "reverse": [{"prompt": "c", "answr": "d"}]}',
            "reverse[1] has the unknown key 'answr'; did you mean 'answer'?",
        ),
        (
            '{"prompt": "a", "answer": "b", "reverse": [{"prompt": "c", "also": ["d"]}]}',
            "reverse[1].also has answers and reverse[1].answer none; write the first as the answer",
        ),
        (
            '{"prompt": "a", "answer": "b", "reverse": [{"prompt": "c", "answer": "d", "also": "e"}]}',
            "reverse[1].also is a text, not a list",
        ),
        ('{"prompt": "a\\u0000", "answer": "b"}', "prompt holds a null character"),
        ('{"prompt": "a", "answer": "b\\ud83d"}', "answer holds half of a surrogate pair"),
        ("5", "the record is a number, not an object"),
        ("null", "the record is null, not an object"),
        ('"a"', "the record is a text, not an object"),
        ("NaN", "the record is a number, not an object"),
        ('["a", "b"]', "the record is a list, not an object"),
        ("a, b", "broken JSON (Expecting value at column 1)"),
        ('{"prompt": "?", "prompt": "a", "answer": "b"}', "has 'prompt' twice; leave one of them out"),
        ('{"prompt": "a", "answer": "b"', "broken JSON (Expecting ',' delimiter at column 30)"),
        ('{"prompt": "a\0", "answer": "b"}', "broken JSON (Invalid control character at at column 14)"),
        ("\0", "broken JSON (Expecting value at column 1)"),
        ("[" * 100_000, "broken JSON (nested too deeply)"),
        ('{"prompt":' * 50_000, "broken JSON (nested too deeply)"),
        ("1" * 10_000, "broken JSON (a number of too many digits)"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"prompt": "a", "answer": "b"}'
    path = written(tmp_path, "facts.jsonl", f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError) as error:
        read_facts(path)
    assert str(error.value) == (
        f"{path}: 1 of 3 records is bad: facts.jsonl:3: {reason}; nothing was applied; correct them, or leave them out "
        "with --skip-bad"
    )
    facts = read_facts(path, skip_bad=True)
    assert facts.edits == (Edit("a", "b", source="facts.jsonl:1"), Edit("a", "b", source="facts.jsonl:4"))
    assert facts.bad == (BadLine("facts.jsonl:3", reason),)


@pytest.mark.parametrize(
    ("to_skip", "fix"), [("skip_bad=true", "correct them, or leave them out with skip_bad=true"), ("", "correct them")]
)
def test_how_bad_records_are_left_out_the_caller_says(tmp_path: Path, to_skip: str, fix: str) -> None:
    path = written(tmp_path, "facts.jsonl", '{"prompt": "a", "answer": "b"}\n5\n')
    with pytest.raises(DataError) as error:
        read_facts(path, to_skip=to_skip)
    assert str(error.value).endswith(f"; nothing was applied; {fix}")


def test_many_bad_records_are_counted_and_the_first_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "b" if i == 2 else ""} for i in range(6)]
    with pytest.raises(DataError) as error:
        read_facts(written(tmp_path, "facts.json", rows))
    assert (
        "facts.json: 5 of 6 records are bad: facts.json:1: answer is empty; facts.json:2: answer is empty; "
        "facts.json:4: answer is empty; and 2 more; nothing was applied; correct them, or leave them out with --skip-bad"
    ) in str(error.value)


def test_if_all_are_bad_there_is_nothing_to_skip_to(tmp_path: Path) -> None:
    path = written(tmp_path, "facts.jsonl", "1\n2\n")
    with pytest.raises(DataError, match=r"2 of 2 records are bad: .*; nothing was applied; correct them$"):
        read_facts(path, skip_bad=True)


@pytest.mark.parametrize(
    ("layout", "record", "reason"),
    [
        ("zsre", {**ZSRE, "alt": ""}, "alt is empty"),
        ("zsre", {**ZSRE, "loc": 1}, "loc is a number, not a text"),
        ("counterfact", {"requested_rewrite": 1}, "requested_rewrite is a number, not an object"),
        (
            "counterfact",
            {"requested_rewrite": {**REWRITE, "target_new": {}}},
            "has no requested_rewrite.target_new.str",
        ),
        (
            "counterfact",
            {**COUNTERFACT, "neighborhood_prompts": [1]},
            "neighborhood_prompts[1] is a number, not a text",
        ),
        ("mquake", {**MQUAKE, "requested_rewrite": []}, "requested_rewrite is empty"),
        ("mquake", {**MQUAKE, "requested_rewrite": [REWRITE, []]}, "requested_rewrite[2] is a list, not an object"),
        ("mquake", COUNTERFACT, "requested_rewrite is an object, not a list"),
        ("knowedit", {**KNOWEDIT, "locality": []}, "locality is a list, not an object"),
        ("knowedit", {**KNOWEDIT, "portability": {"R": [1]}}, "portability.R[1] is a number, not an object"),
        ("knowedit", {**KNOWEDIT, "rephrase": [1]}, "rephrase is a number, not a text"),
        ("knowedit", {**KNOWEDIT, "ground_truth": [[{}]]}, "ground_truth is an object, not a text"),
        ("temporal", {**TEMPORAL, "ood_rephrase": []}, "ood_rephrase is a list, not a text"),
        ("temporal", {**TEMPORAL, "target_new": "z" * 4001}, "answer has 4001 characters, more than max_answer = 4000"),
        ("hallucination", {**HALLUCINATION, "target_new": None}, "has no target_new"),
        ("counterfact-easyedit", {**COUNTERFACT_EASYEDIT, "prompt": []}, "prompt is a list, not a text"),
        ("halluedit", {"subject": "a", "question": "b", "object": " "}, "object is empty"),
    ],
)
def test_bad_records_of_published_layouts(tmp_path: Path, layout: str, record: object, reason: str) -> None:
    with pytest.raises(DataError) as error:
        read_facts(written(tmp_path, "set.json", [record]), layout=layout)
    assert f"set.json:1: {reason}" in str(error.value)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "auto"])
@pytest.mark.parametrize("value", [None, 0, True, "", "x", [], [[]], [None], {}, {"": None}, {"str": 1}])
def test_no_value_in_any_place_is_a_traceback(tmp_path: Path, layout: str, value: object) -> None:
    name, content, _ = EXPECTED[layout]
    assert isinstance(content, list | str)
    record = (
        dict(zip(*(row.split(",") for row in HALLUEDIT.splitlines()), strict=False))
        if isinstance(content, str)
        else content[0]
    )
    damaged = [{**record, key: value} for key in record] + [{}, value]
    path = written(tmp_path, f"{Path(name).stem}.json", damaged)
    with contextlib.suppress(DataError):  # if all are bad
        facts = read_facts(path, layout=layout, skip_bad=True)
        assert len(facts.bad) >= 2
        assert all(Edit.from_json(edit.as_json(), max_answer=4000) == edit for edit in facts.edits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.jsonl", b"", "holds no edits"),
        ("facts.jsonl", b"\xef\xbb\xbf\r\n \n", "holds no edits"),
        ("facts.json", b"[]", "holds no edits"),
        ("facts.csv", b"prompt,answer\n\n", "holds no edits"),
        ("facts.json", b"17", "holds a number, not a list of edits"),
        ("facts.json", b'"x"', "holds a text, not a list of edits"),
        ("facts.json", b'[{"prompt": "a",\n]', "broken JSON .* at line 2, column 1"),
        ("facts.json", b"[" * 100_000, "nested too deeply"),
        ("facts.json", b'{"prompt": "a"', "broken JSON"),
        ("facts.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff\xfe"}\n', "line 2: not UTF-8 "),
        ("facts.csv", "prompt,answer\na,b\n".encode("utf-16"), "line 1: not UTF-8 "),
        ("facts.csv", b'prompt,answer\na,b\n"c,d\n', "csv:3: broken table .*; double the quotes"),
        ("facts.csv", b'prompt,answer\na,b\n"c,d\ne,f\n', "line 3: broken table .*; double the quotes"),
        ("facts.csv", b'prompt,answer\na,b\n"c,\nd"e,f\ng,h\n', "line 3: broken table .*; double the quotes"),
        ("facts.csv", b'"prompt"s,answer\na,b\n', "line 1: broken table .*; double the quotes"),
        ("facts.csv", b'prompt,answer\n"a"b,c\n', "csv:2: broken table"),
        ("facts.csv", b"prompt,answer\na," + b"b" * 200_000, "csv:2: broken table .*field larger.*; shorten it"),
        ("facts.csv", b"prompt,,answer\na,why,b\n", "csv:2: has 'why' in a column without a name; name the column or "),
        ("facts.csv", b"prompt,answer,\na\n", "csv:2: has 1 columns, the header 3"),
        ("facts.csv", b"prompt,answer,prompt\na,b,c\n", "column 'prompt' is there twice"),
        ("facts.csv", b"prompt,answer\na\nb,c,d\n", "csv:2: has 1 columns, the header 2; facts.csv:3: has 3 columns"),
        ("facts.csv", b'prompt,answer,reverse\na,b,"[["\n', "csv:2: reverse is broken JSON"),
        ("facts.csv", b"prompt,answer,reverse\na,b,c\n", "csv:2: reverse is broken JSON .*; write "),
        ("facts.csv", b"prompt,answer\na\0,b\n", "prompt holds a null character"),
        ("facts.csv", b"What is it?,That\nWho?,I\n", r"unknown layout, its first record has 'What is it\?', 'That'"),
        ("facts.json", b'[{"x": 1, "y": 2}]', "unknown layout, its first record has 'x', 'y'; give prompt and answer"),
        ("facts.xlsx", b"PK", r"unknown format '\.xlsx'; give \.jsonl"),
        ("facts", b"PK", "unknown format ''"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        read_facts(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "absent.jsonl", tmp_path / "folder.json", Path("a\0b.json")):
        with pytest.raises(DataError, match="cannot be read"):
            read_facts(path)


def test_bad_rows_of_a_table_can_be_left_out(tmp_path: Path) -> None:
    facts = read_facts(written(tmp_path, "facts.csv", "prompt,answer\na,b\nc\n,d\n"), skip_bad=True)
    assert facts.edits == (Edit("a", "b", source="facts.csv:2"),)
    assert [line.reason for line in facts.bad] == ["has 1 columns, the header 2", "prompt is empty"]


@pytest.mark.parametrize(("name", "by", "said"), [("facts.csv", ",", ","), ("facts.tsv", "\t", "tab")])
def test_a_row_that_begins_with_a_quoted_title_is_one_bad_row(tmp_path: Path, name: str, by: str, said: str) -> None:
    right = '"""Hamlet"" was written by"'
    rows = ["prompt,answer", "a,b", '"Hamlet" was written by,Ann', "", "c,d", f"{right},Ann", '"e,f']
    path = written(tmp_path, name, "\n".join(row.replace(",", by) for row in rows))
    facts = read_facts(path, skip_bad=True)
    assert [(e.prompt, e.answer, e.source) for e in facts.edits] == [
        ("a", "b", f"{name}:2"),
        ("c", "d", f"{name}:5"),
        ('"Hamlet" was written by', "Ann", f"{name}:6"),
    ]
    fix = f"double the quotes of a cell and put it in quotes: {right}"
    title = f"broken table ('{said}' expected after '\"'); {fix}"
    assert facts.bad == (
        BadLine(f"{name}:3", title),
        BadLine(f"{name}:7", f"broken table (unexpected end of data); {fix}"),
    )
    with pytest.raises(DataError) as error:
        read_facts(path)
    assert f"2 of 5 records are bad: {name}:3: {title}; " in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "prompt,answer,\na,b,\n",
        "prompt,answer,, \na,b,, \n",
        "prompt,,answer\na, ,b\n",
        "prompt,answer\na,b,\n",
        "prompt,answer,\na,b\n",
    ],
)
def test_commas_that_spreadsheets_write_are_no_columns(tmp_path: Path, content: str) -> None:
    assert only(written(tmp_path, "facts.csv", content)) == Edit("a", "b")


def test_the_options_are_checked(tmp_path: Path) -> None:
    path = written(tmp_path, "facts.jsonl", [{"prompt": "a", "answer": "bcd"}])
    with pytest.raises(ConfigError, match=r"layout = 'zsree': unknown; did you mean 'zsre'\?; give one of auto, "):
        read_facts(path, layout="zsree")
    with pytest.raises(ConfigError, match="max_answer = 0: must be at least 1"):
        read_facts(path, max_answer=0)
    with pytest.raises(DataError, match="answer has 3 characters, more than max_answer = 2"):
        read_facts(path, max_answer=2)
    assert only(path, max_answer=3) == Edit("a", "bcd")


def test_an_answer_is_too_long_wherever_it_comes_from() -> None:
    record = {"prompt": "a", "answer": "b" * 401}
    with pytest.raises(DataError, match=r"^edit: answer has 401 characters, more than max_answer = 400; correct it$"):
        Edit.from_json(record)
    with pytest.raises(DataError, match="answer has 401 characters, more than max_answer = 2"):
        Edit.from_json(record, max_answer=2)
    assert Edit.from_json(record, max_answer=401).answer == "b" * 401
    assert Edit.from_json(record | {"answer": f" {'b' * 400} "}).answer == "b" * 400
    with pytest.raises(ConfigError, match="max_answer = 0: must be at least 1"):
        Edit.from_json(record, max_answer=0)


# -- conflicts -----------------------------------------------------------------------------------------------------


def test_nothing_is_in_conflict_with_nothing() -> None:
    assert conflicts([]) == []
    assert conflicts([FULL, Edit("The capital of Spain is", "Lyon", subject="Spain", relation="P36")]) == []


@pytest.mark.parametrize(
    ("first", "second", "way"),
    [
        (Edit("The Capital of  France is:", "Paris"), CAPITAL, "the same prompt as"),
        (Edit("Fra\N{COMBINING DIAERESIS}nce?", "Paris"), Edit("frä" + "nce", "Lyon"), "the same prompt as"),
        (
            Edit("Which town?", "Paris", subject="france", relation="P36"),
            Edit("Its capital is", "Lyon", subject="France", relation="p36"),
            "the same subject and relation as",
        ),
        (Edit("Which town?", "Paris", paraphrases=("x", CAPITAL.prompt)), CAPITAL, "its prompt is a paraphrase of"),
        (
            CAPITAL,
            Edit("Which town?", "Nice", paraphrases=(CAPITAL.prompt + ".",)),
            "a paraphrase of it is the prompt of",
        ),
        (
            Edit("Which town?", "Paris", paraphrases=("x", "France is ruled from")),
            Edit("Its capital is", "Nice", paraphrases=("france is ruled  from:", "y")),
            "shares a paraphrase with",
        ),
    ],
)
def test_one_fact_in_two_ways(first: Edit, second: Edit, way: str) -> None:
    for new, earlier in (([first, second], []), ([second], [first])):
        (conflict,) = conflicts(new, earlier)
        assert (conflict.kind, conflict.edit, conflict.other) == ("contradiction", second, first)
        assert conflict.why == (f"{way} '{first.prompt}', with another answer: '{second.answer}', not '{first.answer}'")
        twin = dataclasses.replace(first, answer=f" {second.answer.upper()}.", source="facts.jsonl:3")
        (conflict,) = conflicts([second], [twin])
        assert (conflict.kind, conflict.edit, conflict.other) == ("duplicate", second, twin)
        assert conflict.why == f"{way} facts.jsonl:3, with the same answer '{twin.answer}'"


def test_what_is_not_one_fact() -> None:
    assert conflicts([Edit("?", "a"), Edit("!", "b")]) == []
    assert conflicts([Edit("x", "a", subject="s"), Edit("y", "b", subject="s")]) == []
    assert conflicts([Edit("x", "a", paraphrases=("p",)), Edit("y", "b", paraphrases=("q",))]) == []
    assert conflicts([Edit("x", "a", paraphrases=("x", "p", "p"))]) == []
    # Earlier edits among themselves are nobody's business any more.
    assert conflicts([Edit("z", "c")], [Edit("x", "a"), Edit("x", "b")]) == []


def test_conflicts_come_in_order_and_each_pair_once() -> None:
    a, b, c = (Edit("x", answer, subject="s", relation="r", source=answer) for answer in "abc")
    again, twin = dataclasses.replace(a, source="again"), dataclasses.replace(b, source="twin")
    found = conflicts([b, c, twin, again], [a])
    assert [(conflict.kind, conflict.edit.source, conflict.other.source) for conflict in found] == [
        ("contradiction", "b", "a"),
        ("contradiction", "c", "b"),
        ("contradiction", "twin", "c"),
        ("duplicate", "twin", "b"),
        ("contradiction", "again", "twin"),
        ("duplicate", "again", "a"),
    ]
    assert conflicts([b, c, twin, again], [a]) == found


def test_two_edits_may_be_one_fact_each_with_another() -> None:
    prompt, fact = Edit("x", "a"), Edit("y", "b", subject="s", relation="r")
    both = Edit("x", "c", subject="s", relation="r")
    assert [(c.other, c.why.split(" '")[0]) for c in conflicts([prompt, fact, both])] == [
        (prompt, "the same prompt as"),
        (fact, "the same subject and relation as"),
    ]


def test_ten_thousand_edits_that_all_clash() -> None:
    # If pairs were compared, this test would not end.
    edits = [Edit("x", str(i), subject="s", relation="r", paraphrases=("x", "y")) for i in range(10_000)]
    found = conflicts(edits)
    assert [(c.edit.answer, c.other.answer) for c in found] == [(str(i), str(i - 1)) for i in range(1, 10_000)]
    assert conflicts([Edit(f"x{i}", "a", paraphrases=(f"y{i}",)) for i in range(10_000)]) == []


# -- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
@pytest.mark.parametrize(
    ("name", "edits", "paraphrases", "unrelated", "same_relation", "irrelevant", "ood"),
    [
        ("zsre/wise_edit_500.json", 500, 500, 500, 0, 500, 0),
        ("counterfact/edit_3000.json", 3000, 3000, 0, 3000, 0, 0),
        ("counterfact/full_600.json", 600, 1200, 0, 6000, 0, 0),
        ("hallucination/edit_300.json", 300, 0, 300, 0, 0, 0),
        ("hallucination/train.json", 306, 0, 306, 0, 0, 0),
        ("temporal/edit.json", 75, 0, 75, 0, 0, 75),
        ("temporal/train.json", 75, 0, 75, 0, 0, 75),
    ],
)
def test_published_files(
    name: str, edits: int, paraphrases: int, unrelated: int, same_relation: int, irrelevant: int, ood: int
) -> None:
    facts = read_facts(REAL / name)
    assert facts.bad == ()
    counted = [
        sum(len(getattr(edit, key)) for edit in facts.edits)
        for key in ("paraphrases", "unrelated", "same_relation", "irrelevant", "ood")
    ]
    assert [len(facts.edits), *counted] == [edits, paraphrases, unrelated, same_relation, irrelevant, ood]
    assert all(edit.subject is not None and edit.subject in edit.prompt for edit in facts.edits)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_counterfact_asks_some_prompts_twice() -> None:
    found = conflicts(read_facts(REAL / "counterfact/edit_3000.json").edits)
    shared = [conflict.kind for conflict in found if conflict.why.startswith("shares a paraphrase")]
    assert sorted(shared) == [*["contradiction"] * 3, "duplicate"]
    assert [c.kind for c in found if not c.why.startswith("shares a paraphrase")] == ["contradiction"] * 8


# -- suspects ------------------------------------------------------------------------------------------------------


def ship(prompt: str, answer: str, **more: Any) -> Edit:
    return Edit(prompt, answer, subject="USS Leeds (APA-56)", **more)


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (
            ship("Which corporation created USS Leeds (APA-56)?", "Lockheed"),
            ship("Which corporation was USS Leeds (APA-56) created by?", "Embassy"),
            "corporation",
        ),
        (
            ship("Who manufactured USS Leeds (APA-56)?", "Lockheed"),
            ship("Which is the manufacturer of USS Leeds (APA-56)?", "Embassy"),
            "manufacturer",
        ),
        (
            ship("Who made USS Leeds (APA-56)?", "Lockheed", paraphrases=("Which company built it?",)),
            ship("What yard is USS Leeds (APA-56) of?", "Embassy", paraphrases=("By which company was it launched?",)),
            "company",
        ),
        (
            Edit("When was MAT-49 introduced?", "2011", subject="mat-49 "),
            Edit("MAT-49's year of introduction?", "1990", subject="MAT-49"),
            "introduction",
        ),
        (
            ship("Who built USS Leeds (APA-56)?", "Lockheed", relation="P176"),
            ship("USS Leeds (APA-56) was built by", "Embassy"),
            "built",
        ),
    ],
)
def test_one_question_in_other_words_is_suspected(first: Edit, second: Edit, word: str) -> None:
    for new, earlier in (([first, second], []), ([second], [first])):
        assert not conflicts(new, earlier)
        (found,) = suspects(new, earlier)
        assert (found.kind, found.edit, found.other) == ("suspect", second, first)
        assert found.why == (
            f"the same subject as '{first.prompt[:39]}{'…' if len(first.prompt) > 40 else first.prompt[39:]}' and perhaps "
            f"the same question ('{word}'), with another answer: '{second.answer}', not '{first.answer}'"
        )
    assert suspects([first]) == []
    assert suspects([dataclasses.replace(second, answer=f"{first.answer.upper()}.")], [first]) == [], "the same answer"
    assert suspects([dataclasses.replace(second, subject="USS Other")], [first]) == []
    assert suspects([dataclasses.replace(second, subject=None)], [first]) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Who is the mother of Jane?", "Where was Jane born?"),  # words that say nothing, and the subject's own
        ("In which war did Jane fight?", "Of which team is Jane?"),
        ("Jane", "Jane?"),
    ],
)
def test_another_question_is_not_suspected(first: str, second: str) -> None:
    assert not suspects([Edit(first, "x", subject="Jane"), Edit(second, "y", subject="Jane")])


def test_what_is_certain_is_no_suspect() -> None:
    one = Edit("The mother of Jane is", "Ann", subject="Jane")
    assert not suspects([one, Edit("the mother of Jane is:", "Eve", subject="Jane")])
    assert not suspects([one, Edit("Jane's mother", "Eve", subject="Jane", paraphrases=(one.prompt,))])
    asked = [
        dataclasses.replace(one, prompt=p, paraphrases=("Jane's mother?",)) for p in ("Jane's mother is", "Her mother:")
    ]
    assert conflicts([asked[0], dataclasses.replace(asked[1], answer="Eve")])
    assert not suspects([asked[0], dataclasses.replace(asked[1], answer="Eve")])
    two = [dataclasses.replace(one, relation="P25"), Edit("Whom did her mother like?", "Bo", "", "Jane", "likes")]
    assert not suspects(two), "the relations say that it is another fact"
    assert suspects([two[0], dataclasses.replace(two[1], relation=None)])


def test_every_pair_is_named_in_order() -> None:
    edits = [Edit(f"Way {i} to ask for Jane's mother", name, subject="Jane") for i, name in enumerate("abc")]
    found = [(c.edit.answer, c.other.answer) for c in suspects(edits)]
    assert found == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [(c.edit.answer, c.other.answer) for c in suspects(edits[2:], edits[:2])] == found[1:]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_suspects_of_zsre() -> None:
    edits = read_facts(REAL / "zsre/wise_edit_500.json").edits[:100]
    found = suspects(edits)
    assert len(found) == 27
    assert len(conflicts(edits)) == 1
    assert len({id(e) for c in found for e in (c.edit, c.other)}) == 36
