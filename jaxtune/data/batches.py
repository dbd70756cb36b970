"""Rows to batches: any step's batch by its number alone, and grain's reader threads to make them ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data import packing
from jaxtune.data.masking import Masking, masked
from jaxtune.types import Batch


@dataclass(frozen=True)
class Passages:
    """Of rows that are queries: the distinct texts that go with them, end to end, and which belong to which row."""

    tokens: np.ndarray  # int32
    offsets: np.ndarray  # int64, one more than texts
    of_row_MQ: np.ndarray  # int32, numbers of a row's texts: the one that answers, then hard negatives; -1 = none
    query_ids_M: np.ndarray  # int32, number of the row's own text
    max_length: int  # tokens

    def of(self, bins: packing.Bins, pad_id: int) -> Batch:
        """Returns the fields of these rows' passages; each bin holds one row, or none."""
        Q, U = self.of_row_MQ.shape[1], self.max_length
        rows = [b[0] if b else -1 for b in bins]
        found_BQ = np.stack([self.of_row_MQ[r] if r >= 0 else np.full(Q, -1, np.int32) for r in rows])
        tokens_BQU = np.full((len(bins), Q, U), pad_id, np.int32)
        segment_ids_BQU = np.zeros((len(bins), Q, U), np.int32)
        for at in zip(*np.nonzero(found_BQ >= 0), strict=True):
            start, end = self.offsets[found_BQ[at] : found_BQ[at] + 2]
            tokens_BQU[at][: end - start], segment_ids_BQU[at][: end - start] = self.tokens[start:end], 1
        return {
            "query_ids_B": np.asarray([self.query_ids_M[r] if r >= 0 else -1 for r in rows], np.int32),
            "passage_tokens_BQU": tokens_BQU,
            "passage_segment_ids_BQU": segment_ids_BQU,
            "passage_ids_BQ": found_BQ,
        }


@dataclass(frozen=True)
class TeacherWords:
    """A teacher's likeliest words of each token that trains, which may lie in files: (tokens, J), and where each token's are."""

    logps: np.ndarray  # float32; the last is of all other words together
    ids: np.ndarray  # int32; the last is -1
    at: np.ndarray  # int64, of each token of the rows; -1 = none

    def of(self, offsets: np.ndarray, bins: packing.Bins, max_length: int) -> Batch:
        """Returns the fields of the rows that `bins` hold; a token's stand where it is the target."""
        shape = (len(bins), max_length, self.logps.shape[1])
        made = {"teacher_logps_BTJ": np.zeros(shape, np.float32), "teacher_ids_BTJ": np.zeros(shape, np.int32)}
        for b, t, found in self._places(offsets, bins):
            made["teacher_logps_BTJ"][b, t], made["teacher_ids_BTJ"][b, t] = self.logps[found], self.ids[found]
        return made

    def take(self, said: Any, offsets: np.ndarray, bins: packing.Bins) -> None:
        """Writes what was said of the batch that holds `bins`, (logps, ids) as its fields: `of`, backwards."""
        logps_BTJ, ids_BTJ = said
        for b, t, found in self._places(offsets, bins):
            self.logps[found], self.ids[found] = logps_BTJ[b, t], ids_BTJ[b, t]

    def flush(self) -> None:
        """Sees to it that what was taken is in the files."""
        for array in (self.logps, self.ids):
            if isinstance(array, np.memmap):
                array.flush()

    def _places(self, offsets: np.ndarray, bins: packing.Bins) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(batch row, tokens there, their places in the arrays) of each row."""
        for b, bin_rows in enumerate(bins):
            first = 0
            for index in bin_rows:
                start, end = int(offsets[index]), int(offsets[index + 1])
                found = self.at[start + 1 : end]
                yield b, first + np.flatnonzero(found >= 0), found[found >= 0]
                first += end - start


@dataclass(frozen=True)
class Rows:
    """Tokenised rows end to end: row r is `tokens[offsets[r]:offsets[r + 1]]`, `weights` likewise."""

    tokens: np.ndarray  # int32
    weights: np.ndarray  # float32, loss weight of each token as a target
    offsets: np.ndarray  # int64, one more than rows
    row_ids: list[str]  # "file.jsonl:17"
    counts: dict[str, int] = field(default_factory=dict)
    targets: np.ndarray | None = None  # int32, what each token itself is to be classed as; None = its next token
    scores_MC: np.ndarray | None = None  # float32, what each row's scores should be, in place of a class
    passages: Passages | None = None  # of rows that are queries
    branches: np.ndarray | None = (
        None  # int32, of each token: 0 is what the row's other branches share (`data/preferences.py`)
    )
    reference_logps: np.ndarray | None = None  # float32, log-probability of each token as a target, by another model
    teacher: TeacherWords | None = None  # what a teacher gives each token as a target

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """A hash of what is trained on: tokens, loss weights, where each row begins, classes, scores, passages and branches."""
        hashed, theirs = hashlib.sha256(), self.passages
        more = (theirs.tokens, theirs.offsets, theirs.of_row_MQ) if theirs else ()
        for array in (self.tokens, self.weights, self.offsets, self.targets, self.scores_MC, self.branches, *more):
            if array is not None:
                hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()


class BatchSource:
    """Batches as a pure function of (rows, settings, seed, step): resuming needs the step, a host only its own rows.

    Batch rows flow on over epochs: row r of step s is number `s * batch_size + r` of an endless list of epochs, each
    one a pass over all bins in an order of its own.
    """

    def __init__(
        self,
        rows: Rows,
        max_length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        batch_size: int,
        pad_id: int,
        num_steps: int | None = None,
        masking: Masking | None = None,
    ) -> None:
        """Lays the rows out in bins of `max_length` tokens; `num_steps` bounds the steps, None leaves them open.

        With `masking`, tokens are masked anew each time that they come.
        """
        self.rows, self.max_length, self.pad_id = rows, max_length, pad_id
        self.shuffle, self.seed, self.batch_size, self.num_steps = shuffle, seed, batch_size, num_steps
        self.bins, self.masking = make_bins(rows, max_length, packing), masking
        self._order = lru_cache(maxsize=4)(self._epoch_order)

    @property
    def num_bins(self) -> int:
        """Batch rows of one epoch."""
        return len(self.bins)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the rows takes; the last may reach into the next epoch, so not always whole."""
        return self.num_bins / self.batch_size

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_bins)
        # Sorting Philox's raw bits gives the same order under every NumPy; Generator.permutation does not promise it.
        bits = np.random.Philox(key=[self.seed % 2**64, epoch]).random_raw(self.num_bins)
        return np.argsort(bits, kind="stable")

    def __getitem__(self, step: int) -> Batch:
        """Returns the global batch of a step, every field (B, …)."""
        return self.local(step, np.arange(self.batch_size))

    def local(self, step: int, batch_rows: np.ndarray) -> Batch:
        """Returns some rows of the global batch of a step, by number: those that one host holds."""
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            raise ValueError(f"step {step} is outside 0 to {self.num_steps}")
        return self.numbered([step * self.batch_size + int(row) for row in batch_rows])

    def numbered(self, numbers: list[int]) -> Batch:
        """Returns batch rows by their numbers in the endless list of epochs."""
        batch = stack(self.rows, [self.bin_of(number) for number in numbers], self.max_length, self.pad_id)
        return masked(batch, numbers, self.masking) if self.masking else batch

    def bins_of(self, step: int) -> packing.Bins:
        """The rows that each row of a step's global batch holds, by number."""
        return [self.bin_of(step * self.batch_size + row) for row in range(self.batch_size)]

    def bin_of(self, number: int) -> tuple[int, ...]:
        """The rows in a batch row, by its number."""
        epoch, position = divmod(number, self.num_bins)
        return self.bins[int(self._order(epoch)[position])]


