"""A model that learns one task after another: what it keeps of the earlier ones, and what they do for the later ones.

A *stage matrix* a[i, j] holds the score on task j after stage i, i = 0 … N - 1, higher being better; NaN where nothing was
measured. Stage i learns task i. With N stages and N tasks (GEM, arXiv:1706.08840, section 3; Chaudhry et al., arXiv:1801.10112,
section 3.2):

    average accuracy      A   = mean over j of a[N-1, j]
    backward transfer     BWT = mean over j < N-1 of a[N-1, j] - a[j, j]          below 0: later stages cost earlier tasks
    forgetting            F   = mean over j < N-1 of (max over i < N-1 of a[i, j]) - a[N-1, j]     from the best it ever was
    forward transfer      FWT = mean over j > 0 of a[j-1, j] - b[j]               b: the score before the first stage

A task whose scores a formula lacks is left out of its mean; with no task left the result is NaN. In F the maximum runs over
the stages that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxtune.statistics import Estimate
from jaxtune.types import UserError


class Transfer(NamedTuple):
    """The four measures of a stage matrix, in the scores' unit."""

    average: Estimate
    forgetting: Estimate
    backward: Estimate
    forward: Estimate


def average_accuracy(scores_SJ: np.ndarray) -> float:
    """Mean score over all tasks after the last stage."""
    return _mean(_matrix(scores_SJ)[-1])


def forgetting(scores_SJ: np.ndarray) -> float:
    """Mean over the tasks before the last of their best earlier score minus their last; below 0, they became better still."""
    return _mean(forgotten(scores_SJ)[: _matrix(scores_SJ).shape[0] - 1])


def forgotten(scores_SJ: np.ndarray) -> np.ndarray:
    """Of each task its best score before the last stage, minus its score after it, (J,); NaN where one of them is not known."""
    scores_SJ = _matrix(scores_SJ)
    earlier_SJ = scores_SJ[:-1]
    best_J = np.max(np.where(np.isnan(earlier_SJ), -np.inf, earlier_SJ), axis=0, initial=-np.inf)
    return np.where(np.isfinite(best_J), best_J, np.nan) - scores_SJ[-1]


def backward_transfer(scores_SJ: np.ndarray) -> float:
    """Mean over the tasks before the last of what became of them since the stage that taught them."""
    scores_SJ = _matrix(scores_SJ)
    taught = scores_SJ.shape[0] - 1
    return _mean(scores_SJ[-1, :taught] - np.diagonal(scores_SJ)[:taught])


def forward_transfer(scores_SJ: np.ndarray, before_J: np.ndarray) -> float:
    """Mean over the tasks after the first of what earlier stages did for them: their score when they were about to be taught,
    minus that before the first stage.
    """
    scores_SJ, before_J = _matrix(scores_SJ), np.asarray(before_J, np.float64)
    if before_J.shape != scores_SJ.shape[1:]:
        raise UserError(
            f"{before_J.size} scores before the first stage of {scores_SJ.shape[1]} tasks; expected one each (NaN: not measured)"
        )
    stages = scores_SJ.shape[0]
    ahead = np.asarray([scores_SJ[j - 1, j] for j in range(1, stages)])
    return _mean(ahead - before_J[1:stages])


def measure(
    scores_SJ: np.ndarray, before_J: np.ndarray | None = None, rows: Mapping[int, np.ndarray] | None = None, *,
    num_samples: int = 1000, confidence: float = 0.95, seed: int = 0,
) -> Transfer:  # fmt: skip
    """Returns the four measures of a stage matrix, with percentile intervals where the scores of rows are given.

    Args:
      scores_SJ: the score on task j after stage i; stages down, tasks across, task i taught by stage i; NaN = not measured.
      before_J: the scores before the first stage; None = not measured.
      rows: by task, the scores of its rows after each stage, (stages, M), whose mean over M is the task's column; with a stage more,
        (1 + stages, M), the first is before the first stage. A task's rows are resampled jointly over its stages, so that what
        they have in common cancels; tasks apart from each other. The column of a task without rows stays as it is.
      num_samples, confidence, seed: of the bootstrap.

    Raises:
      UserError: the matrix has no stage or fewer tasks than stages, or the rows are of other shapes.
    """
    scores_SJ = _matrix(scores_SJ)
    S, J = scores_SJ.shape
    before_J = np.full(J, np.nan) if before_J is None else np.asarray(before_J, np.float64)
    value = _all(scores_SJ, before_J)
    found = _resampled(scores_SJ, before_J, rows or {}, num_samples, seed)
    tail = (1 - confidence) / 2

    def estimate(at: int) -> Estimate:
        ends = found[:, at] if rows else np.asarray([np.nan])
        known = ends[np.isfinite(ends)]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        return Estimate(value[at], float(low), float(high))

    return Transfer(*map(estimate, range(4)))


def _resampled(
    scores_SJ: np.ndarray, before_J: np.ndarray, rows: Mapping[int, np.ndarray], num_samples: int, seed: int
) -> np.ndarray:
    """The four measures of each resample, (num_samples, 4)."""
    S, J = scores_SJ.shape
    rng, drawn = np.random.default_rng(seed), {}
    for task, rows_SM in sorted(rows.items()):
        rows_SM = np.asarray(rows_SM, np.float64)
        if not 0 <= task < J or rows_SM.ndim != 2 or rows_SM.shape[0] not in (S, S + 1) or not rows_SM.shape[1]:
            raise UserError(
                f"rows of task {task} have the shape {rows_SM.shape}; expected ({S} or {S + 1} stages, rows)"
            )
        M = rows_SM.shape[1]
        drawn[task] = np.stack([rows_SM[:, rng.integers(0, M, M)].mean(1) for _ in range(num_samples)])
    found = np.empty((num_samples, 4))
    for sample in range(num_samples):
        one_SJ, one_J = scores_SJ.copy(), before_J.copy()
        for task, means in drawn.items():
            one_SJ[:, task] = means[sample, -S:]
            if means.shape[1] > S:
                one_J[task] = means[sample, 0]
        found[sample] = _all(one_SJ, one_J)
    return found


_MEASURES: tuple[Callable[[np.ndarray], float], ...] = (average_accuracy, forgetting, backward_transfer)


def _all(scores_SJ: np.ndarray, before_J: np.ndarray) -> list[float]:
    return [*(one(scores_SJ) for one in _MEASURES), forward_transfer(scores_SJ, before_J)]


def _matrix(scores_SJ: np.ndarray) -> np.ndarray:
    scores_SJ = np.asarray(scores_SJ, np.float64)
    if scores_SJ.ndim != 2 or not scores_SJ.shape[0] or scores_SJ.shape[1] < scores_SJ.shape[0]:
        raise UserError(
            f"a stage matrix of shape {scores_SJ.shape}; expected stages down and at least as many tasks across, one taught by each"
        )
    return scores_SJ


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
