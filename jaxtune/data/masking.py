"""Masked words (arXiv:1810.04805, section 3.1): which tokens are to be guessed, and what stands in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxtune.types import Batch

if TYPE_CHECKING:
    from jaxtune.data.batches import Rows

_TRAINING, _FIXED = 1, 2  # streams of random numbers; the order of epochs is drawn from stream 0


class Masking(NamedTuple):
    """Of a text's tokens `fraction` are to be guessed, at least one: `token_share` of them become the mask token,
    `random_share` any token of the vocabulary, the rest stay. All is drawn from (seed, number of the row), nothing else.
    """

    mask_id: int
    vocab_size: int
    fraction: float
    token_share: float
    random_share: float
    seed: int

    def num_masked(self, num_allowed: int) -> int:
        """How many of a text's tokens are to be guessed."""
        return max(1, round(self.fraction * num_allowed)) if num_allowed else 0


def masked(batch: Batch, numbers: list[int], masking: Masking) -> Batch:
    """Returns a batch with tokens masked, whose weights are then 1 there and 0 elsewhere.

    `numbers` are the batch rows' own, of the endless list of epochs: so a row is masked anew each time it comes, and alike
    on whatever host and after whatever resume. Tokens of weight 0 are never masked.
    """
    rows = [
        _row(tokens_T, weights_T != 0, segment_ids_T, masking, number, _TRAINING)
        for tokens_T, weights_T, segment_ids_T, number in zip(
            batch["tokens_BT"], batch["weights_BT"], batch["segment_ids_BT"], numbers, strict=True
        )
    ]
    tokens_BT, weights_BT = (np.stack(parts) for parts in zip(*rows, strict=True))
    return {**batch, "tokens_BT": tokens_BT, "weights_BT": weights_BT}


def fixed(rows: Rows, masking: Masking) -> Rows:
    """Returns rows masked once and for all, to be measured on: row r by its number alone, however it is packed."""
    tokens, weights = rows.tokens.copy(), np.zeros_like(rows.weights)
    for number, (start, end) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        one = np.ones(end - start, np.int32)
        allowed = rows.weights[start:end] != 0
        tokens[start:end], weights[start:end] = _row(tokens[start:end], allowed, one, masking, number, _FIXED)
    return replace(rows, tokens=tokens, weights=weights)


def num_masked(rows: Rows, masking: Masking) -> int:
    """How many tokens of the rows are guessed in one pass over them."""
    allowed_M = np.add.reduceat(rows.weights != 0, rows.offsets[:-1], dtype=np.int64)
    return sum(masking.num_masked(int(num)) for num in allowed_M)


def _row(
    tokens_T: np.ndarray, allowed_T: np.ndarray, segment_ids_T: np.ndarray, masking: Masking, number: int, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one row's tokens, masked text by text, and the weights that say where."""
    T = len(tokens_T)
    # Philox's raw bits are the same under every NumPy, which its Generator's distributions do not promise to be.
    raw = np.random.Philox(key=[masking.seed % 2**64, number], counter=[0, 0, 0, stream]).random_raw(3 * T)
    order_T, kind_T, token_T = (raw >> np.uint64(11)).reshape(3, T) * 2.0**-53  # each uniform in [0, 1)
    chosen_T = np.zeros(T, bool)
    for segment in range(1, int(segment_ids_T.max(initial=0)) + 1):
        allowed = np.flatnonzero(allowed_T & (segment_ids_T == segment))
        lowest = np.argsort(order_T[allowed], kind="stable")[: masking.num_masked(len(allowed))]
        chosen_T[allowed[lowest]] = True
    becomes_mask_T = chosen_T & (kind_T < masking.token_share)
    becomes_any_T = chosen_T & ~becomes_mask_T & (kind_T < masking.token_share + masking.random_share)
    any_T = (token_T * masking.vocab_size).astype(np.int32)
    tokens_T = np.where(becomes_mask_T, np.int32(masking.mask_id), np.where(becomes_any_T, any_T, tokens_T))
    return tokens_T, chosen_T.astype(np.float32)
