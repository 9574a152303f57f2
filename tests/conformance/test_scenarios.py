"""What every registered scenario that can make up data keeps: equal streams for equal seeds, honest labels and tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_lab import knobs, registry
from cl_lab.errors import ConfigError
from cl_lab.protocols import Scenario
from cl_lab.records import PAD, Experience, Stream

NAMES = registry.names("scenarios")


def scenario_class(name: str) -> type[Scenario]:
    cls, _ = registry.load("scenarios", name)
    assert issubclass(cls, Scenario)
    return cls


def stream(name: str, seed: int = 0) -> Stream:
    """A new stream with the scenario's own test settings."""
    settings: dict[str, Any] | None = scenario_class(name).conformance_knobs()
    assert settings is not None
    made: Stream = registry.create("scenarios", {"name": name, **settings}, "scenario").stream(seed)
    return made


OFFLINE = [n for n in NAMES if scenario_class(n).conformance_knobs() is not None]
every = pytest.mark.parametrize("name", NAMES)
offline = pytest.mark.parametrize("name", OFFLINE)


def test_some_can_make_up_data() -> None:
    assert len(NAMES) >= 12
    assert {"split-digits", "avalanche"} <= set(OFFLINE)


@every
def test_says_what_it_is(name: str) -> None:
    cls = scenario_class(name)
    first = (cls.__doc__ or "").partition("\n")[0]
    assert first
    assert not first.startswith(f"{cls.__name__}(")
    assert {"name": name, "summary": first} in registry.summaries("scenarios")
    for knob in knobs.describe(cls):
        assert knob["doc"], f"{name}.{knob['name']} has no documentation"
    if cls.argument is not None:
        assert cls.argument in {k["name"] for k in knobs.describe(cls)}


@every
def test_refuses_unknown_knobs(name: str) -> None:
    settings = scenario_class(name).conformance_knobs() or {}
    with pytest.raises(ConfigError, match=r"^scenario\.experiencess: unknown key"):
        registry.create("scenarios", {"name": name, **settings, "experiencess": 1}, "scenario")


@offline
def test_equal_seeds_give_equal_streams(name: str) -> None:
    before = torch.get_rng_state()
    one, two = stream(name, 3), stream(name, 3)
    torch.rand(5)
    assert one.fingerprint() == two.fingerprint()
    for a, b in zip(one.experiences, two.experiences, strict=True):
        assert (a.index, a.name, a.classes) == (b.index, b.name, b.classes)
        assert a.train.digest() == b.train.digest()
    torch.set_rng_state(before)


@offline
def test_the_order_of_use_does_not_matter(name: str) -> None:
    one, two = stream(name), stream(name)
    forwards = [e.train.digest() for e in one.experiences]
    backwards = [e.train.digest() for e in reversed(two.experiences)][::-1]
    assert forwards == backwards
    one.experiences[0].release()
    assert one.experiences[0].train.digest() == forwards[0], "the same samples after a release"


@offline
def test_samples_are_as_the_stream_says(name: str) -> None:
    made = stream(name)
    assert made.name
    assert len(made) == len(made.experiences) >= 1
    shapes = {e.train.x.dtype for e in made.experiences} | {e.test.x.dtype for e in made.experiences}
    assert len(shapes) == 1, "one dtype throughout"
    assert shapes <= ({torch.int32} if made.objective == "language" else {torch.uint8, torch.float32})
    for i, e in enumerate(made.experiences):
        assert e.index == i
        for data in (e.train, e.test):
            assert len(data) > 0
            assert tuple(data.x.shape[1:]) == made.input_shape
            assert data.x.is_contiguous()
            if data.x.dtype == torch.float32:
                assert bool(data.x.isfinite().all())
            if made.objective == "regression":
                assert data.y.dtype == torch.float32
                assert bool(data.y.isfinite().all())
                continue
            assert data.y.dtype == data.t.dtype == torch.int64
            assert int(data.y.min()) >= 0
            assert int(data.y.max()) < made.n_classes
        if made.objective == "regression":
            assert e.classes == (0,)
            continue
        if made.objective == "language":  # free answers of a test set need not come in training
            assert tuple(torch.cat([e.train.y, e.test.y]).unique().tolist()) == e.classes
            assert_answers_stand_behind_prompts(made, e)
        else:
            assert tuple(e.train.y.unique().tolist()) == e.classes, "the classes listed are the labels present"
        assert set(e.test.y.unique().tolist()) <= set(e.classes)
    for aside in made.asides.values():
        data = aside.questions
        assert data.x.dtype in shapes
        for y, t in zip(data.y.tolist(), data.t.tolist(), strict=True):
            assert y in aside.stream.experiences[t].classes
    every = [e for on in (made, *(aside.stream for aside in made.asides.values())) for e in on.experiences]
    assert {c for e in every for c in e.classes} == set(range(made.n_classes)), "no output without samples"


def assert_answers_stand_behind_prompts(made: Stream, e: Experience) -> None:
    assert made.answers is not None
    for data in (e.train, e.test):
        prompt, answer = data.x.split([n for (n,) in made.layout.values()], 1)
        assert torch.equal(answer.long(), made.answers[data.y])
        assert bool((prompt[:, -1] != PAD).all()), "a prompt ends where the answer begins"
        assert bool(((prompt != PAD).int().diff() >= 0).all()), "and has no holes"
        assert bool(((answer != PAD).int().diff() <= 0).all())


@offline
def test_tasks_are_experiences(name: str) -> None:
    made = stream(name)
    for e in made.experiences:
        expected = {e.index} if made.task_labels or made.objective == "language" else {0}
        for data in (e.train, e.test):
            assert set(data.t.tolist()) == expected
    if made.task_labels:
        seen = [c for e in made.experiences for c in e.classes]
        assert len(seen) == len(set(seen)), "each task has outputs of its own"


@offline
def test_training_and_test_samples_are_not_the_same(name: str) -> None:
    shares = []
    for e in stream(name).experiences:
        rows = {bytes(r) for r in e.train.x.flatten(1).contiguous().view(torch.uint8).numpy()}
        test = [bytes(r) for r in e.test.x.flatten(1).contiguous().view(torch.uint8).numpy()]
        shares.append(sum(r in rows for r in test) / len(test))
    if scenario_class(name).memorised:
        assert all(share < 0.5 or share == 1 for share in shares)
        assert any(share == 1 for share in shares)
    else:
        assert max(shares) < 0.5


@offline
def test_normalisation_fits_the_input(name: str) -> None:
    made = stream(name)
    assert (made.mean is None) == (made.std is None)
    if made.mean is not None and made.std is not None:
        assert len(made.mean) == len(made.std) in (1, made.input_shape[0])
        assert min(made.std) > 0
