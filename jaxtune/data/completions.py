"""Sampled completions as batches: each with its prompt a segment, several packed into a row, what belongs to a token beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.data import packing
from jaxtune.types import Batch


class Layout(NamedTuple):
    """Minibatches P of a round as fields (P, B, T), and of each of its completions' K tokens, end to end, where it is predicted."""

    fields: Batch
    minibatch_K: np.ndarray
    row_K: np.ndarray
    column_K: np.ndarray

    def lay(self, values_K: np.ndarray) -> np.ndarray:
        """Values of the tokens, each where its token is predicted: (P, B, T), 0 elsewhere."""
        laid = np.zeros(self.fields["tokens_BT"].shape, values_K.dtype)
        laid[self.minibatch_K, self.row_K, self.column_K] = values_K
        return laid

    def read(self, laid_PBT: np.ndarray) -> np.ndarray:
        """The inverse of `lay`."""
        return np.asarray(laid_PBT[self.minibatch_K, self.row_K, self.column_K])

    def batch(self, minibatch: int) -> Batch:
        """The fields of one minibatch, (B, T) each."""
        return {name: array[minibatch] for name, array in self.fields.items()}


def lay_out(
    prompts: Sequence[Sequence[int]], completions: Sequence[np.ndarray], row_ids: Sequence[int] | np.ndarray, order: np.ndarray, num_minibatches: int,
    batch_size: int, max_length: int, pad_id: int, lengths: Sequence[int] | None = None,
) -> Layout:  # fmt: skip
    """Shares completions out among minibatches, equally and in `order`, and packs each minibatch into batch rows.

    Args:
      prompts, completions: tokens of each completion's prompt, and its own.
      row_ids: number of each prompt.
      order: a permutation of the completions.
      lengths: tokens of each completion and its prompt as it is packed; more than it has, where another layout of the same
        completions, with longer prompts, shall share its rows. None: its own.
      batch_size: rows of a minibatch; those that are not needed stay empty. `validation.py` sees to it that all fit.
    """
    lengths_N = np.asarray([len(completion) for completion in completions])
    first_N = np.cumsum(lengths_N) - lengths_N  # of a completion's tokens among all
    places = np.zeros((3, int(lengths_N.sum())), np.int64)
    made: list[Batch] = []
    for part, chosen in enumerate(np.split(order, num_minibatches)):
        texts = [np.concatenate([np.asarray(prompts[i], np.int32), completions[i]]) for i in chosen]
        weights = [np.repeat(np.asarray([0, 1], np.float32), [len(prompts[i]), lengths_N[i]]) for i in chosen]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        bins = packing.pack(np.diff(offsets) if lengths is None else np.asarray(lengths)[chosen], max_length)
        assert len(bins) <= batch_size, "a step's completions do not fit its rows"
        flat = (np.concatenate(texts), np.concatenate(weights), offsets)
        rows = [packing.assemble(*flat, b, max_length, pad_id) for b in bins + [()] * (batch_size - len(bins))]
        for number, (row, members) in enumerate(zip(rows, bins, strict=False)):
            at = 0
            for member in members:
                i = chosen[member]
                row["row_ids_BT"][at : at + len(texts[member])] = row_ids[i]
                tokens = slice(first_N[i], first_N[i] + lengths_N[i])
                where = at + len(prompts[i]) - 1 + np.arange(lengths_N[i])  # a token is predicted at the one before it
                places[:, tokens] = np.broadcast_to(part, len(where)), np.broadcast_to(number, len(where)), where
                at += len(texts[member])
        made.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return Layout({name: np.stack([one[name] for one in made]) for name in made[0]}, *places)


def taught_fields(student: Layout, teacher: Layout) -> Batch:
    """The fields of a teacher that sees other prompts before the same completions, of one minibatch, whose rows are the student's.

    `teacher_at_BT` says at which of its row's tokens the teacher predicts what the student predicts here.
    """
    its = {f"teacher_{name}": teacher.batch(0)[name] for name in ("tokens_BT", "segment_ids_BT", "positions_BT")}
    assert np.array_equal(student.row_K, teacher.row_K), "laid out by other lengths"
    return its | {"teacher_at_BT": student.lay(teacher.column_K.astype(np.int32))[0]}
