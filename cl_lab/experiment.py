"""One run: from a configuration to a folder that holds everything that came of it.

The folder is the truth: resolved configuration, environment, score matrix so far, checkpoints. MLflow is fed from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from cl_lab import environment, registry
from cl_lab.compat import use_freed_memory_again
from cl_lab.config import EngineConfig, PluginConfig, RunConfig, StrategyConfig, dump, label_of, parse
from cl_lab.errors import ConfigError, Interrupted, UserError
from cl_lab.files import InUse, alone_in, set_aside_name, write_atomically, writing_tensors
from cl_lab.launch import is_rank, run_ranks, stop_on_signals, world_size

log = logging.getLogger("cl_lab")

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
_DATA = ("fingerprint", "experiences")
"""What a run's document says of its data (:func:`_data_of`)."""
WEIGHTS = "weights"
"""The folder in a run's that holds the weights after each experience, where ``checkpoint.experiences`` asks for them:
``<n>.safetensors`` after n experiences, ``<n>+<s>.safetensors`` s steps into the next."""
_COMPARED = ("scenario", "model", "strategy", "training", "evaluation", "seed")
"""What must be equal for a run to be resumed; engine, tracking and output folder may differ."""
_DIGESTED = 2**20
"""Bytes of samples read of each training set for its digest, which is made at every start; labels are read whole."""


def run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    label: str | None = None,
    observer: Any = None,
    parent: str | None = None,
    opened: bool = False,
) -> dict[str, Any]:
    """Run ``config.strategy`` with ``config.seed`` in ``folder``; returns the document of ``run.json``.

    ``resume`` continues from the newest whole checkpoint, or starts anew where there is none. ``parent`` is the MLflow
    run under which this one appears; ``opened`` says that the folder has been made ready. Starts its own ranks where
    ``engine.processes`` asks for several and no launcher has. Raises :class:`UserError` for everything the user can mend,
    and :class:`Interrupted` after a signal; the folder then says so.
    """
    if config.strategy is None:
        raise ConfigError("strategy: missing; name one in the file, or add strategy=naive (cl-lab list strategies)")
    label = label or label_of(config.strategy)
    config = config.settled()
    assert config.strategy is not None
    leader = int(os.environ.get("RANK", "0")) == 0
    if leader and not opened:
        check_plugins(config, [config.strategy])
        if not resume and (folder / CONFIG_FILE).exists():
            check_buildable(config, [config.strategy])  # before an earlier run makes room for one that cannot be
        with ready(folder, config, resume):
            return run(config, folder, resume=resume, label=label, observer=observer, parent=parent, opened=True)
    if (config.engine.processes > 1 or config.engine.deepspeed) and not is_rank():  # DeepSpeed wants a process group
        return _run_in_ranks(config, folder, resume, label, parent)
    if is_rank() and config.engine.processes == 1 and world_size() > 1:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"processes": world_size()})})
    finished = read_document(folder) if resume else None
    if finished is not None and finished["status"] == "finished":
        log.info("%s is finished already; nothing to resume", folder)
        return finished
    return _Run(config, folder, label, observer, parent, leader, resume).execute()


