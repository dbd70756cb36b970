"""k-shot curves: how right a model is on tasks that it was never trained on, after k of their rows.

The rows are shown before the question (in context), or adapted to: a few inner steps of `meta` on them, from the parameters
at hand. Each task's rows are drawn several times; both ways, and every model that is measured with the same seed, see the same
draws and the same questions, so two models compare pair by pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, tasks, templates
from jaxtune.data.formats import Example
from jaxtune.data.readers import NEXT, Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import heads, likelihood
from jaxtune.statistics import Estimate
from jaxtune.train import step
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
Correct = dict[str, dict[int, dict[str, np.ndarray]]]  # way -> shots -> task -> (draws, rows) of 0 and 1
_BUCKET_TOKENS = 64  # prompts of many lengths are rounded up to this: each length is a program of its own
_MANY_LABELS = 50


def questions(config: ConfigDict, splits: pipeline.Splits) -> dict[str, tuple[list[Example], tuple[str, ...]]]:
    """Of each held-out task: its test rows, `eval.limit` in all, and the answers to choose among.

    Raises:
      UserError: a task without test rows, with fewer rows to draw from than are shown, or without a choice of answers.
    """
    support, asked, found = tasks.by_name(splits.support), tasks.by_name(splits.test), {}
    most, each = max(config.meta.shots), max(1, config.eval.limit // max(1, len(config.meta.held_out)))
    for name in config.meta.held_out:
        rows, shown = asked.get(name, []), support.get(name, [])
        labels = tuple(sorted({example.answer or "" for example in (*rows, *shown)}))
        if not rows or len(shown) < most:
            raise UserError(
                f"task {name!r} has {len(rows)} test rows and {len(shown)} others; meta.shots={tuple(config.meta.shots)} needs test "
                f"rows, and {most} others to draw from: change data.test_fraction or lower meta.shots"
            )
        if not 2 <= len(labels) <= _MANY_LABELS or "" in labels:
            raise UserError(
                f"task {name!r} has {len(labels)} different answers; meta.shots chooses among 2 to {_MANY_LABELS}"
            )
        found[name] = (pipeline.limited(rows, each if config.eval.limit else 0), labels)
    return found


def measure(
    config: ConfigDict, program: Program, params: Params, frozen: Params, tokenizer: Tokenizer, splits: pipeline.Splits,
    progress: Progress, reader: Reader = NEXT,
) -> Correct:  # fmt: skip
    """Which questions a model answers rightly after each of `meta.shots`: by likelihood among the task's answers, or by its head.

    Without any rows both ways are one. `reader` says how the objective reads a row. `params` are those that train: what adapts
    starts from them, and they stay as they are.

    Raises:
      UserError: as `questions`; a row longer than data.max_length, or a prompt longer than the model's window.
    """
    run = _Run(config, program, params, frozen, tokenizer, progress, reader)
    asked, support = questions(config, splits), tasks.by_name(splits.support)
    ways = tuple(config.meta.ways)
    found: Correct = {way: {k: {} for k in config.meta.shots} for way in ways}
    for name, (rows, labels) in asked.items():
        for shots in config.meta.shots:
            drawn = [tasks.drawn(support[name], shots, config.train.seed, draw) for draw in range(config.meta.draws)]
            for way in ways:
                if shots == 0:
                    right = [run.answered(rows, labels)] if way == ways[0] else found[ways[0]][0][name]
                else:
                    answer = run.shown if way == "shown" else run.adapted
                    right = [answer(rows, shown, labels) for shown in drawn]
                found[way][shots][name] = np.asarray(right)
    return found


class _Run:
    """One model being measured: its programs are compiled once."""

    def __init__(
        self, config: ConfigDict, program: Program, params: Params, frozen: Params, tokenizer: Tokenizer, progress: Progress,
        reader: Reader,
    ):  # fmt: skip
        self.config, self.program, self.params, self.frozen, self.tokenizer = config, program, params, frozen, tokenizer
        whole, size = {**frozen, **params}, config.eval.batch_size
        self.reader, self.programs = reader, dict[int, Any]()
        how: tuple[int, int, Progress, str] = (tokenizer.pad_id, size, progress, "scoring")
        if reader.kind == "next":
            self.score = likelihood.label_scorer(program.inference, whole, *how, _BUCKET_TOKENS)
        else:
            self.read = likelihood.head_scorer(program.inference, whole, reader.pool == "mean", *how)

    def answered(self, rows: Sequence[Example], labels: tuple[str, ...], params: Params | None = None) -> np.ndarray:
        """(rows,) of 0 and 1, with no rows before them."""
        if self.reader.kind == "next":
            return self.shown(rows, [], labels, params)
        asked = heads.rows(self.config, list(rows), self.reader, self.tokenizer)
        scores = self.read([row["prompt_ids"] for row in asked], [row["at"] for row in asked], params)
        best = [self.reader.labels[int(np.argmax(scores_KC[0]))] for scores_KC in scores]
        return np.asarray([label == row["answer"] for label, row in zip(best, asked, strict=True)])

    def shown(
        self, rows: Sequence[Example], shown: Sequence[Example], labels: tuple[str, ...], params: Params | None = None
    ) -> np.ndarray:
        """(rows,) of 0 and 1, with `shown` before each."""
        asked = [tasks.demonstrated(shown, row) for row in rows]
        pairs = [templates.continuations(one, labels, self.tokenizer) for one in asked]
        most = self.program.model_config.max_positions
        for row, (prompt, candidates) in zip(rows, pairs, strict=True):
            length = len(prompt) + max(map(len, candidates))
            if length > most:
                raise UserError(
                    f"{row.row_id}: {length} tokens with {len(shown)} rows before it exceed the model's {most} positions: lower meta.shots"
                )
        scores_MC = self.score([p for p, _ in pairs], [c for _, c in pairs], params)
        best_M = np.argmax(scores_MC, axis=1)
        return np.asarray([labels[at] == row.answer for at, row in zip(best_M, rows, strict=True)])

    def adapted(self, rows: Sequence[Example], shown: Sequence[Example], labels: tuple[str, ...]) -> np.ndarray:
        """(rows,) of 0 and 1, after inner steps on `shown`."""
        data, program = self.config.data, self.program
        tokens = pipeline.tokenize(list(shown), self.tokenizer, data, reader=self.reader)
        if len(tokens) < len(shown):
            raise UserError(
                f"{len(shown) - len(tokens)} of {len(shown)} rows to adapt to do not fit data.max_length={data.max_length}: raise it"
            )
        shards = sharding.num_batch_shards(program.mesh)
        bins = len(pipeline.make_bins(tokens, data.max_length, data.packing))
        size = -(-bins // shards) * shards
        batch = next(pipeline.eval_batches(tokens, data.max_length, data.packing, size, self.tokenizer.pad_id))
        if size not in self.programs:
            self.programs[size] = step.make_adapt(self.config, program, size)
        fields = step.fields(self.config, program)
        arrays = sharding.to_global({name: batch[name] for name in fields}, program.mesh, size)
        params = self.programs[size](self.params, self.frozen, arrays)
        return self.answered(rows, labels, {**self.frozen, **params})


def accuracy(config: ConfigDict, correct: Mapping[str, np.ndarray]) -> Estimate:
    """Mean over tasks of the share of right answers, with an interval over draws and questions.

    Tasks are those at hand. Within each, draws and questions are resampled, both with replacement: one draw serves all
    questions, so they are not independent.
    """
    rng, samples = np.random.default_rng(config.train.seed), config.eval.bootstrap_samples
    sums_S = np.zeros(samples)
    for right in correct.values():
        num_draws, num_rows = right.shape
        draws_SD, rows_SM = (rng.integers(n, size=(samples, n)) for n in (num_draws, num_rows))
        sums_S += right[draws_SD[:, :, None], rows_SM[:, None, :]].mean((1, 2)) / len(correct)
    edge = (1 - config.eval.confidence) / 2
    low, high = np.quantile(sums_S, [edge, 1 - edge])
    return Estimate(float(np.mean([right.mean() for right in correct.values()])), float(low), float(high))


def gap(config: ConfigDict, correct: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> Estimate:
    """Accuracy less that of another model on the same draws and questions, with its paired interval."""
    return accuracy(config, {name: right.astype(float) - other[name] for name, right in correct.items()})


def curves(config: ConfigDict, found: Correct) -> dict[str, dict[int, Estimate]]:
    """way -> shots -> accuracy."""
    return {way: {k: accuracy(config, right) for k, right in by_k.items()} for way, by_k in found.items()}


def table(config: ConfigDict, found: Correct) -> str:
    """The curves for the terminal, a line for each number of rows."""
    by_way = curves(config, found)
    lines = [f"{'rows':>6}" + "".join(f"{way:>26}" for way in by_way)]
    for k in config.meta.shots:
        cells = [by_way[way][k] for way in by_way]
        lines.append(f"{k:>6}" + "".join(f"{f'{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]':>26}" for e in cells))
    names = ", ".join(config.meta.held_out)
    return "\n".join(lines) + (
        f"\naccuracy on tasks never trained on ({names}), {config.meta.draws} draws of the rows each; {config.eval.confidence:.0%} "
        "intervals over draws and questions"
    )


def to_json(config: ConfigDict, found: Correct) -> str:
    """The curves, and what they are made of."""
    by_way = {way: {k: e._asdict() for k, e in by_k.items()} for way, by_k in curves(config, found).items()}
    right = {
        way: {k: {name: x.astype(int).tolist() for name, x in by_task.items()} for k, by_task in by_k.items()}
        for way, by_k in found.items()
    }
    return json.dumps({"accuracy": by_way, "right": right}, indent=1) + "\n"
