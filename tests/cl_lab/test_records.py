"""The values that flow: tensor sets, batches, experiences, streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cl_lab.errors import DataError
from cl_lab.protocols import state_bytes, tensors_of
from cl_lab.records import PAD, Aside, Batch, Experience, Stream, TensorData


def data(n: int = 6, first: int = 0) -> TensorData:
    x = torch.arange(first, first + n).to(torch.uint8).view(n, 1).repeat(1, 4)
    return TensorData(x, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))


def test_columns_must_fit() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="differ in number: 3, 2, 3"):
        TensorData(x, y[:2], y)
    for wrong in (y.int(), y.double()):
        with pytest.raises(DataError, match="labels must be int64"):
            TensorData(x, wrong, y)
        with pytest.raises(DataError, match="labels must be int64"):
            TensorData(x, y, wrong)
    with pytest.raises(DataError, match="labels must be int64"):
        TensorData(x, y, y.float())
    assert TensorData(x, y.float(), y).y.dtype == torch.float32, "targets of a regression"


def test_rows() -> None:
    d = data()
    assert len(d) == 6
    assert d.nbytes == 6 * 4 + 2 * 6 * 8
    taken = d.take(torch.tensor([5, 0]))
    assert taken.x[:, 0].tolist() == [5, 0]
    assert taken.x.dtype == torch.uint8
    batch = d.batch(torch.tensor([1, 2, 3]), epoch=4)
    assert (len(batch), batch.current, batch.epoch, batch.weight) == (3, 3, 4, None)
    taken.x.zero_(), batch.x.zero_()
    assert d.x[:, 0].tolist() == list(range(6)), "copies"


def test_concat() -> None:
    one, two = data(), data(3, first=10)
    both = TensorData.concat([one, two])
    assert both.x[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert TensorData.concat([one]) is one, "no copy of a large set"


def test_digest_tells_data_apart() -> None:
    d = data()
    assert d.digest() == data().digest()
    assert d.digest() == d.take(torch.arange(6)).digest()
    others = [
        data(5),
        data(first=1),
        TensorData(d.x.float(), d.y, d.t),
        TensorData(d.x.view(6, 2, 2), d.y, d.t),
        TensorData(d.x, 1 - d.y, d.t),
        TensorData(d.x, d.y, d.t + 1),
        d.take(torch.arange(5, -1, -1)),
    ]
    assert len({o.digest() for o in [d, *others]}) == 8
    assert TensorData(d.x.t().contiguous().t(), d.y, d.t).digest() == d.digest(), "whatever the layout in memory"


def test_digest_of_a_share() -> None:
    """Of 24 bytes of samples in 6 rows about ``most`` are read; labels always are."""
    d = data()
    assert d.digest(24) == d.digest(100) == d.digest()
    changed = data()
    changed.x[1] += 1
    assert changed.digest(24) != d.digest(24)
    assert changed.digest(12) == d.digest(12), "row 1 is between those read"
    changed.x[2] += 1
    assert changed.digest(12) != d.digest(12)
    assert TensorData(d.x, 1 - d.y, d.t).digest(4) != d.digest(4)
    assert data(5).digest(1) != d.digest(1), "their number is told"


def test_rows_of_a_batch() -> None:
    d = data()
    batch = Batch(d.x, d.y, d.t, current=4, extra={"z": torch.arange(6.0)}, epoch=2)
    part = batch.rows(torch.tensor([1, 3, 4]), torch.tensor([0.1, 0.2, 0.3]))
    assert part.x[:, 0].tolist() == [1, 3, 4]
    assert part.current == 2, "two of them are of the present experience"
    assert part.extra["z"].tolist() == [1, 3, 4]
    assert part.epoch == 2
    assert part.weight is not None
    moved = part.to(torch.device("cpu"))
    assert torch.equal(moved.x, part.x)
    assert torch.equal(moved.extra["z"], part.extra["z"])
    assert (moved.current, moved.epoch) == (2, 2)


def test_experiences_are_made_on_first_use() -> None:
    made: list[str] = []

    def make(part: str) -> TensorData:
        made.append(part)
        return data()

    e = Experience(1, "one", [3, 1, 2], lambda: make("train"), lambda: make("test"))
    assert e.classes == (1, 2, 3)
    assert made == []
    assert e.train is e.train
    assert e.test is e.test
    assert made == ["train", "test"]
    e.release()
    assert len(e.train) == 6
    assert made == ["train", "test", "train"], "only the training set is given back"
    assert "one" in repr(e)


def test_empty_experiences_are_errors() -> None:
    with pytest.raises(DataError, match=r"experience 2 \('two'\) has no classes"):
        Experience(2, "two", [], data, data)
    e = Experience(2, "two", [0], lambda: data(0), lambda: data(0))
    with pytest.raises(DataError, match=r"experience 2 \('two'\) has no train samples"):
        _ = e.train
    with pytest.raises(DataError, match=r"has no test samples"):
        _ = e.test


def test_fingerprint_names_what_is_measured() -> None:
    def stream(test: TensorData, classes: tuple[int, ...] = (0, 1), train: TensorData | None = None) -> Stream:
        e = Experience(0, "e", classes, lambda: train or data(), lambda: test)
        return Stream("s", (e,), (4,), 2)

    one = stream(data())
    assert len(one) == 1
    assert one.fingerprint() == stream(data()).fingerprint()
    assert one.fingerprint() == stream(data(), train=data(3)).fingerprint()
    assert one.fingerprint() != stream(data(5)).fingerprint()
    assert one.fingerprint() != stream(data(), (0, 1, 2)).fingerprint()
    assert one.fingerprint() == dataclasses.replace(one, name="other").fingerprint()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "x"


def test_asides_are_of_the_stream_they_stand_beside() -> None:
    e = Experience(0, "e", (0, 1), data, data)
    stream = Stream("s", (e,), (4,), 2)

    def beside(questions: TensorData) -> Stream:
        return dataclasses.replace(stream, asides={"more": Aside(stream, lambda: questions)})

    assert beside(data(5)).fingerprint() != stream.fingerprint()
    assert beside(data(5)).fingerprint() != beside(data(4)).fingerprint()
    wide = TensorData(torch.zeros(2, 5), torch.zeros(2).long(), torch.zeros(2).long())
    late = TensorData(data().x, data().y, torch.ones_like(data().t))
    none = data().take(torch.arange(0))
    for questions, told in (
        (wide, r"2 samples \[5\] of experiences \[0\]"),
        (late, r"\[4\] of experiences \[1\]"),
        (none, "0 samples"),
    ):
        with pytest.raises(DataError, match=rf"stream 's' has 1 experiences .* but an aside asks .*{told}"):
            _ = beside(questions).asides["more"].questions


def test_an_opening_is_what_says_something() -> None:
    class Spaced:
        """Tokens 0 and 1 are blanks, the others letters."""

        size = 9
        end = 8

        def decode(self, tokens: list[int]) -> str:
            return "".join("  abcdef "[t] for t in tokens)

    table = torch.tensor([[2, 3, 8, PAD], [0, 2, 8, PAD], [0, 1, 3, 8], [0, 8, PAD, PAD]])
    e = Experience(0, "e", range(4), data, data)
    sections: dict[str, Any] = {"layout": {"prompt": (2,), "answer": (4,)}, "answers": table, "scoring": "opening"}
    stream = Stream("s", (e,), (6,), 4, objective="language", tokenizer=Spaced(), **sections)
    assert stream.openings.tolist() == [1, 2, 3, 1]
    assert dataclasses.replace(stream, tokenizer=None).openings.tolist() == [1] * 4


def test_state_bytes() -> None:
    state = {"a": torch.zeros(3), "b": {"c": torch.zeros(2, dtype=torch.uint8), "d": {}}, "e": 5, "f": [1, 2]}
    assert state_bytes(state) == 14
    assert len(list(tensors_of(state))) == 2
    assert state_bytes({}) == 0
