"""What comparisons say of models: win rates, Bradley–Terry strengths, and whether it mattered which side an answer stood on.

A tie is half a win for each side, everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxtune import statistics
from jaxtune.statistics import Estimate


class Position(NamedTuple):
    """Of `decided` comparisons (no ties) the share that the side shown first won, with its exact interval, and p of "a half"."""

    decided: int
    share: Estimate
    p: float


def win_rate(wins: int, ties: int, losses: int, confidence: float = 0.95) -> Estimate:
    """Returns (wins + ties / 2) / all with Wilson's interval, for one look (for more see `sequential`). With ties it is wider than it need be: half-wins vary less than wins."""
    n = wins + ties + losses
    return statistics.wilson((wins + ties / 2) / n if n else math.nan, n, confidence)


def position_bias(first_wins: int, second_wins: int, confidence: float = 0.95) -> Position:
    """Returns how often the side shown first won: Clopper and Pearson's interval, and the exact two-sided binomial p.

    Sides are drawn at random for each expert, so that a share of one half is what no bias gives, whatever is compared.
    """
    n = first_wins + second_wins
    if not n:
        return Position(0, Estimate(math.nan, 0.0, 1.0), 1.0)
    from scipy.stats import binomtest

    tested = binomtest(first_wins, n, 0.5)
    low, high = tested.proportion_ci(confidence, "exact")
    return Position(n, Estimate(first_wins / n, float(low), float(high)), float(tested.pvalue))


def bradley_terry(
    first_M: np.ndarray, second_M: np.ndarray, score_M: np.ndarray, num: int, prior: float = 0.1, times_M: np.ndarray | None = None
) -> np.ndarray:  # fmt: skip
    """Returns the strengths (num,) in log-odds, their mean 0: P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    The maximum of Σ log P of the outcomes, ties as half-wins, less prior / 2 Σ s² (Bradley & Terry 1952,
    doi:10.1093/biomet/39.3-4.324), by Newton's method. The prior, worth less than half a comparison, keeps the strength of a
    model that never lost finite, and that of one that was not compared at 0.

    Args:
      first_M, second_M: numbers of the two models of each comparison.
      score_M: of the first: 1 it won, 0.5 tie, 0 it lost.
      times_M: how often each comparison counts; None = once.
    """
    times = np.ones(len(score_M)) if times_M is None else times_M
    score = np.asarray(score_M, np.float64)
    cells = np.concatenate([first_M * num + second_M, second_M * num + first_M]).astype(int)
    weights = np.concatenate([score * times, (1 - score) * times])
    wins_KK = np.bincount(cells, weights, num * num).reshape(num, num)
    games_KK = wins_KK + wins_KK.T

    def value(s_K: np.ndarray) -> float:
        gaps_KK = s_K[:, None] - s_K
        return float((wins_KK * -np.logaddexp(0, -gaps_KK)).sum() - prior / 2 * (s_K**2).sum())

    s_K = np.zeros(num)
    for _ in range(100):
        chance_KK = 1 / (1 + np.exp(np.clip(s_K - s_K[:, None], -500, 500)))
        slope_K = (wins_KK - games_KK * chance_KK).sum(1) - prior * s_K
        curve_KK = games_KK * chance_KK * (1 - chance_KK)
        step_K = np.linalg.solve(np.diag(curve_KK.sum(1) + prior) - curve_KK, slope_K)
        size, now = 1.0, value(s_K)
        while size > 1e-6 and value(s_K + size * step_K) < now:
            size /= 2
        s_K = s_K + size * step_K
        if np.abs(size * step_K).max(initial=0) < 1e-9:
            break
    return s_K - s_K.mean()


def bradley_terry_intervals(
    first_M: np.ndarray, second_M: np.ndarray, score_M: np.ndarray, num: int, groups_M: np.ndarray | None = None,
    prior: float = 0.1, num_samples: int = 500, confidence: float = 0.95, seed: int = 0,
) -> list[Estimate]:  # fmt: skip
    """Returns each model's strength with its percentile bootstrap interval; comparisons of one group (an item) are drawn together."""
    first_M, second_M, score_M = (np.asarray(one) for one in (first_M, second_M, score_M))
    of_M = np.arange(len(score_M)) if groups_M is None else np.unique(groups_M, return_inverse=True)[1]
    num_groups, rng = int(of_M.max(initial=-1)) + 1, np.random.default_rng(seed)
    strengths_K = bradley_terry(first_M, second_M, score_M, num, prior)
    if not num_groups:
        return [Estimate(0.0, math.nan, math.nan)] * num
    draws = (rng.integers(num_groups, size=num_groups) for _ in range(num_samples))
    times = (np.bincount(drawn, minlength=num_groups)[of_M].astype(np.float64) for drawn in draws)
    samples_SK = np.stack([bradley_terry(first_M, second_M, score_M, num, prior, each) for each in times])
    ends_2K = np.quantile(samples_SK, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [Estimate(float(s), float(low), float(high)) for s, low, high in zip(strengths_K, *ends_2K, strict=True)]


def corrected(
    people: Sequence[float], judge: Sequence[float], judge_alone: Sequence[float], confidence: float = 0.95
) -> Estimate:
    """Returns people's win rate, made more precise by a judge's verdicts on further items, whatever the judge's own bias is.

    Prediction-powered inference: mean(people) + w (mean(judge_alone) - mean(judge)), where w = cov(people, judge) /
    (var(judge) (1 + n / N)) makes the variance least (Angelopoulos, Duchi & Zrnic 2023, arXiv:2311.01453); a judge that knows
    nothing gets w near 0. The interval is the normal approximation's, and for one look.

    Args:
      people, judge: outcomes of the n items that both judged. judge_alone: of the N items that people did not judge.
    """
    h_M, j_M, more_N = (np.asarray(one, np.float64) for one in (people, judge, judge_alone))
    n, others = len(h_M), len(more_N)
    if n < 2:
        return Estimate(math.nan, 0.0, 1.0)
    spread = float(np.concatenate([j_M, more_N]).var(ddof=1)) if others else 0.0
    w = float(np.cov(h_M, j_M)[0, 1]) / (spread * (1 + n / others)) if spread else 0.0
    value = float(h_M.mean() + (w * (more_N.mean() - j_M.mean()) if others else 0.0))
    variance = float((h_M - w * j_M).var(ddof=1)) / n + (w * w * spread / others if others else 0.0)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
