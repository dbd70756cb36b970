"""The rows of a run: fetched, read, split, tokenised and packed; and how the loop asks for them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import fetch, sharding
from jaxtune.config import ConfigDict
from jaxtune.data import masking, pairs, pipeline, preferences, prompts, readers, tasks
from jaxtune.data.formats import Example
from jaxtune.data.prompts import PromptSource
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.rewards import scoring
from jaxtune.train import guests, loop, meta, step
from jaxtune.train.state import Program
from jaxtune.types import BRANCH_BITS, Batch, UserError
from jaxtune.validation_methods import ON_POLICY


class Rows(NamedTuple):
    """The data of a run: examples of each split; training rows as batches; validation rows as tokens.

    `beside`: likewise of each objective beside the main one.
    """

    splits: pipeline.Splits
    train: pipeline.Rows
    validation: pipeline.Rows | None
    batches: pipeline.BatchSource | PromptSource
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


def judged(config: ConfigDict) -> bool:
    """Whether held-out answers are measured by the section `reward`, as those are that an on-policy objective learns from."""
    return config.eval.metric == "reward" or (config.eval.metric == "auto" and config.train.objective in ON_POLICY)


def load(config: ConfigDict, tokenizer: Tokenizer, show: Any, answers: bool = True) -> pipeline.Splits:
    """The examples of each split, held-out tasks apart; without `answers`, rows need none.

    Raises:
      UserError: as `paths`, `pipeline.load` and `tasks.arrange`.
    """
    column = config.meta.task_column if tasks.wanted(config.meta) else None
    keep_rows = judged(config) or bool(config.distill.demonstration)  # whose columns a template may name
    splits = pipeline.load(config.data, paths(config), tokenizer, show, keep_rows, answers, column)
    return tasks.arrange(splits, config.meta, config.train.seed)


def read(
    config: ConfigDict, tokenizer: Tokenizer, show: Any, reader: readers.Reader = readers.NEXT,
    beside: Sequence[tuple[ConfigDict, readers.Reader]] = (), taught: Callable[[list[Example]], list[Example]] | None = None,
) -> Rows:  # fmt: skip
    """Fetches, reads, splits, tokenises and packs the data; sets `train.steps` where epochs decide.

    `reader` says what of an example is learnt; `beside` holds config and reader of each objective beside. Validation rows of masked words are masked once and for all.
    `taught` gives the training examples other answers, a teacher's.

    Raises:
      UserError: bad data, validation is asked for and there are no rows to validate on, or a teacher of other words.
    """
    training = config.train
    guests.check_tokens(config, tokenizer)
    if training.objective in ON_POLICY:
        return _prompts(config, tokenizer, show)
    splits = load(config, tokenizer, show)
    splits = splits._replace(train=taught(splits.train)) if taught else splits
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


def _prompts(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> Rows:
    """The prompts that an on-policy objective answers, checked for its rewards; no validation rows, for no loss is theirs.

    Raises:
      UserError: bad data, or a row that a reward cannot judge.
    """
    data, rl, train = config.data.copy_and_resolve_references(), config.rl, config.train
    if not data.eval and config.eval.split != "validation":
        data.validation_fraction = 0.0
    splits = pipeline.load(data, paths(config), tokenizer, show, keep_rows=True, answers=False)
    rows, examples = prompts.tokenize(splits.train, tokenizer, rl.max_prompt_length, show)
    scoring.check_rows(config.reward, rows.row_ids, [scoring.row_of(example) for example in examples])
    steps = rl.minibatches * rl.passes
    shown = (data.max_length, train.batch_size, tokenizer.pad_id)
    source = prompts.PromptSource(rows, examples, rl.prompts_per_round, steps, data.shuffle, train.seed, *shown)
    # Whole rounds: what was written is trained on.
    train.steps = train.steps or max(1, math.ceil(train.epochs * source.steps_per_epoch / steps - 1e-6)) * steps
    return Rows(splits, rows, None, source)


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
    if reader.kind in preferences.KINDS:
        return preferences.tokenize(examples, tokenizer, config.data, show, label, reader)
    return pipeline.tokenize(examples, tokenizer, config.data, show, label, reader)


_TOLD = (
    "truncated", "too_long", "nothing_to_train", "without_trained_stop", "tools_not_in_template", *preferences.DROPPED,
)  # fmt: skip


def summary(config: ConfigDict, rows: Rows) -> str:
    """One line on the data, for the terminal."""
    c = rows.train.counts
    lost = {name: n for name, n in (Counter(rows.splits.counts) + Counter(c)).items() if n and name in _TOLD}
    note = "".join(f"; {n} {name.replace('_', ' ')}" for name, n in lost.items())
    what = f"({c['trained_tokens']:,} trained) in {rows.batches.num_bins:,} batch rows"
    what = f"in prompts, {config.rl.prompts_per_round} a round" if isinstance(rows.batches, PromptSource) else what
    what = f"in queries and {c['passages']:,} distinct passages" if "passages" in c else what
    others = "".join(f"; beside: {each.train.counts['rows']:,} rows" for each in rows.beside)
    return (
        f"data: {c['rows']:,} rows, {c['tokens']:,} tokens {what}{note}{others}; "
        f"{config.train.steps} steps of {config.train.batch_size}, {rows.batches.steps_per_epoch:.1f} steps an epoch"
    )


def first_row(config: ConfigDict, rows: Rows, tokenizer: Tokenizer, reader: readers.Reader) -> str:
    """The first batch row token by token, with each token's loss weight as a target, for the terminal."""
    batch = rows.batches[0]
    weights_T = batch["weights_BT"][0]
    if reader.kind in ("next", "pairs", "judged"):
        weights_T = np.concatenate([[0.0], weights_T[:-1]])  # a weight stands where its token is predicted
    lines = [
        f"first row of the first batch ({config.train.batch_size} x {config.data.max_length}), weight of each token as a target:"
    ]
    for position, token in enumerate(batch["tokens_BT"][0]):
        segment, row = batch["segment_ids_BT"][0, position], batch["row_ids_BT"][0, position]
        if segment:
            name, text = rows.train.row_ids[row], tokenizer.decode_token(int(token))
            number, branch = segment & (1 << BRANCH_BITS) - 1, segment >> BRANCH_BITS
            where = f"{number:3d}" + (f".{branch}" if reader.kind in preferences.KINDS else "")
            lines.append(f"  {position:5d}  segment {where}  {name:<24}  weight {weights_T[position]:g}  {text}")
    for tokens_U, ids_U in zip(
        batch.get("passage_tokens_BQU", [[]])[0], batch.get("passage_segment_ids_BQU", [[]])[0], strict=True
    ):
        text = tokenizer.decode(tokens_U[ids_U != 0], skip_special=False)
        lines.append(f"  passage of {int((ids_U != 0).sum())} tokens: {text}")
    return "\n".join([*lines, f"  and {int((batch['segment_ids_BT'][0] == 0).sum())} of padding"])


