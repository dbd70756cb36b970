"""Replay: batches in which some rows come from other data (arXiv:2403.08763, section 4.2), by the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxtune.data.batches import BatchSource, Rows
from jaxtune.types import Batch


class MixtureSource(BatchSource):
    """The batches of a main source, with a share of each batch's rows taken from others.

    Before step s, source i has given floor(s x batch_size x share_i) rows: so a batch has its share to within one row, and
    all of them together have it to the row. The main source fills the rest. Each source goes on where it stopped, through its
    own epochs in its own order; a batch row (packed or not) is of one source. What a row's number means in `row_ids_BT`: the main
    source's rows come first, then those of each other one.
    """

    def __init__(self, main: BatchSource, others: Sequence[BatchSource], shares: Sequence[float]) -> None:
        self.main, self.others = main, tuple(others)
        self.rows, self.batch_size, self.num_steps = main.rows, main.batch_size, main.num_steps
        self._shares = [Fraction(str(share)) for share in shares]
        every = [main.rows, *(other.rows for other in others)]
        self._offsets = np.cumsum([0, *map(len, every)])
        self._tokens = [_per_row(rows) for rows in every]

    @property
    def num_bins(self) -> int:
        """Batch rows of one epoch of the main source."""
        return self.main.num_bins

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the main source's rows takes."""
        return self.main.num_bins / float(self.batch_size * (1 - sum(self._shares)))

    def local(self, step: int, batch_rows: np.ndarray) -> Batch:
        """Returns some rows of the global batch of a step, by number: those that one host holds."""
        places = self._places(step)
        wanted = [places[int(row)] for row in batch_rows]
        parts = []
        for index, source in enumerate((self.main, *self.others)):
            numbers = [number for which, number in wanted if which == index]
            if numbers:
                part = source.numbered(numbers)
                ids_BT = part["row_ids_BT"]
                parts.append({**part, "row_ids_BT": np.where(ids_BT >= 0, ids_BT + np.int32(self._offsets[index]), -1)})
        order = np.argsort(np.argsort([which for which, _ in wanted], kind="stable"), kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    def told(self, step: int) -> dict[str, float]:
        """What of a step's batch is replay: a share of its rows, and of its trained tokens."""
        rows, tokens = self._counts(step)
        return {"replay_share": 1 - rows[0] / rows.sum(), "replay_token_share": 1 - tokens[0] / max(1, tokens.sum())}

    def counts(self, num_steps: int) -> list[dict[str, int]]:
        """Batch rows and trained tokens of each source in so many steps, the main one first."""
        total = np.zeros((2, 1 + len(self.others)), np.int64)
        for step in range(num_steps):
            total += self._counts(step)
        return [{"batch_rows": int(rows), "trained_tokens": int(tokens)} for rows, tokens in total.T]

    def row_id(self, number: int, row_ids: Sequence[Sequence[str]]) -> str:
        """The id of a row by its number in a batch, of the ids of every source's rows."""
        index = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return row_ids[index][number - int(self._offsets[index])]

    def _places(self, step: int) -> list[tuple[int, int]]:
        """(source, its row's number) of each row of a batch."""
        given = [(self._given(share, step), self._given(share, step + 1)) for share in self._shares]
        first = step * self.batch_size - sum(start for start, _ in given)
        last = (step + 1) * self.batch_size - sum(end for _, end in given)
        ranges = [(first, last), *given]
        return [(index, number) for index, (start, end) in enumerate(ranges) for number in range(start, end)]

    def _given(self, share: Fraction, step: int) -> int:
        return math.floor(step * self.batch_size * share)

    def _counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        sources = (self.main, *self.others)
        rows, tokens = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.int64)
        for index, number in self._places(step):
            rows[index] += 1
            tokens[index] += self._tokens[index][list(sources[index].bin_of(number))].sum()
        return rows, tokens


def _per_row(rows: Rows) -> np.ndarray:
    """Trained tokens of each row."""
    return np.add.reduceat(rows.weights != 0, rows.offsets[:-1], dtype=np.int64)


def seeded(seed: int, source: int) -> int:
    """The seed of one of the other sources, so that its order is no other's."""
    return (seed + 0x9E3779B97F4A7C15 * (source + 1)) % 2**63