def make_bins(rows: Rows, max_length: int, packed: bool) -> packing.Bins:
    """Returns the rows of each batch row: best fit when `packed`, else (and with passages) one each; ordered by their first row."""
    packed = packed and rows.passages is None
    return packing.pack(rows.lengths, max_length) if packed else packing.one_per_bin(len(rows))


def stack(rows: Rows, bins: packing.Bins, max_length: int, pad_id: int) -> Batch:
    """Returns the batch that holds `bins`: fields (B, T, …), and those of the rows' passages."""
    arrays, more = (
        (rows.tokens, rows.weights, rows.offsets),
        (rows.targets, rows.scores_MC, rows.branches, rows.reference_logps),
    )
    made = [packing.assemble(*arrays, b, max_length, pad_id, *more) for b in bins]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    batch |= {} if rows.teacher is None else rows.teacher.of(rows.offsets, bins, max_length)
    return batch if rows.passages is None else batch | rows.passages.of(bins, pad_id)


class _Failure(NamedTuple):
    error: Exception


class _Steps:
    """What grain reads: step numbers in, this host's batches out."""

    def __init__(self, source: BatchSource, start_step: int, num_steps: int, batch_rows: np.ndarray) -> None:
        self.source, self.start_step, self.num_steps, self.batch_rows = source, start_step, num_steps, batch_rows

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: Any) -> Batch | _Failure:
        # An error travels as a value: raised in a reader thread, a StopIteration would end training without a word.
        try:
            return self.source.local(self.start_step + int(index), self.batch_rows)
        except Exception as error:
            return _Failure(error)


def iterate(
    source: BatchSource,
    start_step: int,
    num_steps: int,
    batch_rows: np.ndarray | None = None,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Yields this host's part (`batch_rows` of each global batch; None = all) of `num_steps` steps from `start_step` on, made up to `prefetch` ahead by grain.

    Raises:
      Exception: whatever making a batch raised, at that batch.
    """
    import grain  # here because grain imports jax, which data/ must not do by itself

    if num_steps <= 0:
        return
    steps = _Steps(source, start_step, num_steps, np.arange(source.batch_size) if batch_rows is None else batch_rows)
    options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=max(1, prefetch))
    made = 0
    for batch in grain.MapDataset.source(steps).to_iter_dataset(options):
        if isinstance(batch, _Failure):
            raise RuntimeError(f"batch of step {start_step + made} could not be made") from batch.error
        made += 1
        yield batch
    if made != num_steps:
        raise RuntimeError(f"the data ended after {made} of {num_steps} batches")


def eval_batches(
    rows: Rows, max_length: int, packing: bool, batch_size: int, pad_id: int, num_batches: int = 0
) -> Iterator[Batch]:
    """Yields every row exactly once in file order, the last batch filled up with empty rows; `num_batches` 0 = all."""
    bins = make_bins(rows, max_length, packing)
    starts = range(0, len(bins), batch_size)
    for start in starts[:num_batches] if num_batches else starts:
        taken = bins[start : start + batch_size]
        yield stack(rows, taken + [()] * (batch_size - len(taken)), max_length, pad_id)


def padding_share(batch: Batch) -> float:
    """Returns the share of a batch's tokens that is padding, 0 to 1."""
    return float(np.mean(batch["segment_ids_BT"] == 0))
