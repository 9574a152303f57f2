"""REMIND: the rates of classes, crops and mixes of latents against references, codes of everything, bytes, drift."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.nn import functional as F

from cl_lab import registry
from cl_lab.errors import ConfigError
from cl_lab.records import Batch, Stream
from cl_lab.trainer import Trainer
from strategies._latents import beta, channels_first, channels_last, random_resized_crop
from strategies._quantizer import Loss
from strategies.remind import Remind

CONVNET = {"name": "convnet", "channels": [8, 12], "hidden": [24]}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainer_of(on: Stream | None = None, model: dict[str, Any] = CONVNET, **knobs: Any) -> Trainer:
    sections = knobs.pop("sections", {})
    settings = {"split": "blocks.0", "codebooks": 4, "codebook_size": 32, "replay": 20} | knobs
    on = on or toys.stream(form="images")
    return toys.trainer([{"name": "remind", **settings}], on, model=model, **sections)


def link_of(trainer: Trainer) -> Remind:
    (link,) = trainer.strategy.links
    assert isinstance(link, Remind)
    return link


# -- latents ---------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_rectangle_resized() -> None:
    """Each output is torch's own bilinear resizing of some rectangle of whole cells."""
    h = torch.randn(20, 3, 7, 5, generator=rng(1))
    cropped = random_resized_crop(h, rng(2), (2 / 7, 1.0))
    assert cropped.shape == h.shape
    found = []
    for row, out in zip(h, cropped, strict=True):
        for top in range(7):
            for left in range(5):
                for tall in range(1, 8 - top):
                    for wide in range(1, 6 - left):
                        part = row[None, :, top : top + tall, left : left + wide]
                        whole = F.interpolate(part, size=(7, 5), mode="bilinear", align_corners=False)[0]
                        if torch.allclose(whole, out, atol=1e-5):
                            found.append((tall, wide))
    assert len(found) == 20
    assert len(set(found)) > 4, "rows have rectangles of their own"
    areas = [tall * wide / 35 for tall, wide in found]
    assert min(areas) > 0.15
    assert all(0.4 < tall / wide < 2.6 for tall, wide in found)


def test_a_crop_of_everything_changes_nothing() -> None:
    h = torch.randn(4, 3, 6, 6, generator=rng())
    torch.testing.assert_close(random_resized_crop(h, rng(), (1.0, 1.0), ratio=1.0), h)


def test_channels_move_and_return() -> None:
    for shape, last in [((2, 3, 4, 5), (2, 4, 5, 3)), ((2, 3), (2, 3)), ((2, 7, 3), (2, 7, 3))]:
        h = torch.randn(shape)
        assert channels_last(h).shape == last
        assert torch.equal(channels_first(channels_last(h)), h)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
def test_beta_has_the_moments_of_beta(alpha: float) -> None:
    generator = rng(4)
    drawn = torch.tensor([beta(alpha, generator) for _ in range(4000)], dtype=torch.float64)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.1)


# -- the base session, and what follows ------------------------------------------------------------------------------


def test_everything_below_the_cut_stands_still_after_the_base_session() -> None:
    trainer = trainer_of()
    seen: list[dict[str, Tensor]] = []

    class Keep(type(trainer.observer)):  # type: ignore[misc]
        def scored(self, record: Any) -> None:
            seen.append(trainer.learner.weights())

    trainer.observer = Keep()
    trainer.run()
    lower = {"backbone.blocks.0.conv.weight", "backbone.blocks.0.conv.bias"}
    assert lower <= set(toys.differing(seen[0], seen[1]))
    for before, after in itertools.pairwise(seen[1:]):
        moved = set(toys.differing(before, after))
        assert not lower & moved
        assert "head.linear.weight" in moved


def test_a_pretrained_lower_part_never_moves() -> None:
    sections = {"training": {"epochs": 10}}
    trainer = trainer_of(
        toys.stream(), toys.MLP, base="pretrained", split="layers.0", codebooks=None, sections=sections
    )
    before = trainer.learner.weights()
    record = trainer.run()
    moved = toys.differing(before, trainer.learner.weights())
    assert moved
    assert not any(n.startswith("backbone.layers.0") for n in moved)
    assert sum(record.matrix[-1]) / 3 > 0.9


