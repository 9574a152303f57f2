"""A share of every past experience in the training set of the next."""

from __future__ import annotations

from typing import Any

import torch
import toys

from strategies.rehearsal_1pct import RehearsalShare


def test_keeps_its_share_of_each_experience_and_mixes_it_in() -> None:
    on = toys.stream()
    trainer = toys.trainer([{"name": "rehearsal-1pct", "share": 0.1}], on)
    (link,) = trainer.strategy.links
    assert isinstance(link, RehearsalShare)
    sizes = []
    for e in on.experiences:
        data = link.training_set(e, trainer.learner)
        assert data is not None
        sizes.append(len(data))
        assert torch.equal(data.x[:60], e.train.x)
        past = data.y[60:].tolist()
        assert all(c < 2 * e.index for c in past), "only classes of the past"
        link.after_experience(e, trainer.learner)
    assert sizes == [60, 66, 72]
    kept: Any = link.state_dict()["kept"]
    for i, e in enumerate(on.experiences):
        rows = kept["x"][6 * i : 6 * i + 6]
        same = (rows[:, None] == e.train.x).all(2)
        assert same.any(1).all()
        assert int(same.any(0).sum()) == 6, "no sample twice"


def test_the_smallest_share_is_one_sample() -> None:
    trainer = toys.trainer([{"name": "rehearsal-1pct", "share": 0.001}], toys.stream())
    record = trainer.run()
    assert record.measures[-1] == {"rehearsal-1pct/memory_samples": 3.0}


def test_a_share_helps_texts() -> None:
    model = {"name": "causal-lm", "weights": "tiny", "adapt": "full"}
    training = {"epochs": 8, "batch_size": 12, "lr": 0.02, "optimizer": "adamw"}
    on = toys.stream(form="texts", scoring="generation")
    some = toys.trainer([{"name": "rehearsal-1pct", "share": 0.3}], on, model=model, training=training).run()
    none = toys.trainer([{"name": "naive"}], on, model=model, training=training).run()
    assert sum(some.matrix[-1]) > sum(none.matrix[-1]) + 0.3
