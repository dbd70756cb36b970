"""How far raters agree: Krippendorff's alpha, Cohen's and Fleiss' kappa, their intervals, and who confuses what with what. NumPy only.

Ratings are `ratings_RU`, raters by units, numbers with NaN where a rater did not rate; `encode` makes them from names. A figure
that is not defined (nobody rated anything twice, or no two values occur) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxtune.statistics import Estimate
from jaxtune.types import UserError

LEVELS = ("nominal", "ordinal", "interval", "ratio")
WEIGHTS = ("", "linear", "quadratic")


class Confusion(NamedTuple):
    """Two raters on the units that both rated: [i, j] counts units that the first gave value i and the second value j."""

    first: int
    second: int
    counts_VV: np.ndarray
    agreement: float
    kappa: float


def encode(names_RU: Sequence[Sequence[str | None]], order: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns ratings as numbers of names, NaN for None, and the names; `order` gives the names their order, else the alphabet.

    Raises:
      UserError: a name is not in `order`.
    """
    found = {name for row in names_RU for name in row if name is not None}
    known = tuple(order) or tuple(sorted(found))
    if unknown := sorted(found - set(known)):
        raise UserError(f"the rating {unknown[0]!r} came; expected one of {', '.join(known)}")
    number = {name: float(at) for at, name in enumerate(known)} | {None: math.nan}
    num_units = max(map(len, names_RU), default=0)
    ratings = np.asarray([[number[name] for name in row] for row in names_RU], np.float64)
    return ratings.reshape(len(names_RU), num_units), known


def krippendorff_alpha(ratings_RU: np.ndarray, level: str = "interval") -> float:
    """Returns Krippendorff's alpha, 1 for full agreement, 0 for that of chance.

    alpha = 1 - D_o / D_e, with coincidences o_ck = Σ_u n_uc (n_uk - [c = k]) / (m_u - 1) over units with m_u >= 2 ratings, of
    which n_uc have value c; n_c = Σ_k o_ck; n = Σ_c n_c; D_o = Σ_ck o_ck d²_ck / n; D_e = Σ_ck n_c n_k d²_ck / (n (n - 1)).
    d²_ck is [c ≠ k] (nominal), (Σ_{g=c..k} n_g - (n_c + n_k) / 2)² (ordinal), (c - k)² (interval), ((c - k) / (c + k))² (ratio).
    Krippendorff, Content Analysis, 2004, chapter 11; "Computing Krippendorff's Alpha-Reliability", 2011.

    Raises:
      UserError: the level is not known, the ratings have no two dims, or ratio has a negative value.
    """
    values_V, counts_UV = _counted(ratings_RU, level)
    return _alpha(values_V, counts_UV, np.ones(len(counts_UV)), level)


