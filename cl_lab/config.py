"""One YAML file per experiment: read by OmegaConf, validated strictly by pydantic.

A misspelt key, a wrong type or a value out of range is one line with the path, the value and the nearest name. Knobs of
plug-ins are validated when the plug-in is created (:func:`cl_lab.registry.create`), against the same rules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cl_lab.errors import ConfigError, nearest
from cl_lab.knobs import explain

_PLUGIN_KEYS = ("scenario", "model", "strategy")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PluginConfig(BaseModel):
    """A plug-in's registered name (or ``file.py:Class``) and its knobs; a bare name is short for ``{name: …}``."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def knobs(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class StrategyConfig(PluginConfig):
    """A strategy, as :class:`PluginConfig`, or a chain of them under ``chain``; ``label`` names it in reports.

    ``training`` holds settings of its own in place of the run's (a method's tuned learning rate, say).
    """

    label: str | None = None
    training: dict[str, Any] | None = None
    chain: list[PluginConfig] | None = None

    @model_validator(mode="before")
    @classmethod
    def _chain(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, list):
            if not value:
                raise ValueError("an empty chain; name at least one strategy, or write 'naive'")
            value = {"chain": value}
        if isinstance(value, dict) and value.get("chain"):
            links = value["chain"] if isinstance(value["chain"], list) else []
            parts = [v.get("name") if isinstance(v, dict) else v for v in links]
            return {**value, "name": "+".join(map(str, parts)) or "chain"}
        return value

    @property
    def links(self) -> list[PluginConfig]:
        """The strategies of the chain, in order (one of them where there is no chain)."""
        return self.chain or [PluginConfig(name=self.name, **self.knobs)]


_Decay = Annotated[float, Field(ge=0, lt=1)]
_Share = Annotated[float, Field(ge=0, le=1)]


_FIRST_KEYS = [
    "epochs",
    "iterations",
    "batch_size",
    "lr",
    "optimizer",
    "momentum",
    "betas",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "milestones",
    "decay",
    "augmentation",
]


