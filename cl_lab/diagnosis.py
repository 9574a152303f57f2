"""What became of old tasks: is what a model knew of them gone, or only the way to say it?

The recovery experiment of "Spurious forgetting in continual learning of language models" (ICLR 2025, arXiv 2501.13453): a
model that seems to have forgotten a task is trained on some of it again, for a few steps, and asked about the rest. What so
few steps bring back, and about samples they did not show, had not been lost. Beside it stand the angles between what
successive experiences did to each layer, and how much probability moved to labels of later tasks.

Torch is imported by the functions that need it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cl_lab.errors import ConfigError, TrainingError, UserError
from cl_lab.experiment import WEIGHTS, is_comparison, read_document, rebuild, saved_config
from cl_lab.reporting import DIAGNOSIS_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cl_lab.adapters import AdaptedLayer, LowRank
    from cl_lab.config import TrainingConfig
    from cl_lab.records import Experience, Stream, TensorData

_PART = 0.1
"""Recovery's share of the steps an experience took: one epoch of task 0's ten in the paper's experiment."""
_FEWEST = 10
_ROWS = 2
"""Rows of a task that tell what its answers depend on."""
_LOW = 0.5
"""Below this recovery ratio, knowledge is said to be lost."""


def diagnose(
    folder: Path,
    *,
    steps: int | None = None,
    lr: float | None = None,
    share: float = 0.5,
    threshold: float = 0.8,
    observer: Any = None,
) -> dict[str, Any]:
    """Diagnose the run in ``folder``, which kept its weights (``checkpoint.experiences``); returns ``diagnosis.json``.

    For every experience but the last, four scores on the same rows, its *half B*: ``original`` with the weights right
    after it, ``forgotten`` with the newest, ``recovered`` after some steps from the newest on its *half A*, ``control``
    after the same steps from the weights before any training; beside them ``before``, what those score as they are.
    ``ratio`` is the paper's (recovered − forgotten) / (original − forgotten). The verdict, with two standard errors of a
    difference of two shares of n rows, ``2 √((p(1−p) + q(1−q)) / n)``, as what chance may do:

    - ``not learnt``: the score fell by no more than chance may do, or rose, but the experience had not raised it above
      ``before`` by more than that: what it did not teach, be it known before or never, can be neither kept nor lost; there
      is no ratio;
    - ``kept``: the score fell by no more than chance may do; there is no ratio;
    - ``knowledge lost``: ratio below 0.5, as far as these steps tell;
    - ``cannot tell``: the ratio is higher, but the control is level with the recovered model: whoever never knew the task
      learns as much in these steps, so recovery proves nothing;
    - ``alignment lost``: ratio of ``threshold`` or more, and above the control;
    - ``partly``: in between.

    What the control cannot see: it knows none of the other tasks, either, so what they share with this one (edges of all
    digits) counts as recovered. And a ratio is one of these steps at this learning rate: more steps bring back more.

    The halves are the paper's. Where an experience is tested on other samples than it was trained on (its task 0:
    questions about other people; pictures), half A is the training set and half B the whole test set. Where it is tested
    on what it was trained on (its tasks 1, 2, …: memory), training on all of it would learn the answers again; there half
    A is ``share`` of the test rows, drawn with the run's seed and whole people
    (:class:`~cl_lab.records.Experience`'s ``groups``) at a time, and half B the others. Equal rows stay on one side.

    Recovery is plain training of all that the model may train, layers that a strategy froze on the way included: the
    experience's own settings with a fresh optimiser, schedule and warm-up shrunk to ``steps`` (by default a tenth of what
    the experience took, at least 10), ``lr`` in place of its learning rate, no augmentation, no strategy. ``newest``
    says what it does to the last experience's score, before and after.

    ``mass`` is the mean probability, over half B, of labels that only the experience has (``own``), that only later ones
    have (``later``) and that both have (``shared``), before (the weights right after it) and after (the newest). In words
    it is that of the answers' first tokens behind the prompt, among the whole vocabulary. ``None`` where the task is told
    or no label is a later task's alone.

    ``updates`` holds, by layer (the model's stages; of soft prompts, the module that owns them), the norm of each
    experience's change of the weights, and the angle in degrees between each and the next: 90 is orthogonal, ``None`` where
    one of the two is no change. Of low-rank adapters it is the change of ``(α/r) B A`` that counts. (The paper compares
    subspaces; this is the plain angle of the updates.)

    ``first_steps`` holds, where the run scored during training, ``[share of the next experience's steps, score]``, and
    ``half_lost_at`` the share by which half of the drop had happened; where it kept weights instead, as below, half B's.

    ``along`` is the paper's own experiment, of a run with ``checkpoint.weights_at``: for the weights so many steps
    (``step``) into the next experience, and at its end, what half B scores with them (``forgotten``) and after the recovery
    above from there (``recovered``), with ``share`` of the next experience's steps and the ``ratio``, ``None`` where no
    more was lost than chance may do.

    The run's own files stay as they are. ``observer`` is told of steps as a run's is. Raises :class:`UserError` for a
    folder that is no run, holds fewer than two experiences or no weights; for a stream of numbers, for a strategy whose
    model does not answer itself, and for one that leaves nothing to train in what answers an old task;
    :class:`ConfigError` for arguments out of range.
    """
    _check_arguments(steps, lr, share, threshold)
    run = _Diagnosed(folder)
    settings = {"steps": steps, "lr": lr, "share": share, "threshold": threshold}
    if observer is not None:
        observer.started(sum(run.recoveries(j) * run.steps_for(j, steps) for j in range(run.last)), 0)
    newest = run.score(run.last + 1, run.trainer.stream.experiences[run.last].test)
    tasks = []
    for j in range(run.last):
        tasks.append(run.examine(run.plan(j, steps, lr, share), newest, threshold, observer))
        run.trainer.stream.experiences[j].release()
        if observer is not None:
            observer.told(_in_words(tasks[-1]))
    document = {
        "scenario": run.document["scenario"],
        "strategy": run.document["strategy"],
        "label": run.document["label"],
        "seed": run.document["seed"],
        "path": str(folder),
        "experiences": run.last + 1,
        "settings": settings,
        "tasks": tasks,
        "updates": run.updates(),
    }
    _write(folder / DIAGNOSIS_FILE, document)
    return document