def read_document(folder: Path) -> dict[str, Any] | None:
    """The document in ``run.json``, or ``None`` where there is none. Raises :class:`UserError` where it is damaged."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(document, dict) or not isinstance(document.get("status"), str):
            raise ValueError("not the document of a run")
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); delete it and use --resume to rebuild it") from error
    return document


def export(folder: Path, to: Path) -> dict[str, Any]:
    """Write what the run in ``folder`` has learnt, as its newest checkpoint holds it, to the folder ``to``.

    Of a language model with low-rank adapters that is one adapter in PEFT's format, with which
    ``PeftModel.from_pretrained(model, to)`` answers as the run does; of one with soft prompts those of its newest task
    (:func:`~cl_lab.causal_lm.save_prompt`); of any other model ``weights.safetensors``, every parameter and buffer by name,
    those of frozen layers among them. Returns ``{"format", "path", "experiences"}``: ``peft`` or ``weights``, and after how
    many experiences. The run stays as it is. Raises :class:`UserError` where there is no run or no checkpoint of it, where
    no adapter gives the strategy's answers, and where ``to`` cannot be written.
    """
    from safetensors.torch import save_file

    from cl_lab import checkpoint
    from cl_lab.adapters import adapted_layers
    from cl_lab.causal_lm import save_adapters, save_prompt
    from cl_lab.hub import find_model
    from cl_lab.models import Classifier

    config = saved_config(folder)
    if config.strategy is None or is_comparison(folder):
        raise UserError(f"export: '{folder}' holds a comparison; name one of its runs, for example {folder}/runs/…")
    found = checkpoint.load_newest(folder / "checkpoints")
    if found is None:
        raise UserError(f"export: '{folder}' holds no checkpoint; run it with checkpoint.enabled=true")
    trainer = rebuild(folder, config)
    trainer.load_state_dict(found[0])
    model, chain = trainer.learner.model, trainer.strategy
    done = {"path": str(to), "experiences": len(trainer.record.matrix)}
    try:
        prompted = isinstance(model, Classifier) and model.backbone.conditional
        if prompted or adapted_layers(model):
            weights = str(config.model.knobs.get("weights", "smollm2-135m"))
            base = "" if weights == "tiny" else find_model(weights)
            if prompted:
                if chain.overrides("predict"):
                    raise UserError(
                        f"export: {label_of(config.strategy)} answers in place of the model, so no prompt gives its "
                        "answers; export a run of progressive-prompts without it"
                    )
                save_prompt(model, to, base=base)
                return {"format": "peft", **done}
            save_adapters(chain.adapters(trainer.learner), model, to, base=base)
            return {"format": "peft", **done}
        if chain.overrides("predict"):
            log.warning("export: %s answers in place of the model; its weights alone do not", config.strategy.name)
        to.mkdir(parents=True, exist_ok=True)
        below = _below(config, model.frozen) if isinstance(model, Classifier) and model.frozen is not None else {}
        weights = below | trainer.learner.weights()
        with writing_tensors():
            save_file({n: w.contiguous() for n, w in weights.items()}, to / "weights.safetensors")
    except OSError as error:
        raise UserError(f"export: cannot write to '{to}' ({error.strerror}); choose another with --out") from error
    return {"format": "weights", **done}


def _below(config: RunConfig, stage: str) -> dict[str, Any]:
    """The weights up to the frozen ``stage``, by name; a run's model has lost them, and as they are built they stay."""
    model = _fresh_model(config, stream_of(config.scenario, config.seed))
    lower = model.modules_up_to(stage)
    return {n: w for n, w in model.state_dict().items() if any(n == o or n.startswith(f"{o}.") for o in lower)}


def _fresh_model(config: RunConfig, stream: Any) -> Any:
    """The model of a run before anything has happened to it: equal weights in every process."""
    from cl_lab import seeding

    seeding.seed_everything(seeding.derive(config.seed, "model"))
    return registry.create("models", {"name": config.model.name, **config.model.knobs}, "model").build(stream)


def rebuild(folder: Path, config: RunConfig, *, same_data: bool = False) -> Any:
    """The trainer of the run of ``config`` in ``folder``, in this process, as it was before its first step.

    It knows nothing of what the run has learnt, and nothing is written. Raises :class:`UserError` as a run does, and, with
    ``same_data``, where its data are no longer those of the run.
    """
    alone = EngineConfig(
        precision=config.engine.precision,
        threads=config.engine.threads,
        device="cpu" if config.engine.device == "cpu" else "auto",
    )
    config = config.model_copy(update={"engine": alone})
    assert config.strategy is not None
    made = _Run(config, folder, label_of(config.strategy), None, None, leader=False, resume=True)
    trainer = made.build()
    if same_data and (other := made.other_data()) is not None:
        raise UserError(f"'{folder}' ran on other {other}; bring the old data back, or run it again")
    return trainer


