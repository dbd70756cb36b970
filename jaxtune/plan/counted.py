"""The rows and the tokens that a plan's training would go through, counted by the reader that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.config import ConfigDict
from jaxtune.data import readers
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source


def rows(config: ConfigDict, show: Callable[..., Iterator[Any]]) -> rows_lib.Rows | None:
    """The rows of `data.train` as training would read them, where there is a tokenizer; sets `train.steps` where epochs decide."""
    model = source.find(config) if config.model.source else source.Model("", None, {}, None, None)
    if not config.data.train or (model.path is None and not config.model.tokenizer):
        return None
    tokenizer = source.find_tokenizer(config, model)
    return rows_lib.read(config, tokenizer, show, start.reader(config, model, tokenizer) if model.uri else readers.NEXT)


def training_tokens(config: ConfigDict, steps: int, counted: rows_lib.Rows | None) -> int:
    """Tokens of all epochs' rows, or of the `steps` that were asked for; of their batches where there are no rows to count."""
    if counted is not None:
        epochs = steps / counted.batches.steps_per_epoch if steps else config.train.epochs
        return round(counted.train.counts["tokens"] * epochs)
    if config.data.train:
        raise UserError(
            "counting the tokens of data.train needs a tokenizer: set model.tokenizer, or plan.api_training_tokens"
        )
    return int(steps * config.train.batch_size * config.data.max_length)
