"""Metrics of continual learning: pure functions on the score matrix R.

``R[i][j]`` is the score on the test set of experience ``j`` after learning experience ``i`` (both from 0), and
``initial`` (the row R₀, ``[T]``) holds the scores before any training. Scores are "higher is better" and need not lie
in [0, 1]: a regression's score is minus its mean squared error, so ``average_accuracy`` is minus the mean loss, and a loss
that grows is forgetting (``first_minus_last_forgetting`` is ``F_T`` of Lin et al. 2023, "Theory on Forgetting and
Generalization of Continual Learning"). Shares of an ideal score (the omegas) are defined where that is positive.

The field has several quantities under one name; here each has a name of its own:

* forgetting: :func:`forgetting` (Chaudhry: the best of *earlier* rows minus the last),
  :func:`first_minus_last_forgetting` (Avalanche: the score just after learning minus the last, which is −BWT),
  :func:`max_including_last_forgetting` (Mammoth, PyCIL: the best of *all* rows minus the last, never negative);
* accuracy: :func:`average_accuracy` weighs experiences alike, :func:`weighted_average_accuracy` (Avalanche's
  ``Top1_Acc_Stream``) weighs test samples alike;
* anytime accuracy: :func:`average_anytime_accuracy` weighs evaluations alike, :func:`a_auc` (Koh) training samples alike;
* omega: :func:`omega_all` (Kemker: one ideal accuracy) and :func:`omega_streaming` (REMIND: an offline curve).

Every function takes a matrix of ``k ≤ T`` rows and ``T`` columns. With ``k < T`` (a run under way, or one that
stopped) it gives the value at that point: T is read as k, and columns of experiences not yet learnt are left out.
Where a formula is undefined (a mean over no experience, say BWT for one) the value is ``nan``, which :func:`summary`
turns into ``None``. Every function raises :class:`ValueError` when the matrix is empty, ragged, has more rows than
columns, or holds an entry that is not a finite number, and when a vector that goes with it is not ``[T]`` finite
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

Anytime = Mapping[str, Any]
"""An evaluation in training: ``step`` and ``samples`` (how many were taken before it), ``experience`` (index of the one
being learnt), ``accuracies`` ``[T]`` (scores, where they are no accuracies)."""


class Interval(TypedDict):
    """Mean, sample standard deviation and 95 % confidence interval of repeated measurements."""

    mean: float
    std: float
    ci95: list[float]


def average_accuracy(matrix: npt.ArrayLike) -> float:
    """Mean score over all experiences learnt, after the last one.

    ``ACC = 1/T Σ_j R[T,j]``. Lopez-Paz & Ranzato 2017 (GEM), Eq. 2. ``matrix`` is ``[k, T]``.
    Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    return _mean(_learnt(matrix)[-1])


def weighted_average_accuracy(matrix: npt.ArrayLike, test_samples: npt.ArrayLike) -> float:
    """Share of right answers over the union of all test sets learnt, after the last experience.

    ``Σ_j n_j R[T,j] / Σ_j n_j`` with ``n_j`` the number of test samples of experience j: each sample weighs the same,
    as in Avalanche's ``Top1_Acc_Stream``. ``matrix`` is ``[k, T]``, ``test_samples`` ``[T]``. Raises
    :class:`ValueError` also for a negative number of samples, or none in the first test set.
    """
    R = _learnt(matrix)
    weights = _weights(test_samples, _columns(matrix))[: len(R)]
    return float(R[-1] @ weights / weights.sum())


