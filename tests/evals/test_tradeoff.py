"""Gain against retention: hand-made points of which it is plain what is dominated, what is the knee, and how ranks agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jaxtune.evals import tradeoff
from jaxtune.statistics import Estimate
from jaxtune.types import UserError


def at(name: str, gain: float, kept: float, *broken: str) -> tradeoff.Point:
    return tradeoff.Point(name, Estimate(gain, gain - 0.1, gain + 0.1), Estimate(kept, kept - 0.1, kept + 0.1), broken)


POINTS = [
    at("all", 1.0, -1.0, "wiki", "sums"),
    at("most", 0.9, -0.2, "sums"),
    at("some", 0.5, -0.1),
    at("worse than some", 0.4, -0.3),
    at("nothing", 0.0, 0.0),
]


def test_what_another_beats_in_both_is_dominated() -> None:
    assert tradeoff.dominated(POINTS) == [False, False, False, True, False]
    assert tradeoff.dominated([at("a", 1, 0), at("b", 1, 0)]) == [False, False]  # a tie beats nobody


@pytest.mark.parametrize(("rule", "name"), [("within", "some"), ("gain", "all"), ("knee", "most")])
def test_the_rule_picks(rule: str, name: str) -> None:
    picked = tradeoff.pick(POINTS, rule)
    assert picked is not None
    assert picked.name == name


def test_nothing_qualifies() -> None:
    assert tradeoff.pick(POINTS[:2], "within") is None
    assert tradeoff.pick([at("diverged", math.nan, 0.0)], "gain") is None
    assert tradeoff.pick([at("alone", 0.3, -0.5)], "knee").name == "alone"  # type: ignore[union-attr]


def told(metric: str, before: float, gap: tuple[float, float, float], higher: bool, broken: bool = False) -> Any:
    difference = {metric: {**Estimate(*gap)._asdict(), "p": 0.5, "test": "t", "higher_is_better": higher}}
    return {
        "metric": metric, "higher_is_better": higher, "before": {metric: {"value": before}}, "difference": difference, "broken": broken
    }  # fmt: skip


def test_retention_is_the_mean_relative_change_with_worse_below_0() -> None:
    sets = {
        "wiki": told("bits_per_byte", 0.8, (0.04, 0.02, 0.08), higher=False, broken=True),  # 5% worse
        "boolq": told("accuracy", 0.5, (0.05, -0.05, 0.10), higher=True),  # 10% better
        "sums": told("exact_match", 0.0, (0.01, 0.0, 0.02), higher=True),  # of 0, its own unit
    }
    found = tradeoff.retention(sets)
    assert found is not None
    assert found.value == pytest.approx((-0.05 + 0.10 + 0.01) / 3)
    assert found.low == pytest.approx(found.value - math.hypot(0.05, 0.20, 0.01) / 3)
    assert found.high == pytest.approx(found.value + math.hypot(0.025, 0.10, 0.01) / 3)
    gap = {"value": -0.3, "low": -0.4, "high": -0.1, "higher_is_better": False}
    point = tradeoff.point("run", {"difference": {"label_nll": gap}, "protected": sets})
    assert point.gain == Estimate(0.3, 0.1, 0.4)
    assert point.broken == ("wiki",)
    assert tradeoff.retention({}) is None


def test_a_run_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match="not measured before and after"):
        tradeoff.point("run", {"difference": {}})
    gap = {"value": 1.0, "low": 1.0, "high": 1.0, "higher_is_better": True}
    with pytest.raises(UserError, match=r"has no metric 'acuracy'.*did you mean 'accuracy'"):
        tradeoff.point("run", {"difference": {"accuracy": gap}}, "acuracy")


def test_rank_correlation_counts_orders() -> None:
    """Of five points in one order, 2 of 120 orders are as extreme; of two columns without a bond, p says so."""
    exact = tradeoff.rank_correlation([1, 2, 3, 4, 5], [10, 20, 30, 40, 500])
    assert exact["value"] == pytest.approx(1.0)
    assert exact["p"] == pytest.approx(2 / 120)
    rng = np.random.default_rng(1)
    x = rng.normal(size=18)
    loose = tradeoff.rank_correlation(x, rng.normal(size=18))
    tight = tradeoff.rank_correlation(x, x + 0.1 * rng.normal(size=18))
    assert tight["p"] < 1e-3 < 0.05 < loose["p"]
    assert tight["low"] > 0.8
    assert loose["low"] < loose["value"] < loose["high"]
