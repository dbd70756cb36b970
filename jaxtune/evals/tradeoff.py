"""Gain on a task against what it cost: points with intervals, which of them others dominate, and which one to take. NumPy only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import statistics
from jaxtune.statistics import Estimate
from jaxtune.types import UserError, nearest

PICKS = ("within", "gain", "knee")
_EXACT = 7  # points whose orders are all counted for a p; of more, so many are drawn:
_DRAWN = 10_000


class Point(NamedTuple):
    """One run: `gain`, after minus before of the task's metric, above 0 better; `retention`, the mean over protected sets of the
    change relative to the score before, below 0 worse, None without sets; `broken` the sets beyond their tolerance.
    """

    name: str
    gain: Estimate
    retention: Estimate | None
    broken: tuple[str, ...] = ()

    @property
    def kept(self) -> float:
        return self.retention.value if self.retention else 0.0


def headline(metrics: Mapping[str, Any]) -> str:
    """The metric that a report shows first: macro-F1 where there is one, else the first."""
    return "macro_f1" if "macro_f1" in metrics else next(iter(metrics))


def point(name: str, report: Mapping[str, Any], metric: str = "") -> Point:
    """A run by its report.json.

    Args:
      name: what to call it.
      report: with `difference` by metric, and `protected` by set.
      metric: of the gain; "" = the report's headline.

    Raises:
      UserError: the run measured no difference, or not by this metric.
    """
    gaps = report.get("difference") or {}
    if not gaps:
        raise UserError(
            f"{name} was not measured before and after: name held-out rows (data.test, data.test_fraction), and leave eval.before_after=True"
        )
    metric = metric or report.get("metric") or headline(gaps)
    if metric not in gaps:
        raise UserError(f"{name} has no metric {metric!r}; it has {', '.join(gaps)}{nearest(metric, list(gaps))}")
    sets = report.get("protected") or {}
    broken = tuple(one for one, told in sets.items() if told["broken"])
    return Point(name, oriented(gaps[metric], gaps[metric]["higher_is_better"]), retention(sets), broken)


def oriented(gap: Mapping[str, float], higher_is_better: bool) -> Estimate:
    """A difference, above 0 better."""
    if higher_is_better:
        return Estimate(gap["value"], gap["low"], gap["high"])
    return Estimate(-gap["value"], -gap["high"], -gap["low"])


def change(told: Mapping[str, Any]) -> Estimate:
    """What a protected set's score did, above 0 better, as a share of the score before (its own unit where that was 0)."""
    metric = told["metric"]
    by = abs(told["before"][metric]["value"]) or 1.0
    gap = oriented(told["difference"][metric], told["higher_is_better"])
    return Estimate(gap.value / by, gap.low / by, gap.high / by)


def retention(sets: Mapping[str, Mapping[str, Any]]) -> Estimate | None:
    """The mean change over the sets; their rows are different ones, so the ends of the intervals add up by their squares
    (Zou & Donner 2008, doi:10.1002/sim.3095).
    """
    changes = [change(told) for told in sets.values()]
    if not changes:
        return None
    value = math.fsum(one.value for one in changes) / len(changes)
    down, up = (math.hypot(*(one.value - one[end] for one in changes)) / len(changes) for end in (1, 2))
    return Estimate(value, value - down, value + up)


def dominated(points: Sequence[Point]) -> list[bool]:
    """Whether another point is no worse in gain and in retention, and better in one of them."""

    def beats(one: Point, other: Point) -> bool:
        no_worse = one.gain.value >= other.gain.value and one.kept >= other.kept
        return no_worse and (one.gain.value > other.gain.value or one.kept > other.kept)

    return [any(beats(one, other) for one in points) for other in points]


def pick(points: Sequence[Point], rule: str) -> Point | None:
    """The point to take, by a rule; None where none qualifies.

    within   the most gain of those that broke no set
    gain     the most gain
    knee     of those that none dominates, the one furthest above the line from the most retention to the most gain, both
             scaled to 0…1 (the distance of Satopaa et al. 2011, doi:10.1109/ICDCSW.2011.20)
    """
    open_ = [one for one in points if math.isfinite(one.gain.value) and math.isfinite(one.kept)]
    if rule == "within":
        open_ = [one for one in open_ if not one.broken]
    if rule == "knee":
        open_ = [one for one, lost in zip(open_, dominated(open_), strict=True) if not lost]
    if not open_:
        return None
    if rule != "knee":
        return max(open_, key=lambda one: (one.gain.value, one.kept))
    sides = np.asarray([(one.gain.value, one.kept) for one in open_])
    span = np.ptp(sides, axis=0)
    scaled = (sides - sides.min(0)) / np.where(span > 0, span, 1)
    return open_[int(np.argmax(scaled.sum(1)))]


def rank_correlation(
    x: Sequence[float], y: Sequence[float], num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Spearman's correlation of two columns with its bootstrap interval, and the two-sided p of "any order is as likely".

    p counts the orders of `y` whose correlation is at least as far from 0: all of them for up to 7 points, else
    (1 + hits) / (1 + 10,000) of random ones (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    x_M, y_M = np.asarray(x, np.float64), np.asarray(y, np.float64)
    found = statistics.bootstrap(
        statistics.spearman, x_M, y_M, num_samples=num_samples, confidence=confidence, seed=seed
    )
    seen = abs(found.value) * (1 - 1e-9)
    if len(x_M) <= _EXACT:
        orders = np.asarray(list(itertools.permutations(range(len(x_M)))))
    else:
        orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(x_M)), (_DRAWN, 1)), axis=1)
    hits = int(np.sum(np.abs(statistics.spearman(np.broadcast_to(x_M, orders.shape), y_M[orders])) >= seen))
    p = hits / len(orders) if len(x_M) <= _EXACT else (1 + hits) / (1 + len(orders))
    return {**found._asdict(), "p": p, "test": "rank permutation", "points": len(x_M)}


def columns(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for the terminal, its columns aligned."""

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def shown(estimate: Estimate | None) -> str:
    """ "+0.323 [+0.253, +0.387]"."""
    return "–" if estimate is None else f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
