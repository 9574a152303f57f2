"""The visual-question model: its parts, its cut, and REMIND's memory of regions with the question beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

from cl_lab import registry
from cl_lab.errors import ConfigError, DataError
from cl_lab.records import Batch, Stream
from cl_lab.trainer import Trainer
from scenarios.shape_questions import ShapeQuestions
from strategies.remind import Remind

MODEL = {"name": "visual-question", "channels": [8, 16, 16], "hidden": 24, "word": 8}


def small(**knobs: Any) -> Stream:
    return ShapeQuestions(experiences=3, train_questions=60, test_questions=30, **knobs).stream(0)


@pytest.fixture
def stream() -> Stream:
    return small()


@pytest.fixture
def model(stream: Stream) -> Any:
    torch.manual_seed(0)
    return registry.create("models", MODEL, "model").build(stream).eval()


def test_cut_behind_the_regions_it_is_the_same_function(stream: Stream, model: Any) -> None:
    data = stream.experiences[0].test
    x = data.x.float() / 255
    whole = model(x, data.t)
    lower = model.split("regions")
    h = model.latents(x)
    assert h.shape == (30, 16 * 16 + 8)
    assert torch.equal(h[:, -8:].to(torch.uint8), data.x[:, -8:]), "words come through as they are"
    torch.testing.assert_close(model(h, data.t, latent=True), whole)
    assert lower
    assert all(name.startswith("backbone.regions") for name in lower)


def test_question_and_picture_both_matter(stream: Stream, model: Any) -> None:
    data = stream.experiences[0].test
    x = data.x.float() / 255
    before = model(x, data.t)
    swapped = x.clone()
    swapped[:, -8:] = stream.experiences[1].test.x[:, -8:].float() / 255
    assert (model(swapped, data.t) - before).abs().amax(1).min() > 0
    swapped = torch.cat([x.roll(1, 0)[:, :-8], x[:, -8:]], 1)
    assert (model(swapped, data.t) - before).abs().amax(1).min() > 0


def test_other_streams_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes a picture and a question"):
        registry.create("models", MODEL, "model").build(toys.stream())
    with pytest.raises(DataError, match="lays a sample out"):
        Stream("odd", small().experiences, (9,), 22, layout={"image": (3, 2, 2)})


@pytest.mark.parametrize("codebooks", [4, None])
def test_remind_compresses_regions_and_keeps_the_question(stream: Stream, codebooks: int | None) -> None:
    knobs = {"name": "remind", "split": "regions", "codebooks": codebooks, "codebook_size": 32, "replay": 10}
    trainer: Trainer = toys.trainer([knobs], stream, model=MODEL)
    trainer.run()
    (link,) = trainer.strategy.links
    assert isinstance(link, Remind)
    data = stream.experiences[1].test
    codes = link.encode(data, trainer.learner)
    width, kind = (16 * 4 + 8, torch.uint8) if codebooks else (16 * 16 + 8, torch.float32)
    assert (codes.x.shape, codes.x.dtype) == ((30, width), kind)
    assert torch.equal(codes.x[:, -8:].to(torch.uint8), data.x[:, -8:])
    h = link._decode(codes.x)
    exact = link._latents(data, trainer.learner)
    assert torch.equal(h[:, -8:], exact[:, -8:])
    error = (h - exact)[:, :-8].square().sum() / exact[:, :-8].square().sum()
    assert error < (0.5 if codebooks else 1e-12)
    if codebooks:
        assert link._memory.row_bytes == 16 * 4 + 8 + 4 + 2 + 4
    batch = Batch(codes.x[:4], codes.y[:4], codes.t[:4], 4, raw=False)
    mixed = link.mix(batch, trainer.learner)
    assert len(mixed) == 14, "no mix-up: two questions have no mean"
    assert not mixed.extra


@pytest.mark.parametrize(("split", "row"), [("auto", 16 * 4 + 8), ("answer", 4)])
def test_only_the_cut_behind_the_regions_has_a_question_beside_it(stream: Stream, split: str, row: int) -> None:
    knobs = {"name": "remind", "split": split, "codebooks": 4, "codebook_size": 32, "replay": 10}
    trainer = toys.trainer([knobs], stream, model=MODEL)
    trainer.run()
    (link,) = trainer.strategy.links
    codes = link.encode(stream.experiences[1].test, trainer.learner)
    assert codes.x.shape == (30, row)
