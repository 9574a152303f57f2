"""Strategies compose: a chain calls each of its links in order, so no file exists for a pair of methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from cl_lab.adapters import LowRank, low_rank
from cl_lab.errors import ConfigError
from cl_lab.protocols import Learner, Strategy
from cl_lab.records import Batch, Experience, State, Stream, TensorData

_HOOKS = (
    "prepare",
    "prepared",
    "before_experience",
    "training_set",
    "budget",
    "mix",
    "learning_rate",
    "adjust_loss",
    "observe_outputs",
    "adjust_gradients",
    "after_step",
    "after_experience",
    "encoding",
    "encode",
    "predict",
    "other_answers",
    "adapters",
    "penalty",
    "measures",
)

_ALONE = {
    "training_set": "choose the training set",
    "learning_rate": "set the learning rate",
    "encode": "encode the samples",
    "predict": "decide how the model answers",
    "adapters": "decide which adapters answer",
}


class Chain:
    """A list of strategies as one; hooks that no link overrides cost nothing.

    Raises :class:`ConfigError` where two links both choose the training set (or another thing that only one can), or
    where a link needs boundaries or task labels that the stream hides, or does not learn what the stream asks for.
    """

    def __init__(self, links: Sequence[Strategy], names: Sequence[str], stream: Stream) -> None:
        self.links, self.names = list(links), list(names)
        self._active: dict[str, list[Any]] = {
            hook: [link for link in links if getattr(type(link), hook) is not getattr(Strategy, hook)]
            for hook in _HOOKS
        }
        for hook, what in _ALONE.items():
            choosers = [n for n, s in zip(names, links, strict=True) if any(s is a for a in self._active[hook])]
            if len(choosers) > 1:
                raise ConfigError(f"strategy chain: {' and '.join(choosers)} both {what}; keep one of them")
        replacing = [n for n, s in zip(names, links, strict=True) if s.replaces_loss]
        if len(replacing) > 1:
            raise ConfigError(
                f"strategy chain: {' and '.join(replacing)} both put a loss of their own in place of the training loss; "
                "keep one of them"
            )
        # What replaces the training loss takes it away, and finds it whole only where none has scaled it before.
        self._active["adjust_loss"].sort(key=lambda link: not link.replaces_loss)
        self.told = stream.boundaries
        """Whether the links hear where an experience begins and ends."""
        for name, link in zip(names, links, strict=True):
            if link.learns_when_asked and not stream.boundaries:
                if len(links) > 1:
                    raise ConfigError(
                        f"strategy chain: '{name}' learns when it is scored, the others while samples pass, where a stream "
                        "hides boundaries; leave the others out, or set scenario.boundaries=true"
                    )
                self.told = True
            elif link.needs_boundaries and not stream.boundaries:
                raise ConfigError(
                    f"strategy '{name}' needs to know where an experience ends, but this stream hides it; "
                    "set scenario.boundaries=true or take a strategy that does not (cl-lab list strategies)"
                )
            if link.task_conditioned and not stream.tells_task:
                raise ConfigError(
                    f"strategy '{name}' needs the task label of every sample, but stream '{stream.name}' tells none; "
                    "set scenario.incremental=task or take a strategy that does not"
                )
            if stream.objective not in link.objectives:
                like = link.instead.get(stream.objective)
                fix = f"take {like}, its like there" if like else "take a strategy that learns one, for example naive"
                raise ConfigError(
                    f"strategy '{name}' learns {' or '.join(sorted(link.objectives))} only, but stream '{stream.name}' is "
                    f"a {stream.objective}; {fix}"
                )
        renewing = next((n for n, s in zip(names, links, strict=True) if s.renews_parameters), None)
        remembering = next((n for n, s in zip(names, links, strict=True) if s.remembers_parameters), None)
        if renewing is not None and remembering is not None:
            raise ConfigError(
                f"strategy chain: {renewing} begins adapters anew with each experience, so what {remembering} remembers of "
                "the old ones says nothing about them; keep one of the two"
            )

    @property
    def reference(self) -> bool:
        """Whether any link sees more than a continual learner may."""
        return any(link.reference for link in self.links)

    @property
    def gathers(self) -> bool:
        """Whether a link brings samples of several experiences together to train on."""
        return any(link.gathers for link in self.links)

    @property
    def learns_when_asked(self) -> bool:
        """Whether all links learn from what they keep alone, however often."""
        return all(link.learns_when_asked for link in self.links)

    @property
    def uses_features(self) -> bool:
        """Whether any link wants the features of the training pass."""
        return any(link.uses_features for link in self.links)

    @property
    def trained_by_steps(self) -> bool:
        """Whether the trainer's steps are what changes the model's weights, for any link."""
        return any(link.trained_by_steps for link in self.links)

    @property
    def whole_parameters(self) -> list[str]:
        """Names of the links that cannot run where parameters are sharded."""
        return [n for n, link in zip(self.names, self.links, strict=True) if link.whole_parameters]

    def overrides(self, hook: str) -> bool:
        """Whether any link does something at ``hook``."""
        return bool(self._active[hook])

    def prepare(self, model: nn.Module, stream: Stream) -> nn.Module:
        """See :class:`~cl_lab.protocols.Strategy`, as for every hook below."""
        for link in self._active["prepare"]:
            model = link.prepare(model, stream)
        for link in self._active["prepared"]:
            link.prepared(model)
        return model

    def before_experience(self, experience: Experience, learner: Learner) -> None:
        for link in self._active["before_experience"]:
            link.before_experience(experience, learner)

    def training_set(self, experience: Experience, learner: Learner) -> TensorData | None:
        for link in self._active["training_set"]:
            chosen: TensorData | None = link.training_set(experience, learner)
            return chosen
        return experience.train

    def budget(self, experience: Experience, learner: Learner) -> int:
        return max((link.budget(experience, learner) for link in self._active["budget"]), default=1)

    def mix(self, batch: Batch, learner: Learner) -> Batch | None:
        mixed: Batch | None = batch
        for link in self._active["mix"]:
            if mixed is None:
                break
            mixed = link.mix(mixed, learner)
        return mixed

    def learning_rate(self, batch: Batch, learner: Learner) -> float | None:
        for link in self._active["learning_rate"]:
            lr: float | None = link.learning_rate(batch, learner)
            return lr
        return None

    def adjust_loss(self, loss: Tensor, *, batch: Batch, outputs: Tensor, learner: Learner) -> Tensor:
        for link in self._active["adjust_loss"]:
            loss = link.adjust_loss(loss, batch=batch, outputs=outputs, learner=learner)
        return loss

    def observe_outputs(self, batch: Batch, outputs: Tensor, learner: Learner) -> None:
        for link in self._active["observe_outputs"]:
            link.observe_outputs(batch, outputs, learner)

    def adjust_gradients(self, learner: Learner) -> None:
        for link in self._active["adjust_gradients"]:
            link.adjust_gradients(learner)

    def after_step(self, learner: Learner) -> None:
        for link in self._active["after_step"]:
            link.after_step(learner)

    def after_experience(self, experience: Experience, learner: Learner) -> None:
        for link in self._active["after_experience"]:
            link.after_experience(experience, learner)

    def encoding(self) -> Hashable:
        for link in self._active["encode"]:
            name: Hashable = link.encoding()
            return name
        return None

    def encode(self, data: TensorData, learner: Learner) -> TensorData:
        for link in self._active["encode"]:
            data = link.encode(data, learner)
        return data

    def predict(self, batch: Batch, learner: Learner) -> Tensor:
        for link in self._active["predict"]:
            scores: Tensor = link.predict(batch, learner)
            return scores
        return learner.forward(batch)

    def other_answers(self, learner: Learner) -> dict[str, Callable[[Batch], Tensor]]:
        """By ``strategy/name``."""
        return {
            f"{name}/{key}": answer
            for name, link in zip(self.names, self.links, strict=True)
            for key, answer in link.other_answers(learner).items()
        }

    def adapters(self, learner: Learner) -> dict[str, LowRank]:
        """Raises :class:`ConfigError` where a link's answers are not those of any adapters."""
        for name, link in zip(self.names, self.links, strict=True):
            if any(link is a for a in self._active["predict"]) and all(link is not a for a in self._active["adapters"]):
                raise ConfigError(
                    f"strategy '{name}' answers in place of the model, so no adapter gives its answers; export a run of a "
                    "strategy whose model answers itself, for example naive"
                )
        for link in self._active["adapters"]:
            made: dict[str, LowRank] = link.adapters(learner)
            return made
        return low_rank(learner.replica())

    def penalty(self, learner: Learner) -> float:
        return float(sum(link.penalty(learner) for link in self._active["penalty"]))

    def measures(self) -> dict[str, float]:
        named = [
            (n, s) for n, s in zip(self.names, self.links, strict=True) if any(s is a for a in self._active["measures"])
        ]
        return {f"{name}/{key}": value for name, link in named for key, value in link.measures().items()}

    def state_dict(self) -> State:
        return {
            f"{i}-{name}": link.state_dict() for i, (name, link) in enumerate(zip(self.names, self.links, strict=True))
        }

    def load_state_dict(self, state: State) -> None:
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            own = state[f"{i}-{name}"]
            assert isinstance(own, dict)
            link.load_state_dict(own)