def verdict(
    before: float, original: float, forgotten: float, recovered: float, control: float, n: int, threshold: float
) -> tuple[float | None, str]:
    """The recovery ratio and the verdict of :func:`diagnose` on five shares of ``n`` rows."""
    ratio = recovery_ratio(original, forgotten, recovered, n)
    if ratio is None:
        return None, "not learnt" if original - before <= chance_of(original, before, n) else "kept"
    if ratio < _LOW:
        return ratio, "knowledge lost"
    if recovered - control <= chance_of(recovered, control, n):
        return ratio, "cannot tell"
    return ratio, "alignment lost" if ratio >= threshold else "partly"


def recovery_ratio(original: float, forgotten: float, recovered: float, n: int) -> float | None:
    """(recovered − forgotten) / (original − forgotten); ``None`` where no more was lost than chance may do."""
    drop = original - forgotten
    return None if drop <= chance_of(original, forgotten, n) else (recovered - forgotten) / drop


def chance_of(p: float, q: float, n: int) -> float:
    """Two standard errors of the difference of two shares ``p`` and ``q`` of ``n`` rows each."""
    return 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / n)


# --- updates of the weights -------------------------------------------------------------------------------------------


def change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], adapted: Mapping[str, AdaptedLayer]
) -> dict[str, Tensor | LowRank]:
    """What lies between two states of the weights, by name: float64 differences, of the entries that both have.

    A layer that is ``adapted`` stands under its path, with the change of ``(α/r) B A`` as factors ``[2r, inputs]`` and
    ``[outputs, 2r]``; nothing is multiplied out.
    """
    import torch

    from cl_lab.adapters import LowRank

    factors = {name for layer in adapted.values() for name in (layer.a, layer.b)}
    made: dict[str, Tensor | LowRank] = {}
    for name in before.keys() & after.keys() - factors:
        old, new = _common(before[name].double(), after[name].double())
        made[name] = new - old
    for path, layer in adapted.items():
        (a, old_a), (b, old_b) = ((after[n].double(), before[n].double()) for n in (layer.a, layer.b))
        # Where nothing changed it is exactly none, not what rounding leaves of a difference.
        factor = 0.0 if torch.equal(a, old_a) and torch.equal(b, old_b) else layer.scale
        made[path] = LowRank(torch.cat([a, old_a]), factor * torch.cat([b, -old_b], 1))
    return made


