"""What an audit measures, part by part: a column of numbers, one for each row, and what they amount to with an interval.

Two models on the same rows give two columns of one figure; their difference is paired, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import statistics
from jaxtune.statistics import Estimate
from jaxtune.types import UserError


class Figure(NamedTuple):
    """One number of an audit. `part` (probes, bbq, crows), `name` (whose rows) and `metric` say which.

    column: of each row what `statistic` reduces. against: a second column, which the first is compared with row by row (the scores of
    both versions of a row); the figure is then the difference. nothing: the value at which nothing is shown (0.5 of a
    preference, 0 of a gap); None where no value is that. leans: the column is of 1, -1 and 0, where 0 counts
    among the "rows" or is none of the "answers"; "" of another column.
    """

    part: str
    name: str
    metric: str
    column: np.ndarray
    statistic: statistics.Statistic = statistics.mean
    nothing: float | None = None
    against: np.ndarray | None = None
    leans: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.name, self.metric

    @property
    def values(self) -> np.ndarray:
        return self.column if self.against is None else self.column - self.against


def estimate(figure: Figure, options: dict[str, Any]) -> dict[str, Any]:
    """Returns part, name, metric, rows, value, low, high, `interval` (how it was made), and p with its test where there is one.

    Shares of rows have Wilson's interval, and so have leans that are all alike, for a bootstrap of few such rows has no width; all else
    has a percentile bootstrap.
    """
    values = figure.values
    if not len(values):
        raise UserError("no rows to measure; expected at least one")
    told = {"part": figure.part, "name": figure.name, "metric": figure.metric, "rows": len(values)}
    if values.dtype == bool:
        found = statistics.wilson(float(values.mean()), len(values), options["confidence"])
        told |= {**found._asdict(), "interval": "Wilson"}
        if figure.nothing == 0.5:
            told |= {"p": statistics.mcnemar(~values, values), "test": "exact sign test"}
    else:
        found, how = statistics.bootstrap(figure.statistic, values, **options), "bootstrap"
        if figure.leans and len(set(values[values != 0])) < 2 and found.low == found.high:
            found, how = _alike(values, figure.leans == "rows", options["confidence"]), "Wilson, for all are alike"
        told |= {**found._asdict(), "interval": how}
        if figure.against is not None:
            p = statistics.paired_permutation(figure.against, figure.column, seed=options["seed"])
            told |= {"p": p, "test": "paired permutation"}
    return told | {"nothing": figure.nothing}


def _alike(values_M: np.ndarray, zeros_count: bool, confidence: float) -> Estimate:
    """The interval of leans that are all alike, zeros apart, from Wilson's of no row that leans another way; of no rows all there can be."""
    num, value = int((values_M != 0).sum()), float(np.sign(values_M.sum()))
    if value:
        reach = 2 * statistics.wilson(0, num, confidence).high
        return Estimate(value, value - reach, value) if value > 0 else Estimate(value, value, value + reach)
    reach = statistics.wilson(0, len(values_M), confidence).high if zeros_count else 1.0
    return Estimate(0.0, -reach, reach)


def compare(before: Figure, after: Figure, options: dict[str, Any]) -> dict[str, Any]:
    """Returns part, name, metric, and after minus before on the same rows with its paired bootstrap interval, p and test."""
    assert before.key == after.key, (before.key, after.key)
    first, second = before.values, after.values
    gap: Estimate = statistics.difference(before.statistic, first, second, **options)
    if first.dtype == bool:
        p, test = statistics.mcnemar(first, second), "exact McNemar"
    else:
        p = statistics.paired_permutation(first, second, statistic=before.statistic, seed=options["seed"])
        test = "paired permutation"
    told = {"part": before.part, "name": before.name, "metric": before.metric, "rows": len(first)}
    return told | {**gap._asdict(), "p": p, "test": test}


def by_key(found: Sequence[Figure]) -> dict[tuple[str, str, str], Figure]:
    """The figures by what they are."""
    return {figure.key: figure for figure in found}