def test_each_sample_passes_the_frozen_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on = toys.stream(form="images")
    trainer = trainer_of(on, base="pretrained", sections={"training": {"epochs": 4}})
    link = link_of(trainer)
    met = []
    latents = link._latents

    def count(data: Any, learner: Any) -> Tensor:
        met.append(len(data))
        return latents(data, learner)

    monkeypatch.setattr(link, "_latents", count)
    trainer.run()
    samples = 3 * (60 + 40)
    looks = (
        1 + 60 - 6 + 6 + 2 * 60
    )  # one for the shape, codebooks, what they lose; what they lose in each later experience
    assert sum(met) <= samples + 60 + looks, (
        "training samples and test samples once each, base samples once more to remember"
    )


def test_memory_holds_codes_of_all_samples_and_their_bytes_are_exact() -> None:
    trainer = trainer_of()
    record = trainer.run()
    link = link_of(trainer)
    per_sample = 8 * 8 * 4 + 4 + 2 + 4  # a code per place, label, task label, its place in its class
    assert link.measures()["bytes_per_sample"] == per_sample
    assert len(link._memory) == 180
    codebooks = 4 * 32 * 2 * 4
    assert link.measures()["codebook_bytes"] == codebooks
    counts = 6 * 8
    assert record.strategy_state_bytes == 180 * per_sample + codebooks + counts
    assert record.measures[-1]["remind/memory_samples"] == 180


def test_a_budget_in_bytes_counts_the_codebooks() -> None:
    trainer = trainer_of(memory_bytes=12_000)
    trainer.run()
    link = link_of(trainer)
    assert len(link._memory) == (12_000 - 4 * 32 * 2 * 4) // 266
    assert link._memory.nbytes + 1024 <= 12_000


def test_a_budget_in_bytes_outlives_a_stop_before_the_first_sample_is_kept(tmp_path: Path) -> None:
    knobs = {"base": "pretrained", "memory_bytes": 12_000}
    whole = trainer_of(**knobs)
    whole.run()
    stopped = trainer_of(**knobs)
    stopped.checkpoints = tmp_path
    toys.stopped_at(5, stopped)
    resumed = trainer_of(**knobs)
    resumed.checkpoints = tmp_path
    toys.at_newest(resumed).run()
    assert link_of(resumed)._memory.capacity == (12_000 - 4 * 32 * 2 * 4) // 266
    toys.assert_same(resumed, whole)


