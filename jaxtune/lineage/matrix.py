"""The stage matrix: what each release scores on each stage's held-out rows, and what learning on has cost and brought.

a[i, j] is the score on stage j after release i; i = 0 is the base. Below the diagonal stands what was kept, on it what was
learnt, one above it what was known before it was learnt. Higher above it nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.evals import measure, tasks
from jaxtune.evals.protected import Protected
from jaxtune.evals.statistics import Estimate


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
    """What learning on has done to other stages, T stages in all, each in the unit of its metric; a loss counts with its sign turned.

    forgetting         F = 1/(T-1) Σ_{j<T} (max_{j≤l<T} a[l,j] - a[T,j])    (Chaudhry et al. 2018, arXiv:1801.10112, eq. 3)
    backward_transfer  BWT = 1/(T-1) Σ_{j<T} (a[T,j] - a[j,j])             (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 3)
    forward_transfer   FWT = 1/(T-1) Σ_{1<j≤T} (a[j-1,j] - a[0,j])          (eq. 4 there, with the base in the place of a random model)

    Intervals: each stage's difference is a paired bootstrap over its rows, and those of different stages are independent, so
    that of the sum Σθ is Σθ ± √Σ(limit - θ)², side by side (Zou & Donner 2008, doi:10.1002/sim.3095). The best earlier
    release in F is taken as given.

    Returns:
      the figures that can be had: none of one stage alone, nor where a cell was not measured.
    """
    last, values, found = len(matrix.stages), matrix.values, {}
    signs = np.asarray([1.0 if one.higher_is_better else -1.0 for one in matrix.stages])
    best = (
        [1 + j + int(np.nanargmax(signs[j] * values[1 + j : last, j])) for j in range(last - 1)]
        if _whole(values)
        else []
    )
    pairs = {
        "forgetting": [(last, best[j], j) for j in range(last - 1)] if best else [],
        "backward_transfer": [(1 + j, last, j) for j in range(last - 1)],
        "forward_transfer": [(0, j, j) for j in range(1, last)],
    }
    for name, compared in pairs.items():
        gaps = [_gap(matrix, *one) for one in compared]
        known = [gap for gap in gaps if gap is not None]
        if known and len(known) == len(gaps):
            found[name] = _mean(known)
    return found


def _whole(values: np.ndarray) -> bool:
    """Whether each stage has been measured at least once since it was learnt, the last time included."""
    return len(values) > 2 and not np.isnan([values[1 + j, j] for j in range(values.shape[1])]).any()


def _gap(matrix: Matrix, before: int, after: int, j: int) -> Estimate | None:
    """a[after, j] - a[before, j], more being better, with its paired interval."""
    one, first, second = matrix.stages[j], matrix.cells[before][j], matrix.cells[after][j]
    if first is None or second is None:
        return None
    gap = tasks.compare(first, second, **measure.intervals(one.config))[one.metric]
    value, low, high = gap["value"], gap["low"], gap["high"]
    return Estimate(value, low, high) if one.higher_is_better else Estimate(-value, -high, -low)


def _mean(gaps: Sequence[Estimate]) -> Estimate:
    value = float(np.mean([gap.value for gap in gaps]))
    below = np.sqrt(sum((gap.value - gap.low) ** 2 for gap in gaps)) / len(gaps)
    above = np.sqrt(sum((gap.high - gap.value) ** 2 for gap in gaps)) / len(gaps)
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
