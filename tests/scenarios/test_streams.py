"""Base sessions, orders, chains, blurred boundaries, long tails, few shots and re-occurrences, and which go together."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cl_lab import knobs, registry
from cl_lab.chain import Chain
from cl_lab.errors import ConfigError
from cl_lab.protocols import Strategy
from cl_lab.records import Batch, Experience, Stream, TensorData
from scenarios import _orders, _sources
from scenarios._sources import ImageSet
from scenarios.vision import (
    CORe50,
    PermutedMNIST,
    SplitCIFAR100,
    SplitDigits,
    SplitMNIST,
    SplitTinyImageNet,
)

SHARED = Path(os.environ.get("CL_LAB_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
N, CLASSES, SESSIONS, FRAMES = 60, 10, 4, 5


def numbered(labels: Tensor) -> Tensor:
    """Images whose first two pixels tell their row."""
    x = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    rows = torch.arange(len(labels))
    x[:, 0, 0, 0], x[:, 0, 0, 1] = (rows // 256).byte(), (rows % 256).byte()
    return x


def rows_of(data: TensorData) -> Tensor:
    """Which rows of the set these are."""
    return data.x[:, 0, 0, 0].long() * 256 + data.x[:, 0, 0, 1].long()


def made_up(n_classes: int, per_class: int, tests: int, sessions: bool = False) -> ImageSet:
    """``per_class`` samples of each class one after the other or, with sessions, by session and then by object."""
    y = torch.arange(n_classes).repeat_interleave(per_class)
    domain = None
    if sessions:
        y = torch.arange(n_classes).repeat_interleave(FRAMES).repeat(SESSIONS)
        domain = torch.arange(1, SESSIONS + 1).repeat_interleave(n_classes * FRAMES)
    test_y = torch.arange(n_classes * tests) % n_classes
    held_out = torch.full_like(test_y, 9) if sessions else None
    return ImageSet("made-up", numbered(y), y, numbered(test_y), test_y, n_classes, domain, held_out)


SETS = {
    "mnist": made_up(CLASSES, N, 6),
    "tiny-imagenet": made_up(100, 6, 2),
    "cifar100": made_up(100, 50, 1),
    "core50": made_up(CLASSES, 0, 6, sessions=True),
}


@pytest.fixture(autouse=True)
def sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sets but the digits are made up."""
    monkeypatch.setattr(_sources, "load", lambda name, *_: SETS[name])


def present(data: TensorData) -> list[int]:
    return [int(c) for c in data.y.unique()]


def told(stream: Stream) -> list[tuple[Any, ...]]:
    return [(e.name, e.classes, e.train.digest(), e.test.digest()) for e in stream.experiences]


def all_rows(experiences: tuple[Experience, ...]) -> list[int]:
    return sorted(int(r) for e in experiences for r in rows_of(e.train))


# -- base sessions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experiences", "later"), [(51, 1), (11, 5)])
def test_base_session(experiences: int, later: int) -> None:
    stream = SplitTinyImageNet(base_classes=50, experiences=experiences).stream(0)
    assert [len(e.classes) for e in stream.experiences] == [50, *[later] * (experiences - 1)]
    assert stream.n_classes == 100
    for e in stream.experiences:
        assert tuple(present(e.train)) == tuple(present(e.test)) == e.classes
    assert [c for e in stream.experiences for c in e.classes] == list(range(100))
    assert all_rows(stream.experiences) == list(range(600))


