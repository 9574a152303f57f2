"""A model that answers questions about pictures: regions of the picture, weighed by the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from cl_lab.errors import ConfigError
from cl_lab.knobs import knob
from cl_lab.models import HEAD_DOC, Backbone, Classifier, HeadKind, Stage, classifier
from cl_lab.protocols import ModelSpec
from cl_lab.records import FlatLatent, Stream

_VOCABULARY = 256  # words are bytes


class VisualQuestionBackbone(Backbone):
    """Features of a question ``q`` and of the sum ``Σ_i σ(a_i) u_i`` over regions, ``u_i = g((W v_i + p_i) ∘ A q)``.

    After bottom-up top-down attention (Anderson et al. 2018): a question scores each region and takes their sum. The gates
    ``σ(a_i)`` are sigmoids, not a softmax, since a mean cannot count (Zhang et al. 2018, "Learning to count objects").
    ``q = tanh(Q [w_1 … w_L])``, the words side by side, where the source has a GRU: enough for sentences of seven forms, and
    learnt sooner.
    """

    def __init__(self, image: tuple[int, int, int], length: int, channels: list[int], word: int, hidden: int) -> None:
        super().__init__()
        depth, height, width = image
        self._image, self._length = image, length
        self.regions = nn.Sequential()
        for size in channels:
            self.regions.append(
                nn.Sequential(
                    nn.Conv2d(depth, size, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()
                )
            )
            depth, height, width = size, (height + 1) // 2, (width + 1) // 2
        self._rows = (height * width, depth)
        self.flat_latents = {"regions": FlatLatent(depth, beside=length)}
        place = nn.Embedding(height * width, hidden)
        nn.init.normal_(place.weight, std=0.1)  # beside the regions, not above them
        asked = nn.Linear(hidden, hidden)
        # A factor that starts near 0 hides what it multiplies, and learning waits: this makes A q about 2.
        nn.init.normal_(asked.weight, std=3.5 * hidden**-0.5)
        self.answer = nn.ModuleDict(
            {
                "words": nn.Embedding(_VOCABULARY, word, padding_idx=0),
                "question": nn.Linear(length * word, hidden),
                "region": nn.Linear(depth, hidden),
                "asked": asked,
                "place": place,
                "mix": nn.Linear(hidden, hidden),
                "gate": nn.Linear(hidden, 1),
                "out": nn.Linear(2 * hidden, hidden),
            }
        )
        self.width = hidden

    def stages(self) -> list[Stage]:
        """``regions``: picture and question to regions and question; ``answer``: those to features."""
        return [("regions", self._regions), ("answer", self._answer)]

    def _regions(self, x: Tensor) -> Tensor:
        """``[B, C·H·W + L]`` in [0, 1] → ``[B, R·D + L]``, the words as whole numbers."""
        pixels, words = x.split([x.shape[1] - self._length, self._length], 1)
        maps = self.regions(pixels.unflatten(1, self._image))
        return torch.cat([maps.flatten(2).transpose(1, 2).flatten(1), (words * 255).round().to(maps.dtype)], 1)

    def _answer(self, h: Tensor) -> Tensor:
        """``[B, R·D + L]`` → ``[B, width]``."""
        rows, depth = self._rows
        regions, words = h.split([rows * depth, self._length], 1)
        part = self.answer
        question = torch.tanh(part["question"](part["words"](words.round().long()).flatten(1)))
        seen = part["region"](regions.unflatten(1, (rows, depth))) + part["place"].weight
        # A product, as in the source's joint embedding: which part of a region matters depends on the question.
        mixed = relu(part["mix"](relu(seen * part["asked"](question)[:, None])))
        found = (torch.sigmoid(part["gate"](mixed)) * mixed).sum(1)
        features: Tensor = relu(part["out"](torch.cat([found, question], 1)))
        return features


@dataclass
class VisualQuestion(ModelSpec):
    """Answers questions about pictures: convolutions make regions, the question weighs them, their sum answers.

    For streams whose samples are a picture and a question (``shape-questions``). Cut behind ``regions``, its latents are
    the regions, with the question beside them; REMIND compresses the regions and keeps the question as it is.
    """

    parts: ClassVar[tuple[str, ...]] = ("image", "question")

    channels: list[int] = knob([16, 32, 64], "channels of each convolution; every one halves the picture", min_length=1)
    word: int = knob(32, "size of a word's embedding", ge=1)
    hidden: int = knob(64, "size of the question's state and of the features", ge=1)
    head: HeadKind = knob("auto", HEAD_DOC)

    def build(self, stream: Stream) -> Classifier:
        """A fresh network. Raises :class:`ConfigError` for another kind of stream, widths below 1, or an impossible head."""
        image, question = (stream.layout.get(part, ()) for part in self.parts)
        if len(image) != 3 or len(question) != 1:
            raise ConfigError(
                f"model 'visual-question' takes a picture and a question, which samples of stream '{stream.name}' are not; "
                "use scenario shape-questions, or another model"
            )
        if min(self.channels) < 1:
            raise ConfigError(f"model.channels = {self.channels}: every entry must be at least 1")
        backbone = VisualQuestionBackbone(
            (image[0], image[1], image[2]), question[0], self.channels, self.word, self.hidden
        )
        return classifier(backbone, backbone.width, stream, self.head)