class _Run:
    """The life of one run in one process (or one rank)."""

    def __init__(
        self, config: RunConfig, folder: Path, label: str, observer: Any, parent: str | None, leader: bool, resume: bool
    ) -> None:
        assert config.strategy is not None
        self.config, self.folder, self.leader, self.resume = config, folder, leader, resume
        self.strategy = config.strategy
        self.parent = parent
        self.observer = observer
        self.tracker: Any = None
        self._sent: set[str] = set()
        before: dict[str, Any] = (read_document(folder) or {}) if resume else {}
        self._begun_on = {key: before[key] for key in _DATA if before.get(key)}
        self.document: dict[str, Any] = {
            "scenario": config.scenario.name,
            "strategy": self.strategy.name,
            "label": label,
            "seed": config.seed,
            "status": "running",
            "resumed": before.get("resumed", 0),
            "reference": False,
            "initial": [],
            "matrix": [],
            "metrics": {},
            "cost": {},
            "run_id": before.get("run_id", ""),
            "path": str(folder),
            "experiences": before.get("experiences", []),
            "initial_valid": [],
            "valid": [],
            "anytime": [],
            "losses": [],
            "measures": [],
            "drift": [],
            "asides": [],
            "fingerprint": before.get("fingerprint", ""),
            "score": "accuracy",
            "chance": None,
            "encoding": None,
            "error": None,
            "started": before.get("started", _now()),
            "finished": None,
        }

    def execute(self) -> dict[str, Any]:
        try:
            self._track()
            trainer = self.build()
            if self.resume:
                self._restore(trainer)
            with stop_on_signals() as stop:
                trainer.stop = stop
                record = trainer.run()
            trainer.learner.close()
            self._note(record)
            encoding = trainer.strategy.encoding()
            self.document["encoding"] = None if encoding is None else str(encoding)
            self._finish("finished")
        except Interrupted as error:
            self._finish("interrupted", str(error))
            raise
        except BaseException as error:
            self._finish("failed", str(error) or type(error).__name__)
            raise
        return dict(_finite(self.document))

    def _track(self) -> None:
        from cl_lab.tracking import Tracker

        if not self.leader:
            return
        t = self.config.tracking
        name = f"{self.document['label']} seed {self.config.seed}"
        self.tracker = Tracker.open(t.uri, t.experiment, parent=self.parent, name=name)
        run_id = self.tracker.start_run(
            self.folder,
            config=self.config.model_dump(mode="json", exclude={"strategies", "seeds", "out"}),
            resumed=self.document["resumed"],
            fresh=not self.resume,
        )
        self.document["run_id"] = run_id or self.document["run_id"] or self.folder.name
        self._write()

    def build(self) -> Any:
        """The trainer of this run, before its first step; what is known of the stream enters the document."""
        import torch

        from cl_lab import augmentation, seeding
        from cl_lab.latents import put_through
        from cl_lab.learner import EngineLearner
        from cl_lab.models import Classifier
        from cl_lab.trainer import Trainer

        c = self.config
        torch.set_num_threads(environment.threads_for(c.engine.processes, c.engine.threads))
        use_freed_memory_again()
        stream = stream_of(c.scenario, c.seed)
        chain = _chain(self.strategy, stream)
        if stream.online and not chain.learns_when_asked:
            _check_one_pass(stream, c.training)
        model, raw = _fresh_model(c, stream), stream
        latents = model.frozen if isinstance(model, Classifier) else None
        for experience in (0, 1):
            augmentation.check(c.training.at(experience).augmentation, stream, latents=latents)
        if isinstance(model, Classifier) and model.frozen is not None:
            device = torch.device("cuda" if torch.cuda.is_available() and c.engine.device != "cpu" else "cpu")
            stream = put_through(stream, model, model.frozen, keep=model.keep_latents, device=device)
        model = chain.prepare(model, stream)
        learner = EngineLearner(model, stream, c.training, c.engine, c.seed)
        if learner.rank:  # the weights are equal, dropout masks should not be
            seeding.seed_everything(seeding.derive(c.seed, "rank", learner.rank))
        self.document |= {
            "reference": chain.reference,
            "score": stream.score,
            "chance": stream.chance,
            **_data_of(raw),
        }
        checkpoints, weights = self.folder / "checkpoints", self.folder / WEIGHTS
        return Trainer(stream, learner, chain, c, c.seed, observer=self, checkpoints=checkpoints, weights=weights)

    def _restore(self, trainer: Any) -> None:
        from cl_lab import checkpoint

        folder = self.folder / "checkpoints"
        found = checkpoint.load_newest(folder)
        if found is None:
            log.info("no checkpoint in %s yet; starting from the beginning", folder)
            return
        if (other := self.other_data()) is not None:
            self.document |= self._begun_on  # that of the rows learnt so far
            raise UserError(
                f"--resume: '{self.folder}' began on other {other}; bring the old data back, or give another --out"
            )
        self.document["resumed"] += 1
        trainer.load_state_dict(found[0])
        log.info("resuming from %s", found[1])
        if self.leader:
            self._write()

    def other_data(self) -> str | None:
        """How the data that the run began on differ from those that are there now; ``None`` where they do not."""
        return _other_data(self._begun_on, self.document)

    # --- observing the trainer ------------------------------------------------------------------------------------

    def started(self, total_steps: int, done_steps: int) -> None:
        if self.observer is not None and self.leader:
            self.observer.started(total_steps, done_steps)

    def stepped(self, experience: Any, step: int, loss: float | None) -> None:
        if self.observer is not None and self.leader:
            self.observer.stepped(experience, step, loss)

    def scored(self, record: Any) -> None:
        if not self.leader:
            return
        self._note(record)
        self._write()
        if self.observer is not None:
            self.observer.scored(record)
        if self.tracker is not None:
            rows = len(record.matrix)
            if record.drift and record.drift[-1].get("learnt") == rows:  # else it was logged when it was new
                self.tracker.log_drift(record.drift[-1])
            if record.asides and record.asides[-1]["learnt"] == rows:
                self.tracker.log_asides(record.asides[-1])
            if rows:
                self.tracker.log_row(rows - 1, record.matrix[-1], self.document["score"])
                if record.measures and record.measures[-1]:
                    self.tracker.log_metrics(record.measures[-1], step=rows - 1)
                for point in record.losses:
                    if point["experience"] == rows - 1:
                        self.tracker.log_metrics({"loss": point["loss"]}, step=point["step"])

    def _note(self, record: Any) -> None:
        from cl_lab.metrics import summary

        self.document |= {
            "initial": record.initial,
            "matrix": record.matrix,
            "initial_valid": record.initial_valid,
            "valid": record.valid,
            "anytime": record.anytime,
            "losses": record.losses,
            "measures": record.measures,
            "drift": record.drift,
            "asides": record.asides,
            "cost": record.cost(),
        }
        if record.matrix:
            tests = [e["test_samples"] for e in self.document["experiences"]]
            self.document["metrics"] = summary(
                record.matrix,
                record.initial,
                test_samples=tests,
                anytime=_complete(record.anytime, len(tests)),
                valid=record.valid or None,
                general=[list(d["general"].values()) for d in record.drift] if len(record.drift) > 1 else None,
            )

    def _finish(self, status: str, error: str | None = None) -> None:
        if not self.leader:
            return
        self.document |= {"status": status, "error": error, "finished": _now()}
        self._write()
        if self.tracker is not None:
            self.tracker.finish()

    def _write(self) -> None:
        try:
            write_atomically(self.folder / RUN_FILE, json.dumps(_finite(self.document), indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / RUN_FILE}: {error.strerror}; free space or choose another --out"
            ) from error


