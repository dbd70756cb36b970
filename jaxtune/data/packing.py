"""Rows to batch rows: best-fit-decreasing bins, and the arrays of one bin."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np

from jaxtune.types import BRANCH_BITS, Batch

Bins = list[tuple[int, ...]]


def pack(lengths: np.ndarray, max_length: int) -> Bins:
    """Returns bins of row indices whose lengths sum to at most `max_length`: best fit, longest rows first.

    Each row goes into the fullest bin that still has room. Deterministic: ties go in row order, rows of a bin and the
    bins themselves (by their first row) are in row order. Lengths must be 1 to `max_length`.
    """
    bins: list[list[int]] = []
    room: dict[int, deque[int]] = {}  # free tokens -> bins with so many, the longest waiting first
    sizes: list[int] = []  # keys of `room`, sorted, for the smallest that is enough
    for row in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[row])
        assert 0 < length <= max_length, "tokenize() drops or cuts longer rows"
        at = bisect_left(sizes, length)
        if at == len(sizes):
            free, index = max_length, len(bins)
            bins.append([row])
        else:
            free = sizes[at]
            index = room[free].popleft()
            bins[index].append(row)
            if not room[free]:
                del room[free], sizes[at]
        left = free - length
        if left:
            if left not in room:
                room[left] = deque()
                insort(sizes, left)
            room[left].append(index)
    return sorted(tuple(sorted(rows)) for rows in bins)


def one_per_bin(num_rows: int) -> Bins:
    """Returns the unpacked form: each row alone in its bin, in row order."""
    return [(row,) for row in range(num_rows)]


def assemble(
    tokens: np.ndarray,
    weights: np.ndarray,
    offsets: np.ndarray,
    bin_rows: tuple[int, ...],
    max_length: int,
    pad_id: int,
    targets: np.ndarray | None = None,
    scores_MC: np.ndarray | None = None,
    branches: np.ndarray | None = None,
    reference_logps: np.ndarray | None = None,
) -> Batch:
    """Returns one batch row: the fields of `types.Batch`, each (T, …).

    The target of a token is the next token of its own segment, with that token's weight; the last token of a segment
    has target 0 and weight 0, so no row predicts the next one's first token. A branch is a segment of its own, whose
    positions count on from the prompt that it shares.

    Args:
      tokens: int32, all rows end to end; `weights` float32 likewise, of each token as a target.
      offsets: row r is `tokens[offsets[r]:offsets[r + 1]]`.
      targets: int32 likewise, a class for each token, whose weight is then the token's own; None = the next token.
      scores_MC: float32, each row's scores, which then stand wherever its weights are not 0.
      branches: int32 likewise, of each token, where rows have them.
      reference_logps: float32 likewise, of each token as a target.
      bin_rows: the rows to lay out; () gives a row of padding.
    """
    row = empty(max_length, pad_id)
    if scores_MC is not None:
        row["scores_BTC"] = np.zeros((max_length, scores_MC.shape[1]), np.float32)
    if reference_logps is not None:
        row["reference_logps_BT"] = np.zeros(max_length, np.float32)
    at = 0
    for segment, index in enumerate(bin_rows, 1):
        start, end = int(offsets[index]), int(offsets[index + 1])
        stop = at + end - start
        of = np.zeros(end - start, np.int32) if branches is None else branches[start:end]
        row["tokens_BT"][at:stop] = tokens[start:end]
        if targets is None:
            follows = (of[1:] == of[:-1]) | (
                of[:-1] == 0
            )  # the first of a branch that goes on from a prompt is its last token
            row["targets_BT"][at : stop - 1] = follows * tokens[start + 1 : end]
            row["weights_BT"][at : stop - 1] = follows * weights[start + 1 : end]
        else:
            row["targets_BT"][at:stop], row["weights_BT"][at:stop] = targets[start:end], weights[start:end]
        if scores_MC is not None:
            row["scores_BTC"][at:stop] = (weights[start:end, None] != 0) * scores_MC[index]
        if reference_logps is not None:
            row["reference_logps_BT"][at : stop - 1] = (row["weights_BT"][at : stop - 1] != 0) * reference_logps[
                start + 1 : end
            ]
        row["segment_ids_BT"][at:stop] = segment | of << BRANCH_BITS
        row["positions_BT"][at:stop] = _positions(of)
        row["row_ids_BT"][at:stop] = index
        at = stop
    return row


def take_back(values_T: np.ndarray, into: np.ndarray, offsets: np.ndarray, bin_rows: tuple[int, ...]) -> None:
    """Writes what a batch row says of its tokens' targets to where the rows' own tokens are: `assemble`, backwards."""
    at = 0
    for index in bin_rows:
        start, end = int(offsets[index]), int(offsets[index + 1])
        into[start + 1 : end] = values_T[at : at + end - start - 1]
        at += end - start


def _positions(branches: np.ndarray) -> np.ndarray:
    """Position of each token in its own branch, the shared prompt included."""
    index = np.arange(len(branches))
    begins = np.diff(branches, prepend=-1) != 0
    return index - np.maximum.accumulate(index * begins) + (branches > 0) * np.count_nonzero(branches == 0)


def empty(max_length: int, pad_id: int) -> Batch:
    """Returns one batch row of padding alone."""
    return {
        "tokens_BT": np.full(max_length, pad_id, np.int32),
        "targets_BT": np.zeros(max_length, np.int32),
        "weights_BT": np.zeros(max_length, np.float32),
        "segment_ids_BT": np.zeros(max_length, np.int32),
        "positions_BT": np.zeros(max_length, np.int32),
        "row_ids_BT": np.full(max_length, -1, np.int32),
    }
