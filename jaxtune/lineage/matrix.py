"""The stage matrix: what each release scores on each stage's held-out rows, and what learning on has cost and brought.

a[i, j] is the score on stage j after release i; i = 0 is the base. Below the diagonal stands what was kept, on it what was
learnt, one above it what was known before it was learnt. Higher above it nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.evals import forgetting, measure, tasks
from jaxtune.evals.protected import Protected
from jaxtune.statistics import Estimate


class Matrix(NamedTuple):
    """`cells[i][j]` is a model's result on a stage's rows, or None; `models` and `stages` name rows and columns.

    `stages[j]` is learnt by `models[j + 1]`.
    """

    models: list[str]
    stages: list[Protected]
    cells: list[list[tasks.Result | None]]

    @property
    def values(self) -> np.ndarray:
        """The judged metric of each cell, NaN where nothing was measured."""
        return np.asarray(
            [[_value(cell, one) for cell, one in zip(row, self.stages, strict=True)] for row in self.cells]
        )


def _value(cell: tasks.Result | None, one: Protected) -> float:
    return float("nan") if cell is None else cell.metrics[one.metric].value


def transfer(matrix: Matrix) -> dict[str, Estimate]:
    """What learning on has done to other stages, by `evals.forgetting`: forgetting, backward_transfer and forward_transfer, each in
    the unit of the stages' metrics; a loss counts with its sign turned.

    Intervals: each stage's difference is a paired bootstrap over its rows, whatever its metric is made of, and those of
    different stages are independent, so that the limits of the sum Σθ are √Σ(limit - θ)² from it, on either side (Zou & Donner
    2008, doi:10.1002/sim.3095). The best earlier release in forgetting is taken as given.

    Returns:
      the figures that can be had: none of one stage alone, nor where a cell was not measured.
    """
    last = len(matrix.stages)
    signs = np.asarray([1.0 if one.higher_is_better else -1.0 for one in matrix.stages])
    before_J, scores_SJ = (signs * matrix.values)[0], (signs * matrix.values)[1:]
    if last < 2 or np.isnan(np.diagonal(scores_SJ)).any():
        return {}
    best = [1 + int(np.nanargmax(scores_SJ[:-1, j])) for j in range(last - 1)]
    found = {
        "forgetting": (forgetting.forgetting(scores_SJ), [(last, best[j], j) for j in range(last - 1)]),
        "backward_transfer": (forgetting.backward_transfer(scores_SJ), [(1 + j, last, j) for j in range(last - 1)]),
        "forward_transfer": (forgetting.forward_transfer(scores_SJ, before_J), [(0, j, j) for j in range(1, last)]),
    }
    estimates = {
        name: _estimate(value, [_gap(matrix, *one) for one in pairs]) for name, (value, pairs) in found.items()
    }
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _gap(matrix: Matrix, before: int, after: int, j: int) -> Estimate | None:
    """a[after, j] - a[before, j], more being better, with its paired interval."""
    one, first, second = matrix.stages[j], matrix.cells[before][j], matrix.cells[after][j]
    if first is None or second is None:
        return None
    gap = tasks.compare(first, second, **measure.intervals(one.config))[one.metric]
    value, low, high = gap["value"], gap["low"], gap["high"]
    return Estimate(value, low, high) if one.higher_is_better else Estimate(-value, -high, -low)


def _estimate(value: float, gaps: Sequence[Estimate | None]) -> Estimate | None:
    """The mean of differences, with the interval that theirs make; None where one of them is not known."""
    known = [gap for gap in gaps if gap is not None]
    if len(known) < len(gaps):
        return None
    below = np.sqrt(sum((gap.value - gap.low) ** 2 for gap in known)) / len(known)
    above = np.sqrt(sum((gap.high - gap.value) ** 2 for gap in known)) / len(known)
    return Estimate(value, value - float(below), value + float(above))


def table(matrix: Matrix) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) for terminal and report."""
    header = ["After", *(f"{one.name} ({one.metric})" for one in matrix.stages)]
    rows = []
    for model, row in zip(matrix.models, matrix.cells, strict=True):
        rows.append([model, *(_told(cell, one) for cell, one in zip(row, matrix.stages, strict=True))])
    return header, rows


def _told(cell: tasks.Result | None, one: Protected) -> str:
    if cell is None:
        return "–"
    e = cell.metrics[one.metric]
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