def for_loop(config: ConfigDict, rows: Rows, tokenizer: Tokenizer, program: Program) -> loop.Data:
    """Batches as the loop asks for them: this host's rows only.

    Raises:
      UserError: the objective writes its batches itself, and what asks for rows (lr_find) has no rewards.
    """
    mine, data = sharding.host_rows(program.mesh, config.train.batch_size), config.data
    every = (rows, *rows.beside)
    sources = [each.batches for each in every if isinstance(each.batches, pipeline.BatchSource)]
    if len(sources) < len(every):
        raise UserError(
            f"train.objective={config.train.objective!r} writes its own batches, which only `train` can ask for"
        )

    def batches(first_step: int, num_steps: int, current: Any = None) -> Iterator[Any]:
        streams = [pipeline.iterate(source, first_step, num_steps, mine, data.prefetch_batches) for source in sources]
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
        blank = [{name: np.zeros_like(x) for name, x in source.local(0, mine).items()} for source in sources]
        for found in itertools.zip_longest(*map(measured, every)):  # of weight 0 where one has no more
            yield _joined([batch or empty for batch, empty in zip(found, blank, strict=True)])

    return loop.Data(batches, held_back if rows.validation else None, lambda row: rows.train.row_ids[row])


def _joined(found: Sequence[Batch]) -> Batch:
    """One batch of those of each objective."""
    return {step.prefix(at) + name: array for at, batch in enumerate(found) for name, array in batch.items()}
