"""Configs of rows that are read beside the main objective's: those of `train.beside`, of replay, and of a Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtune.config import ConfigDict, base
from jaxtune.objectives.ops import CLASSING

_OF_ROWS = (
    "eval", "test", "split_key", "split_regex", "format", "files", "prepare", "columns", "prompt", "passage", "negative",
    "mined_negatives", "system", "label_column", "label_separator", "label_bins", "limit",
)  # fmt: skip
_OF_THE_BATCH = ("max_length", "max_passage_length", "packing", "shuffle", "prefetch_batches")


def prefix(number: int) -> str:
    """What the names of the batch fields of objective `number` begin with; 0 is the main one."""
    return f"{number}/" if number else ""


def beside(config: ConfigDict) -> list[ConfigDict]:
    """A config for each objective of `train.beside`, by which its rows are read.

    What shapes the main objective's loss is not theirs. Rows of their own are told by their fields, as `base()` has it.
    """
    plain, made = base(), []
    for name, _, *rows in config.train.beside:
        one = config.copy_and_resolve_references()
        for key in ("beside", "patience", "eval_every_steps", *CLASSING):
            one.train[key] = plain.train[key]
        one.retain.replay, one.retain.penalties = (), ()
        one.train.objective, one.preference.share_prompts = name, "never"  # for the main one's rows decide on branches
        if rows:
            for key in _OF_ROWS:
                one.data[key] = plain.data[key]
            one.data.train = rows[0]
        made.append(one)
    return made


def with_data(config: ConfigDict, settings: Sequence[tuple[str, Any]], uri: str = "") -> ConfigDict:
    """The config with other rows: `settings` of its section `data` ("data.KEY", value), the rest of it as `base()` has it.

    All of the rows are taken, none held out; the shape of a batch stays. `uri` is `data.train`.
    """
    one, plain = config.copy_and_resolve_references(), base().data
    for key in plain:
        if key not in _OF_THE_BATCH:
            one.data[key] = plain[key]
    one.data.validation_fraction = 0.0
    for key, value in settings:
        one.data[key.removeprefix("data.")] = value
    one.data.train = uri or one.data.train
    return one
