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
from jaxtune.data import masking, mixture, pairs, pipeline, preferences, privacy, prompts, readers, tasks
from jaxtune.data.formats import Example
from jaxtune.data.mixture import MixtureSource
from jaxtune.data.prompts import PromptSource
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.rewards import scoring
from jaxtune.train import beside as beside_lib
from jaxtune.train import guests, loop, meta
from jaxtune.train.preferences import is_precomputed
from jaxtune.train.state import Program
from jaxtune.types import BRANCH_BITS, Batch, UserError
from jaxtune.validation_methods import ON_POLICY


class Rows(NamedTuple):
    """The data of a run: examples of each split; training rows as batches; validation rows as tokens.

    `beside`: likewise of each objective beside the main one. `replay`: rows of other data that batches hold.
    """

    splits: pipeline.Splits
    train: pipeline.Rows
    validation: pipeline.Rows | None
    batches: pipeline.BatchSource | PromptSource
    beside: tuple[Rows, ...] = ()
    replay: tuple[pipeline.Rows, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of all that is trained on."""
        others = [each.digest for each in self.beside] + [each.digest for each in self.replay]
        return "+".join([self.train.digest, *others])


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
    private = privacy.of(config.privacy)
    splits = pipeline.load(config.data, paths(config), tokenizer, show, keep_rows, answers, column, private)
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
    replay = _replayed(config, tokenizer, show, reader)
    batches = _batches(config, splits, rows, tokenizer, reader, replay)
    # Rounded up, so that every row is trained on; less a little, for 3 x 0.1 is more than 0.3.
    training.steps = training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch - 1e-6))
    for other, _ in beside:
        other.train.steps = training.steps
    beside_it = tuple(read(other, tokenizer, show, how) for other, how in beside)
    return Rows(splits, rows, validation, batches, beside_it, replay)


def _prompts(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> Rows:
    """The prompts that an on-policy objective answers, checked for its rewards; no validation rows, for no loss is theirs.

    Raises:
      UserError: bad data, or a row that a reward cannot judge.
    """
    data, rl, train = config.data.copy_and_resolve_references(), config.rl, config.train
    if not data.eval and config.eval.split != "validation":
        data.validation_fraction = 0.0
    private = privacy.of(config.privacy)
    splits = pipeline.load(data, paths(config), tokenizer, show, keep_rows=True, answers=False, private=private)
    rows, examples = prompts.tokenize(splits.train, tokenizer, rl.max_prompt_length, show)
    scoring.check_rows(config.reward, rows.row_ids, [scoring.row_of(example) for example in examples])
    steps = rl.minibatches * rl.passes
    shown = (data.max_length, train.batch_size, tokenizer.pad_id)
    source = prompts.PromptSource(rows, examples, rl.prompts_per_round, steps, data.shuffle, train.seed, *shown)
    # Whole rounds: what was written is trained on.
    train.steps = train.steps or max(1, math.ceil(train.epochs * source.steps_per_epoch / steps - 1e-6)) * steps
    return Rows(splits, rows, None, source)


def aside(
    config: ConfigDict, tokenizer: Tokenizer, show: Any, label: str, reader: readers.Reader
) -> tuple[pipeline.Splits, pipeline.Rows]:
    """Rows that a config of `beside.with_data` names: their examples, and as tokens.

    Raises:
      UserError: as `load`, with `label` before it.
    """
    try:
        private = privacy.of(config.privacy)
        splits = pipeline.load(config.data, paths(config), tokenizer, show, judged(config), private=private)
        rows = _tokenized(config, splits.train, tokenizer, show, label, reader)
        if private:
            rows.counts[_PERSONAL] = sum(len(example.personal) for example in splits.train)
        return splits, rows
    except UserError as error:
        raise UserError(f"{label}: {error}") from None


def _replayed(config: ConfigDict, tokenizer: Tokenizer, show: Any, reader: readers.Reader) -> tuple[pipeline.Rows, ...]:
    """The rows of `retain.replay`, read by their own settings and for the run's objective.

    Raises:
      UserError: as `aside`, or the objective's rows hold numbers of a reference, which replay has not.
    """
    if config.retain.replay and is_precomputed(config):
        raise UserError(
            f"retain.replay with train.objective={config.train.objective!r} and preference.reference={config.preference.reference!r}, whose "
            "log-probabilities are computed before training for data.train alone: train a new adapter (preference.reference='adapter_off')"
        )
    named = [(uri, beside_lib.with_data(config, settings, uri)) for uri, _, settings in config.retain.replay]
    return tuple(aside(own, tokenizer, show, f"retain.replay {uri!r}", reader)[1] for uri, own in named)


def _batches(
    config: ConfigDict, splits: pipeline.Splits, rows: pipeline.Rows, tokenizer: Tokenizer, reader: readers.Reader,
    replay: Sequence[pipeline.Rows],
) -> pipeline.BatchSource:  # fmt: skip
    data, training = config.data, config.train
    if config.meta.algorithm:
        of_row = {example.row_id: example.task for example in splits.train}
        named, layout = [of_row[row_id] for row_id in rows.row_ids], meta.layout(config.meta)
        sizes = (data.max_length, data.packing, training.seed, training.batch_size, tokenizer.pad_id)
        return tasks.TaskSource(rows, named, *sizes, *layout)

    def source(rows: pipeline.Rows, seed: int) -> pipeline.BatchSource:
        masks = reader.masking and reader.masking._replace(seed=seed)
        sizes = (data.max_length, data.packing, data.shuffle, seed, training.batch_size, tokenizer.pad_id)
        return pipeline.BatchSource(rows, *sizes, masking=masks)

    main = source(rows, training.seed)
    others = [source(each, mixture.seeded(training.seed, number)) for number, each in enumerate(replay)]
    return mixture.MixtureSource(main, others, [share for _, share, _ in config.retain.replay]) if others else main


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
    others = f"; personal data: {privacy.told(personal(rows.splits))}" if config.privacy.enabled else ""
    others += "".join(f"; beside: {each.train.counts['rows']:,} rows" for each in rows.beside)
    for each, (uri, share, _) in zip(rows.replay, config.retain.replay, strict=True):
        others += f"; replay: {each.counts['rows']:,} rows of {uri}, {share:.0%} of each batch"
    return (
        f"data: {c['rows']:,} rows, {c['tokens']:,} tokens {what}{note}{others}; "
        f"{config.train.steps} steps of {config.train.batch_size}, {rows.batches.steps_per_epoch:.1f} steps an epoch"
    )


REPLAY = "replay of "
_PERSONAL = "personal_data"  # of rows that are read beside: how much was found in them


def personal(splits: pipeline.Splits) -> dict[str, Any]:
    """The personal data that was found in rows, as `privacy.counts` tells it, in all and by split."""
    found = {name: [e.personal for e in getattr(splits, name)] for name in ("train", "validation", "test")}
    every = privacy.counts(row for split in found.values() for row in split)
    return every | {"by_split": {name: privacy.counts(split) for name, split in found.items()}}


def counts(config: ConfigDict, rows: Rows, num_steps: int) -> dict[str, int]:
    """What a run of so many steps has to say of its rows, in numbers; with how much of each replayed source it saw."""
    found = dict(rows.train.counts)
    if isinstance(rows.batches, MixtureSource):
        every = rows.batches.counts(num_steps)[1:]
        for (uri, *_), seen in zip(config.retain.replay, every, strict=True):
            found |= {f"{REPLAY}{uri}, {name.replace('_', ' ')}": number for name, number in seen.items()}
        for (uri, *_), each in zip(config.retain.replay, rows.replay, strict=True):
            if _PERSONAL in each.counts:
                found[f"{REPLAY}{uri}, personal data found"] = each.counts[_PERSONAL]
    return found


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

    data_of = (batches, held_back if rows.validation else None)
    mixed = rows.batches
    if isinstance(mixed, MixtureSource):
        ids = [each.row_ids for each in (rows.train, *rows.replay)]
        return loop.Data(*data_of, lambda row: mixed.row_id(row, ids), mixed.told)
    return loop.Data(*data_of, lambda row: rows.train.row_ids[row])


def _joined(found: Sequence[Batch]) -> Batch:
    """One batch of those of each objective."""
    return {beside_lib.prefix(at) + name: array for at, batch in enumerate(found) for name, array in batch.items()}