def valid_output_rate(valid: npt.ArrayLike) -> float:
    """Mean share of free answers that are one of their task's answers, right or wrong, after the last experience.

    ``1/T Σ_j V[T,j]``. A model that has lost a task's format and not its knowledge shows it here first. ``valid`` is
    ``[k, T]``, laid out as a score matrix. Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    return average_accuracy(valid)


def accuracy_given_valid(matrix: npt.ArrayLike, valid: npt.ArrayLike) -> float:
    """Mean accuracy among the answers that are one of their task's, after the last experience.

    ``mean_j R[T,j] / V[T,j]`` over the experiences with ``V[T,j] > 0``; ``nan`` where there are none. ``matrix`` and
    ``valid`` are ``[k, T]``. Raises :class:`ValueError` for a malformed matrix (see the module) or unequal shapes.
    """
    R, V = _learnt(matrix), _learnt(valid)
    if R.shape != V.shape:
        raise ValueError(f"a score matrix {list(R.shape)} and valid shares {list(V.shape)} do not go together")
    some = V[-1] > 0
    return _mean(R[-1][some] / V[-1][some])


def general_ability_delta(general: npt.ArrayLike) -> float:
    """How what a model knows beside its stream changed: its scores now minus those before training (negative: lost).

    ``GAD = 1/M Σ_m (G[t,m] − G[0,m])`` over M sets of general abilities. Wang et al. 2023 (TRACE, arXiv 2310.06762), §3.3
    "General Ability Delta". ``general`` is ``[n, M]``: row 0 before training, the last row now. Raises
    :class:`ValueError` where it is empty, ragged, or holds an entry that is not a finite number.
    """
    G = _table(general, "general", "needs [n, M] with at least one row and one set", "G")
    return _mean(G[-1] - G[0])


def average_incremental_accuracy(matrix: npt.ArrayLike) -> float:
    """Mean, over the whole run, of the average accuracy on what had been learnt so far.

    ``1/T Σ_i (1/i Σ_{j≤i} R[i,j])``. Rebuffi et al. 2017 (iCaRL), §4 "average incremental accuracy". ``matrix`` is
    ``[k, T]``. Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    R = _learnt(matrix)
    return _mean([_mean(R[i, : i + 1]) for i in range(len(R))])


def average_anytime_accuracy(anytime: Iterable[Anytime]) -> float:
    """Mean accuracy on the experiences met so far, over all evaluations during training.

    ``1/N Σ_n (1/k_n Σ_{j≤k_n} A(E_j, f_n))`` with ``k_n`` the experience being learnt at evaluation n. Caccia et al.
    2022 (ER-ACE), and the online survey of Soutif-Cormerais et al. 2023. Evaluations weigh the same, however far apart
    they are (cf. :func:`a_auc`), so evaluate every so many steps. ``anytime`` is a list of
    ``{"step", "experience", "accuracies": [T]}``; ``nan`` where it is empty. Raises :class:`ValueError` for a record
    whose accuracies do not cover the experiences met, or are not finite.
    """
    return _mean([_mean(scores) for _, scores in _evaluations(anytime)])


def a_auc(anytime: Iterable[Anytime]) -> float:
    """Area under the curve of accuracy over training samples, per sample: anytime accuracy as an integral.

    ``A_AUC = 1/(s_N − s_1) ∫ a(s) ds``, the curve running straight from evaluation to evaluation (trapezium rule), where
    ``a`` is the mean accuracy on the experiences met so far and ``s`` the training samples that had passed (``samples`` of
    a record; its ``step`` where that is missing). After Koh et al. 2022 (i-Blurry), "A_AUC", whose code takes the plain
    mean of evaluations made every so many samples. That plain mean is :func:`average_anytime_accuracy`, from which this
    differs in two ways: an evaluation weighs as many samples as lie half-way to its neighbours, so that uneven spacing
    (experiences that do not divide by ``every_steps``, batches of unequal size) does not tilt it; and the first and the
    last, having one neighbour, weigh half. Nothing is assumed before the first evaluation or after the last. ``anytime``
    as there, in order; ``nan`` where it is empty, the one value where there is one. Raises :class:`ValueError` also for
    samples that do not increase.
    """
    records = list(anytime)
    heights = np.array([_mean(scores) for _, scores in _evaluations(records)])
    if len(heights) < 2:
        return _mean(heights)
    widths = np.diff([float(r.get("samples", r["step"])) for r in records])
    if widths.min() <= 0:
        raise ValueError(
            f"anytime[{int(np.argmin(widths)) + 1}]: its samples do not come after those of the one before"
        )
    return float((heights[:-1] + heights[1:]) @ widths / 2 / widths.sum())


