"""The words every room shares: one shape legend, the batch, and the user's error.

Shape legend. An array's name ends in one letter per dim, outermost first:

    B  batch rows              T  tokens of a row (queries)   S  keys: tokens or cache slots
    D  model (embedding) dim   N  query heads                 K  key/value heads
    G  query heads per K       H  head dim                    F  feed-forward dim
    V  vocabulary              L  layers (stacked, scanned)   R  LoRA rank
    A  accumulation steps      C  candidates (labels)         M  rows of a data set
    Q  passages of a query     U  tokens of a passage         W  passages of a batch or corpus
    J  a teacher's likeliest words, and all others as one

"axis" is the mesh's, "dim" an array's. Counts are `num_…`; scalars carry units: `_tokens _steps _bytes _seconds`.
"""

from __future__ import annotations

import numpy as np

# A batch: named NumPy arrays, each (B, …) as its name ends, made in `data/`, turned into global `jax.Array`s once, by `sharding.py`.
#
#   tokens_BT       int32    input ids; `pad_id` where there is no token
#   targets_BT      int32    the next token of the same segment; or what this token itself is to be classed as; 0 where there is none
#   weights_BT      float32  loss weight of predicting `targets_BT` (or `scores_BTC`); 0 masks
#   scores_BTC      float32  what a text's scores should be, at the token whose weight is not 0; several labels and numbers alone
#   segment_ids_BT  int32    1, 2, … numbers the rows packed into one; 0 is padding
#   positions_BT    int32    position inside the segment, restarting at 0
#   row_ids_BT      int32    index of the data row a token came from; -1 is padding (host-side bookkeeping)
#   reference_logps_BT  float32  log-probability that the reference model gives `targets_BT`; 0 where nothing trains
#   old_logps_BT    float32  likewise of the policy that sampled them
#   advantages_BT   float32  how much better than expected the token's completion was
#   old_values_BT   float32  what a critic expected before the token, when it was sampled
#   returns_BT      float32  what it should have expected
#   teacher_logps_BTJ  float32  log-probabilities of a teacher's likeliest words, the last of all others together
#   teacher_ids_BTJ    int32    these words; -1 for all others
#   teacher_tokens_BT, teacher_segment_ids_BT, teacher_positions_BT  int32  what a teacher reads in the place of these, where that is another text
#   teacher_at_BT   int32    at which of its row's tokens it predicts `targets_BT`
#   gold_BT         float32  1 where the targets are the data's, 0 where the student wrote them itself
#
# A segment id may hold a branch above its number: `number | branch << BRANCH_BITS`. Branch 0 is a prompt that the other
# branches of its number go on from; they do not see each other.
#
# Pairs of texts hold the query in the fields above (its loss weight stands on its first token) and beside it
#
#   query_ids_B              int32  number of the query's text; equal texts have equal numbers; -1 is filling
#   passage_tokens_BQU       int32  the passage that answers, then hard negatives
#   passage_segment_ids_BQU  int32  1 where there is a token; 0 is padding
#   passage_ids_BQ           int32  number of the passage's text, likewise; -1 where there is none
Batch = dict[str, np.ndarray]

BATCH_FIELDS: dict[str, np.dtype] = {
    "tokens_BT": np.dtype(np.int32),
    "targets_BT": np.dtype(np.int32),
    "weights_BT": np.dtype(np.float32),
    "scores_BTC": np.dtype(np.float32),
    "segment_ids_BT": np.dtype(np.int32),
    "positions_BT": np.dtype(np.int32),
    "row_ids_BT": np.dtype(np.int32),
    "reference_logps_BT": np.dtype(np.float32),
    "old_logps_BT": np.dtype(np.float32),
    "advantages_BT": np.dtype(np.float32),
    "old_values_BT": np.dtype(np.float32),
    "returns_BT": np.dtype(np.float32),
    "teacher_logps_BTJ": np.dtype(np.float32),
    "teacher_ids_BTJ": np.dtype(np.int32),
    "gold_BT": np.dtype(np.float32),
    "teacher_tokens_BT": np.dtype(np.int32),
    "teacher_segment_ids_BT": np.dtype(np.int32),
    "teacher_positions_BT": np.dtype(np.int32),
    "teacher_at_BT": np.dtype(np.int32),
    "query_ids_B": np.dtype(np.int32),
    "passage_tokens_BQU": np.dtype(np.int32),
    "passage_segment_ids_BQU": np.dtype(np.int32),
    "passage_ids_BQ": np.dtype(np.int32),
}

# What a rematerialised block may keep for its backward pass, by name (`train.save`, `train.offload`): its input, which is kept
# in any case; queries, keys and values; what the attention kernel gives; what attention adds to the residual; what down_proj reads.
SAVED_NAMES = ("block_input", "qkv", "attention", "mixed", "mlp")

BRANCH_BITS = 16  # of a segment id's low bits, its number

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "the work was saved; run the same command again"


class UserError(ValueError):
    """A mistake the user can mend. Says what came, what was expected and what to do; the launcher prints it alone."""


class Waiting(Exception):
    """Something is missing that people are to do; says what. Work is saved: the launcher ends with `RESUME_EXIT_CODE`."""


def nearest(name: str, known: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Returns "; did you mean 'x' or 'y'?" for the known names nearest to `name`, or "" when none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, limit, 0.6)
    if "." in name or any("." in k for k in known):  # dotted paths: the last part alone may have been meant
        tails = {k: k.rsplit(".", 1)[-1] for k in known}
        close = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(dict.fromkeys(tails.values())), limit, 0.75)
        near += [k for tail in close for k in known if tails[k] == tail and k not in near]
    near = near[:limit]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
