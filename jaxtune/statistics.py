"""Intervals and paired tests over rows, of evaluations and of people's verdicts. NumPy only.

A *statistic* takes columns with a dim of rows M, any dims before it, and reduces M: `mean` maps (M,) to a number
and (S, M) to (S,). So S resamples are one call, whatever the statistic. A row may be more than a number, (M, K, …): then
the statistic knows how many dims follow M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from jaxtune.types import UserError

Statistic = Callable[..., Any]

_BLOCK_CELLS = 1 << 20  # resampled rows held at once: bounds memory, whatever the number of rows


class Estimate(NamedTuple):
    """A measured value between the ends of its confidence interval."""

    value: float
    low: float
    high: float


def mean(x_M: np.ndarray) -> Any:
    """Returns the mean over rows."""
    return np.asarray(x_M, np.float64).mean(-1)


def accuracy(predicted_M: np.ndarray, answers_M: np.ndarray) -> Any:
    """Returns the share of rows whose prediction is the answer, 0 to 1."""
    return (np.asarray(predicted_M) == np.asarray(answers_M)).mean(-1)


def macro_f1(predicted_M: np.ndarray, answers_M: np.ndarray, labels: Sequence[Any]) -> Any:
    """Returns the unweighted mean of each label's F1, 0 to 1.

    F1 = 2 TP / (2 TP + FP + FN). The mean runs over all of `labels`, in every resample: one that is neither predicted
    nor an answer counts 0, as in scikit-learn's `f1_score(labels=labels, average="macro", zero_division=0)`.
    """
    predicted, answers = np.asarray(predicted_M), np.asarray(answers_M)
    f1 = []
    for label in labels:
        is_predicted, is_answer = predicted == label, answers == label
        found = 2 * (is_predicted & is_answer).sum(-1)
        f1.append(found / np.maximum(is_predicted.sum(-1) + is_answer.sum(-1), 1))
    return np.mean(f1, axis=0)


def auc(score_M: np.ndarray, is_right_M: np.ndarray) -> Any:
    """Returns the chance that a right row's score is above a wrong row's, ties counting a half; NaN where there is but one kind."""
    score, right = np.broadcast_arrays(np.asarray(score_M, np.float64), np.asarray(is_right_M, bool))
    order = np.argsort(score, axis=-1, kind="stable")
    ordered = np.take_along_axis(score, order, -1)
    index = np.broadcast_to(np.arange(score.shape[-1], dtype=np.float64), score.shape)
    begins = np.concatenate([np.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], -1)
    ends = np.concatenate([begins[..., 1:], np.ones_like(begins[..., :1])], -1)
    first = np.maximum.accumulate(np.where(begins, index, 0), -1)
    last = np.minimum.accumulate(np.where(ends, index, np.inf)[..., ::-1], -1)[..., ::-1]
    ranked = np.take_along_axis(right, order, -1)
    num_right, num = right.sum(-1), score.shape[-1]
    below = ((first + last) / 2 * ranked).sum(-1) - num_right * (num_right - 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return below / (num_right * (num - num_right))


def calibration_error(sure_M2: np.ndarray, bins: int = 10) -> Any:
    """Returns the expected calibration error, 0 to 1 (arXiv:1706.04599): how far, on average, confidence is from being right.

    `sure` holds each row's confidence and whether it was right; rows of like confidence are put into `bins` equal ranges.
    """
    sure, right = np.asarray(sure_M2, np.float64)[..., 0], np.asarray(sure_M2, np.float64)[..., 1]
    which = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [np.abs(((right - sure) * (which == one)).sum(-1)) for one in range(bins)]
    return np.sum(gaps, axis=0) / sure.shape[-1]


def micro_f1(counts_MK2: np.ndarray, wanted_MK: np.ndarray) -> Any:
    """Returns F1 = 2 TP / (predicted + wanted) over all kinds together, 0 to 1; `counts` are (TP, predicted) of each kind."""
    right, total = _f1_parts(counts_MK2, wanted_MK)
    return right.sum(-1) / np.maximum(total.sum(-1), 1)


def kinds_macro_f1(counts_MK2: np.ndarray, wanted_MK: np.ndarray) -> Any:
    """Returns the unweighted mean of each kind's F1, 0 to 1; one that is neither predicted nor wanted counts 0."""
    right, total = _f1_parts(counts_MK2, wanted_MK)
    return (right / np.maximum(total, 1)).mean(-1)