def product(u: Tensor | LowRank, v: Tensor | LowRank) -> float:
    """The inner product of two changes of one tensor; for factors ``⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ)``."""
    from cl_lab.adapters import LowRank

    if isinstance(u, LowRank) and isinstance(v, LowRank):
        return float(((u.b.T @ v.b) * (u.a @ v.a.T)).sum())
    assert not isinstance(u, LowRank)
    assert not isinstance(v, LowRank)
    return float((u * v).sum())


def angle(u: Mapping[str, Tensor | LowRank], v: Mapping[str, Tensor | LowRank], names: Sequence[str]) -> float | None:
    """The angle in degrees between two changes of the tensors ``names``, over the entries that both have.

    ``None`` where one of them is no change there.
    """
    pairs = [_shared(u[n], v[n]) for n in names]
    lengths = math.sqrt(max(0.0, sum(product(a, a) for a, _ in pairs) * sum(product(b, b) for _, b in pairs)))
    if lengths == 0:
        return None
    cosine = sum(product(a, b) for a, b in pairs) / lengths
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def length(u: Mapping[str, Tensor | LowRank], names: Sequence[str]) -> float:
    """The norm of a change of the tensors ``names``."""
    return math.sqrt(max(0.0, sum(product(u[n], u[n]) for n in names)))


def layers_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """``names`` of parameters or modules by layer, in the model's order: a backbone's stages, else the owning modules."""
    from cl_lab.models import Classifier

    stage_of: dict[str, str] = {}
    # A model whose weights another network writes (hnet) has other parameters than those of its stages; what stands before
    # each text goes through all stages and is part of none.
    staged = all(name.startswith(("backbone.", "head.")) for name in names)
    if isinstance(model, Classifier) and staged and not model.backbone.conditional:
        for stage in model.stages():
            for path in model.modules_up_to(stage):
                for name in names:
                    # A module that is named, one with an adapter, holds what the path leads to.
                    if name == path or name.startswith(path + ".") or path.startswith(name + "."):
                        stage_of.setdefault(name, stage)
    found: dict[str, list[str]] = {}
    for name in names:
        owner = "head" if name.startswith("head.") else name.rpartition(".")[0] or name
        found.setdefault(stage_of.get(name, owner), []).append(name)
    return found


def _shared(u: Tensor | LowRank, v: Tensor | LowRank) -> tuple[Tensor | LowRank, Tensor | LowRank]:
    from cl_lab.adapters import LowRank

    if isinstance(u, LowRank) or isinstance(v, LowRank):
        return u, v
    return _common(u, v)


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The corner that both tensors have: a head that grew has more rows than before."""
    corner = tuple(slice(min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
    return a[corner], b[corner]


# --- one run ----------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Recovery of one experience."""

    experience: Experience
    training: TrainingConfig
    steps: int
    a: TensorData
    b: TensorData
    memorised: bool


