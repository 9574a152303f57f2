"""Whether a prompt names a subject: the comparison by hand, and what it decides of a side memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_lab.editable import EditableModel
from cl_lab.editing import load_editable
from cl_lab.errors import ConfigError
from cl_lab.patches import SidePatch, load_patch, packed
from cl_lab.subjects import NamedSubjects, SubjectKeys

WIDTH = 3


def keys(*subjects: list[list[float]], least: float = 0.9, centre: float = 0.0) -> SubjectKeys:
    tokens = torch.tensor([t for s in subjects for t in s], dtype=torch.float32)
    of = torch.tensor([i for i, s in enumerate(subjects) for _ in s])
    most, mean = torch.full((len(subjects),), least), torch.full((WIDTH,), centre)
    return SubjectKeys(torch.nn.functional.normalize(tokens, dim=1), of, most, mean, torch.ones(WIDTH))


def everything(h: Tensor) -> Tensor:
    return torch.ones(h.shape[:2], dtype=torch.bool)


def test_resemblance_by_hand() -> None:
    h = torch.tensor([[[2.0, 0, 0], [0, 3.0, 0]], [[1.0, 1.0, 0], [0, 0, 5.0]]])
    one = keys([[1, 0, 0], [0, 1, 0]], [[0, 0, 1]])
    half = 0.5**0.5
    torch.testing.assert_close(one.resemblance(h, everything(h)), torch.tensor([[1.0, 0.0], [half, 1.0]]))
    first = torch.tensor([[True, False], [True, False]])
    (
        torch.testing.assert_close(one.resemblance(h, first), torch.tensor([[0.5, 0.0], [half, 0.0]])),
        "prompts alone count",
    )


def test_what_all_tokens_share_says_nothing() -> None:
    h = torch.tensor([[[11.0, 10, 10]]])
    assert float(keys([[1, 0, 0]]).resemblance(h, everything(h))) < 0.7
    assert float(keys([[1, 0, 0]], centre=10.0).resemblance(h, everything(h))) == pytest.approx(1)


def test_several_are_compared_at_once() -> None:
    x, y, z = ([[float(i == n) for i in range(WIDTH)]] for n in range(WIDTH))
    named = NamedSubjects(
        [
            [("a", keys(x))],
            [("a", keys(y)), ("a", keys(z, x))],
            [("b", keys(x))],
            [("a", keys(y)), ("a", None)],
            [("a", keys(z, centre=5.0))],
        ]
    )
    assert named.paths == ["a", "b"]
    low = {"a": torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]]]), "b": torch.tensor([[[0, 0, 1.0]], [[1.0, 0, 0]]])}
    found = named.among(low, torch.ones(2, 1, dtype=torch.bool))
    assert found.tolist() == [[True, False], [True, True], [False, True], [True, True], [False, False]]
    assert NamedSubjects([]).among({}, torch.ones(2, 1, dtype=torch.bool)).shape == (0, 2)


@pytest.fixture
def model() -> EditableModel:
    return load_editable("tiny")


def side_patch(model: EditableModel, prompt: str, shard: int = 0) -> SidePatch:
    """One that answers whatever is asked that has tokens like the last two of ``prompt``."""
    site, low = model.down_projection(2), model.layer(1)
    heard = model.inputs(model.rows([(model.tokenizer.encode(prompt), [])]), [low])[low.path][0][-2:]
    own = torch.nn.functional.normalize(heard, dim=1)
    many = SubjectKeys(own, torch.zeros(len(own), dtype=torch.int64), torch.tensor([0.98]), *centred(heard))
    return SidePatch(
        "by hand",
        path=site.path,
        shard=shard,
        places=packed(torch.ones(site.weight.numel(), dtype=torch.bool)),
        values=(0.3 * torch.randn(site.weight.numel(), generator=torch.Generator().manual_seed(shard))).bfloat16(),
        gap=1e-6,
        floor=1e-6,
        subject_path=low.path,
        subjects=many,
    )


def centred(h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(h.shape[1]), torch.ones(h.shape[1])


def test_a_memory_answers_where_its_subject_is_named_alone(model: EditableModel, tmp_path: Path) -> None:
    patch = side_patch(model, "Say zq")
    asked, aside = "Say zq", "Who wrote it, and when?"
    before = model.answer([asked, aside], max_new_tokens=6)
    hooks = [len(m._forward_pre_hooks) for m in model.model.modules()]
    again = load_patch(tmp_path / "patch", patch.save(tmp_path / "patch"))
    assert isinstance(again, SidePatch)
    assert again.subject_path == patch.subject_path
    again.apply(model)
    assert "name its subject" in again.fires(model)
    twin = model.twin()
    for one in (model, twin):
        assert one.fired(asked) == [again]
        assert one.fired(aside) == []
        after = one.answer([asked, aside], max_new_tokens=6)
        assert after[0] != before[0]
        assert after[1] == before[1]
    again.revert(model)
    assert [len(m._forward_pre_hooks) for m in model.model.modules()] == hooks, "nothing listens any more"
    assert model.answer([asked, aside], max_new_tokens=6) == before
    assert twin.fired(asked) == [again], "the twin's stay"


def test_of_many_memories_those_named_are_looked_at_first(model: EditableModel) -> None:
    """More than are computed for each prompt: the one whose subject is named answers, though its gap is the least."""
    patches = [side_patch(model, "Say zq" if n == 7 else f"#{n:02d}", shard=n) for n in range(40)]
    patches[7].gap = 1e-4
    for patch in patches:
        patch.apply(model)
    assert model.fired("Say zq") == [patches[7]]


def test_a_layer_that_is_not_there_is_told(model: EditableModel) -> None:
    patch = side_patch(model, "Say zq")
    patch.subject_path = "model.layers.99"
    with pytest.raises(ConfigError, match=r"has no module 'model\.layers\.99'"):
        patch.apply(model)
    assert model.patches == []