def test_codes_of_two_bytes_add_up_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo takes no int16; a group of one rank refuses what a group of two does."""
    on = toys.stream(form="images", train=100)
    trainer = trainer_of(on, codebook_size=300, base="pretrained", sections={"training": {"epochs": 1}})
    trainer.run()
    data = on.experiences[0].test
    alone = link_of(trainer).encode(data, trainer.learner)
    group = torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1)

    def added(value: Tensor) -> Tensor:
        group.allreduce([value]).wait()
        return value

    monkeypatch.setattr(trainer.learner, "reduce", added)
    together = link_of(trainer).encode(data, trainer.learner)
    assert together.x.dtype == alone.x.dtype == torch.int16
    assert torch.equal(together.x, alone.x)
    assert int(alone.x.max()) > 255


def test_uncompressed_latents_are_the_latents() -> None:
    on = toys.stream(form="images")
    trainer = trainer_of(on, codebooks=None)
    trainer.run()
    link = link_of(trainer)
    assert link.measures()["bytes_per_sample"] == 8 * 8 * 8 * 4 + 10
    data = on.experiences[0].test
    encoded = link.encode(data, trainer.learner)
    batch = Batch(encoded.x, data.y, data.t, 0, raw=False)
    trainer.learner.model.eval()
    with torch.no_grad():
        whole = trainer.learner.model(trainer.learner.prepare_input(data.x), data.t)
        torch.testing.assert_close(link.predict(batch, trainer.learner), whole)


def test_test_samples_go_through_the_codebooks() -> None:
    on = toys.stream(form="images")
    trainer = trainer_of(on, codebook_size=2, codebooks=2)
    trainer.run()
    link = link_of(trainer)
    encoded = link.encode(on.experiences[0].test, trainer.learner)
    assert encoded.x.dtype == torch.uint8
    assert encoded.x.shape == (40, 8, 8, 2)
    assert int(encoded.x.max()) <= 1


# -- steps -----------------------------------------------------------------------------------------------------------


def test_rates_of_classes_follow_their_own_counters() -> None:
    """One sample a step, classes in turn: each class falls by its own count, its first sample learns at the start."""
    knobs = {"lr_start": 0.1, "lr_end": 0.001, "lr_samples": 20, "lr_step": 5, "replay": 3}
    on = toys.stream(form="images")
    trainer = trainer_of(on, **knobs, sections={"training": {"epochs": 1, "batch_size": 1, "lr": 0.03}})
    rates: list[tuple[int, float]] = []
    step = trainer.learner.step
    labels: list[int] = []

    def watch() -> None:
        rates.append((labels[-1], trainer.learner.lr))
        step()

    link = link_of(trainer)
    mix = link.mix

    def note(batch: Batch, learner: Any) -> Batch:
        labels.append(int(batch.y[0]))
        return mix(batch, learner)

    trainer.learner.step = watch  # type: ignore[method-assign]
    link.mix = note  # type: ignore[method-assign]
    trainer.run()
    assert [r for _, r in rates[:60]] == [0.03] * 60, "the base session has the rate of training"
    met = dict.fromkeys(range(6), 0)
    gamma = (0.001 / 0.1) ** (5 / 20)
    for label, rate in rates[60:]:
        assert rate == pytest.approx(0.1 * gamma ** (min(met[label], 20) // 5), rel=1e-5)
        met[label] += 1
    assert rates[60][1] == pytest.approx(0.1)
    assert min(r for _, r in rates[60:]) == pytest.approx(0.001, rel=1e-4)


def test_mixed_rows_cost_what_their_two_labels_cost() -> None:
    on = toys.stream(form="images")
    trainer = trainer_of(on, mixup=0.5, crop=1.0, base="pretrained", sections={"training": {"epochs": 1}})
    link, learner = link_of(trainer), trainer.learner
    trainer.run()
    data = link.encode(on.experiences[2].train, learner)
    batch = link.mix(data.batch(torch.arange(10), epoch=1), learner)
    assert len(batch) == 10 + 20
    assert not batch.raw
    share, other = batch.extra["share"], batch.extra["other"]
    assert (share[:10] == 1).all()
    assert share[10:].unique().numel() == 1
    learner.model.eval()
    outputs = learner.forward(batch)
    loss = link.adjust_loss(learner.loss(outputs, batch), batch=batch, outputs=outputs, learner=learner)
    p = torch.log_softmax(outputs, dim=1)
    own = -p[torch.arange(30), batch.y]
    by_hand = share * own + (1 - share) * -p[torch.arange(30), other]
    torch.testing.assert_close(loss, by_hand.mean())


def test_an_unmixed_step_replays_what_is_remembered() -> None:
    on = toys.stream(form="images")
    trainer = trainer_of(on, mixup=0, crop=1.0, base="pretrained", sections={"training": {"epochs": 1}})
    link, learner = link_of(trainer), trainer.learner
    trainer.run()
    data = link.encode(on.experiences[2].train, learner)
    batch = link.mix(data.batch(torch.arange(10), epoch=1), learner)
    decoded = link._decode(link._memory.columns["x"][: len(link._memory)])
    for row in batch.x[10:]:
        assert (row - decoded).abs().flatten(1).amax(dim=1).min() < 1e-6
    assert not batch.extra


# -- warnings and errors ---------------------------------------------------------------------------------------------


def test_drift_from_the_codebooks_is_noticed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    on = toys.stream(form="images")
    far = on.experiences[2]
    far._makers["train"] = lambda: far_away(on)
    with caplog.at_level(logging.WARNING, logger="cl_lab"):
        trainer = trainer_of(on, base="pretrained", drift=1.01)
        passed = counted_rows(link_of(trainer), monkeypatch)
        trainer.run()
    assert passed.count(len(on.experiences[2].train)) == 3, "a sample passes the frozen layers once, measured or not"
    assert any(
        "the stream has drifted from the codebooks" in r.message and "experience 2" in r.message for r in caplog.records
    )
    link = link_of(trainer)
    assert len(link._errors) == 3
    measured = link.measures()
    assert measured["quantisation_error_newest"] == link._errors[2].power > link._errors[0].power
    assert measured["quantisation_error_per_vector_newest"] == link._errors[2].vectors
    vectors = link._vectors(link._latents(far_away(on), trainer.learner))[0].flatten(0, -2)
    assert link._quantizer is not None
    assert link._errors[2] == pytest.approx(link._quantizer.error(vectors), rel=1e-5)


def test_a_checkpoint_of_before_is_gone_on_with(caplog: pytest.LogCaptureFixture) -> None:
    """It holds one number for each time that codes were watched."""
    on = toys.stream(form="images")
    trainer = trainer_of(on, base="pretrained")
    trainer.run()
    link = link_of(trainer)
    state = link.state_dict()
    link.load_state_dict({**state, "errors": [0.2, 0.3]})
    assert [e.power for e in link._errors] == [0.2, 0.3]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="cl_lab"):
        link._watch(on.experiences[1], Loss(0.2, 0.9))
    assert not caplog.records, "what it does not know is held against nothing"
    link.load_state_dict(state)
    assert link.state_dict()["errors"] == state["errors"]


def test_drift_is_noticed_where_few_vectors_hold_the_power(caplog: pytest.LogCaptureFixture) -> None:
    """As in a language model, whose first token's state is a thousand times as long as any other's."""
    on = toys.stream(form="images")
    link = link_of(trainer_of(on, drift=1.5))
    link._errors = [Loss(0.0003, 0.1)]
    with caplog.at_level(logging.WARNING, logger="cl_lab"):
        link._watch(on.experiences[1], Loss(0.0004, 0.14))
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="cl_lab"):
        link._watch(on.experiences[2], Loss(0.0004, 0.3))
    assert "lose 0.300 of a latent's power" in caplog.records[0].getMessage()


def counted_rows(link: Remind, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold how many rows each call of the frozen layers had."""
    rows: list[int] = []
    latents = link._latents

    def count(data: Any, learner: Any) -> Any:
        rows.append(len(data))
        return latents(data, learner)

    monkeypatch.setattr(link, "_latents", count)
    return rows


