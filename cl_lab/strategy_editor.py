"""A strategy as an editor: edits are learnt as one experience of a stream of patches, and what has changed is the patch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lab import checkpoint, knobs, registry, seeding
from cl_lab.adapters import LowRank, is_transposed
from cl_lab.causal_lm import CausalBackbone, VocabularyHead, add_adapters, linear_modules
from cl_lab.chain import Chain
from cl_lab.config import RunConfig, parse
from cl_lab.edit_strategy import EditorStrategy
from cl_lab.errors import ConfigError, EditError, TrainingError
from cl_lab.knobs import knob
from cl_lab.learner import EngineLearner
from cl_lab.models import Classifier
from cl_lab.patches import Delta, Patch, WeightPatch
from cl_lab.protocols import Editor, Strategy
from cl_lab.records import PAD, Experience, State, Stream, TensorData
from cl_lab.trainer import Trainer

if TYPE_CHECKING:
    from cl_lab.editable import EditableModel
    from cl_lab.facts import Edit

_VALUES = "json"  # the name under which a patch keeps what of a state is no tensor


@dataclass
class StrategyEditor(Editor):
    """Any strategy that trains a causal language model on texts, as an editor (strategy:ewc): a patch is one experience.

    The edits' prompts with their new answers and the answers' end, as ``edit-stream`` has them (and as a chat's turns, with
    ``chat``), are trained on by the loop that runs every strategy, ``steps`` steps of it, in a copy of the model; what has
    changed then is a :class:`~cl_lab.patches.WeightPatch`. The strategy's own knobs stand beside these.

    Only linear layers are trained, those that ``targets`` name; embeddings, norms, biases and the head are frozen. With
    ``adapt=lora`` one pair of low-rank factors for each of them goes on from patch to patch as it does from experience to
    experience; a patch is what they add now less what they added before, of twice the rank (once, for the first patch and
    where past adapters stand still). With ``adapt=full`` a patch is a dense difference of every target: 4 bytes a weight.

    An editor keeps nothing between edits: what the strategy knows (a Fisher, a memory of texts, slow weights), its random
    numbers, the adapters and the answers met so far lie in the patch, as its ``statistics``, and the next proposal goes on
    from the newest patch of the same strategy on the model. It begins at the model as it stands: where another patch was
    taken away or laid beside, the weights under the adapters are those that give what the model now answers. Taking the
    newest patch away takes what the strategy learnt of it along; of an older one newer patches remember what they knew. A
    rehearsal's memory holds the tokens of earlier prompts, so its patches do, and quadratic penalties on whole weights
    (``adapt=full``) hold two numbers for each. The optimiser starts anew with each patch.

    Refused are what sees more than the present experience (``joint``), what learns no texts, and what answers with something
    other than changed weights (``remind``, soft prompts; with ``adapt=full`` also ``ilora``). The number of patches to come
    is not known, so what a strategy shares out over all experiences it gives to the present one.

    Raises :class:`EditError` where a text is longer than ``max_prompt`` or ``max_answer``, where the loss is not finite, or
    neither small nor lower at the end.
    """

    argument: ClassVar[str | None] = "strategy"
    folds: ClassVar[bool] = True

    strategy: str = knob(
        doc="the strategy that learns the edits (cl-lab list strategies); its knobs stand beside these"
    )
    lr: float = knob(1e-3, "learning rate", gt=0, le=1000)
    steps: int = knob(30, "optimiser steps for each patch", ge=1)
    batch_size: int = knob(8, "texts of the patch in each step", ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = knob("adam", "optimiser; new for each patch")
    adapt: Literal["lora", "full"] = knob("lora", "train low-rank adapters of the targets, or their weights")
    targets: list[str] = knob(
        ["q_proj", "v_proj", "up_proj", "down_proj"],
        "linear layers that are trained: last parts of their paths, or whole paths with wildcards",
        min_length=1,
    )
    rank: int = knob(8, "rank of each adapter", ge=1)
    alpha: float = knob(16.0, "an adapter counts alpha/rank times", gt=0)
    chat: bool = knob(True, "also train the prompt as a chat's turn, where the model has a template")
    max_prompt: int = knob(128, "tokens of the longest prompt; for all patches of a model alike", ge=1)
    max_answer: int = knob(32, "tokens of the longest answer with its end, likewise", ge=1)
    seed: int = knob(0, "of the adapters' beginning, the order of texts and what the strategy draws", ge=0)

    _settings: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # the strategy's own knobs

    @classmethod
    def conformance_knobs(cls) -> dict[str, Any]:
        return {"lr": 0.02, "steps": 40}

    @classmethod
    def wrap(cls, own: Mapping[str, Any], settings: Mapping[str, Any], path: str) -> StrategyEditor:
        """The editor with knobs of this class in ``own`` and the strategy's in ``settings``; ``path`` is where they stood.

        Raises :class:`ConfigError` for knobs that are not valid and a strategy that cannot edit.
        """
        made: StrategyEditor = knobs.build(cls, own, path)
        made._settings = dict(settings)
        made._fresh(path)
        return made

    @property
    def name(self) -> str:
        """What its patches are called."""
        return f"strategy:{self.strategy}"

    def check(self, model: EditableModel) -> None:
        linear_modules(model.model, self.targets, "targets")

    def propose(self, model: EditableModel, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Patch:
        held, drawn = self._held(model), seeding.global_state()
        known = None if held is None else held["answers"]
        index = 0 if held is None else held["patches"]
        assert isinstance(index, int)
        stream = self._stream(model, edits, known, index)
        seeding.seed_everything(seeding.derive(self.seed, self.name, index))
        try:
            return self._learnt(model, stream, held)
        except TrainingError as error:
            raise EditError(
                f"{self.name}: '{edits[0].shown}': {re.split('[:;] ', str(error))[0]}; the model is as it was; lower the "
                "editor's lr"
            ) from error
        finally:
            seeding.restore_global_state(drawn)

    def _fresh(self, path: str = "editor") -> Strategy:
        """The strategy as it begins. Raises :class:`ConfigError` for one that cannot edit."""
        made = registry.create("strategies", {**self._settings, "name": self.strategy}, path)
        why = None
        if isinstance(made, EditorStrategy):
            why = f"is an editor already; use editor {self.strategy.removeprefix('editor:')}"
        elif "language" not in made.objectives:
            why = "learns no texts, which edits are; use naive, replay, ewc or another that does"
        elif made.reference:
            why = "sees more than one experience, but a patch knows its own edits alone; use naive, replay or ewc"
        elif type(made).predict is not Strategy.predict and (
            self.adapt == "full" or type(made).adapters is Strategy.adapters
        ):
            other = "; set adapt=lora" if type(made).adapters is not Strategy.adapters else "; use naive, replay or ewc"
            why = f"answers with something other than the weights it trains, which a patch cannot hold{other}"
        if why is not None:
            raise ConfigError(f"{path}.name = '{self.name}': strategy '{self.strategy}' {why}")
        strategy: Strategy = made
        return strategy

    # -- the stream of patches -----------------------------------------------------------------------------------------

    def _stream(self, model: EditableModel, edits: Sequence[Edit], known: Any, index: int) -> Stream:
        """A stream whose one experience is that of patch ``index``; ``known`` ``[n, max_answer]`` are the answers before."""
        pairs = [pair for edit in edits for pair in self._texts(model, edit)]
        numbers = {} if known is None else {tuple(row): i for i, row in enumerate(known.tolist())}
        x = torch.full((len(pairs), self.max_prompt + self.max_answer), PAD, dtype=torch.int32)
        y = torch.zeros(len(pairs), dtype=torch.int64)
        for i, (prompt, answer) in enumerate(pairs):
            x[i, self.max_prompt - len(prompt) : self.max_prompt] = torch.tensor(prompt, dtype=torch.int32)
            x[i, self.max_prompt : self.max_prompt + len(answer)] = torch.tensor(answer, dtype=torch.int32)
            y[i] = numbers.setdefault(tuple(x[i, self.max_prompt :].tolist()), len(numbers))
        data = TensorData(x, y, torch.full_like(y, index))
        experience = Experience(index, f"patch {index}", y.unique().tolist(), lambda: data, lambda: data, edits=edits)
        return Stream(
            name="patches",
            experiences=(experience,),
            input_shape=(x.shape[1],),
            n_classes=len(numbers),
            objective="language",
            layout={"prompt": (self.max_prompt,), "answer": (self.max_answer,)},
            answers=torch.tensor(list(numbers)),
            vocabulary=model.tokenizer.size,
            tokenizer=model.tokenizer,
        )

    def _texts(self, model: EditableModel, edit: Edit) -> list[tuple[list[int], list[int]]]:
        pairs = []
        for chat in (False, True)[: 1 + (self.chat and model.tokenizer.can_chat)]:
            tokens = model.encode_prompt(edit.prompt, chat=chat), model.encode_answer(edit.answer, chat=chat)
            for what, some, most in zip(("prompt", "answer"), tokens, (self.max_prompt, self.max_answer), strict=True):
                if len(some) > most:
                    raise EditError(
                        f"{self.name}: '{edit.shown}': its {what} takes {len(some)} tokens, max_{what} = {most}; shorten "
                        f"it, or begin anew with a higher max_{what}"
                    )
            pairs.append(tokens)
        return pairs

    # -- one experience ------------------------------------------------------------------------------------------------

    def _learnt(self, model: EditableModel, stream: Stream, held: State | None) -> WeightPatch:
        (experience,) = stream.experiences
        chain = Chain([self._fresh()], [self.strategy], stream)
        config = self._config(model)
        learner = EngineLearner(self._model(model, chain, stream), stream, config.training, config.engine, self.seed)
        try:
            before = self._restore(learner, chain, held)
            said = _answers(stream)[experience.train.y]

            def loss() -> float:
                found = learner.log_likelihoods(
                    experience.train, said, self.batch_size, lambda batch: chain.predict(batch, learner)
                )
                return float((-found / (said != PAD).sum(1)).mean())

            first = loss()
            trainer = Trainer(stream, learner, chain, config, self.seed)
            trainer.learn(experience)
            last = loss()
            if last >= max(first, 0.1):  # what was known before may get a little worse
                raise EditError(
                    f"{self.name}: '{experience.edits[0].shown}': the loss went from {first:.3g} to {last:.3g}; the model "
                    "is as it was; lower the editor's lr"
                )
            notes = {"steps": trainer.record.steps, "loss": last, "edits": len(experience.edits)}
            changes = self._changes(model, learner, chain, before)
            return WeightPatch(self.name, notes, changes, self._state(learner, chain, stream))
        finally:
            learner.close()

    def _config(self, model: EditableModel) -> RunConfig:
        return parse(
            {
                "scenario": "patches",
                "training": {
                    "iterations": self.steps,
                    "lr": self.lr,
                    "batch_size": self.batch_size,
                    "optimizer": self.optimizer,
                },
                "engine": {"kind": "torch", "device": "cuda" if model.device.type == "cuda" else "cpu"},
                "checkpoint": {"enabled": False},
                "tracking": {"uri": None},
            },
            self.name,
        )

    def _model(self, model: EditableModel, chain: Chain, stream: Stream) -> Any:
        """A classifier around a copy of the model, its targets ready to be trained, as the strategy wants it."""
        copied = model.copied()
        if self.adapt == "lora":
            add_adapters(copied, self.targets, rank=self.rank, alpha=self.alpha, place="targets")
        else:
            for path in linear_modules(copied, self.targets, "targets"):
                copied.get_submodule(path).weight.requires_grad_(True)
        backbone = CausalBackbone(copied.base_model, self.max_prompt, self.max_answer)
        head = VocabularyHead(copied.get_output_embeddings(), copied.config)
        built = chain.prepare(Classifier(backbone, head), stream)
        if backbone.conditional:
            raise ConfigError(
                f"{self.name}: puts soft prompts before each text, which is no change of weights; use another strategy "
                "(cl-lab list strategies)"
            )
        return built

    def _restore(self, learner: EngineLearner, chain: Chain, held: State | None) -> dict[str, LowRank]:
        """Go on from what a patch held; returns what the adapters add before they are trained, by path in the classifier."""
        if held is None:
            return chain.adapters(learner) if self.adapt == "lora" else {}
        state: Any = held["learner"]
        weights = state["weights"] if self.adapt == "lora" else learner.learnt()
        learner.load_state_dict({**state, "weights": dict(weights), "optimizer": None})
        own: Any = held["strategy"]
        chain.load_state_dict(own)
        if self.adapt == "full":
            return {}
        before = chain.adapters(learner)
        layers = dict(learner.model.named_modules())
        with torch.no_grad():
            for path, (a, b) in before.items():  # the model's weights have all of that on them already
                layer: Any = layers[path]
                weight, change = layer.base_layer.weight, b @ a
                weight -= (change.T if is_transposed(layer.base_layer) else change).to(weight)
        chain.load_state_dict(own)  # whoever made a copy of the model when asked for adapters made it too early
        return before

    # -- the patch -----------------------------------------------------------------------------------------------------

    def _changes(
        self, model: EditableModel, learner: EngineLearner, chain: Chain, before: Mapping[str, LowRank]
    ) -> dict[str, Delta]:
        """What has changed, by path in the model."""
        prefix = next(name for name, module in model.model.named_modules() if module is model.decoder)
        inside = "backbone.model."
        if self.adapt == "lora":
            after = chain.adapters(learner)
            made = {p: _difference(new, before.get(p)) for p, new in after.items()}
            return {f"{prefix}.{p.removeprefix(inside)}": change for p, change in made.items() if change is not None}
        changes = {}
        weights = dict(learner.model.named_parameters())
        for path in linear_modules(model.model, self.targets, "targets"):
            new, site = weights[inside + path.removeprefix(f"{prefix}.") + ".weight"].detach(), model.site(path)
            change = ((new.T if site.transposed else new).float() - site.weight.float()).cpu()
            if change.any():
                changes[path] = Delta(dense=change)
        return changes

    def _state(self, learner: EngineLearner, chain: Chain, stream: Stream) -> dict[str, Tensor]:
        """What the next patch goes on from, as tensors by name."""
        own = learner.state_dict()
        kept = ("frozen", "rng", *(["weights"] if self.adapt == "lora" else []))
        state: State = {
            "learner": {name: own[name] for name in kept},
            "strategy": chain.state_dict(),
            "answers": _answers(stream).to(torch.int32),
            "patches": stream.experiences[0].index + 1,
            "made_with": self._made_with(),
        }
        tensors, values = checkpoint.flatten(state)
        text = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
        return {name: t.detach().cpu().clone() for name, t in tensors.items()} | {_VALUES: text}

    def _made_with(self) -> dict[str, Any]:
        """The settings that a state depends on."""
        names = ("adapt", "targets", "rank", "alpha", "max_prompt", "max_answer")
        return {"knobs": json.loads(json.dumps({n: getattr(self, n) for n in names} | self._settings))}

    def _held(self, model: EditableModel) -> State | None:
        """What the newest patch of this strategy on ``model`` keeps. Raises :class:`ConfigError` for one made otherwise."""
        for patch in reversed(model.patches):
            if isinstance(patch, WeightPatch) and patch.editor == self.name:
                tensors = dict(patch.statistics)
                held = checkpoint.unflatten(tensors, json.loads(bytes(tensors.pop(_VALUES).tolist())))
                self._check(held)
                return held
        return None

    def _check(self, held: State) -> None:
        made: Any = held["made_with"]
        then, now = made["knobs"], self._made_with()["knobs"]
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                raise ConfigError(
                    f"{key} = {now.get(key)!r}: the newest patch of '{self.name}' on the model was made with "
                    f"{then.get(key)!r}, and what it keeps fits no other; keep that, or take its patches away"
                )


def _answers(stream: Stream) -> Tensor:
    assert stream.answers is not None
    return stream.answers


def _difference(new: LowRank, old: LowRank | None) -> Delta | None:
    """``new`` less ``old``, dense where its factors would be larger; ``None`` where that is nothing.

    What both begin with (adapters of the past) cancels.
    """
    if old is not None:
        n = min(len(new.a), len(old.a))
        same = (new.a[:n] == old.a[:n]).all(1) & (new.b[:, :n] == old.b[:, :n]).all(0)
        first = int(same.long().cumprod(0).sum())
        new, old = (LowRank(c.a[first:], c.b[:, first:]) for c in (new, old))
        if old.b.any():
            new = LowRank(torch.cat([new.a, old.a]), torch.cat([new.b, -old.b], 1))
    if not new.b.any():
        return None
    dense = new.b.shape[0] * new.a.shape[1]
    factors = Delta(a=new.a.contiguous(), b=new.b.contiguous())
    return factors if new.a.numel() + new.b.numel() < dense else Delta(dense=factors.value())