def alpha_interval(
    ratings_RU: np.ndarray, level: str = "interval", groups_U: np.ndarray | None = None, num_samples: int = 1000,
    confidence: float = 0.95, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Returns `krippendorff_alpha` with its percentile bootstrap interval over units; over groups of units where these are given.

    Units of one group, such as the characters of one text, are drawn together.
    """
    values_V, counts_UV = _counted(ratings_RU, level)
    of_U = np.arange(len(counts_UV)) if groups_U is None else np.unique(groups_U, return_inverse=True)[1]
    num, rng = int(of_U.max(initial=-1)) + 1, np.random.default_rng(seed)
    value = _alpha(values_V, counts_UV, np.ones(len(counts_UV)), level)
    drawn = (np.bincount(rng.integers(num, size=num), minlength=num)[of_U] for _ in range(num_samples if num else 0))
    samples = np.asarray([_alpha(values_V, counts_UV, times_U, level) for times_U in drawn])
    return _between(value, samples, confidence)


def interval(
    statistic: Callable[[np.ndarray], float], ratings_RU: np.ndarray, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:  # fmt: skip
    """Returns a statistic of the ratings with its percentile bootstrap interval over units (Efron 1979)."""
    if isinstance(statistic, partial) and statistic.func is krippendorff_alpha and not statistic.args:
        more: Any = {"num_samples": num_samples, "confidence": confidence, "seed": seed}
        return alpha_interval(ratings_RU, **statistic.keywords, **more)
    if statistic is krippendorff_alpha:
        return alpha_interval(ratings_RU, num_samples=num_samples, confidence=confidence, seed=seed)
    ratings_RU, rng = _checked(ratings_RU), np.random.default_rng(seed)
    num = ratings_RU.shape[1]
    drawn = (rng.integers(num, size=num) for _ in range(num_samples if num else 0))
    return _between(statistic(ratings_RU), np.asarray([statistic(ratings_RU[:, at]) for at in drawn]), confidence)


def _between(value: float, samples_S: np.ndarray, confidence: float) -> Estimate:
    defined = samples_S[np.isfinite(samples_S)]
    if not len(defined) or not math.isfinite(value):
        return Estimate(float(value), math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(low), float(high))


def _checked(ratings_RU: np.ndarray) -> np.ndarray:
    ratings = np.asarray(ratings_RU, np.float64)
    if ratings.ndim != 2:
        raise UserError(f"ratings of {ratings.ndim} dims came; expected two, raters by units")
    return ratings


def _counted(ratings_RU: np.ndarray, level: str) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur, ascending, and how many raters gave each to each unit."""
    if level not in LEVELS:
        raise UserError(f"level={level!r} came; expected one of {', '.join(LEVELS)}")
    ratings = _checked(ratings_RU)
    is_there = ~np.isnan(ratings)
    values_V, number_M = np.unique(ratings[is_there], return_inverse=True)
    if level == "ratio" and len(values_V) and values_V[0] < 0:
        raise UserError(f"a rating of {values_V[0]:g} came; ratio needs ratings of 0 or more")
    num_units, num_values = ratings.shape[1], len(values_V)
    at_M = np.broadcast_to(np.arange(num_units), ratings.shape)[is_there] * num_values + number_M
    return values_V, np.bincount(at_M, minlength=num_units * num_values).reshape(num_units, num_values).astype(
        np.float64
    )


def _alpha(values_V: np.ndarray, counts_UV: np.ndarray, times_U: np.ndarray, level: str) -> float:
    """alpha where each unit counts `times_U` times."""
    num_U = counts_UV.sum(1)
    weight_U = np.where(num_U >= 2, times_U / np.maximum(num_U - 1, 1), 0.0)
    weighted_UV = counts_UV * weight_U[:, None]
    coincidences_VV = weighted_UV.T @ counts_UV - np.diag(weighted_UV.sum(0))
    margins_V = coincidences_VV.sum(1)
    n = margins_V.sum()
    squared_VV = _squared(values_V, margins_V, level)
    expected = margins_V @ squared_VV @ margins_V
    if n <= 1 or not expected > 0:
        return math.nan
    return float(1 - (n - 1) * (coincidences_VV * squared_VV).sum() / expected)


def _squared(values_V: np.ndarray, margins_V: np.ndarray, level: str) -> np.ndarray:
    """How far apart two values are, squared."""
    if level == "nominal":
        return 1 - np.eye(len(values_V))
    if level == "ordinal":
        rank_V = np.cumsum(margins_V) - margins_V / 2
        return (rank_V[:, None] - rank_V) ** 2
    gap_VV = values_V[:, None] - values_V
    if level == "ratio":
        both_VV = values_V[:, None] + values_V
        gap_VV = gap_VV / np.where(both_VV > 0, both_VV, 1)
    return gap_VV**2


def cohen_kappa(first_U: np.ndarray, second_U: np.ndarray, weights: str = "") -> float:
    """Returns Cohen's kappa of two raters on the units that both rated.

    kappa = 1 - Σ w_ij o_ij / Σ w_ij e_ij, e_ij = row_i column_j / n; w_ij = [i ≠ j] (Cohen 1960), |i - j| (linear) or (i - j)²
    (quadratic; Cohen 1968), where i and j are the numbers of the values that occur, in order, as in scikit-learn.

    Raises:
      UserError: the weights are not known.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r} came; expected '', 'linear' or 'quadratic'")
    first, second = np.asarray(first_U, np.float64), np.asarray(second_U, np.float64)
    both = ~np.isnan(first) & ~np.isnan(second)
    values_V, number_M = np.unique(np.concatenate([first[both], second[both]]), return_inverse=True)
    if not len(values_V):
        return math.nan
    at_first, at_second = np.split(number_M, 2)
    counts_VV = np.bincount(at_first * len(values_V) + at_second, minlength=len(values_V) ** 2)
    return _kappa(counts_VV.reshape(len(values_V), -1).astype(np.float64), weights)


def _kappa(counts_VV: np.ndarray, weights: str = "") -> float:
    gap_VV = np.abs(np.subtract.outer(np.arange(len(counts_VV)), np.arange(len(counts_VV)))).astype(np.float64)
    weight_VV = {"": np.sign(gap_VV), "linear": gap_VV, "quadratic": gap_VV**2}[weights]
    total = counts_VV.sum()
    expected = (weight_VV * np.outer(counts_VV.sum(1), counts_VV.sum(0))).sum() / total if total else 0.0
    return float(1 - (weight_VV * counts_VV).sum() / expected) if expected > 0 else math.nan


def fleiss_kappa(ratings_RU: np.ndarray) -> float:
    """Returns Fleiss' kappa for nominal values (Fleiss 1971, doi:10.1037/h0031619).

    kappa = (P - P_e) / (1 - P_e), P the mean over units of Σ_c n_uc (n_uc - 1) / (m_u (m_u - 1)), P_e = Σ_c p_c², p_c the share of
    all ratings. Fleiss has m_u alike for all units; here they may differ, and units with fewer than two ratings are left out.
    """
    _, counts_UV = _counted(ratings_RU, "nominal")
    counts_UV = counts_UV[counts_UV.sum(1) >= 2]
    if not len(counts_UV):
        return math.nan
    num_U = counts_UV.sum(1)
    agreed = ((counts_UV * (counts_UV - 1)).sum(1) / (num_U * (num_U - 1))).mean()
    expected = ((counts_UV.sum(0) / num_U.sum()) ** 2).sum()
    return float((agreed - expected) / (1 - expected)) if expected < 1 else math.nan


def confusion(first_U: np.ndarray, second_U: np.ndarray, num_values: int) -> np.ndarray:
    """Returns counts (V, V) over units that both rated; ratings are numbers from 0 on, as of `encode`."""
    both = ~np.isnan(first_U) & ~np.isnan(second_U)
    at_M = first_U[both].astype(int) * num_values + second_U[both].astype(int)
    return np.bincount(at_M, minlength=num_values**2).reshape(num_values, num_values)


def pairwise(ratings_RU: np.ndarray, num_values: int, weights: str = "") -> list[Confusion]:
    """Each pair of raters with units in common, the most in common first; ratings as of `encode`, weights as of `cohen_kappa`."""
    ratings, found = _checked(ratings_RU), []
    for first in range(len(ratings)):
        for second in range(first + 1, len(ratings)):
            counts_VV = confusion(ratings[first], ratings[second], num_values)
            found.append(_confused(first, second, counts_VV, weights))
    return sorted((one for one in found if one.counts_VV.any()), key=lambda one: -one.counts_VV.sum())


def against_others(ratings_RU: np.ndarray, num_values: int) -> list[Confusion]:
    """Each rater (first) against the majority of the others (second = -1): an own vote agrees with itself, so it is left out.

    Units where the others are tied are left out too.
    """
    ratings = _checked(ratings_RU)
    votes_UV = np.stack([(ratings == value).sum(0) for value in range(num_values)], 1)
    found = []
    for rater, own_U in enumerate(ratings):
        others_UV = votes_UV - (own_U[:, None] == np.arange(num_values))
        found.append(_confused(rater, -1, confusion(own_U, majority(others_UV), num_values)))
    return [one for one in found if one.counts_VV.any()]


def majority(votes_UV: np.ndarray) -> np.ndarray:
    """The value with the most votes of each unit; NaN where there is none, or a tie."""
    most_U = votes_UV.max(1)
    is_clear_U = (most_U > 0) & ((votes_UV == most_U[:, None]).sum(1) == 1)
    return np.where(is_clear_U, votes_UV.argmax(1), np.nan)


def _confused(first: int, second: int, counts_VV: np.ndarray, weights: str = "") -> Confusion:
    agreed = float(np.trace(counts_VV) / max(int(counts_VV.sum()), 1))
    return Confusion(first, second, counts_VV, agreed, _kappa(counts_VV.astype(np.float64), weights))
