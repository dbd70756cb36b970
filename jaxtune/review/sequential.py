"""When to stop comparing two models: a test and a confidence interval that may be looked at after every verdict.

An outcome is what a comparison said of one side: 1 it was better, 0 worse, 0.5 a tie, or a mean of several verdicts on one item.
Outcomes x_i in [0, 1] have the mean m given those before, the win rate. For any bet q in (0, 1) on it the wealth

    K_n(m; q) = Π_i (x_i q / m + (1 - x_i) (1 - q) / (1 - m))

is a nonnegative martingale that starts at 1, and so is its mean over a prior of q that is fixed beforehand (here Beta(4, 4), on
a grid). By Ville's inequality it ever reaches 1 / alpha with probability alpha at most, however often one looks. So
{m: K_n(m) < 1 / alpha} holds the true win rate at all times at once with probability 1 - alpha; K is log-convex in m, so that
this set is an interval. Without ties it is the mixture SPRT (Robbins 1970, doi:10.1214/aoms/1177696786); for bounded outcomes it is
a betting martingale (Waudby-Smith & Ramdas 2024, arXiv:2010.09686). A tie neither helps nor harms the test of m = 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.types import UserError

BETTER, WORSE, SAME, OPEN = "better", "worse", "same", "open"
_PRIOR, _GRID = 4.0, 200  # of the bets: Beta(4, 4), which expects a win rate of 0.2 to 0.8


class Decision(NamedTuple):
    """What outcomes say so far.

    decision: better | worse | same (no difference larger than the margin) | open, as it was when it was first known.
    stopped_at: after how many outcomes that was; 0 while it is open. num: outcomes there are. rate: their mean, between `low` and
    `high`, which hold at any time with probability 1 - alpha. e_value: the evidence that the win rate is not 1/2.
    """

    decision: str
    stopped_at: int
    num: int
    rate: float
    low: float
    high: float
    e_value: float


def decide(outcomes: Sequence[float], alpha: float = 0.05, margin: float = 0.0) -> Decision:
    """Returns what the outcomes say, in the order in which they came.

    Args:
      outcomes: of one side, 0 to 1 each, one an item: two verdicts on one item are not independent.
      alpha: a wrong decision, ever, has at most this probability.
      margin: "same" is said once the interval lies within 1/2 ± margin; 0 = never.

    Raises:
      UserError: an outcome is not in [0, 1], or alpha or margin are outside what they may be.
    """
    x_N = np.asarray(outcomes, np.float64).reshape(-1)
    if not np.all((x_N >= 0) & (x_N <= 1)):
        raise UserError("an outcome outside 0 to 1 came; expected 1 (better), 0 (worse), 0.5 (tie) or a mean of these")
    if not 0 < alpha < 1 or not 0 <= margin < 0.5:
        raise UserError(f"alpha={alpha}, margin={margin} came; expected 0 < alpha < 1 and 0 <= margin < 0.5")
    if not len(x_N):
        return Decision(OPEN, 0, 0, math.nan, 0.0, 1.0, 1.0)
    values_V, number_N = np.unique(x_N, return_inverse=True)
    counts_NV = np.cumsum(number_N[:, None] == np.arange(len(values_V)), 0)
    rate_N, limit = np.cumsum(x_N) / np.arange(1, len(x_N) + 1), math.log(1 / alpha)
    even_N = _log_wealth(values_V, counts_NV, 0.5)
    is_same_N = np.zeros(len(x_N), bool)
    if margin:
        far = [_log_wealth(values_V, counts_NV, 0.5 + sign * margin) >= limit for sign in (-1, 1)]
        is_same_N = far[0] & far[1] & (np.abs(rate_N - 0.5) < margin)
    done_N = (even_N >= limit) | is_same_N
    at = int(done_N.argmax()) if done_N.any() else -1
    said = OPEN if at < 0 else SAME if is_same_N[at] else BETTER if rate_N[at] > 0.5 else WORSE
    low, high = _interval(values_V, counts_NV[-1], float(rate_N[-1]), limit)
    e_value = math.exp(min(float(even_N[-1]), 700.0))
    return Decision(said, at + 1, len(x_N), float(rate_N[-1]), low, high, e_value)


def _log_wealth(values_V: np.ndarray, counts_NV: np.ndarray, mean: float) -> np.ndarray:
    """log K_n(mean) of each n, from how often each value has come by then."""
    q_Q = (np.arange(_GRID) + 0.5) / _GRID
    log_prior_Q = (_PRIOR - 1) * (np.log(q_Q) + np.log1p(-q_Q))
    log_prior_Q -= np.log(np.exp(log_prior_Q).sum())
    factor_VQ = values_V[:, None] * q_Q / mean + (1 - values_V[:, None]) * (1 - q_Q) / (1 - mean)
    log_NQ = counts_NV @ np.log(factor_VQ) + log_prior_Q
    most_N1 = log_NQ.max(1, keepdims=True)
    return (most_N1 + np.log(np.exp(log_NQ - most_N1).sum(1, keepdims=True)))[:, 0]


def _interval(values_V: np.ndarray, counts_V: np.ndarray, rate: float, limit: float) -> tuple[float, float]:
    """The ends of {m: K(m) < 1 / alpha}, which holds the rate itself: bisected, outside by 1e-6 at most."""
    ends = []
    for far in (0.0, 1.0):
        inside, outside = rate, far
        while abs(outside - inside) > 1e-6:
            middle = (inside + outside) / 2
            is_in = _log_wealth(values_V, counts_V[None], middle)[0] < limit
            inside, outside = (middle, outside) if is_in else (inside, middle)
        ends.append(outside)
    return ends[0], ends[1]
