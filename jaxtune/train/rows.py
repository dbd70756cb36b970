"""The rows of a run: fetched, read, split, tokenised and packed; and how the loop asks for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import fetch, sharding
from jaxtune.config import ConfigDict
from jaxtune.data import masking, pairs, pipeline, readers, tasks
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.train import loop, meta, step
from jaxtune.train.state import Program
from jaxtune.types import Batch, UserError


class Rows(NamedTuple):
    """The data of a run: examples of each split; training rows as batches; validation rows as tokens.

    `beside`: likewise of each objective beside the main one.
    """

    splits: pipeline.Splits
    train: pipeline.Rows
    validation: pipeline.Rows | None
    batches: pipeline.BatchSource
    beside: tuple[Rows, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of all that is trained on."""
        return "+".join([self.train.digest, *(each.digest for each in self.beside)])


def paths(config: ConfigDict) -> dict[str, Path]:
    """The data files on this machine, by split.

    Raises:
      UserError: no training data is named, or a file is not to be had.
    """
    if not config.data.train:
        raise UserError(
            "data.train is empty: name a file of training rows (.jsonl, .csv, .tsv, .txt, .parquet; path or URI)"
        )
    return {name: fetch.local(config.data[name]) for name in ("train", "eval", "test") if config.data[name]}


def load(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> pipeline.Splits:
    """The examples of each split, held-out tasks apart.

    Raises:
      UserError: as `paths`, `pipeline.load` and `tasks.arrange`.
    """
    column = config.meta.task_column if tasks.wanted(config.meta) else None
    splits = pipeline.load(config.data, paths(config), tokenizer, show, column)
    return tasks.arrange(splits, config.meta, config.train.seed)


def read(
    config: ConfigDict, tokenizer: Tokenizer, show: Any, reader: readers.Reader = readers.NEXT,
    beside: Sequence[tuple[ConfigDict, readers.Reader]] = (),
) -> Rows:  # fmt: skip
    """Fetches, reads, splits, tokenises and packs the data; sets `train.steps` where epochs decide.

    `reader` says what of an example is learnt; `beside` holds config and reader of each objective beside. Validation rows of masked words are masked once and for all.

    Raises:
      UserError: bad data, or validation is asked for and there are no rows to validate on.
    """
    training = config.train
    splits = load(config, tokenizer, show)
    rows = _tokenized(config, splits.train, tokenizer, show, "tokenising", reader)
    for name in ("patience", "eval_every_steps"):
        if training[name] and not splits.validation:
            raise UserError(
                f"train.{name}={training[name]} needs validation rows, and there are none: set data.eval or raise "
                f"data.validation_fraction, or set train.{name}=0"
            )
    validation = (
        _tokenized(config, splits.validation, tokenizer, show, "tokenising validation", reader)
        if splits.validation
        else None
    )
    if reader.masking:
        rows.counts["trained_tokens"] = masking.num_masked(rows, reader.masking)
        validation = masking.fixed(validation, reader.masking) if validation else None
    batches = _batches(config, splits, rows, tokenizer, reader)
    # Rounded up, so that every row is trained on; less a little, for 3 x 0.1 is more than 0.3.
    training.steps = training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch - 1e-6))
    for other, _ in beside:
        other.train.steps = training.steps
    return Rows(splits, rows, validation, batches, tuple(read(other, tokenizer, show, how) for other, how in beside))


def _batches(
    config: ConfigDict, splits: pipeline.Splits, rows: pipeline.Rows, tokenizer: Tokenizer, reader: readers.Reader
) -> pipeline.BatchSource:
    data, training = config.data, config.train
    if config.meta.algorithm:
        of_row = {example.row_id: example.task for example in splits.train}
        named, layout = [of_row[row_id] for row_id in rows.row_ids], meta.layout(config.meta)
        sizes = (data.max_length, data.packing, training.seed, training.batch_size, tokenizer.pad_id)
        return tasks.TaskSource(rows, named, *sizes, *layout)
    return pipeline.BatchSource(
        rows, data.max_length, data.packing, data.shuffle, training.seed, training.batch_size, tokenizer.pad_id,
        masking=reader.masking,
    )  # fmt: skip


def _tokenized(
    config: ConfigDict, examples: list[Any], tokenizer: Tokenizer, show: Any, label: str, reader: readers.Reader
) -> pipeline.Rows:
    if config.train.objective == "contrastive":
        return pairs.tokenize(examples, tokenizer, config.data, show, label)
    return pipeline.tokenize(examples, tokenizer, config.data, show, label, reader)


def summary(config: ConfigDict, rows: Rows) -> str:
    """One line on the data, for the terminal."""
    c = rows.train.counts
    lost = {
        name: n
        for name, n in {**rows.splits.counts, **c}.items()
        if n and name in ("truncated", "too_long", "nothing_to_train", "without_trained_stop", "tools_not_in_template")
    }
    note = "".join(f"; {n} {name.replace('_', ' ')}" for name, n in lost.items())
    what = f"({c['trained_tokens']:,} trained) in {rows.batches.num_bins:,} batch rows"
    what = f"in queries and {c['passages']:,} distinct passages" if "passages" in c else what
    others = "".join(f"; beside: {each.train.counts['rows']:,} rows" for each in rows.beside)
    return (
        f"data: {c['rows']:,} rows, {c['tokens']:,} tokens {what}{note}{others}; "
        f"{config.train.steps} steps of {config.train.batch_size}, {rows.batches.steps_per_epoch:.1f} steps an epoch"
    )


def for_loop(config: ConfigDict, rows: Rows, tokenizer: Tokenizer, program: Program) -> loop.Data:
    """Batches as the loop asks for them: this host's rows only."""
    mine, data = sharding.host_rows(program.mesh, config.train.batch_size), config.data
    every = (rows, *rows.beside)

    def batches(first_step: int, num_steps: int) -> Iterator[Any]:
        streams = [pipeline.iterate(each.batches, first_step, num_steps, mine, data.prefetch_batches) for each in every]
        return (_joined(found) for found in zip(*streams, strict=True))

    def measured(each: Rows) -> Iterator[Any]:
        if each.validation is None:
            return
        options = (data.max_length, data.packing, config.train.batch_size, tokenizer.pad_id, config.train.eval_batches)
        for batch in pipeline.eval_batches(each.validation, *options):
            yield {name: array[mine] for name, array in batch.items()}

    def held_back() -> Iterator[Any]:
        if not rows.beside:
            yield from measured(rows)
            return
        blank = [{name: np.zeros_like(x) for name, x in each.batches.local(0, mine).items()} for each in every]
        for found in itertools.zip_longest(*map(measured, every)):  # of weight 0 where one has no more
            yield _joined([batch or empty for batch, empty in zip(found, blank, strict=True)])

    return loop.Data(batches, held_back if rows.validation else None, lambda row: rows.train.row_ids[row])


def _joined(found: Sequence[Batch]) -> Batch:
    """One batch of those of each objective."""
    return {step.prefix(at) + name: array for at, batch in enumerate(found) for name, array in batch.items()}