def bwt(matrix: npt.ArrayLike) -> float:
    """Backward transfer: how later learning changed the scores of earlier experiences (negative: forgetting).

    ``BWT = 1/(T−1) Σ_{j<T} (R[T,j] − R[j,j])``. Lopez-Paz & Ranzato 2017 (GEM), Eq. 3. ``matrix`` is ``[k, T]``;
    ``nan`` for one experience. Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    R = _learnt(matrix)
    return _mean((R[-1] - np.diag(R))[:-1])


def fwt(matrix: npt.ArrayLike, initial: npt.ArrayLike) -> float:
    """Forward transfer: the score on an experience just before learning it, over that of the untrained model.

    ``FWT = 1/(T−1) Σ_{j≥2} (R[j−1,j] − R₀[j])``. Lopez-Paz & Ranzato 2017 (GEM), Eq. 4. ``matrix`` is ``[k, T]``,
    ``initial`` ``[T]``; ``nan`` for one experience. Class-incremental learners cannot name classes they never met, so
    there it merely says "minus chance". Raises :class:`ValueError` for a malformed matrix or vector (see the module).
    """
    R = _learnt(matrix)
    before = _vector(initial, _columns(matrix), "initial")[: len(R)]
    return _mean(np.diag(R, 1) - before[1:])


def forgetting(matrix: npt.ArrayLike) -> float:
    """Forgetting: the best score an experience had before the last one was learnt, minus its score now.

    ``F = 1/(T−1) Σ_{j<T} (max_{l∈{1,…,T−1}} R[l,j] − R[T,j])``. Chaudhry et al. 2018 (RWalk), §3 "forgetting measure":
    the maximum never takes in the last row, so later gains give negative values. ``matrix`` is ``[k, T]``; ``nan`` for
    one experience. Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    R = _learnt(matrix)
    return math.nan if len(R) == 1 else _mean((R[:-1].max(axis=0) - R[-1])[:-1])


def first_minus_last_forgetting(matrix: npt.ArrayLike) -> float:
    """Forgetting as Avalanche reports it: the score just after learning minus the last, which is −BWT.

    ``1/(T−1) Σ_{j<T} (R[j,j] − R[T,j])``. Avalanche 0.6, ``evaluation/metrics/forgetting_bwt.py``
    (``StreamForgetting``). ``matrix`` is ``[k, T]``; ``nan`` for one experience.
    Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    R = _learnt(matrix)
    return _mean((np.diag(R) - R[-1])[:-1])


def max_including_last_forgetting(matrix: npt.ArrayLike) -> float:
    """Forgetting as Mammoth and PyCIL report it: the best score of the whole run minus the last, never negative.

    ``1/(T−1) Σ_{j<T} (max_{l∈{1,…,T}} R[l,j] − R[T,j])``. Mammoth ``utils/metrics.py``, PyCIL ``trainer.py``; both
    hold 0 above the diagonal, we hold what was measured there. ``matrix`` is ``[k, T]``; ``nan`` for one experience.
    Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    R = _learnt(matrix)
    return _mean((R.max(axis=0) - R[-1])[:-1])


