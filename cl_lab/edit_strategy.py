"""An editor in a comparison: it learns a stream of edits by laying patches, and is scored like any strategy."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lab import knobs
from cl_lab.adapters import adapted_layers
from cl_lab.causal_lm import CausalBackbone
from cl_lab.editable import EditableModel
from cl_lab.errors import ConfigError, EditError
from cl_lab.facts import Edit
from cl_lab.knobs import knob
from cl_lab.models import Classifier
from cl_lab.patches import Patch, remade
from cl_lab.protocols import Editor, Learner, Strategy
from cl_lab.records import OBJECTIVES, PAD, Batch, Experience, Objective, State, Stream, TensorData

log = logging.getLogger("cl_lab")


@dataclass
class EditorStrategy(Strategy):
    """Makes the edits of each experience with an editor and answers with the patched model; trains nothing itself.

    The patches lie on a copy of the learner's model, which stays as it is. Test rows are answered through
    :class:`~cl_lab.editable.EditableModel`, told which tokens of a row are its prompt's own, so that whoever answers for
    some prompts only decides by these and never by the answer, whether it is given or being written; what puts facts before
    prompts does so here, too. An editor that does decide by the answer (``Editor.routes_once`` is false) reads the answers
    that stand behind one prompt one at a time, each as if it were the only one. The copy is in the precision the weights are
    held in, whatever ``engine.precision`` says. An edit that its editor refuses is left out with a warning and counted.

    State: the patches, and which edits they made; a run that goes on lays them on the model again, in their order.
    """

    needs_boundaries: ClassVar[bool] = True
    whole_parameters: ClassVar[bool] = True
    trained_by_steps: ClassVar[bool] = False
    # Nothing is learnt but edits, which only a stream of texts has; prepare says so in better words than a chain.
    objectives: ClassVar[frozenset[Objective]] = OBJECTIVES

    edits_per_patch: int | None = knob(1, "edits that are made at once; null: all of an experience", ge=1)

    _name: str = field(default="editor", init=False, repr=False)
    _editor: Editor = field(default_factory=Editor, init=False, repr=False)
    _patches: list[Patch] = field(default_factory=list, init=False, repr=False)
    _made: list[list[int]] = field(default_factory=list, init=False, repr=False)  # experience and place of each edit
    _refused: int = field(default=0, init=False, repr=False)
    # Not state:
    _stream: Stream | None = field(default=None, init=False, repr=False)
    _patched: _Patched | None = field(default=None, init=False, repr=False)

    @classmethod
    def wrap(cls, editor: Editor, name: str, settings: Mapping[str, Any], path: str) -> EditorStrategy:
        """``editor``, called ``name``, with the knobs of this class in ``settings``; ``path`` is where they stood."""
        made: EditorStrategy = knobs.build(cls, settings, path)
        made._editor, made._name = editor, name
        return made

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        if not all(e.edits for e in stream.experiences):
            raise ConfigError(
                f"strategy '{self._name}': is an editor, but stream '{stream.name}' has no edits; use scenario edit-stream, "
                "or a strategy (cl-lab list strategies)"
            )
        if not (isinstance(model, Classifier) and isinstance(model.backbone, CausalBackbone)) or not stream.tokenizer:
            raise ConfigError(
                f"strategy '{self._name}': edits language models, not {type(model).__name__}; use model causal-lm"
            )
        if model.frozen is not None or model.backbone.conditional:
            what = (
                "model.frozen" if model.frozen is not None else "the strategy that puts soft prompts before each text"
            )
            raise ConfigError(f"strategy '{self._name}': reads texts through all layers; leave out {what}")
        self._stream = stream
        return model

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        """Nothing."""
        return None

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        model = self._model(learner).editable
        # A resumed run begins with nothing in mind; had this one kept what it read, its batches would be rounded otherwise.
        model.memo.clear()
        edits, size = experience.edits, self.edits_per_patch or len(experience.edits)
        batches = [range(first, min(first + size, len(edits))) for first in range(0, len(edits), size)]
        while batches:
            places, *batches = batches
            try:
                patch = self._editor.propose(model, [edits[i] for i in places], self._earlier())
            except EditError as error:
                if len(places) > 1:  # a bad edit takes no other with it
                    log.warning("%s; the %d edits of its batch are tried one by one", error, len(places))
                    batches = [*(range(i, i + 1) for i in places), *batches]
                else:
                    log.warning("%s; left out", error)
                    self._refused += 1
                continue
            patch.apply(model)
            self._patches.append(patch)
            self._made += [[experience.index, i] for i in places]
        self._model(learner).forget_prompts()

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        return self._model(learner).logits(batch)

    def measures(self) -> dict[str, float]:
        size = sum(p.nbytes for p in self._patches)
        return {
            "edits": len(self._made),
            "patches": len(self._patches),
            "refused": self._refused,
            "bytes_per_edit": size / max(len(self._made), 1),
        }

    def state_dict(self) -> State:
        return {
            "made": [list(place) for place in self._made],
            "refused": self._refused,
            "patches": {
                f"{i:06d}": {
                    # As text: whatever a patch has settled comes back as it was.
                    "document": json.dumps(p.document()),
                    "tensors": {name: t.detach().cpu() for name, t in p.tensors().items()},
                }
                for i, p in enumerate(self._patches)
            },
        }

    def load_state_dict(self, state: State) -> None:
        made, refused, patches = state["made"], state["refused"], state["patches"]
        assert isinstance(made, list)
        assert isinstance(refused, int)
        assert isinstance(patches, dict)
        self._made, self._refused, self._patched = [list(place) for place in made], refused, None
        self._patches = [_patch(patches[name]) for name in sorted(patches)]

    def _earlier(self) -> list[Edit]:
        assert self._stream is not None
        return [self._stream.experiences[e].edits[i] for e, i in self._made]

    def _model(self, learner: Learner) -> _Patched:
        if self._patched is None:
            self._patched = _Patched(learner.replica(), learner.stream, together=self._editor.routes_once)
            for patch in self._patches:
                patch.apply(self._patched.editable)
        return self._patched


def _patch(state: Any) -> Patch:
    return remade(json.loads(state["document"]), state["tensors"])


class _Causal(nn.Module):
    """A classifier's decoder and head, in the form in which Transformers' models hold theirs."""

    def __init__(self, decoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.config: Any = decoder.config
        self._prefix: str = decoder.base_model_prefix
        self.add_module(self._prefix, decoder)
        self.lm_head = head

    @property
    def base_model(self) -> nn.Module:
        """The decoder."""
        return self.get_submodule(self._prefix)

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.lm_head


class _Patched:
    """A copy of the model with patches on it, which answers rows of the stream.

    ``together``: several answers behind one prompt are read in one pass.
    """

    def __init__(self, model: Any, stream: Stream, *, together: bool = True) -> None:
        for path in adapted_layers(
            model
        ):  # nobody trains them, so they add nothing; editors look for the layers themselves
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_submodule(path).base_layer)
        self._decoder, self._head, self._layered = model.backbone.model, model.head, model.backbone.layered
        self._together = together
        self._prompt, self._answer = (size for (size,) in stream.layout.values())
        assert stream.tokenizer is not None
        self.editable = EditableModel(_Causal(self._decoder, self._head.linear), stream.tokenizer, "causal-lm")
        self._read: dict[tuple[int, ...], list[int]] = {}

    def forget_prompts(self) -> None:
        """Patches have come: they may put something else before a prompt."""
        self._read.clear()

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``[B, m·A', vocabulary]`` at the places of the answers of ``batch``, as the causal-lm's are."""
        prompt, x, texts = self._told(batch.x)
        backbone = CausalBackbone(self._decoder, prompt, self._answer, layered=self._layered)
        head, answers = x.tensor_split((prompt,), 1)
        # A decoder that is run whole has each answer in a row of its own: hooks that were told of the prompts' rows would
        # take all that stands there for what was asked.
        if answers.shape[1] == self._answer or (self._together and backbone.layered):
            return self._read_at_once(backbone, prompt, x, texts, batch.t)
        each = [
            self._read_at_once(backbone, prompt, torch.cat([head, one], 1), texts, batch.t)
            for one in answers.split(self._answer, 1)
        ]
        longest = max(said.shape[1] for said in each)  # a shorter answer has nothing to say at the places behind it
        return torch.cat([F.pad(said, (0, 0, 0, longest - said.shape[1])) for said in each], 1)

    def _told(self, x: Tensor) -> tuple[int, Tensor, list[list[int]]]:
        """How many columns prompts have, rows with what the patches put before these, and the prompts' tokens."""
        prompt = self._prompt
        texts = [row[row >= 0].tolist() for row in x[:, :prompt].cpu()]
        if any(patch.rewrites for patch in self.editable.patches):
            texts = [self._reread(tokens) for tokens in texts]
            prompt = max(map(len, texts))
            told = torch.full((len(x), prompt), PAD, dtype=x.dtype)
            for row, tokens in zip(told, texts, strict=True):
                row[prompt - len(tokens) :] = torch.tensor(tokens, dtype=x.dtype)
            x = torch.cat([told.to(x.device), x[:, self._prompt :]], 1)
        return prompt, x, texts

    def _read_at_once(
        self, backbone: CausalBackbone, prompt: int, x: Tensor, texts: Sequence[Sequence[int]], t: Tensor
    ) -> Tensor:
        rows = self.editable.rows([(tokens, []) for tokens in texts])
        place = torch.arange(x.shape[1]) - (prompt - rows.prompt)[:, None]  # in its text, of each column of each row
        asked = (place >= rows.begin[:, None]) & (place < rows.until[:, None])
        columns = backbone.columns(x.cpu())
        read = x[:, columns.to(x.device)]
        with self.editable.prompts(asked[:, columns], read >= 0, read):
            logits: Tensor = self._head(backbone(x), t)
        return logits

    def _reread(self, tokens: list[int]) -> list[int]:
        """A prompt's tokens with what the patches put before it."""
        key = tuple(tokens)
        if key not in self._read:
            model = self.editable
            rows = model.rows([(tokens, [])])
            own = tokens[int(rows.begin) : int(rows.until)]
            text, chat = model.tokenizer.decode(own), model.tokenizer.can_chat
            if not chat or model.encode_prompt(text, chat=True) != tokens:
                text, chat = model.tokenizer.decode(tokens), False
            # Before a text that is only read there stands nothing that could be asked about.
            read = model.read_prompt(text, chat=chat, room=self._answer) if text.strip() else []
            # Nothing was put there: as it was, also where tokens are not what their text would give.
            self._read[key] = tokens if read in ([], model.encode_prompt(text, chat=chat)) else read
        return self._read[key]