def _complete(anytime: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Anytime records hold the experiences seen so far; the metrics want a place for every one."""
    return [{**a, "accuracies": a["accuracies"] + [0.0] * (length - len(a["accuracies"]))} for a in anytime]


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; ``None`` stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value


def _path(strategy: StrategyConfig, index: int) -> str:
    return f"strategy.{index}" if strategy.chain else "strategy"


def stream_of(scenario: PluginConfig, seed: int) -> Any:
    """The stream of a scenario for a seed. The last few are kept, so that ten strategies read the data once."""
    return _stream(json.dumps({"name": scenario.name, **scenario.knobs}, sort_keys=True), seed)


@lru_cache(maxsize=2)
def _stream(scenario: str, seed: int) -> Any:
    return registry.create("scenarios", json.loads(scenario), "scenario").stream(seed)


def forget_streams() -> None:
    """Let go of the streams that :func:`stream_of` keeps."""
    _stream.cache_clear()


def check_plugins(config: RunConfig, strategies: Sequence[StrategyConfig]) -> None:
    """Validate the knobs of every strategy, the model and the scenario; raises :class:`UserError` for the first mistake."""
    for i, strategy in enumerate(strategies):
        for j, link in enumerate(strategy.links):
            place = _path(strategy, j) if strategy is config.strategy else f"strategies.{i}"
            registry.create("strategies", {"name": link.name, **link.knobs}, place)
    registry.create("models", {"name": config.model.name, **config.model.knobs}, "model")
    registry.create("scenarios", {"name": config.scenario.name, **config.scenario.knobs}, "scenario")


def check_buildable(config: RunConfig, strategies: Sequence[StrategyConfig]) -> None:
    """Read the stream, put it to each strategy, make the model and look for the device.

    Raises :class:`UserError` for what no run could mend.
    """
    from cl_lab.learner import check_device

    check_device(config.engine)
    stream = stream_of(config.scenario, config.seed)
    for strategy in strategies:
        _chain(strategy, stream)
    _fresh_model(config, stream)


def _chain(strategy: StrategyConfig, stream: Any) -> Any:
    """A strategy's links as one, fit for ``stream``."""
    from cl_lab.chain import Chain

    links = [
        registry.create("strategies", {"name": s.name, **s.knobs}, _path(strategy, i))
        for i, s in enumerate(strategy.links)
    ]
    return Chain(links, [s.name for s in strategy.links], stream)


@contextlib.contextmanager
def ready(
    folder: Path, config: RunConfig, resume: bool, *, comparison: bool = False, threads: int | None = None
) -> Iterator[None]:
    """Have ``folder`` ready for a run of ``config``, or a comparison, and nobody else in it meanwhile.

    What an earlier one left there is set aside as a whole, unless it is gone on with (``resume``); then a run that failed
    under other settings makes room. Raises :class:`ConfigError` where another process works in it, where what is to be gone
    on with is a run and no comparison (or the other way round) or has other settings, and :class:`UserError` where nothing
    can be written.
    """
    if threads is None:
        threads = environment.threads_for(config.engine.processes, config.engine.threads)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _enter(stack, folder)
            if resume:
                left = None if _goes_on(folder, config, comparison) else "a run that failed under other settings"
            else:
                left = f"an earlier {'comparison' if is_comparison(folder) else 'run'} (--resume goes on with one)"
            if left is not None and (folder / CONFIG_FILE).exists():
                aside = set_aside_name(folder)
                folder.rename(aside)
                stack.close()  # the lock went with it
                log.warning("%s held %s; it is kept as %s", folder, left, aside.name)
                folder.mkdir(exist_ok=True)
                _enter(stack, folder)
            write_atomically(folder / CONFIG_FILE, dump(config))
            write_atomically(folder / "environment.json", json.dumps(environment.snapshot(threads), indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write to output folder '{folder}': {error.strerror}; choose another with --out"
            ) from error
        yield


def _enter(stack: contextlib.ExitStack, folder: Path) -> None:
    try:
        # Where there are no locks (Windows, some network file systems) nobody is held off.
        with contextlib.suppress(ImportError, OSError):
            stack.enter_context(alone_in(folder))
    except InUse as other:
        raise ConfigError(f"'{folder}': process {other} is running there; wait for it, or give another --out") from None


def _goes_on(folder: Path, config: RunConfig, comparison: bool) -> bool:
    """Whether what ``folder`` holds, if anything, can be gone on with; what is refused see :func:`ready`."""
    if comparison and (folder / RUN_FILE).exists():
        raise ConfigError(f"--resume: '{folder}' holds a single run; leave --resume out, or give another --out")
    if not comparison and is_comparison(folder):
        raise ConfigError(
            f"--resume: '{folder}' holds a comparison; cl-lab compare goes on with it, or give another --out"
        )
    return comparison or check_resumable(folder, config)


def is_comparison(folder: Path) -> bool:
    """Whether ``folder`` holds a comparison and no run."""
    return (folder / "runs").is_dir() and not (folder / RUN_FILE).exists()


def _check_one_pass(stream: Any, training: Any) -> None:
    """Raise :class:`ConfigError` where samples of an online stream would be seen twice; a base session may say otherwise."""
    for e in stream.experiences:
        t = training.at(e.index)
        if e.index == 0 and training.first is not None:
            continue
        if t.iterations is None and t.epochs > 1:
            raise ConfigError(f"training.epochs = {t.epochs}: an online stream shows each sample once; set it to 1")
        if t.iterations is not None and t.iterations > (most := math.ceil(len(e.train) / t.batch_size)):
            raise ConfigError(
                f"training.iterations = {t.iterations}: an online stream shows each sample once, and the {len(e.train)} of "
                f"experience {e.index + 1} make {most} batches of {t.batch_size}; give at most so many, or training.epochs=1"
            )


def check_resumable(folder: Path, config: RunConfig) -> bool:
    """Whether the run in ``folder``, if there is one, can be gone on with; not if it failed under other settings.

    Raises :class:`ConfigError` where any other run there has other settings than ``config``, naming the first.
    """
    if not (folder / CONFIG_FILE).is_file():
        return True
    before, now = (c.model_dump(mode="json", include=set(_COMPARED)) for c in (saved_config(folder), config))
    if (found := _difference(before, now, "")) is not None:
        if (read_document(folder) or {}).get("status") == "failed":
            return False
        path, there, here = found
        raise ConfigError(
            f"--resume: '{path}' differs from the run in {folder} ({there} there, {here} now); "
            "give the old settings, or another --out"
        )
    return True


def is_run_of(folder: Path, config: RunConfig) -> bool:
    """Whether ``folder`` holds a run of ``config``, whatever its strategy is called there."""
    try:
        found = saved_config(folder) if read_document(folder) is not None else None
    except UserError:
        return False  # what is damaged is a run of nothing
    if found is None:
        return False
    before, now = (c.model_dump(mode="json", include=set(_COMPARED)) for c in (found, config))
    for settings in (before, now):
        settings["strategy"] = {**(settings["strategy"] or {}), "label": None}
    return _difference(before, now, "") is None


def rename(folder: Path, to: Path, config: RunConfig, label: str) -> None:
    """Move the run of ``config`` in ``folder`` to ``to``, under another label. Raises :class:`OSError`."""
    document = read_document(folder)
    assert document is not None
    # Moved last: whatever ends this before, the next --resume finds the run where it was and does it again.
    write_atomically(folder / RUN_FILE, json.dumps({**document, "label": label, "path": str(to)}, indent=1))
    write_atomically(folder / CONFIG_FILE, dump(config))
    folder.rename(to)


def check_data(folder: Path, config: RunConfig) -> None:
    """Raise :class:`UserError` where the run of ``config`` in ``folder`` saw other data than are there now."""
    if (
        other := _other_data(read_document(folder) or {}, _data_of(stream_of(config.scenario, config.seed)))
    ) is not None:
        raise UserError(f"--resume: '{folder}' ran on other {other}; bring the old data back, or give another --out")


def _data_of(stream: Any) -> dict[str, Any]:
    """What ``run.json`` says of the data of a stream, as it is before any frozen layers."""
    return {
        "fingerprint": stream.fingerprint(),
        "experiences": [
            {
                "index": e.index,
                "name": e.name,
                # Of texts the classes are rows of a table that is not here; there may be as many as samples.
                **({"answers": len(e.classes)} if stream.answers is not None else {"classes": list(e.classes)}),
                **({"measure": stream.measures[e.index]} if stream.measures else {}),
                "train_samples": len(e.train),
                "train_digest": e.train.digest(_DIGESTED)[:16],
                "test_samples": len(e.test),
            }
            for e in stream.experiences
        ],
    }


def _other_data(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How the data in ``before``, a run's document, differ from those in ``now``; ``None`` where it names no difference."""
    one, two = before.get("fingerprint"), now["fingerprint"]
    if one and one != two:
        return f"test data than are there now (fingerprint {one[:12]}, now {two[:12]})"
    for e, there in zip(before.get("experiences", []), now["experiences"], strict=False):
        for key in ("train_samples", "train_digest"):  # older runs kept no digest
            if key in e and e[key] != there[key]:
                place = f"{key} of experience {there['index'] + 1}"
                return f"training data than are there now ({place}: {e[key]}, now {there[key]})"
    return None


def saved_config(folder: Path) -> RunConfig:
    """The configuration saved with a run or comparison; raises :class:`UserError` where it is missing or damaged."""
    import yaml

    path = folder / CONFIG_FILE
    try:
        document = yaml.safe_load(path.read_text())
        for section in ("model", "scenario"):  # older runs hold a knob that the command line's flag took the place of
            if isinstance(document, dict) and isinstance(document.get(section), dict):
                document[section].pop("trust_remote_code", None)
        return parse(document, str(path))
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' holds no run: config.yaml is missing; name a folder that cl-lab run or compare wrote"
        ) from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"'{path}' is damaged ({error}); repeat the run with another --out") from error


def _difference(before: Any, now: Any, path: str) -> tuple[str, str, str] | None:
    """Dotted path of the first place where two documents differ, with what stands there in each."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            place = f"{path}.{key}" if path else str(key)
            if (found := _difference(before.get(key), now.get(key), place)) is not None:
                return found
    return path, json.dumps(before), json.dumps(now)


def _run_in_ranks(config: RunConfig, folder: Path, resume: bool, label: str, parent: str | None) -> dict[str, Any]:
    job = {"folder": str(folder), "resume": resume, "label": label, "parent": parent, "config": dump(config)}
    write_atomically(folder / "job.json", json.dumps(job))
    code = run_ranks("cl_lab.rank", [str(folder / "job.json")], config.engine.processes, config.engine.threads)
    document = read_document(folder)
    if document is None or (code and document["status"] in ("running", "finished")):
        raise UserError(
            f"a rank ended with code {code} (of {config.engine.processes} in {folder}); its message is above; "
            "continue with --resume"
        )
    if document["status"] == "interrupted":
        raise Interrupted("a signal", str(folder))
    if document["status"] == "failed":
        raise UserError(str(document["error"]))
    return document


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main_rank(job_file: str) -> int:
    """The body of one rank that :func:`run` has started; returns its exit code."""
    import yaml

    from cl_lab.display import StepProgress, configure_logging

    configure_logging(logging.INFO if os.environ["RANK"] == "0" else logging.ERROR)
    job = json.loads(Path(job_file).read_text())
    config = parse(yaml.safe_load(job["config"]), job_file)
    progress = StepProgress() if os.environ["RANK"] == "0" else None
    try:
        with progress or _Nothing():
            run(
                config,
                Path(job["folder"]),
                resume=job["resume"],
                label=job["label"],
                observer=progress,
                parent=job["parent"],
                opened=True,
            )
    except (UserError, Interrupted) as error:
        if os.environ["RANK"] != "0":
            print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