def learning_accuracy(matrix: npt.ArrayLike) -> float:
    """Mean score on each experience just after learning it: plasticity.

    ``LA = 1/T Σ_j R[j,j]``. Riemer et al. 2019 (MER), §5 "learning accuracy". ``matrix`` is ``[k, T]``.
    Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    return _mean(np.diag(_learnt(matrix)))


def intransigence(matrix: npt.ArrayLike, joint: npt.ArrayLike) -> float:
    """Intransigence: how much better a jointly trained model scores than the learner just after learning.

    ``I = 1/T Σ_j (a*_j − R[j,j])``, the mean of ``I_k`` of Chaudhry et al. 2018 (RWalk), §3 "intransigence measure".
    There ``a*_k`` is trained on experiences up to k; a final joint model, trained on all, is the usual stand-in.
    ``matrix`` is ``[k, T]``, ``joint`` ``[T]``. Raises :class:`ValueError` for a malformed matrix or vector (see the
    module).
    """
    R = _learnt(matrix)
    return _mean(_vector(joint, _columns(matrix), "joint")[: len(R)] - np.diag(R))


def min_accuracy(matrix: npt.ArrayLike, anytime: Iterable[Anytime] = ()) -> float:
    """Worst score of each earlier experience at any time since it was learnt, averaged.

    ``min-ACC = 1/(T−1) Σ_{j<T} min_{n after learning j} A(E_j, f_n)``. De Lange et al. 2023 (the stability gap),
    "average minimum accuracy". The minimum is over the rows of R after row j and over the ``anytime`` evaluations made
    while a later experience was being learnt; with none of these it sees no more than the rows. ``matrix`` is
    ``[k, T]``; ``nan`` for one experience.
    Raises :class:`ValueError` for a malformed matrix or record (see the module).
    """
    R = _learnt(matrix)
    lowest = np.array([R[j + 1 :, j].min(initial=np.inf) for j in range(len(R))])
    for current, scores in _evaluations(anytime):
        if current < len(R):
            lowest[:current] = np.minimum(lowest[:current], scores[:current])
    return _mean(lowest[:-1])


def worst_case_accuracy(matrix: npt.ArrayLike, anytime: Iterable[Anytime] = ()) -> float:
    """The current experience's score joined with the worst that earlier ones went through.

    ``WC-ACC = 1/T · R[T,T] + (1 − 1/T) · min-ACC``. De Lange et al. 2023 (the stability gap), "worst-case accuracy"; a
    lower bound of :func:`average_accuracy`. ``matrix`` is ``[k, T]``, ``anytime`` as in :func:`min_accuracy`. Raises
    :class:`ValueError` for a malformed matrix or record (see the module).
    """
    R = _learnt(matrix)
    T = len(R)
    return float(R[0, 0]) if T == 1 else float(R[-1, -1] / T + (1 - 1 / T) * min_accuracy(matrix, anytime))


def omega_base(matrix: npt.ArrayLike, offline: npt.ArrayLike) -> float:
    """Omega base: how much of the first experience is kept, as a share of an offline model's score on it.

    ``Ω_base = 1/(T−1) Σ_{i≥2} R[i,1] / α_ideal`` with ``α_ideal = offline[0]``. Kemker et al. 2018, "Ω_base".
    ``matrix`` is ``[k, T]``, ``offline`` ``[T]`` (scores of the offline model per experience); ``nan`` for one
    experience or an ideal that is not positive. Raises :class:`ValueError` for a malformed matrix or vector (see the
    module).
    """
    R = _learnt(matrix)
    return _ratio(_mean(R[1:, 0]), _vector(offline, _columns(matrix), "offline")[0])


def omega_new(matrix: npt.ArrayLike) -> float:
    """Omega new: the score on each experience after the first just after learning it.

    ``Ω_new = 1/(T−1) Σ_{i≥2} R[i,i]``. Kemker et al. 2018, "Ω_new" (not divided by any ideal). ``matrix`` is
    ``[k, T]``; ``nan`` for one experience. Raises :class:`ValueError` for a malformed matrix (see the module).
    """
    return _mean(np.diag(_learnt(matrix))[1:])


def omega_all(matrix: npt.ArrayLike, offline: npt.ArrayLike, test_samples: npt.ArrayLike | None = None) -> float:
    """Omega all: the score on everything learnt so far, as a share of an offline model's on the first experience.

    ``Ω_all = 1/(T−1) Σ_{i≥2} α_all,i / α_ideal`` with ``α_ideal = offline[0]`` and ``α_all,i`` the score over the test
    sets up to i: their mean, or weighted by ``test_samples``. Kemker et al. 2018, "Ω_all". It may exceed 1 where the
    first experience is hard or the offline model weak. ``matrix`` is ``[k, T]``, ``offline`` and ``test_samples``
    ``[T]``; ``nan`` for one experience or an ideal that is not positive. Raises :class:`ValueError` for a malformed
    matrix or vector (see the module).
    """
    ideal = _vector(offline, _columns(matrix), "offline")[0]
    return _ratio(_mean(_seen_so_far(matrix, test_samples)[1:]), ideal)


def omega_streaming(
    matrix: npt.ArrayLike, offline_curve: npt.ArrayLike, test_samples: npt.ArrayLike | None = None
) -> float:
    """Omega of streaming learning (REMIND): the score on all seen so far over an offline model's at the same point.

    ``Ω = 1/T Σ_{i≥1} α_i / α_offline,i``, the first experience included. Hayes et al. 2020 (REMIND). Not Kemker's
    :func:`omega_all`: the reference here is a curve, ``offline_curve[i]`` being what an offline model trained on
    experiences up to i scores on them. ``matrix`` is ``[k, T]``, ``offline_curve`` and ``test_samples`` ``[T]``;
    ``nan`` where the curve is not positive. Raises :class:`ValueError` for a malformed matrix or vector (see the module).
    """
    seen = _seen_so_far(matrix, test_samples)
    curve = _vector(offline_curve, _columns(matrix), "offline_curve")
    return _mean([_ratio(a, b) for a, b in zip(seen, curve, strict=False)])


def summary(
    matrix: npt.ArrayLike,
    initial: npt.ArrayLike | None,
    *,
    test_samples: npt.ArrayLike | None = None,
    anytime: Sequence[Anytime] = (),
    joint: npt.ArrayLike | None = None,
    cumulative: npt.ArrayLike | None = None,
    valid: npt.ArrayLike | None = None,
    general: npt.ArrayLike | None = None,
) -> dict[str, float | None]:
    """Every metric the given inputs allow, by function name, ready for JSON (undefined values are ``None``).

    ``matrix`` is ``[k, T]``; ``initial``, ``test_samples`` and ``joint`` (scores of an offline model per experience)
    are ``[T]``; ``cumulative`` ``[T, T]`` is the score matrix of a learner whose row i is an offline model's of
    experiences up to i, so that its scores on those are REMIND's offline curve; ``valid`` ``[k, T]`` are shares of answers
    that are their task's; ``general`` ``[n, M]`` scores of general abilities, from before training on. Left out:
    ``weighted_average_accuracy`` without ``test_samples``, ``average_anytime_accuracy`` and ``a_auc`` without ``anytime``,
    ``intransigence`` and Kemker's omegas without ``joint``, ``omega_streaming`` without ``cumulative``,
    ``valid_output_rate`` and ``accuracy_given_valid`` without ``valid``, ``general_ability_delta`` without ``general``.
    ``fwt`` is always there, ``None`` without ``initial``. Raises :class:`ValueError` for a malformed matrix, vector or
    record (see the module).
    """
    values = {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "bwt": bwt(matrix),
        "fwt": math.nan if initial is None else fwt(matrix, initial),
        "learning_accuracy": learning_accuracy(matrix),
        "first_minus_last_forgetting": first_minus_last_forgetting(matrix),
        "max_including_last_forgetting": max_including_last_forgetting(matrix),
        "min_accuracy": min_accuracy(matrix, anytime),
        "worst_case_accuracy": worst_case_accuracy(matrix, anytime),
    }
    if test_samples is not None:
        values["weighted_average_accuracy"] = weighted_average_accuracy(matrix, test_samples)
    if valid is not None:
        values["valid_output_rate"] = valid_output_rate(valid)
        values["accuracy_given_valid"] = accuracy_given_valid(matrix, valid)
    if general is not None:
        values["general_ability_delta"] = general_ability_delta(general)
    if anytime:
        values["average_anytime_accuracy"] = average_anytime_accuracy(anytime)
        values["a_auc"] = a_auc(anytime)
    if joint is not None:
        values["intransigence"] = intransigence(matrix, joint)
        values["omega_base"] = omega_base(matrix, joint)
        values["omega_new"] = omega_new(matrix)
        values["omega_all"] = omega_all(matrix, joint, test_samples)
    if cumulative is not None:
        curve = _seen_so_far(cumulative, test_samples)
        values["omega_streaming"] = omega_streaming(matrix, curve, test_samples)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def interval(values: Iterable[float]) -> Interval:
    """Mean, sample standard deviation (n − 1) and 95 % confidence interval of the mean, by Student's t.

    ``mean ± t_{0.975, n−1} · std / √n`` over ``n`` independent runs (seeds). One value says nothing about its spread:
    then ``std`` is 0.0 and ``ci95`` is ``[mean, mean]``, so print ``n`` beside it. Raises :class:`ValueError` when
    there is no value, or one that is not a finite number.
    """
    sample = _vector(list(values), None, "values")
    n = len(sample)
    if n == 0:
        raise ValueError("no values to make an interval of")
    mean = float(sample.mean())
    if n == 1:
        return {"mean": mean, "std": 0.0, "ci95": [mean, mean]}
    from scipy.stats import t  # 0.5 s to import, and only reports over several seeds need it

    std = float(sample.std(ddof=1))
    half = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def _mean(values: npt.ArrayLike) -> float:
    # numpy warns about the mean of nothing; for us it is simply undefined.
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else math.nan


def _ratio(value: float, ideal: float) -> float:
    return float(value / ideal) if ideal > 0 else math.nan


def _full(matrix: npt.ArrayLike) -> Array:
    R = _table(matrix, "score matrix", "needs [k, T] with at least one row and one column", "R")
    if R.shape[0] > R.shape[1]:
        raise ValueError(f"score matrix of shape {list(R.shape)}: has more rows than experiences (columns)")
    return R


def _table(values: npt.ArrayLike, name: str, needs: str, letter: str) -> Array:
    """``values`` as a float64 table, neither empty nor ragged nor holding what is not finite, or an error that says so."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: rows must be equally long lists of numbers") from None
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} of shape {list(table.shape)}: {needs}")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        i, j = (int(v) for v in bad[0])
        raise ValueError(f"{name}: {letter}[{i}][{j}] is {table[i, j]}; every entry must be a finite number")
    return table


