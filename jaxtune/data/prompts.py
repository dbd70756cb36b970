"""Prompts that a model is to answer itself, and which of them each round takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.data import batches, templates
from jaxtune.data.batches import Rows
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import Batch, UserError


class PromptSource:
    """The prompts of a round, by its number alone; stands where `BatchSource` stands.

    Prompts flow on over epochs, each one a pass over all of them in an order of its own.

    Args:
      rows: the prompts' tokens; `examples` what they were made from, one each.
      per_round: prompts of a round, which takes `steps_per_round` optimizer steps.
      max_length, batch_size, pad_id: of the batches that show prompts (`[step]`).
    """

    def __init__(
        self, rows: Rows, examples: Sequence[Example], per_round: int, steps_per_round: int, shuffle: bool, seed: int, max_length: int,
        batch_size: int, pad_id: int,
    ):  # fmt: skip
        self.rows, self.examples, self.per_round, self.steps_per_round = rows, examples, per_round, steps_per_round
        self._shuffle, self._seed = shuffle, seed
        self._shown = (max_length, batch_size, pad_id)

    @property
    def num_bins(self) -> int:
        """Prompts of one epoch."""
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which each prompt is answered once."""
        return self.num_bins / self.per_round * self.steps_per_round

    def tokens(self, number: int) -> list[int]:
        """The tokens of a prompt."""
        start, end = self.rows.offsets[number : number + 2]
        return [int(token) for token in self.rows.tokens[start:end]]

    def of_round(self, number: int) -> np.ndarray:
        """The numbers of a round's prompts."""
        places = [divmod(number * self.per_round + i, self.num_bins) for i in range(self.per_round)]
        return np.asarray([self._order(epoch, 0)[at] for epoch, at in places], np.int64)

    def others(self, number: int) -> np.ndarray:
        """All prompts that are not a round's, in the order in which they may take the place of some of its."""
        order = self._order(number, 1)
        return order[~np.isin(order, self.of_round(number))]

    def __getitem__(self, step: int) -> Batch:
        """Returns the first prompts of the step's round, as a batch in which nothing trains."""
        max_length, batch_size, pad_id = self._shown
        chosen = [(int(row),) for row in self.of_round(step // self.steps_per_round)[:batch_size]]
        return batches.stack(self.rows, chosen + [()] * (batch_size - len(chosen)), max_length, pad_id)

    def _order(self, number: int, kind: int) -> np.ndarray:
        if not self._shuffle and kind == 0:
            return np.arange(self.num_bins)
        # Sorting Philox's raw bits gives the same order under every NumPy; Generator.permutation does not promise it.
        bits = np.random.Philox(key=[self._seed % 2**64, 2 * number + kind]).random_raw(self.num_bins)
        return np.argsort(bits, kind="stable")


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, max_prompt_length: int, progress: Any
) -> tuple[Rows, list[Example]]:
    """Returns the prompts' tokens, and the examples that they are of; longer ones than `max_prompt_length` are dropped and counted.

    Raises:
      UserError: an example has no prompt apart from its answer, its prompt is empty, or none is left.
    """
    kept: list[tuple[Example, list[int]]] = []
    for example in progress(examples, len(examples), "tokenising prompts"):
        if example.is_pair or example.words is not None or (example.messages is None and not example.prompt):
            raise UserError(f"{example.row_id}: has no prompt apart from its answer: expected a chat, or a prompt")
        ids = templates.prompt_ids(example, tokenizer)
        if not ids:
            raise UserError(f"{example.row_id}: the prompt is empty: there is nothing to go on from")
        kept += [(example, ids)] if len(ids) <= max_prompt_length else []
    if not kept:
        raise UserError(
            f"all {len(examples)} prompts are longer than rl.max_prompt_length={max_prompt_length} tokens: raise it"
        )
    tokens = np.concatenate([np.asarray(ids, np.int32) for _, ids in kept])
    offsets = np.cumsum([0, *(len(ids) for _, ids in kept)], dtype=np.int64)
    names = ("truncated", "nothing_to_train", "without_trained_stop", "tools_not_in_template", "trained_tokens")
    counts = {"rows": len(kept), "tokens": len(tokens), "too_long": len(examples) - len(kept)} | dict.fromkeys(names, 0)
    rows = Rows(tokens, np.zeros(len(tokens), np.float32), offsets, [e.row_id for e, _ in kept], counts)
    return rows, [example for example, _ in kept]