def test_tasks_after_a_base_session() -> None:
    stream = SplitMNIST(base_classes=4, experiences=4, incremental="task", shuffle_classes=True).stream(2)
    assert [present(e.train) for e in stream.experiences] == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]]
    assert [set(e.test.t.tolist()) for e in stream.experiences] == [{0}, {1}, {2}, {3}]
    assert [e.name for e in stream.experiences] != [
        e.name for e in SplitMNIST(base_classes=4, experiences=4).stream(2).experiences
    ]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (SplitMNIST(base_classes=4), r"experiences = 5: the 6 classes of mnist .* choose one of 2, 3, 4, 7$"),
        (SplitMNIST(base_classes=10), r"base_classes = 10: leaves none .* at most 9$"),
        (SplitMNIST(base_classes=4, experiences=1), r"experiences = 1: the 6 classes after"),
        (SplitMNIST(base_classes=10, order="iid"), r"base_classes = 10: leaves none"),
        (SplitMNIST(base_classes=4, experiences=1, order="iid"), r"experiences = 1: the 6 classes after"),
        (CORe50(base_classes=4, incremental="class"), r"experiences = 0: base_classes = 4 is not the benchmark's"),
    ],
)
def test_base_sessions_that_do_not_fit(scenario: SplitMNIST, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        scenario.stream(0)
    assert "\n" not in str(error.value)


def test_core50_with_a_base_session() -> None:
    stream = CORe50(base_classes=4, incremental="class", experiences=4).stream(0)
    assert [len(e.classes) for e in stream.experiences] == [4, 2, 2, 2]


# -- orders --------------------------------------------------------------------------------------------------------


def test_class_and_class_iid_are_one_thing() -> None:
    for settings in ({}, {"base_classes": 4, "experiences": 3}, {"train_limit": 7, "shuffle_classes": True}):
        assert told(SplitMNIST(**settings).stream(1)) == told(SplitMNIST(order="class-iid", **settings).stream(1))


def test_iid() -> None:
    images = SETS["mnist"]
    stream = SplitMNIST(order="iid", experiences=7).stream(0)
    assert all_rows(stream.experiences) == list(range(600))
    assert [len(e.train) for e in stream.experiences] == [86] * 5 + [85] * 2
    for e in stream.experiences:
        assert e.classes == tuple(range(CLASSES))
        assert torch.equal(e.train.y, images.train_y[rows_of(e.train)]), "global outputs"
        assert e.test is stream.experiences[0].test
        assert len(e.train.y.unique()) == CLASSES  # none of ten classes lacks among 85 (chance 1e-3)
    assert torch.equal(stream.experiences[0].test.y, images.test_y)
    other = SplitMNIST(order="iid", experiences=7).stream(1)
    assert other.fingerprint() == stream.fingerprint()
    assert told(other) != told(stream)
    assert told(SplitMNIST(order="iid", experiences=7, order_seed=0).stream(1)) == told(stream)


def test_iid_outputs_follow_the_class_order() -> None:
    split = SplitMNIST(shuffle_classes=True, experiences=10).stream(3)
    shuffled = SplitMNIST(shuffle_classes=True, order="iid", experiences=3).stream(3)
    output = {int(r): c for c, e in enumerate(split.experiences) for r in rows_of(e.train)}
    for e in shuffled.experiences:
        assert e.train.y.tolist() == [output[int(r)] for r in rows_of(e.train)]


def test_iid_after_a_base_session() -> None:
    stream = SplitMNIST(order="iid", base_classes=4, experiences=4, test_limit=12).stream(0)
    base, *later = stream.experiences
    assert base.classes == (0, 1, 2, 3)
    assert base.train.digest() == SplitMNIST(base_classes=4, experiences=4).stream(0).experiences[0].train.digest()
    assert {e.classes for e in later} == {(4, 5, 6, 7, 8, 9)}
    assert [len(e.train) for e in later] == [120] * 3
    assert all_rows(stream.experiences) == list(range(600))
    assert {id(e.test) for e in later} == {id(later[0].test)}
    assert present(later[0].test) == [4, 5, 6, 7, 8, 9]
    assert len(later[0].test) == len(base.test) == 12


def test_limits_of_an_iid_stream() -> None:
    stream = SplitMNIST(order="iid", experiences=6, train_limit=25).stream(0)
    assert [len(e.train) for e in stream.experiences] == [25] * 6
    kept = torch.cat([e.train.y for e in stream.experiences]).bincount()
    assert kept.tolist() == [15] * 10


def recording(row: int) -> tuple[int, int]:
    """Object and session of a row of the made-up CORe50."""
    images = SETS["core50"]
    assert images.train_domain is not None
    return int(images.train_y[row]), int(images.train_domain[row])


@pytest.mark.parametrize("order", ["instance", "class-instance"])
def test_recordings(order: Any) -> None:
    scenario = CORe50(order=order, incremental="class", experiences=12, shuffle_classes=True)
    stream = scenario.stream(0)
    assert all_rows(stream.experiences) == list(range(200))
    rows = [[int(r) for r in rows_of(e.train)] for e in stream.experiences]
    assert [len(r) // FRAMES for r in rows] == [4] * 4 + [3] * 8, "whole recordings, evenly"
    sequence = [recording(r) for r in itertools.chain(*rows)]
    blocks = [key for key, _ in itertools.groupby(sequence)]
    assert len(blocks) == len(set(blocks)) == CLASSES * SESSIONS, "each recording once, in one piece"
    for row, following in itertools.pairwise(itertools.chain(*rows)):
        assert recording(row) != recording(following) or following > row, "in the order in which it was taken"
    outputs = torch.cat([e.train.y for e in stream.experiences])
    assert bool((outputs.diff() >= 0).all()) == (order == "class-instance")
    for e in stream.experiences:
        assert e.classes == tuple(present(e.train)) == tuple(present(e.test))
        assert len(e.test) == 6 * len(e.classes)
    sessions = [s for _, s in blocks]
    assert sessions != sorted(sessions)
    assert told(scenario.stream(0)) == told(stream)
    assert told(scenario.stream(1)) != told(stream)


def test_experiences_of_the_same_classes_share_their_test_set() -> None:
    stream = CORe50(order="class-instance", incremental="class", experiences=40).stream(0)
    assert len({id(e.test) for e in stream.experiences}) == CLASSES
    assert [e.classes[0] for e in stream.experiences] == sorted(list(range(CLASSES)) * SESSIONS)


def test_recordings_after_a_base_session() -> None:
    stream = CORe50(order="instance", incremental="class", base_classes=4, experiences=9).stream(0)
    assert stream.experiences[0].classes == (0, 1, 2, 3)
    assert len(stream.experiences[0].train) == 4 * SESSIONS * FRAMES
    assert [len(e.train) for e in stream.experiences[1:]] == [3 * FRAMES] * 8
    assert all(min(e.classes) >= 4 for e in stream.experiences[1:])
    assert all_rows(stream.experiences) == list(range(200))


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (SplitMNIST(order="instance"), r"order = 'instance': mnist does not say .* core50 does"),
        (SplitMNIST(order="iid", experiences=601), r"experiences = 601: .* 600 training samples .* at most 600$"),
        (
            CORe50(order="instance", incremental="class", base_classes=4, experiences=26),
            r"experiences = 26: .* 24 recordings for 25 of them; give at most 25$",
        ),
        (CORe50(order="iid", incremental="class"), r"experiences = 0: order = 'iid' .* give a number"),
    ],
)
def test_orders_that_do_not_fit(scenario: SplitMNIST, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scenario.stream(0)


def test_sessions_keep_their_order() -> None:
    with pytest.raises(ConfigError, match=r"shuffle_classes = True: incremental = 'domain' keeps the sessions' order"):
        CORe50(shuffle_classes=True)


# -- chains --------------------------------------------------------------------------------------------------------


def test_temporal_over_classes() -> None:
    stream = SplitCIFAR100(order="iid", temporal=0.8, experiences=50).stream(0)
    assert all_rows(stream.experiences) == list(range(5000))
    assert {e.classes for e in stream.experiences} == {tuple(range(100))}
    chain = torch.cat([e.train.y for e in stream.experiences])[:4000]
    lengths = torch.unique_consecutive(chain, return_counts=True)[1].double()
    assert float(lengths.mean()) == pytest.approx(5, abs=4 * 4.5 / len(lengths) ** 0.5)
    # An experience of 100 samples holds far fewer classes than one of the same size without the chain.
    plain = SplitCIFAR100(order="iid", experiences=50).stream(0)
    few, many = (sum(len(present(e.train)) for e in s.experiences[:40]) / 40 for s in (stream, plain))
    assert few < 22 < 60 < many
    # Within a class the samples are shuffled.
    rows = torch.cat([rows_of(e.train) for e in stream.experiences])
    assert not bool((rows[SETS["cifar100"].train_y[rows] == 0].diff() > 0).all())


def test_temporal_over_recordings() -> None:
    stream = CORe50(order="instance", temporal=0.5, incremental="class", experiences=4).stream(0)
    assert all_rows(stream.experiences) == list(range(200))
    rows = [int(r) for e in stream.experiences for r in rows_of(e.train)]
    assert len({e.classes for e in stream.experiences}) == 1
    by_recording: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        by_recording.setdefault(recording(row), []).append(row)
    assert all(frames == sorted(frames) for frames in by_recording.values())
    runs = [len(list(group)) for _, group in itertools.groupby(recording(r) for r in rows)]
    assert 1.5 < sum(runs) / len(runs) < 2.3  # a recording of five frames ends some runs early


def test_temporal_after_a_base_session() -> None:
    stream = SplitMNIST(order="iid", temporal=0.0, base_classes=4, experiences=3).stream(0)
    chain = torch.cat([e.train.y for e in stream.experiences[1:]])
    assert not bool((chain[:300].diff() == 0).any()), "never the same class twice"
    assert stream.experiences[0].classes == (0, 1, 2, 3)


# -- blurred boundaries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_blurry_classes(share: float) -> None:
    plain = SplitMNIST().stream(0)
    stream = SplitMNIST(blurry=share).stream(0)
    assert all_rows(stream.experiences) == list(range(600))
    side = int(share / 2 * 120)
    for i, e in enumerate(stream.experiences):
        own = torch.isin(e.train.y // 2, torch.tensor([i]))
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < 5]
        assert len(e.train) == 120
        assert [int((e.train.y // 2 == j).sum()) for j in neighbours] == [side] * len(neighbours)
        assert int(own.sum()) == 120 - side * len(neighbours)
        assert e.classes == tuple(sorted({*present(e.train), 2 * i, 2 * i + 1}))
        assert e.test.digest() == plain.experiences[i].test.digest(), "tested on its own classes"
    assert stream.n_classes == 10
    assert told(SplitMNIST(blurry=share).stream(1)) != told(stream)
    assert told(SplitMNIST(blurry=0).stream(0)) == told(plain)


def test_blurry_leaves_the_base_session_alone() -> None:
    stream = SplitMNIST(blurry=0.5, base_classes=4, experiences=4).stream(0)
    assert present(stream.experiences[0].train) == [0, 1, 2, 3]
    assert present(stream.experiences[1].train) == [4, 5, 6, 7]
    assert present(stream.experiences[2].train) == [4, 5, 6, 7, 8, 9]


def test_blurry_domains_and_sessions() -> None:
    images = SETS["mnist"]
    stream = SplitMNIST(blurry=0.5, incremental="domain").stream(0)
    for e in stream.experiences:
        assert e.classes == (0, 1)
        assert torch.equal(e.train.y, images.train_y[rows_of(e.train)] % 2), "each sample keeps its label"
    sessions = CORe50(blurry=0.2).stream(0)
    assert all_rows(sessions.experiences) == list(range(200))
    seen = [[recording(int(r))[1] for r in rows_of(e.train)] for e in sessions.experiences]
    assert [s.count(1) for s in seen] == [45, 5, 0, 0]
    assert [s.count(2) for s in seen] == [5, 40, 5, 0]
    assert {id(e.test) for e in sessions.experiences} == {id(sessions.experiences[0].test)}


def test_blurry_recordings() -> None:
    stream = CORe50(order="class-instance", incremental="class", experiences=10, blurry=0.4).stream(0)
    assert all_rows(stream.experiences) == list(range(200))
    assert [int((e.train.y == i).sum()) for i, e in enumerate(stream.experiences)] == [16, *[12] * 8, 16]
    assert [e.classes for e in stream.experiences][:2] == [(0, 1), (0, 1, 2)]


# -- imbalance -----------------------------------------------------------------------------------------------------


def test_long_tail_keeps_the_test_set() -> None:
    stream = SplitMNIST(imbalance=0.1).stream(0)
    counts = torch.cat([e.train.y for e in stream.experiences]).bincount()
    assert counts.tolist() == [int(60 * 0.1 ** (c / 9) + 1e-9) for c in range(10)]
    assert counts[-1] == 6
    assert stream.fingerprint() == SplitMNIST().stream(0).fingerprint()
    assert told(stream) != told(SplitMNIST(imbalance=0.1).stream(1))
    # The tail is the set's, whatever the order: shuffled classes meet it anywhere.
    shuffled = SplitMNIST(imbalance=0.1, shuffle_classes=True, experiences=10).stream(0)
    for e in shuffled.experiences:
        assert len(e.train) == counts[int(e.name.split()[1])]
    mixed = SplitMNIST(imbalance=0.1, order="iid", experiences=4).stream(0)
    assert torch.equal(torch.cat([e.train.y for e in mixed.experiences]).bincount(), counts)
    # Of some of the classes it is theirs, as if the set had no others.
    some = SplitMNIST(imbalance=0.1, only_classes=4, experiences=2).stream(0)
    assert [e.train.y.bincount()[-2:].tolist() for e in some.experiences] == [[60, 27], [12, 6]]


def test_a_limit_does_not_flatten_the_tail() -> None:
    stream = SplitMNIST(imbalance=0.1, train_limit=40).stream(0)
    counts = torch.cat([e.train.y for e in stream.experiences]).bincount()
    assert counts.tolist() == [int(20 * 0.1 ** (c / 9) + 1e-9) for c in range(10)]


def test_few_shots() -> None:
    stream = SplitTinyImageNet(base_classes=60, experiences=9, shots=5).stream(0)
    base, *sessions = stream.experiences
    assert base.train.y.bincount().tolist() == [6] * 60
    for i, e in enumerate(sessions):
        assert e.classes == tuple(range(60 + 5 * i, 65 + 5 * i))
        assert e.train.y.bincount()[60 + 5 * i :].tolist() == [5] * 5
        assert len(e.test) == 10
    assert told(stream) != told(SplitTinyImageNet(base_classes=60, experiences=9, shots=5).stream(1))
    assert len(SplitMNIST(shots=3).stream(0).experiences[1].train) == 6
    pool = SplitMNIST(shots=4, base_classes=4, experiences=4, order="iid").stream(0)
    assert [len(e.train) for e in pool.experiences] == [240, 8, 8, 8]
    assert [len(e.train) for e in SplitMNIST(shots=100).stream(0).experiences] == [120] * 5, "all there are"


# -- re-occurrences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "exponent"), [("power", 1.0), ("power", 2.5), ("exponential", 0.7), ("uniform", 1.0)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_shares_of_earlier_tasks(law: Any, exponent: float, share: float) -> None:
    stream = SplitMNIST(revisit=law, revisit_exponent=exponent, revisit_share=share).stream(0)
    for k, e in enumerate(stream.experiences):
        budget = round(120 * share / (1 - share)) if k else 0  # whatever the law
        assert len(e.train) == 120 + budget
        task = rows_of(e.train) // (2 * N)
        found = task.bincount(minlength=5)[:k].tolist()
        weights = {
            "power": [(k - j + 1) ** -exponent for j in range(k)],
            "exponential": [2.718281828459045 ** (-exponent * (k - j)) for j in range(k)],
            "uniform": [1.0] * k,
        }[law]
        assert int((task == k).sum()) == 120
        assert sum(found) == budget
        for j, count in enumerate(found):
            assert abs(count - budget * weights[j] / sum(weights)) < 1, "rounded by the largest remainders"
        assert found == _orders.largest_remainder(weights, budget) if k else found == []
        own = rows_of(e.train)[task == k]
        assert len(own.unique()) == 120, "all of its own, once"
        for j in range(k):
            times = rows_of(e.train)[task == j].bincount(minlength=600)[120 * j : 120 * (j + 1)]
            assert int(times.max() - times.min()) <= 1, "no sample a second time before all have come"
        assert e.classes == tuple(sorted({*present(e.train), 2 * k, 2 * k + 1}))
        assert present(e.test) == [2 * k, 2 * k + 1]


def test_what_comes_again_is_what_came() -> None:
    """Re-occurrences are of the samples that the earlier experience had, and they stand among the new ones."""
    settings = {"train_limit": 20, "imbalance": 0.5}
    stream = SplitMNIST(revisit="uniform", **settings).stream(0)
    plain = SplitMNIST(**settings).stream(0)
    own = [set(rows_of(e.train).tolist()) for e in plain.experiences]
    for k, e in enumerate(stream.experiences):
        rows = rows_of(e.train).tolist()
        assert own[k] <= set(rows) <= set().union(*own[: k + 1])
        new = [r in own[k] for r in rows]
        assert k == 0 or new != sorted(new, reverse=True)
        again = e.train.digest()
        e.release()
        assert e.train.digest() == again


def test_permuted_samples_come_again_as_they_were() -> None:
    plain = PermutedMNIST(experiences=3).stream(0)
    stream = PermutedMNIST(experiences=3, revisit="power", revisit_share=0.5).stream(0)
    seen = [{bytes(x.flatten().tolist()) for x in e.train.x} for e in plain.experiences]
    last = [bytes(x.flatten().tolist()) for x in stream.experiences[2].train.x]
    assert len(last) == 1200
    # Images of one row of pixels set may look alike under two permutations, hence at least.
    assert sum(x in seen[2] for x in last) >= 600
    assert sum(x in seen[1] for x in last) >= _orders.largest_remainder([1 / 3, 1 / 2], 600)[1]
    assert all(x in set().union(*seen) for x in last)
    own = PermutedMNIST(experiences=3, incremental="class", revisit="uniform").stream(0)
    assert [len(e.classes) for e in own.experiences] == [10, 20, 30]
    assert present(own.experiences[2].train) == list(range(30))


# -- what goes together --------------------------------------------------------------------------------------------

REFUSED = [
    (SplitMNIST, {"order": "iid", "incremental": "task"}, r"order = 'iid': .*use incremental=class$"),
    (SplitMNIST, {"order": "instance", "incremental": "domain"}, r"order = 'instance': .*use incremental=class$"),
    (SplitMNIST, {"base_classes": 2, "incremental": "domain"}, r"base_classes = 2: .*use incremental=class$"),
    (SplitMNIST, {"temporal": 0.5}, r"temporal = 0.5: order = 'class' .*order=iid.*order=instance"),
    (SplitMNIST, {"temporal": 0.5, "order": "class-instance"}, r"temporal = 0.5: order = 'class-instance'"),
    (SplitMNIST, {"temporal": 1.0, "order": "iid"}, r"temporal = 1.0: input should be less than 1"),
    (SplitMNIST, {"blurry": 0.1, "order": "iid"}, r"blurry = 0.1: a stream that is mixed throughout"),
    (CORe50, {"blurry": 0.1, "order": "instance", "temporal": 0.5, "incremental": "class"}, r"blurry = 0.1: a stream"),
    (SplitMNIST, {"blurry": 0.1, "incremental": "task"}, r"blurry = 0.1: .*use incremental=class$"),
    (SplitMNIST, {"blurry": 0.1, "experiences": 1}, r"blurry = 0.1: experiences = 1 leaves no neighbours"),
    (SplitMNIST, {"blurry": 0.1, "experiences": 2, "base_classes": 2}, r"blurry = 0.1: experiences = 2 leaves no"),
    (SplitMNIST, {"blurry": 1.5}, r"blurry = 1.5: input should be less than or equal to 1"),
    (SplitMNIST, {"shots": 1, "experiences": 1}, r"shots = 1: .*raise experiences"),
    (SplitMNIST, {"shots": 1, "order": "iid"}, r"shots = 1: order = 'iid' .*give base_classes"),
    (SplitMNIST, {"imbalance": 0.0}, r"imbalance = 0.0: input should be greater than 0"),
    (SplitMNIST, {"revisit": "power", "order": "iid"}, r"revisit = 'power': a stream that is mixed throughout"),
    (SplitMNIST, {"revisit": "power", "incremental": "task"}, r"revisit = 'power': .*use incremental=class or domain"),
    (PermutedMNIST, {"revisit": "power", "experiences": 1}, r"revisit = 'power': .*raise experiences"),
    (SplitMNIST, {"revisit": "power", "revisit_share": 1.0}, r"revisit_share = 1.0: input should be less than 1"),
    (CORe50, {"order": "iid"}, r"order = 'iid': the experiences are sessions .*use incremental=class"),
    (CORe50, {"base_classes": 10}, r"base_classes = 10: the experiences are sessions .*use incremental=class"),
    (CORe50, {"temporal": 0.5}, r"temporal = 0.5: the experiences are sessions"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "settings", "message"), REFUSED)
def test_senseless_combinations_are_refused(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^scenario\." + message) as error:
        knobs.build(cls, settings, "scenario")
    assert "\n" not in str(error.value)


GRID: list[dict[str, Any]] = [
    {"base_classes": 4, "experiences": 4, "shuffle_classes": True},
    {"base_classes": 4, "experiences": 4, "shots": 5, "shuffle_classes": True},
    {"order": "iid", "experiences": 6},
    {"order": "iid", "experiences": 6, "base_classes": 2, "temporal": 0.9, "imbalance": 0.3},
    {"order": "iid", "experiences": 20, "temporal": 0.7, "online": True},
    {"blurry": 0.3},
    {"blurry": 0.3, "imbalance": 0.2, "base_classes": 2, "incremental": "class"},
    {"imbalance": 0.02, "incremental": "task"},
    {"shots": 2, "incremental": "task"},
    {"revisit": "power", "blurry": 0.2, "shots": 9},
    {"revisit": "exponential", "incremental": "domain", "imbalance": 0.5, "train_limit": 50},
]


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_streams_of_the_digits(settings: dict[str, Any]) -> None:
    """What the conformance suite asks of every stream, of each kind of stream."""
    before = torch.get_rng_state()
    scenario = knobs.build(SplitDigits, settings, "scenario")
    stream, again = scenario.stream(5), scenario.stream(5)
    backwards = [e.train.digest() for e in reversed(again.experiences)][::-1]
    assert [e.train.digest() for e in stream.experiences] == backwards
    assert told(stream) == told(again)
    assert told(stream) != told(scenario.stream(6))
    assert torch.equal(before, torch.get_rng_state())
    known = {int(c) for e in stream.experiences for c in e.train.y.unique()}
    assert known == set(range(stream.n_classes)) == {c for e in stream.experiences for c in e.classes}
    seen: list[bytes] = []
    for e in stream.experiences:
        assert {*present(e.train), *present(e.test)} <= set(e.classes)
        assert set(e.test.t.tolist()) == set(e.train.t.tolist()) == {e.index if stream.task_labels else 0}
        assert e.train.x.is_contiguous()
        seen += [bytes(x) for x in e.train.x.flatten(1).numpy()]
    if "revisit" not in settings:
        assert len(seen) - len(set(seen)) == 0, "no sample twice"


@pytest.mark.parametrize("strategy", ["naive", "replay", "cumulative"])
@pytest.mark.parametrize("settings", [GRID[1], GRID[3], GRID[5], GRID[9]], ids=str)
def test_strategies_learn_on_them(strategy: str, settings: dict[str, Any]) -> None:
    """With boundaries told and, where the strategy can do without, hidden."""
    for told_boundaries in (True, False):
        if strategy == "cumulative" and not told_boundaries:
            continue
        run = {**settings, "boundaries": told_boundaries, "online": True, "normalise": True}
        stream = knobs.build(SplitDigits, run, "scenario").stream(0)
        record = toys.trainer([{"name": strategy}], stream, training={"epochs": 1, "lr": 0.1}).run()
        assert len(record.matrix) == len(record.matrix[0]) == settings.get("experiences", 5)
        assert record.matrix[0][0] > 0.7, "the first experience is learnt"


@pytest.mark.slow  # decodes 25,000 pictures where the cache is empty
@pytest.mark.skipif(not (SHARED / "vision" / "tinyimagenet").is_dir(), reason=f"no Tiny-ImageNet in {SHARED}")
def test_real_tiny_imagenet_base_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scenario = SplitTinyImageNet(data_dir=str(SHARED), base_classes=50, experiences=51, train_limit=60, test_limit=50)
    stream = scenario.stream(0)
    assert [len(e.classes) for e in stream.experiences] == [50, *[1] * 50]
    assert [len(e.train) for e in stream.experiences[1:]] == [60] * 50


def test_streams_whose_order_matters_are_trained_on_in_that_order() -> None:
    """Two epochs over a chain of classes: the rows come as the stream has them; elsewhere they are shuffled."""
    for settings, kept in (({"order": "iid", "temporal": 0.9}, True), ({}, False), ({"order": "iid"}, False)):
        scenario = registry.create("scenarios", {"name": "split-digits", "experiences": 2, **settings}, "scenario")
        on = scenario.stream(0)
        seen: list[Tensor] = []

        class Look(Strategy):
            def mix(self, batch: Batch, learner: Any) -> Batch:
                seen.append(batch.y)  # noqa: B023
                return batch

        link = Look()

        class One(Chain):
            def __init__(self, links: Any, names: Any, stream: Stream) -> None:
                super().__init__([link], ["look"], stream)  # noqa: B023

        toys.trainer([{"name": "naive"}], on, chain=One, training={"epochs": 2, "lr": 0.001}).run()
        first = on.experiences[0].train.y
        n = len(first)
        met = torch.cat(seen)[: 2 * n]
        assert torch.equal(met, torch.cat([first, first])) is kept
        assert torch.equal(met[:n].sort().values, first.sort().values)