def _learnt(matrix: npt.ArrayLike) -> Array:
    # The square part: scores on the k experiences learnt so far.
    R = _full(matrix)
    return R[:, : len(R)]


def _columns(matrix: npt.ArrayLike) -> int:
    return int(np.shape(matrix)[1])


def _vector(values: npt.ArrayLike, length: int | None, name: str) -> Array:
    try:
        v = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be a list of numbers") from None
    if v.ndim != 1 or (length is not None and len(v) != length):
        raise ValueError(f"{name} of shape {list(v.shape)}: needs [{'n' if length is None else length}]")
    if not np.isfinite(v).all():
        raise ValueError(f"{name}: entry {int(np.argmin(np.isfinite(v)))} is not a finite number")
    return v


def _weights(test_samples: npt.ArrayLike, length: int) -> Array:
    weights = _vector(test_samples, length, "test_samples")
    if weights.min() < 0 or weights[0] == 0:
        raise ValueError("test_samples: must not be negative, and the first must be positive")
    return weights


def _seen_so_far(matrix: npt.ArrayLike, test_samples: npt.ArrayLike | None) -> list[float]:
    R = _learnt(matrix)
    T = _columns(matrix)
    weights = np.ones(T) if test_samples is None else _weights(test_samples, T)
    return [float(np.average(R[i, : i + 1], weights=weights[: i + 1])) for i in range(len(R))]


def _evaluations(anytime: Iterable[Anytime]) -> list[tuple[int, Array]]:
    # (index of the experience being learnt, scores on all met so far) of each evaluation.
    found = []
    for n, record in enumerate(anytime):
        current = int(record["experience"])
        scores = list(record["accuracies"])[: current + 1]
        if current < 0 or len(scores) <= current:
            raise ValueError(f"anytime[{n}]: {len(scores)} accuracies do not cover experience {current}")
        found.append((current, _vector(scores, None, f"anytime[{n}].accuracies")))
    return found