def _f1_parts(counts_MK2: np.ndarray, wanted_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts_K2, wanted_K = np.asarray(counts_MK2).sum(-3), np.asarray(wanted_MK).sum(-2)
    return 2 * counts_K2[..., 0], counts_K2[..., 1] + wanted_K


def ratio(part_M: np.ndarray, whole_M: np.ndarray) -> Any:
    """Returns the sum of one column over that of another."""
    return np.asarray(part_M).sum(-1) / np.asarray(whole_M).sum(-1)


def rmse(predicted_M: np.ndarray, answers_M: np.ndarray) -> Any:
    """Returns the root of the mean squared difference."""
    return np.sqrt(np.mean((np.asarray(predicted_M, np.float64) - answers_M) ** 2, axis=-1))


def pearson(predicted_M: np.ndarray, answers_M: np.ndarray) -> Any:
    """Returns the linear correlation of two columns, -1 to 1; 0 where one of them does not vary."""
    x, y = (np.asarray(column, np.float64) for column in (predicted_M, answers_M))
    x, y = (column - column.mean(-1, keepdims=True) for column in (x, y))
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(spread > 0, (x * y).sum(-1) / np.where(spread > 0, spread, 1), 0.0)


def spearman(predicted_M: np.ndarray, answers_M: np.ndarray) -> Any:
    """Returns the correlation of two columns' ranks, -1 to 1; equal values share their mean rank."""
    return pearson(_ranks(np.asarray(predicted_M)), _ranks(np.asarray(answers_M)))


def _ranks(x_M: np.ndarray) -> np.ndarray:
    order_M = np.argsort(x_M, axis=-1, kind="stable")
    sorted_M, index_M = np.take_along_axis(x_M, order_M, -1), np.arange(x_M.shape[-1])
    new_M = np.concatenate([np.ones_like(order_M[..., :1], bool), sorted_M[..., 1:] != sorted_M[..., :-1]], -1)
    last_M = np.concatenate([new_M[..., 1:], np.ones_like(order_M[..., :1], bool)], -1)
    first_M = np.maximum.accumulate(np.where(new_M, index_M, 0), -1)
    end_M = np.minimum.accumulate(np.where(last_M, index_M, len(index_M))[..., ::-1], -1)[..., ::-1]
    ranks_M = np.empty(x_M.shape)
    np.put_along_axis(ranks_M, order_M, (first_M + end_M) / 2, -1)
    return ranks_M


def confusion_matrix(predicted_M: np.ndarray, answers_M: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
    """Returns counts (C, C): [i, j] is how many rows with answer `labels[i]` were predicted `labels[j]`."""
    labels_C = np.asarray(labels)
    is_answer_MC = np.asarray(answers_M)[:, None] == labels_C
    is_predicted_MC = np.asarray(predicted_M)[:, None] == labels_C
    return is_answer_MC.T.astype(np.int64) @ is_predicted_MC.astype(np.int64)


def bootstrap(
    statistic: Statistic, *columns_M: np.ndarray, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Returns a statistic of the rows with its percentile interval.

    Rows are resampled with replacement, all columns jointly, `num_samples` times; the interval runs between the
    (1 ± confidence) / 2 quantiles (Efron 1979, doi:10.1214/aos/1176344552). The same seed gives the same resamples.

    Raises:
      UserError: there are no rows.
    """
    columns, num_rows = _aligned(columns_M)
    rng = np.random.default_rng(seed)

    def resampled(rows_SM: np.ndarray) -> np.ndarray:
        return np.asarray(statistic(*(column[rows_SM] for column in columns)))

    blocks = _blocks(num_samples, columns)
    samples_S = np.concatenate([resampled(rng.integers(num_rows, size=(size, num_rows))) for size in blocks])
    low, high = np.quantile(samples_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(statistic(*columns)), float(low), float(high))


def wilson(share: float, num: int, confidence: float = 0.95) -> Estimate:
    """Returns a share of `num` rows with Wilson's score interval (1927, doi:10.1080/01621459.1927.10502953), which holds for few rows too.

    It holds for one look, and of no rows it is from 0 to 1.
    """
    if not num:
        return Estimate(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, width = share + z * z / (2 * num), z * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    low, high = ((middle + side * width) / (1 + z * z / num) for side in (-1, 1))
    return Estimate(share, min(max(0.0, low), share), max(min(1.0, high), share))


def difference(
    statistic: Statistic,
    before_M: np.ndarray,
    after_M: np.ndarray,
    *shared_M: np.ndarray,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Returns statistic(after, *shared) - statistic(before, *shared) with its paired bootstrap interval.

    Both sides see the same resampled rows, so what makes a row hard for both cancels. `shared_M` are columns that
    belong to the row and not to the model, such as the answers.
    """

    def gap(before: np.ndarray, after: np.ndarray, *shared: np.ndarray) -> Any:
        return statistic(after, *shared) - statistic(before, *shared)

    return bootstrap(gap, before_M, after_M, *shared_M, num_samples=num_samples, confidence=confidence, seed=seed)


def paired_permutation(
    before_M: np.ndarray,
    after_M: np.ndarray,
    *shared_M: np.ndarray,
    statistic: Statistic = mean,
    num_samples: int = 10_000,
    seed: int = 0,
) -> float:
    """Returns the two-sided p of "before and after are exchangeable within each row".

    Swaps before and after in random rows and counts how often |difference| is at least the one seen: p = (1 + hits) /
    (1 + num_samples) (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585). With few rows all 2^M swaps are counted,
    and p is exact. For means this flips the signs of the differences; any other statistic is re-measured.
    """
    (before, after, *shared), num_rows = _aligned((before_M, after_M, *shared_M))
    rng = np.random.default_rng(seed)

    def gaps(swap_SM: np.ndarray) -> np.ndarray:
        swap = swap_SM.reshape(*swap_SM.shape, *[1] * (before.ndim - 1))
        swapped_before, swapped_after = np.where(swap, after, before), np.where(swap, before, after)
        return np.abs(statistic(swapped_after, *shared) - statistic(swapped_before, *shared))

    seen = gaps(np.zeros((1, num_rows), bool))[0] * (1 - 1e-9)  # a tie is a hit, though its sums may round differently
    if 2**num_rows <= num_samples:
        every_swap = (np.arange(2**num_rows)[:, None] >> np.arange(num_rows)) & 1
        return float(np.mean(gaps(every_swap.astype(bool)) >= seen))
    blocks = _blocks(num_samples, [before, after])
    hits = sum(int(np.sum(gaps(rng.random((size, num_rows)) < 0.5) >= seen)) for size in blocks)
    return (1 + hits) / (1 + num_samples)


def mcnemar(before_correct_M: np.ndarray, after_correct_M: np.ndarray) -> float:
    """Returns the two-sided p of McNemar's exact test that both accuracies are equal.

    Only rows that one side alone got right count: of n such rows, the smaller side has k; under equality k is
    Binomial(n, 1/2), so p = min(1, 2 Σ_{i≤k} C(n, i) / 2^n) (McNemar 1947, doi:10.1007/BF02295996).
    """
    (before, after), _ = _aligned((before_correct_M, after_correct_M))
    before, after = before.astype(bool), after.astype(bool)
    gained, lost = int(np.sum(after & ~before)), int(np.sum(before & ~after))
    n, term, tail = gained + lost, 1, 0
    for i in range(min(gained, lost) + 1):  # whole numbers, so no tail is too small to be exact
        tail += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def _aligned(columns_M: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    columns = [np.asarray(column) for column in columns_M]
    assert all(len(column) == len(columns[0]) for column in columns), [column.shape for column in columns]
    if not len(columns[0]):
        raise UserError("no rows to measure; expected at least one: check eval.split, eval.limit and the data")
    return columns, len(columns[0])


def _blocks(num_samples: int, columns: Sequence[np.ndarray]) -> Iterator[int]:
    most = max(1, _BLOCK_CELLS // max(column.size for column in columns))
    for start in range(0, num_samples, most):
        yield min(most, num_samples - start)
