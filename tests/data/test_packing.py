"""Packing loses no row, mixes none, and wastes no more than first fit."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxtune.data import packing


def random_lengths(count: int, max_length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, max_length + 1, count)


def first_fit(lengths: np.ndarray, max_length: int) -> int:
    free: list[int] = []
    for length in lengths:
        at = next((i for i, room in enumerate(free) if room >= length), None)
        if at is None:
            free.append(max_length - length)
        else:
            free[at] -= length
    return len(free)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_length", [7, 64, 1000])
def test_every_row_once_and_no_bin_too_full(seed: int, max_length: int) -> None:
    lengths = random_lengths(300, max_length, seed)
    bins = packing.pack(lengths, max_length)
    assert sorted(row for rows in bins for row in rows) == list(range(300))
    assert max(lengths[list(rows)].sum() for rows in bins) <= max_length
    assert -(-lengths.sum() // max_length) <= len(bins) <= first_fit(lengths, max_length)
    assert bins == sorted(bins)
    assert all(list(rows) == sorted(rows) for rows in bins)
    assert bins == packing.pack(lengths, max_length)


def test_best_fit_takes_the_fullest_bin() -> None:
    # 6 and 5 open bins of 10; 5 fits beside 5 exactly, 4 beside 6. First fit in file order needs a third bin.
    lengths = np.array([5, 4, 6, 5])
    assert packing.pack(lengths, 10) == [(0, 3), (1, 2)]
    assert first_fit(lengths, 10) == 3


def test_ties_are_settled_for_good() -> None:
    # Written down: a run resumed under a later jaxtune must find the same bins.
    assert packing.pack(np.array([6, 6, 6, 4, 4, 2, 2, 9, 1]), 10) == [(0, 3), (1, 4), (2, 5, 6), (7, 8)]


def test_a_hundred_thousand_rows_in_seconds() -> None:
    lengths = random_lengths(100_000, 1500) // 2 + 1
    start = time.perf_counter()
    packing.pack(lengths, 2048)
    assert time.perf_counter() - start < 5


def test_assembled_row_keeps_segments_apart() -> None:
    tokens = np.array([11, 12, 13, 21, 22, 31], np.int32)
    weights = np.array([1, 0, 1, 1, 1, 1], np.float32)
    row = packing.assemble(tokens, weights, np.array([0, 3, 5, 6]), (0, 1, 2), 8, pad_id=9)
    assert row["tokens_BT"].tolist() == [11, 12, 13, 21, 22, 31, 9, 9]  # every token is an input
    assert row["targets_BT"].tolist() == [12, 13, 0, 22, 0, 0, 0, 0]  # never the next segment's first token
    assert row["weights_BT"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]  # the target's weight, not the input's
    assert row["segment_ids_BT"].tolist() == [1, 1, 1, 2, 2, 3, 0, 0]
    assert row["positions_BT"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row["row_ids_BT"].tolist() == [0, 0, 0, 1, 1, 2, -1, -1]


def test_unpacked_is_one_row_each() -> None:
    assert packing.one_per_bin(3) == [(0,), (1,), (2,)]
    assert packing.pack(np.array([], np.int64), 4) == []
