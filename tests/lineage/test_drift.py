"""Drift: rare alarms where nothing changed, sure ones where something did; figures against hand-computed ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxtune.lineage import drift


def test_mmd_is_the_unbiased_estimate() -> None:
    """Against the sums written out, for rows of two numbers."""
    rng = np.random.default_rng(0)
    x_MD, y_MD = rng.normal(size=(4, 2)), rng.normal(2.0, 1.0, size=(5, 2))
    pooled = [*x_MD, *y_MD]
    median = np.median([((a - b) ** 2).sum() for a, b in itertools.combinations(pooled, 2)])

    def mean(first: np.ndarray, second: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not (same and i == j)]
        return float(np.mean([np.exp(-((first[i] - second[j]) ** 2).sum() / median) for i, j in pairs]))

    squared = mean(x_MD, x_MD, True) + mean(y_MD, y_MD, True) - 2 * mean(x_MD, y_MD, False)
    shift, likeness_M = drift.mmd(x_MD, y_MD, 50, 0)
    assert squared > 0
    assert shift.effect == pytest.approx(np.sqrt(squared), rel=1e-9)
    assert likeness_M[2] == pytest.approx(mean(x_MD, y_MD[2:3], False), rel=1e-9)


def test_where_nothing_changed_alarms_are_as_rare_as_said() -> None:
    """Two samples of one distribution, 120 times: p is spread evenly, and below 0.05 in about one of twenty.

    Of 120 trials at 5%, 13 or more alarms come less than once in a hundred times.
    """
    found, all_false = [], 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        old_MD, new_MD = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
        embeddings, _ = drift.mmd(old_MD, new_MD, 99, seed)
        found.append(embeddings.p)
        shifts = {
            "embeddings": embeddings,
            "labels": drift.labels(*(list(rng.choice(["a", "b", "c"], 60)) for _ in range(2))),
            "lengths": drift.lengths(*(rng.integers(5, 200, 60).tolist() for _ in range(2))),
        }
        all_false += min(shift.p_holm for shift in drift.holm(shifts).values()) < 0.05
    assert np.sum(np.asarray(found) < 0.05) <= 13
    assert all_false <= 13, "of the three tests together"
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_what_changed_is_found_and_the_strangest_rows_named() -> None:
    rng = np.random.default_rng(1)
    old_MD = rng.normal(size=(60, 6))
    new_MD = np.concatenate([rng.normal(size=(50, 6)), rng.normal(4.0, 0.3, size=(10, 6))])
    shift, likeness_M = drift.mmd(old_MD, new_MD, 199, 0)
    assert shift.p == 1 / 200
    assert set(np.argsort(likeness_M)[:10]) == set(range(50, 60))
    assert drift.labels(["a"] * 80 + ["b"] * 20, ["a"] * 50 + ["b"] * 50).p < 1e-4
    assert drift.lengths(range(100), range(60, 160)).p < 1e-6


def test_effects_by_hand() -> None:
    """40:10 against 25:25: χ² = 100 (40·25 - 10·25)² / (50·50·65·35) = 9.89, V = √(9.89/100)."""
    shift = drift.labels(["a"] * 40 + ["b"] * 10, ["a"] * 25 + ["b"] * 25)
    assert shift.effect == pytest.approx(np.sqrt((40 * 25 - 10 * 25) ** 2 / (50 * 50 * 65 * 35)))
    assert shift.told in ("'a' 80% → 50%", "'b' 20% → 50%")
    assert drift.lengths([1, 2, 3, 4], [3, 4, 5, 6]).effect == 0.5
    assert drift.labels(["a"] * 5, ["a"] * 9).p == 1.0, "one label cannot shift"
    assert drift.labels(["a"] * 9, ["b"] * 9).effect == pytest.approx(1.0)


def test_holm_by_hand() -> None:
    """0.01, 0.03 and 0.04 of three: times 3, 2 and 1, each no smaller than the one before."""
    found = drift.holm({name: drift.Shift("", 0.0, p, 1, 1) for name, p in (("a", 0.04), ("b", 0.01), ("c", 0.03))})
    assert {name: shift.p_holm for name, shift in found.items()} == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
