"""Whether new data differ from old: in meaning (embeddings), in labels, in lengths; by how much, and how surely.

NumPy and SciPy alone. Rows are taken to be independent: rows that come in groups make the p too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Shift(NamedTuple):
    """One comparison of new rows with old ones.

    `effect` is 0 where they are alike: the MMD of embeddings (0 to √2), Cramér's V of labels (0 to 1), the largest gap of the
    lengths' distributions (0 to 1). `p_holm` is `p` corrected for the number of comparisons.
    """

    test: str
    effect: float
    p: float
    num_old: int
    num_new: int
    p_holm: float = 1.0
    told: str = ""


def mmd(old_MD: np.ndarray, new_MD: np.ndarray, num_permutations: int, seed: int) -> tuple[Shift, np.ndarray]:
    """The maximum mean discrepancy of two samples, by a Gaussian kernel, and each new row's likeness to the old ones.

    MMD²_u = 1/(m(m-1)) Σ_{i≠j} k(x_i,x_j) + 1/(n(n-1)) Σ_{i≠j} k(y_i,y_j) - 2/(mn) Σ k(x_i,y_j), the unbiased estimate
    (Gretton et al. 2012, JMLR 13:723, eq. 3), k(a,b) = exp(-|a-b|² / (2 s²)), 2 s² the median of the pooled rows' squared
    distances. p: how often a random split of the pooled rows has at least this MMD², (1 + hits) / (1 + permutations).

    Args:
      old_MD, new_MD: embeddings, two rows or more of each.
      num_permutations, seed: of the test.

    Returns:
      The shift, whose effect is √max(0, MMD²_u); and (M,) each new row's mean kernel with the old rows, 0 to 1.
    """
    num_old, num_new = len(old_MD), len(new_MD)
    assert min(num_old, num_new) >= 2, (num_old, num_new)
    pooled_MD = np.concatenate([old_MD, new_MD]).astype(np.float64)
    squared_M = (pooled_MD**2).sum(1)
    distances_MM = np.maximum(squared_M[:, None] + squared_M[None, :] - 2 * pooled_MD @ pooled_MD.T, 0)
    median = float(np.median(distances_MM[np.triu_indices(len(pooled_MD), 1)]))
    kernel_MM = np.exp(-distances_MM / (median if median > 0 else 1.0))
    likeness_M = kernel_MM[num_old:, :num_old].mean(1)
    np.fill_diagonal(kernel_MM, 0.0)
    rng = np.random.default_rng(seed)
    is_old = np.zeros((num_permutations + 1, num_old + num_new))
    is_old[0, :num_old] = 1
    for row in range(1, num_permutations + 1):
        is_old[row, rng.permutation(num_old + num_new)[:num_old]] = 1
    values = _mmd_squared(kernel_MM, is_old)
    hits = int(np.sum(values[1:] >= values[0] - 1e-12))
    p = (1 + hits) / (1 + num_permutations)
    shift = Shift("MMD, permutations", float(np.sqrt(max(values[0], 0.0))), p, num_old, num_new)
    return shift, likeness_M


def _mmd_squared(kernel_MM: np.ndarray, is_old: np.ndarray) -> np.ndarray:
    """MMD²_u of each split (a row of 0s and 1s) of the pooled rows; the kernel's diagonal is 0."""
    to_old = is_old @ kernel_MM
    total = kernel_MM.sum()
    within_old, across = (to_old * is_old).sum(1), (to_old * (1 - is_old)).sum(1)
    within_new = total - within_old - 2 * across
    m = is_old.sum(1)
    n = is_old.shape[1] - m
    squared: np.ndarray = within_old / (m * (m - 1)) + within_new / (n * (n - 1)) - 2 * across / (m * n)
    return squared


def labels(old: Sequence[str], new: Sequence[str]) -> Shift:
    """Whether labels are as frequent in the new rows as in the old: Pearson's chi-squared over their counts.

    The effect is Cramér's V, √(χ²/N) for two samples (Cramér 1946). Told: the label whose share has changed most.
    """
    from scipy import stats

    names = sorted({*old, *new})
    counts_2C = np.asarray([[list(side).count(name) for name in names] for side in (old, new)])
    if len(names) < 2:
        return Shift("chi-squared", 0.0, 1.0, len(old), len(new))
    found = stats.chi2_contingency(counts_2C, correction=False)
    effect = float(np.sqrt(found.statistic / counts_2C.sum()))
    share_2C = counts_2C / counts_2C.sum(1, keepdims=True)
    most = int(np.abs(share_2C[1] - share_2C[0]).argmax())
    told = f"{names[most]!r} {share_2C[0, most]:.0%} → {share_2C[1, most]:.0%}"
    return Shift("chi-squared", effect, float(found.pvalue), len(old), len(new), told=told)


def lengths(old_M: Sequence[int], new_M: Sequence[int]) -> Shift:
    """Whether texts are as long: the two-sample Kolmogorov-Smirnov test over tokens; its statistic is the effect."""
    from scipy import stats

    found = stats.ks_2samp(old_M, new_M)
    told = f"median {np.median(old_M):.0f} → {np.median(new_M):.0f} tokens"
    return Shift("Kolmogorov-Smirnov", float(found.statistic), float(found.pvalue), len(old_M), len(new_M), told=told)


def holm(shifts: dict[str, Shift]) -> dict[str, Shift]:
    """The shifts with each p corrected so that one false alarm among all is no likelier than its level (Holm 1979).

    In the order of their p, the i-th of m (from 0) is multiplied by m - i, and is no smaller than the one before.
    """
    corrected, largest = dict(shifts), 0.0
    for place, name in enumerate(sorted(shifts, key=lambda name: shifts[name].p)):
        largest = max(largest, min(1.0, shifts[name].p * (len(shifts) - place)))
        corrected[name] = shifts[name]._replace(p_holm=largest)
    return corrected


def table(shifts: dict[str, Shift], alpha: float) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) for terminal and report."""
    rows = [
        [
            name,
            s.test,
            f"{s.effect:.3f}",
            f"{s.p:.2g}",
            f"{s.p_holm:.2g}",
            "yes" if s.p_holm < alpha else "no",
            s.told or "–",
        ]
        for name, s in shifts.items()
    ]
    return ["Drift", "Test", "Effect", "p", "p (Holm)", f"Shifted at {alpha:g}", "Most"], rows