class TrainingConfig(_Strict):
    """How each experience is learnt."""

    epochs: int = Field(1, ge=1, description="passes over each experience's training set")
    iterations: int | None = Field(None, ge=1, description="optimiser steps per experience, instead of epochs")
    batch_size: int = Field(
        64, ge=1, description="samples of the current experience per optimiser step, over all ranks"
    )
    lr: float = Field(0.05, gt=0, description="learning rate")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="optimiser")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), description="moment decay rates of adam and adamw")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    optimizer_state: Literal["fresh", "kept"] = Field(
        "fresh", description="start each experience with a new optimiser, or keep its moments across experiences"
    )
    schedule: Literal["constant", "cosine", "linear", "step"] = Field(
        "constant", description="learning-rate schedule within each experience"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up at the start of each experience")
    milestones: list[_Share] = Field(
        default_factory=lambda: [0.5, 0.75],
        description="where 'step' decays, as fractions of the experience with its warm-up",
    )
    decay: float = Field(0.1, gt=0, le=1, description="factor of 'step' at each milestone")
    clip_norm: float | None = Field(None, gt=0, description="clip the gradient's global L2 norm to this")
    accumulate: int = Field(1, ge=1, description="split each batch into this many pieces to save memory")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each training set held out for early stopping (Fisher and memories filled after an "
        "experience still see it, memories filled as samples pass do not)",
    )
    patience: int | None = Field(
        None, ge=1, description="stop an experience after this many epochs without a better validation accuracy"
    )
    augmentation: str = Field(
        "none",
        description="'none', 'crop-flip' (4-pixel padding), or 'file.py:function' applied to each sample by workers",
    )
    workers: int = Field(0, ge=0, description="worker processes for a 'file.py:function' augmentation")
    first: dict[str, Any] | None = Field(
        None,
        description="settings of the first experience (a base session) in place of these: "
        "epochs, iterations, batch_size, lr, optimizer, momentum, betas, weight_decay, schedule, warmup_steps, "
        "milestones, decay, augmentation",
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.patience is not None and self.validation == 0:
            raise ValueError("patience needs a validation split; set training.validation, for example to 0.1")
        if self.patience is not None and self.iterations is not None:
            raise ValueError("patience counts epochs; give training.epochs instead of training.iterations")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} is larger than batch_size={self.batch_size}")
        if self.first is not None:
            if self.optimizer_state == "kept":
                raise ValueError("first starts another optimiser; set training.optimizer_state=fresh or leave it out")
            for key in self.first:
                if key not in _FIRST_KEYS:
                    near = nearest(key, _FIRST_KEYS)
                    raise ValueError(
                        f"first.{key}: unknown key{near}; the first experience may differ in {_FIRST_KEYS}"
                    )
            self.at(0)
        return self

    def at(self, experience: int) -> TrainingConfig:
        """The settings of one experience. Raises :class:`ValueError` where those of the first are not valid."""
        if self.first is None:
            return self
        others = self.model_copy(update={"first": None})
        return others if experience > 0 else others.changed(self.first, "first")

    def changed(self, settings: dict[str, Any], place: str) -> TrainingConfig:
        """These settings with others in their place; epochs take the place of iterations.

        Raises :class:`ValueError` with one line that begins with ``place`` for a setting that is unknown or not valid.
        """
        merged = self.model_dump()
        if "epochs" in settings and "iterations" not in settings:
            merged["iterations"] = None
        try:
            return TrainingConfig(**{**merged, **settings})
        except ValidationError as error:
            raise ValueError(f"{place}.{explain(error, '', list(TrainingConfig.model_fields))}") from None


class EvaluationConfig(_Strict):
    """When and how test sets are scored."""

    batch_size: int = Field(2048, ge=1, description="samples per forward pass of an evaluation")
    every_steps: int | None = Field(
        None, ge=1, description="also score every test set seen so far each n steps (anytime accuracy, stability gap)"
    )
    drift: bool | Literal["ends"] = Field(
        False,
        description="of language models, before the first experience and after each (ends: after the last alone): "
        "perplexity of plain text and questions of general knowledge",
    )
    probe_text: str | None = Field(
        None, min_length=1, description="text file whose paragraphs the perplexity is measured on, in place of ours"
    )

    @model_validator(mode="after")
    def _read(self) -> EvaluationConfig:
        if self.probe_text is not None and not self.drift:
            raise ValueError("probe_text is what drift reads; set evaluation.drift=true, or leave it out")
        return self


class EngineConfig(_Strict):
    """What the training loop runs on."""

    kind: Literal["auto", "torch", "deepspeed"] = Field(
        "auto", description="torch (DDP when there are several processes) or deepspeed; auto: deepspeed if zero > 0"
    )
    processes: int = Field(1, ge=1, description="ranks started on this machine")
    zero: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of forward and backward")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per process; default cores // processes, or OMP_NUM_THREADS if fewer"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.kind == "torch" and self.zero > 0:
            raise ValueError(f"zero={self.zero} needs DeepSpeed; set engine.kind=deepspeed or engine.zero=0")
        if self.kind == "deepspeed" and self.zero == 0 and self.precision == "bf16":
            raise ValueError(
                "DeepSpeed keeps fp32 copies of bf16 weights from ZeRO 1 on; set engine.zero=1 or kind=torch"
            )
        return self

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs the steps."""
        return self.kind == "deepspeed" or self.zero > 0


class CheckpointConfig(_Strict):
    """How a run survives."""

    enabled: bool = Field(True, description="save after each experience and every so many steps")
    every_steps: int | None = Field(1000, ge=1, description="also save every n steps inside an experience")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints to keep")
    experiences: bool = Field(
        False, description="keep the weights from before training and after each experience, for cl-lab diagnose"
    )
    weights_at: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="with experiences=true: keep the weights so many steps into each experience, too"
    )

    @model_validator(mode="after")
    def _kept(self) -> CheckpointConfig:
        if self.weights_at and not self.experiences:
            raise ValueError(
                f"weights_at={self.weights_at} is read with experiences=true only; set it, or leave it out"
            )
        return self


class TrackingConfig(_Strict):
    """Where MLflow stores runs."""

    uri: str | None = Field("sqlite:///mlruns.db", description="MLflow tracking URI; null switches tracking off")
    experiment: str = Field("cl-lab", min_length=1, description="MLflow experiment")


class RunConfig(_Strict):
    """One experiment; ``strategies`` and ``seeds`` are what ``cl-lab compare`` crosses."""

    scenario: PluginConfig = Field(description="the stream")
    model: PluginConfig = Field(default_factory=lambda: PluginConfig(name="mlp"), description="the model")
    strategy: StrategyConfig | None = Field(None, description="the strategy, or a list of them: a chain")
    strategies: list[StrategyConfig] | None = Field(None, min_length=1, description="what compare compares")
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())
    seed: int = Field(0, ge=0, description="seed of a single run")
    seeds: list[int] | None = Field(None, min_length=1, description="seeds of a comparison")
    out: str | None = Field(None, min_length=1, description="output folder; default runs/<file name>")

    @model_validator(mode="after")
    def _own_training(self) -> RunConfig:
        for i, strategy in enumerate(self.strategies or []):
            self.of(strategy, f"strategies.{i}.training")
        if self.strategy is not None:
            self.of(self.strategy, "strategy.training")
        return self

    def of(self, strategy: StrategyConfig, place: str = "strategy.training") -> TrainingConfig:
        """How ``strategy`` is trained: its own settings before the run's. Raises :class:`ValueError` for invalid ones."""
        return self.training if strategy.training is None else self.training.changed(strategy.training, place)

    def settled(self) -> RunConfig:
        """The same run with the strategy's own training settings as the run's."""
        if self.strategy is None or self.strategy.training is None:
            return self
        bare = self.strategy.model_copy(update={"training": None})
        return self.model_copy(update={"training": self.of(self.strategy), "strategy": bare})

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None:
            if len(set(value)) != len(value):
                raise ValueError("a seed stands twice; each gives the same run")
            if min(value) < 0:
                raise ValueError("seeds must be 0 or greater")
        return value


def parse(document: Any, source: str) -> RunConfig:
    """Validate a plain document; raises :class:`ConfigError` with one line that names ``source``."""
    if not isinstance(document, dict):
        raise ConfigError(
            f"{source}: must hold a mapping (scenario, model, strategy, …), got {type(document).__name__}"
        )
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{source}: {explain(error, '', _keys_at(first['loc'][:-1]))}") from None


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file with dotted overrides (``training.epochs=2``) applied.

    Raises :class:`ConfigError` for a missing or malformed file, an override that is not ``key=value``, a failed
    interpolation, and everything :func:`parse` refuses.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if path.is_dir():
        raise ConfigError(f"configuration file '{path}' is a folder; give a .yaml file in it")
    if not path.is_file():
        raise ConfigError(f"configuration file '{path}' does not exist; shipped examples are in configs/")
    try:
        base: Any = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key or key.startswith("-"):
                raise ConfigError(f"override '{override}': must be key=value, for example training.epochs=2")
            if not OmegaConf.is_dict(base):
                break  # parse says what is wrong with the file
            _expand(base, key)
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
            # A plug-in given anew keeps nothing of the one it replaces; a section keeps what is not mentioned.
            OmegaConf.update(base, key, parsed["value"], merge=key not in _PLUGIN_KEYS)
        document = OmegaConf.to_container(base, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, ValueError, AssertionError):  # a step into a list by name, or into a value
        raise ConfigError(
            f"override '{override}': '{key}' leads nowhere in {path}; count into lists from 0: strategies.1.strength=5"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': not a valid YAML value: {error}") from None
    return parse(document, str(path))


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it back gives an equal configuration."""
    import yaml

    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def label_of(strategy: StrategyConfig, others: Sequence[StrategyConfig] = ()) -> str:
    """How a strategy is called in reports: its label, or its name, told apart from namesakes by its knobs."""
    if strategy.label is not None:
        return strategy.label
    namesakes = [o for o in others if o.label is None and o.name == strategy.name]
    if len(namesakes) <= 1:
        return strategy.name
    knobs = [f"{k}={v}" for link in strategy.links for k, v in link.knobs.items()]
    return f"{strategy.name}({', '.join(knobs)})" if knobs else strategy.name


def _expand(base: Any, key: str) -> None:
    """Let ``strategy.strength=100`` work where the file says ``strategy: ewc``; also in a chain or a list of strategies."""
    from omegaconf import OmegaConf

    head, *rest = key.split(".")
    if head not in (*_PLUGIN_KEYS, "strategies"):
        return
    for n in range(len(rest)):
        if all(part.isdigit() or part == "chain" for part in rest[:n]):
            place = ".".join([head, *rest[:n]])
            if isinstance(name := OmegaConf.select(base, place), str):
                OmegaConf.update(base, place, {"name": name})


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place in the document, for suggesting the nearest."""
    model: Any = RunConfig
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