class _Diagnosed:
    """A run with its weights after each experience, and its model to put them into."""

    def __init__(self, folder: Path) -> None:
        from cl_lab.adapters import adapted_layers

        self.folder = folder
        self.document, self.last = _read(folder)
        config = saved_config(folder)
        assert config.strategy is not None
        self.config = config.settled()
        self.trainer = rebuild(folder, self.config, same_data=True)
        _check_answers(self.trainer)
        self.learner = self.trainer.learner
        self.adapted = adapted_layers(self.learner.model)
        self._check_trains()

    def steps_for(self, j: int, steps: int | None) -> int:
        """How many steps the recovery of experience ``j`` takes, where ``steps`` are asked for."""
        return steps or max(_FEWEST, round(_PART * self._taken(j)))

    def kept_inside(self, j: int) -> list[int]:
        """After how many steps of experience ``j`` its weights were kept, its end aside."""
        found = (self.folder / WEIGHTS).glob(f"{j}+*.safetensors")
        return sorted(int(path.name.removesuffix(".safetensors").partition("+")[2]) for path in found)

    def recoveries(self, j: int) -> int:
        """How many recoveries the diagnosis of experience ``j`` takes."""
        inside = len(self.kept_inside(j + 1))
        # That from the end of the next experience is the one from the newest weights where it is the last.
        return 2 + inside + (inside > 0 and j + 1 < self.last)

    def plan(self, j: int, steps: int | None, lr: float | None, share: float) -> _Plan:
        """How experience ``j`` is to be recovered."""
        experience = self.trainer.stream.experiences[j]
        t = self.config.training.at(j)
        count = self.steps_for(j, steps)
        shrunk = min(1.0, count / max(1, self._taken(j)))
        changed = {"lr": lr or t.lr, "warmup_steps": round(t.warmup_steps * shrunk)}
        memorised = _mostly_within(experience.test, experience.train)
        a, b = experience.train, experience.test
        if memorised:
            a, b = _halves(experience, share, self.config.seed)
        return _Plan(experience, t.model_copy(update=changed), count, a, b, memorised)

    def examine(self, plan: _Plan, newest: float, threshold: float, observer: Any) -> dict[str, Any]:
        """All that is told of one experience."""
        j, n = plan.experience.index, len(plan.b)
        before = self.score(0, plan.b)
        original, mass = self.score(j + 1, plan.b), self.mass(j, plan.b)
        forgotten, moved = self.score(self.last + 1, plan.b), self.mass(j, plan.b)
        self.recover(self.last + 1, plan, observer)
        recovered = self._score(plan.b)
        newest_after = self._score(self.trainer.stream.experiences[self.last].test)
        self.recover(0, plan, observer)
        control = self._score(plan.b)
        ratio, said = verdict(before, original, forgotten, recovered, control, n, threshold)
        along = self.along(plan, original, (forgotten, recovered), observer)
        curve = self.first_steps(j)
        if curve is None and along is not None:
            curve = [[0.0, original], *([point["share"], point["forgotten"]] for point in along)]
        return {
            "index": j,
            "name": plan.experience.name,
            "before": before,
            "original": original,
            "forgotten": forgotten,
            "recovered": recovered,
            "control": control,
            "ratio": ratio,
            "noise": chance_of(original, forgotten, n),
            "verdict": said,
            "newest": {"before": newest, "after": newest_after},
            "steps": plan.steps,
            "lr": plan.training.lr,
            "memorised": plan.memorised,
            "rows": {"a": len(plan.a), "b": n},
            "mass": None if mass is None or moved is None else {"before": mass, "after": moved},
            "first_steps": curve,
            "half_lost_at": None if curve is None else _half_lost_at(curve),
            "along": along,
        }

    def along(
        self, plan: _Plan, original: float, newest: tuple[float, float], observer: Any
    ) -> list[dict[str, Any]] | None:
        """What was lost and what comes back while the next experience is learnt; ``None``: no weights were kept there.

        ``newest`` is what half B scores with the newest weights, and after recovery from them.
        """
        j, n = plan.experience.index, len(plan.b)
        inside, taken = self.kept_inside(j + 1), self._taken(j + 1)
        if not inside:
            return None
        found = []
        for step in [*inside, taken]:
            if step == taken and j + 1 == self.last:
                forgotten, recovered = newest
            else:
                point = f"{j + 1}+{step}" if step < taken else j + 2
                forgotten = self.score(point, plan.b)
                self.recover(point, plan, observer)
                recovered = self._score(plan.b)
            ratio, share = recovery_ratio(original, forgotten, recovered, n), step / taken
            found.append({"step": step, "share": share, "forgotten": forgotten, "recovered": recovered, "ratio": ratio})
        return found

    def load(self, learnt: int | str) -> None:
        """Put the weights after ``learnt`` experiences (``n+s``: and s steps) into the model."""
        self.learner.close()
        self.learner.set_learnt(dict(self._weights(learnt)))

    def score(self, learnt: int | str, data: TensorData) -> float:
        """The score on ``data`` with the weights after ``learnt`` experiences."""
        self.load(learnt)
        return self._score(data)

    def recover(self, learnt: int | str, plan: _Plan, observer: Any) -> None:
        """Train the weights after ``learnt`` experiences on half A of an experience."""
        from cl_lab import seeding
        from cl_lab.trainer import learning_rate

        learner, t, j = self.learner, plan.training, plan.experience.index
        self.load(learnt)
        # Both recoveries of an experience see the same batches and draw the same masks.
        seeding.seed_everything(seeding.derive(self.config.seed, "diagnose", j))
        learner.configure(t)
        learner.begin(fresh=True)
        learner.train_mode()
        per_epoch = math.ceil(len(plan.a) / t.batch_size)
        total = 0.0
        for step in range(plan.steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = seeding.permutation(len(plan.a), self.config.seed, "diagnose", j, epoch)
            batch = plan.a.batch(order[place * t.batch_size : (place + 1) * t.batch_size], epoch)
            learner.set_lr(learning_rate(t, step, plan.steps))
            pieces = learner.pieces(batch)
            for i, piece in enumerate(pieces):
                piece = piece.to(learner.device)
                loss = learner.loss(learner.forward(piece), piece)
                learner.backward(loss, last=i + 1 == len(pieces))
                total += float(loss.detach())
            learner.step()
            if not math.isfinite(total):
                raise TrainingError(
                    f"diagnose: the loss became {total} at step {step} of recovering experience {j} "
                    f"('{plan.experience.name}') with lr={t.lr}; give a lower --lr"
                )
            if observer is not None:
                observer.stepped(plan.experience, step + 1, None)

    def mass(self, j: int, data: TensorData) -> dict[str, float] | None:
        """Mean probability of the labels of experience ``j`` and of later ones, of the model as it is, over ``data``."""
        import torch

        from cl_lab.records import Batch

        found = _labels(self.trainer.stream, j, self.last)
        if found is None:
            return None
        learner, size = self.learner, self.config.evaluation.batch_size
        learner.model.eval()
        sums = dict.fromkeys(found, 0.0)
        with torch.no_grad():
            for start in range(0, len(data), size):
                rows = slice(start, start + size)
                batch = Batch(data.x[rows], data.y[rows], data.t[rows], 0, raw=data.raw).to(learner.device)
                logits = learner.forward(batch).float()
                # In words, what is said first follows from the prompt alone.
                shares = (logits[:, 0] if logits.dim() == 3 else logits).softmax(1)
                for name, labels in found.items():
                    sums[name] += float(shares[:, labels.to(shares.device)].sum())
        return {name: value / len(data) for name, value in sums.items()}

    def updates(self) -> dict[str, Any]:
        """Norms of what each experience did to each layer, and angles between successive ones."""
        learnt, factors = self._weights(0), {n for layer in self.adapted.values() for n in (layer.a, layer.b)}
        names = [n for n, _ in self.learner.model.named_parameters() if n in learnt and n not in factors]
        layers = layers_of(self.learner.model, [*names, *self.adapted])
        everything = [n for own in layers.values() for n in own]
        norms, angles, whole_norms, whole_angles = [], [], [], []
        previous: dict[str, Any] | None = None
        for before, after in self._pairs():
            update = change(before, after, self.adapted)
            norms.append([length(update, own) for own in layers.values()])
            whole_norms.append(length(update, everything))
            if previous is not None:
                angles.append([angle(previous, update, own) for own in layers.values()])
                whole_angles.append(angle(previous, update, everything))
            previous = update
        whole = {"norms": whole_norms, "angles": whole_angles}
        return {"layers": list(layers), "norms": norms, "angles": angles, "whole": whole}

    def first_steps(self, j: int) -> list[list[float]] | None:
        """``[share of the next experience's steps, score]`` from right after experience ``j`` on; ``None``: not measured."""
        begin, ends = self._ends(j), self._ends(j + 1)
        if begin is None or ends is None or ends <= begin:
            return None
        points = [
            [(a["step"] - begin) / (ends - begin), a["accuracies"][j]]
            for a in self.document["anytime"]
            if a["experience"] == j + 1 and a["step"] < ends
        ]
        matrix = self.document["matrix"]
        return [[0.0, matrix[j][j]], *points, [1.0, matrix[j + 1][j]]] if points else None

    def _ends(self, j: int) -> int | None:
        """The step, over the whole run, with which experience ``j`` ended; ``None`` where it took none.

        The trainer logs a loss at the last step, whatever ended the experience. Older runs logged none when patience ran
        out: there the end is the last loss before it.
        """
        return max((int(p["step"]) for p in self.document["losses"] if p["experience"] == j), default=None)

    def _taken(self, j: int) -> int:
        """The steps that experience ``j`` took."""
        end = self._ends(j)
        before = max((s for i in range(j) if (s := self._ends(i)) is not None), default=0)
        return 0 if end is None else end - before

    def _check_trains(self) -> None:
        """Refuse a run whose old tasks read nothing that may be trained: no step could bring anything back."""
        for learnt, when in ((0, "before any training"), (self.last + 1, "by now")):
            self.load(learnt)
            for experience in self.trainer.stream.experiences[: self.last]:
                if not self._reads_trained(experience.test):
                    raise UserError(
                        f"diagnose: strategy '{', '.join(self.trainer.strategy.names)}' trains parameters of each task's "
                        f"own, and none that '{experience.name}' reads {when}, so its recovery would tell nothing; diagnose "
                        "a run of a strategy whose tasks share what is trained, for example naive"
                    )

    def _reads_trained(self, data: TensorData) -> bool:
        """Whether answers to ``data``, as the model is, depend on anything that may be trained."""
        import torch

        from cl_lab import seeding
        from cl_lab.records import Batch

        learner, few = self.learner, slice(0, _ROWS)
        learner.model.eval()
        with torch.enable_grad():
            outputs = learner.forward(Batch(data.x[few], data.y[few], data.t[few], 0, raw=data.raw).to(learner.device))
            if not outputs.requires_grad:
                return False
            said = torch.where(outputs.isfinite(), outputs, 0.0)
            # Not the loss, whose gradient is zero as well where an answer is certain.
            drawn = torch.randn(said.shape[-1], generator=seeding.generator(self.config.seed, "diagnose", "reads"))
            trained = [p for p in learner.model.parameters() if p.requires_grad]
            found = torch.autograd.grad((said @ drawn.to(said)).sum(), trained, allow_unused=True)
        return any(g is not None and bool(g.any()) for g in found)

    def _score(self, data: TensorData) -> float:
        return float(self.learner.score(data, self.config.evaluation.batch_size).value)

    def _weights(self, learnt: int | str) -> dict[str, Tensor]:
        from cl_lab.checkpoint import load_weights

        return load_weights(_weights_file(self.folder, learnt))

    def _pairs(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        before = self._weights(0)
        for learnt in range(1, self.last + 2):
            after = self._weights(learnt)
            yield before, after
            before = after


# --- what it reads and writes -----------------------------------------------------------------------------------------


def _check_arguments(steps: int | None, lr: float | None, share: float, threshold: float) -> None:
    if steps is not None and steps < 1:
        raise ConfigError(f"diagnose: steps = {steps}: must be 1 or more; leave it out for a tenth of the experience's")
    if lr is not None and not (lr > 0 and math.isfinite(lr)):
        raise ConfigError(f"diagnose: lr = {lr}: must be above 0; leave it out for the run's own")
    if not 0 < share < 1:
        raise ConfigError(f"diagnose: share = {share}: must lie between 0 and 1, for example 0.5")
    if not _LOW <= threshold <= 1:
        raise ConfigError(f"diagnose: threshold = {threshold}: must lie between {_LOW} and 1, for example 0.8")


def _read(folder: Path) -> tuple[dict[str, Any], int]:
    """The document of the run in ``folder``, and the index of the last experience that it has learnt and kept."""
    saved_config(folder)  # says what is wrong with a folder that holds nothing
    document = read_document(folder)
    if document is None:
        if is_comparison(folder):
            first = min((p.name for p in (folder / "runs").iterdir() if p.is_dir()), default="…")
            raise UserError(
                f"diagnose: '{folder}' holds a comparison; name one of its runs, for example {folder}/runs/{first}"
            )
        raise UserError(f"diagnose: '{folder}' holds a run that has not begun; run it with --resume first")
    learnt = len(document["matrix"])
    if learnt < 2:
        raise UserError(
            f"diagnose: the run in '{folder}' has learnt {learnt} of {len(document['experiences'])} experiences, and two at "
            "least are needed; finish it with --resume, or take a stream of more experiences"
        )
    missing = [n for n in range(learnt + 1) if not _weights_file(folder, n).is_file()]
    if missing:
        which = "no weights" if len(missing) == learnt + 1 else f"no weights after {missing[0]} experiences"
        raise UserError(
            f"diagnose: the run in '{folder}' kept {which}; run it again, without --resume, with checkpoint.experiences=true"
        )
    return document, learnt - 1


def _check_answers(trainer: Any) -> None:
    """Refuse what the weights of the model alone say nothing about."""
    from cl_lab.protocols import Strategy

    if trainer.stream.objective == "regression":
        raise UserError(
            f"diagnose: stream '{trainer.stream.name}' is a regression, and a recovery ratio is one of right answers; "
            "diagnose a run on classes or texts"
        )
    for name, link in zip(trainer.strategy.names, trainer.strategy.links, strict=True):
        if any(getattr(type(link), hook) is not getattr(Strategy, hook) for hook in ("predict", "encode", "adapters")):
            raise UserError(
                f"diagnose: strategy '{name}' answers with more than the model's own weights, so they do not tell what it "
                "knows; diagnose a run of a strategy whose model answers itself, for example naive"
            )


def _mostly_within(test: TensorData, train: TensorData) -> bool:
    """Whether more than half of the test rows are training rows (a duplicate here and there is none)."""
    if test.x.shape[1:] != train.x.shape[1:] or test.x.dtype != train.x.dtype:
        return False

    def rows(data: TensorData) -> list[bytes]:
        return [x + y.tobytes() for x, y in zip(_bytes(data.x), data.y.numpy(), strict=True)]

    known = set(rows(train))
    return 2 * sum(row in known for row in rows(test)) > len(test)


def _bytes(x: Tensor) -> list[bytes]:
    return [row.tobytes() for row in x.contiguous().numpy()]


def _together(groups: Tensor, x: Tensor) -> Tensor:
    """``groups`` ``[N]`` with those that hold equal rows of ``x`` as one, which goes by the lowest of their numbers."""
    import torch

    joined = {g: g for g in groups.tolist()}

    def lowest(g: int) -> int:
        while joined[g] != g:
            joined[g] = joined[joined[g]]
            g = joined[g]
        return g

    first: dict[bytes, int] = {}
    for row, group in zip(_bytes(x), groups.tolist(), strict=True):
        a, b = sorted((lowest(group), lowest(first.setdefault(row, group))))
        joined[b] = a
    return torch.tensor([lowest(g) for g in groups.tolist()], dtype=groups.dtype)


def _halves(experience: Experience, share: float, seed: int) -> tuple[TensorData, TensorData]:
    """The test rows in two, those that belong together or are equal on one side."""
    import torch

    from cl_lab import seeding

    test = experience.test
    groups = _together(torch.arange(len(test)) if experience.groups is None else experience.groups, test.x)
    there = groups.unique()
    drawn = there[seeding.permutation(len(there), seed, "diagnose", "half", experience.index)]
    count = round(share * len(there))
    if not 0 < count < len(there):
        raise UserError(
            f"diagnose: share = {share}: leaves nothing on one side of the {len(there)} parts that the test set of "
            f"'{experience.name}' divides into; set --share nearer to 0.5, or scenario.test_samples higher"
        )
    chosen = torch.isin(groups, drawn[:count])
    return test.take(chosen.nonzero().flatten()), test.take((~chosen).nonzero().flatten())


def _labels(stream: Stream, j: int, last: int) -> dict[str, Tensor] | None:
    """Outputs (in words, first tokens) of experience ``j`` alone, of experiences up to ``last`` alone, and of both."""
    import torch

    if stream.task_labels:
        return None
    outputs = [torch.tensor(e.classes) for e in stream.experiences]
    if stream.answers is not None:
        outputs = [stream.answers[classes, 0].unique() for classes in outputs]
    own, later = outputs[j], torch.cat(outputs[j + 1 : last + 1]).unique()
    found = {
        "own": own[~torch.isin(own, later)],
        "later": later[~torch.isin(later, own)],
        "shared": own[torch.isin(own, later)],
    }
    return found if len(found["later"]) else None


def _half_lost_at(curve: Sequence[Sequence[float]]) -> float | None:
    """The share of the steps by which half of the drop had happened; ``None`` where there was none."""
    start, end = curve[0][1], curve[-1][1]
    if end >= start:
        return None
    return next(float(share) for share, score in curve if score <= (start + end) / 2)


def _weights_file(folder: Path, learnt: int | str) -> Path:
    return folder / WEIGHTS / f"{learnt}.safetensors"


def _in_words(task: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {task[name]:.4f}" for name in ("original", "forgotten", "recovered", "control"))
    ratio = "" if task["ratio"] is None else f", ratio {task['ratio']:.2f}"
    return f"{task['name']}: {scores}{ratio}: {task['verdict']}"


def _write(path: Path, document: Mapping[str, Any]) -> None:
    from cl_lab.files import write_atomically

    try:
        write_atomically(path, json.dumps(document, indent=1))
    except OSError as error:
        raise UserError(f"diagnose: cannot write {path}: {error.strerror}; make the folder writable") from error
