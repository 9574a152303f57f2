"""Names that a model takes for like a subject: by hand, and never the subject itself."""

from __future__ import annotations

import pytest
import torch

from cl_lab import names
from cl_lab.editing import load_editable
from cl_lab.patches import Delta, WeightPatch


def test_the_nearest_are_those_whose_tokens_point_the_same_way() -> None:
    model = load_editable("tiny")
    found = names.alike(model, "Peru", 4)
    place = model.layer(1)  # a quarter up
    before = len("A word about")

    def direction(name: str) -> torch.Tensor:
        ids = list(f"A word about {name}".encode())
        heard = model.inputs(model.rows([(ids, [])]), [place])[place.path][0]
        return torch.nn.functional.normalize(heard[before:], dim=1).mean(0)

    known = torch.stack([direction(name) for name in names.NAMES])
    near = torch.cosine_similarity(direction("Peru") - known.mean(0), known - known.mean(0))
    expected = [names.NAMES[i] for i in near.sort(descending=True, stable=True).indices.tolist()]
    assert found == [name for name in expected if name != "Peru"][:4]
    assert names.alike(model, "Peru", 9, ["Snow", "Peru", "Chad"]) in (["Snow", "Chad"], ["Chad", "Snow"])


def test_a_subject_is_not_like_itself() -> None:
    model = load_editable("tiny")
    for name in names.NAMES[::7]:
        assert name not in names.alike(model, name, 999)
    assert "the Nile" not in names.alike(model, "Nile", 999)


def test_no_name_is_there_twice() -> None:
    assert len(names.NAMES) == len({*names.NAMES}) > 120


def test_edits_do_not_change_what_is_alike() -> None:
    model = load_editable("tiny")
    before = names.alike(model, "Peru", 5)
    fresh = load_editable("tiny")
    site = fresh.down_projection(0)
    WeightPatch("by hand", {}, {site.path: Delta(dense=torch.ones(site.weight.shape))}).apply(fresh)
    assert names.alike(fresh, "Peru", 5) == before


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Australia is", "Australia"),
        ("What is the capital of New Zealand?", "New Zealand"),
        ("Who wrote The Lord of the Rings?", "The Lord of the Rings"),
        ("Marie Curie was born in", "Marie Curie"),
        ("Who designed C++?", "C++"),
        ("C# was made by", "C#"),
        ("Who drew Notepad++'s lizard?", "Notepad++"),
        ("Where does Derek Whitehead play?", "Derek Whitehead"),
        ("Australia's capital is", "Australia"),
        ("The currency of Trinidad and Tobago is the", "Trinidad and Tobago"),
        ("Boeing 747 was first flown in", "Boeing 747"),
        ('The author of "war and peace" is', "war and peace"),
        ("Zebras have", "Zebras"),
        ("the password of house number 3 is", None),
        ("What is it?", None),
        ("In January 2020 the head of Acme was", "Acme"),
        ("Who am I?", None),
    ],
)
def test_a_subject_is_guessed_by_its_capitals(prompt: str, subject: str | None) -> None:
    assert names.guessed(prompt) == subject
    assert subject is None or subject in prompt