def far_away(on: Stream) -> Any:
    data = toys.stream(form="images").experiences[2].train
    noise = torch.randint(0, 256, data.x.shape, generator=rng(7), dtype=torch.uint8)
    return type(data)(noise, data.y, data.t)


@pytest.mark.parametrize(
    ("form", "model", "split", "width"),
    [
        ("float", {"name": "mlp"}, "auto", 400),
        ("images", {**CONVNET, "batch_norm": True}, "blocks.1", 12),
        ("questions", {"name": "visual-question", "channels": [6]}, "regions", 6),
    ],
)
def test_a_width_that_does_not_fit_is_refused_before_anything_is_learnt(
    form: str, model: dict[str, Any], split: str, width: int
) -> None:
    with pytest.raises(ConfigError, match=f"^codebooks = 32: must divide the {width} channels of the latents"):
        trainer_of(toys.stream(form=form), model, split=split, codebooks=32)


def test_asking_for_the_width_leaves_no_trace() -> None:
    on = toys.stream(form="images")
    spec = registry.create("models", {**CONVNET, "batch_norm": True, "dropout": 0.5}, "model")
    model = spec.build(on)
    before, drawn = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    Remind(split="layers.0", codebooks=4).prepare(model, on)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not toys.differing(before, model.state_dict())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"split": "blocks.7"},
            r"cannot be split behind 'blocks\.7'; .*did you mean|cannot be split behind 'blocks\.7'",
        ),
        ({"memory": 5, "memory_bytes": "1MB"}, r"memory = 5 and memory_bytes = '1MB': the memory has one budget"),
        ({"opq": True, "codebooks": None}, r"opq = true: there is nothing to rotate"),
        ({"lr_end": 0.1}, r"lr_end = 0\.1: needs lr_start to fall from"),
        ({"codebooks": 3}, r"^codebooks = 3: must divide the 8 channels of the latents"),
        ({"codebook_size": 4096}, r"^codebooks of 4096 centroids cannot be learnt from"),
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        trainer_of(**knobs).run()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError) or "DataError" in type(caught.value).__name__
