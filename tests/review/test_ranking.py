"""Rankings: known strengths come back, intervals hold what they should, and a preferred side is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxtune.review import ranking

STRENGTHS = np.asarray([-1.2, -0.3, 0.0, 0.5, 1.0])


def played(rng: np.random.Generator, num: int, ties: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second = rng.integers(0, 5, num), rng.integers(0, 4, num)
    second = second + (second >= first)
    won = rng.random(num) < 1 / (1 + np.exp(STRENGTHS[second] - STRENGTHS[first]))
    return first, second, np.where(rng.random(num) < ties, 0.5, won)


def test_known_strengths_come_back() -> None:
    found = ranking.bradley_terry(*played(np.random.default_rng(0), 20_000), 5)
    np.testing.assert_allclose(found, STRENGTHS - STRENGTHS.mean(), atol=0.06)


def test_strengths_are_those_of_choix() -> None:
    choix = pytest.importorskip("choix")
    first, second, score = played(np.random.default_rng(1), 400)
    wins = [(a, b) if s else (b, a) for a, b, s in zip(first, second, score, strict=True)]
    expected = choix.opt_pairwise(5, wins, alpha=0.05, tol=1e-10)
    np.testing.assert_allclose(ranking.bradley_terry(first, second, score, 5, prior=0.1), expected, atol=1e-4)


def test_intervals_hold_the_truth() -> None:
    rng, inside = np.random.default_rng(2), []
    for seed in range(20):
        found = ranking.bradley_terry_intervals(*played(rng, 300), 5, num_samples=100, seed=seed)
        inside += [one.low <= s <= one.high for one, s in zip(found, STRENGTHS - STRENGTHS.mean(), strict=True)]
    assert np.mean(inside) > 0.87


def test_ties_are_half_wins() -> None:
    a, b = np.asarray([0, 0]), np.asarray([1, 1])
    np.testing.assert_allclose(ranking.bradley_terry(a, b, np.asarray([0.5, 0.5]), 2), [0, 0], atol=1e-9)
    split = ranking.bradley_terry(a, b, np.asarray([1.0, 0.0]), 2)
    np.testing.assert_allclose(split, [0, 0], atol=1e-9)


def test_who_never_lost_stays_finite() -> None:
    found = ranking.bradley_terry(np.zeros(500, int), np.ones(500, int), np.ones(500), 3)
    assert np.isfinite(found).all()
    assert 3 < found[0] - found[1] < 15
    assert abs(found[2] - found.mean()) < 1e-6  # never compared
    assert ranking.bradley_terry(np.zeros(0, int), np.zeros(0, int), np.zeros(0), 2).tolist() == [0, 0]


def test_copies_of_an_item_are_no_evidence() -> None:
    first, second, score = played(np.random.default_rng(3), 60)
    copied = [np.repeat(one, 5) for one in (first, second, score)]
    alone = ranking.bradley_terry_intervals(*copied, 5, num_samples=200)[4]
    grouped = ranking.bradley_terry_intervals(*copied, 5, np.repeat(np.arange(60), 5), num_samples=200)[4]
    assert grouped.high - grouped.low > 1.6 * (alone.high - alone.low)


def test_win_rates() -> None:
    """Wilson's interval of 8 of 10 is 0.490 to 0.943 (as in Newcombe 1998's method 3)."""
    found = ranking.win_rate(8, 0, 2)
    assert (round(found.value, 3), round(found.low, 3), round(found.high, 3)) == (0.8, 0.490, 0.943)
    assert ranking.win_rate(7, 2, 1) == found
    assert ranking.win_rate(5, 0, 0).high == 1.0
    assert math.isnan(ranking.win_rate(0, 0, 0).value)


def test_a_preferred_side() -> None:
    found = ranking.position_bias(15, 5)
    assert found.share.value == 0.75
    assert found.p == pytest.approx(2 * sum(math.comb(20, k) for k in range(6)) / 2**20)
    assert found.share.low < 0.51 < found.share.high
    assert ranking.position_bias(0, 0).p == 1.0


@pytest.mark.parametrize(("skill", "gain"), [(0.9, 0.75), (0.5, 1.02)])
def test_a_judge_helps_as_far_as_it_is_right(skill: float, gain: float) -> None:
    """People's win rate is 0.6; a judge who always adds a fifth of wins to one side does not move the estimate."""
    rng, ours, alone, values = np.random.default_rng(4), [], [], []
    for _ in range(300):
        truth = (rng.random(1000) < 0.6).astype(float)
        judge = np.where(rng.random(1000) < skill, truth, rng.random(1000) < 0.5)
        judge = np.where(rng.random(1000) < 0.2, 1.0, judge) if skill > 0.5 else (rng.random(1000) < 0.9).astype(float)
        found = ranking.corrected(truth[:100], judge[:100], judge[100:])
        values.append(found.value)
        ours.append(found.low <= 0.6 <= found.high)
        alone.append((found.high - found.low) / (2 * 1.96 * math.sqrt(0.24 / 100)))
    assert np.mean(values) == pytest.approx(0.6, abs=0.01)
    assert 0.91 <= np.mean(ours) <= 0.98
    assert np.mean(alone) < gain
