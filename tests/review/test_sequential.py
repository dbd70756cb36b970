"""The stopping rule: wrong at most as often as it says, looked at after each verdict; and how soon it stops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxtune.review import sequential
from jaxtune.types import UserError


def drawn(rng: np.random.Generator, rate: float, ties: float, num: int) -> np.ndarray:
    """Outcomes of which `ties` are ties, with the mean `rate`."""
    decided = (rate - ties / 2) / (1 - ties)
    return np.where(rng.random(num) < ties, 0.5, rng.random(num) < decided)


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_false_alarms(ties: float) -> None:
    """Two models that are alike, looked at after each of 400 verdicts, 600 times over: at most alpha are told apart.

    At alpha = 0.1, 600 runs of a rule at its limit would exceed 0.135 once in 500 times. A fixed-sample test looked at as
    often would be wrong far more often, as the same runs show.
    """
    rng, wrong, naive = np.random.default_rng(0), 0, 0
    for _ in range(600):
        x = drawn(rng, 0.5, ties, 400)
        wrong += sequential.decide(x, alpha=0.1).decision != "open"
        n = np.arange(1, 401)
        z = np.abs(np.cumsum(x) / n - 0.5)[10:] / (0.5 * np.sqrt((1 - ties) / n[10:]))
        naive += bool((z > 1.645).any())
    assert wrong / 600 <= 0.135
    assert naive / 600 > 0.3


def test_it_covers_at_all_times() -> None:
    """The true rate leaves the interval at any of 60 times in no more than alpha of the runs."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(100):
        x = drawn(rng, 0.65, 0.2, 60)
        found = [sequential.decide(x[:n], alpha=0.2) for n in range(1, 61, 4)]
        missed += any(not one.low <= 0.65 <= one.high for one in found)
    assert missed / 100 <= 0.2 + 2.6 * math.sqrt(0.2 * 0.8 / 100)


@pytest.mark.parametrize(("rate", "least", "most"), [(0.6, 180, 240), (0.7, 45, 65)])
def test_how_soon(rate: float, least: float, most: float) -> None:
    """The figures of docs/agreement.md, at alpha = 0.05 and without ties."""
    rng = np.random.default_rng(2)
    found = [sequential.decide(drawn(rng, rate, 0.0, 1200)) for _ in range(150)]
    assert {one.decision for one in found} == {"better"}
    mean = np.mean([one.stopped_at for one in found])
    print(f"win rate {rate}: {mean:.0f} comparisons on average")
    assert least < mean < most


def test_no_difference_worth_having() -> None:
    """Alike models are told to be so, within a margin; and of models apart by just the margin few are."""
    rng = np.random.default_rng(3)
    alike = [sequential.decide(drawn(rng, 0.5, 0.3, 1500), margin=0.1) for _ in range(60)]
    assert np.mean([one.decision == "same" for one in alike]) > 0.9
    print(f"alike, margin 0.1, 30% ties: {np.mean([one.stopped_at for one in alike]):.0f} comparisons on average")
    apart = [sequential.decide(drawn(rng, 0.6, 0.0, 500), margin=0.1) for _ in range(100)]
    assert np.mean([one.decision == "same" for one in apart]) <= 0.1


def test_a_decision_stands() -> None:
    x = [1.0] * 30 + [0.0] * 30
    then, now = sequential.decide(x[:30]), sequential.decide(x)
    assert (then.decision, now.decision) == ("better", "better")
    assert then.stopped_at == now.stopped_at < 30
    assert now.rate == 0.5
    assert now.low < 0.5 < now.high
    assert sequential.decide([1 - one for one in x]).decision == "worse"


def test_the_interval_is_where_wealth_is_small() -> None:
    x = np.asarray([1, 0.5, 1, 1, 0, 1, 0.25, 1, 1, 1, 0.5])
    found = sequential.decide(x, alpha=0.1)
    values, numbers = np.unique(x, return_inverse=True)
    counts = np.bincount(numbers)[None]
    for mean in np.linspace(0.01, 0.99, 99):
        inside = sequential._log_wealth(values, counts, mean)[0] < math.log(10)
        assert inside == (found.low < mean < found.high)


def test_fair_bets() -> None:
    """Wealth is a martingale under the mean that it is of: over all outcomes of four three-valued verdicts its mean is 1."""
    values, chances, mean = np.asarray([0, 0.5, 1]), np.asarray([0.2, 0.3, 0.5]), 0.65
    total = 0.0
    for at in np.ndindex(3, 3, 3, 3):
        counts = np.bincount(at, minlength=3)[None]
        total += chances[list(at)].prod() * math.exp(sequential._log_wealth(values, counts, mean)[0])
    assert total == pytest.approx(1)


def test_ties_do_not_move_it() -> None:
    x = [1.0, 0.0, 1.0, 1.0, 1.0]
    assert sequential.decide(x).e_value == pytest.approx(sequential.decide(x + [0.5] * 40).e_value)
    assert sequential.decide([]) == ("open", 0, 0, pytest.approx(math.nan, nan_ok=True), 0.0, 1.0, 1.0)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="outside 0 to 1"):
        sequential.decide([1.5])
    with pytest.raises(UserError, match="0 < alpha < 1"):
        sequential.decide([1.0], alpha=0.0)
