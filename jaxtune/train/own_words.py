"""On-policy distillation (GKD, arXiv:2306.13649): in a share of the steps a student is taught on answers that it writes itself.

Such a step takes the prompts of the rows that its batch would have held, and the student of the moment answers them, as
`rl.temperature`, `rl.top_k`, `rl.top_p`, `rl.min_p`, `rl.max_new_tokens` and `rl.slots` say. Its answers are in
WORKDIR/rollouts before the step on them, so that a run that was killed goes on exactly. Cross-entropy learns from gold answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.data import packing
from jaxtune.data.batches import BatchSource, Rows
from jaxtune.data.completions import lay_out
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller
from jaxtune.train import loop
from jaxtune.train import rows as rows_lib
from jaxtune.train.goodput import Wall
from jaxtune.train.round_files import Round, RoundFiles
from jaxtune.train.state import Params, Program
from jaxtune.types import Batch, UserError


def wanted(config: ConfigDict) -> bool:
    """Whether some steps' answers are the student's."""
    return config.train.objective == "distill" and config.distill.on_policy > 0


def for_loop(
    config: ConfigDict, workdir: Path, rows: rows_lib.Rows, tokenizer: Tokenizer, program: Program, wall: Wall
) -> loop.Data:
    """A run's batches as the loop asks for them, some of them of the student's own answers.

    Raises:
      UserError: a row has no prompt that could be answered.
    """
    gold = rows_lib.for_loop(config, rows, tokenizer, program)
    source = rows.batches
    assert isinstance(source, BatchSource)
    return OwnWords(config, workdir, rows.train, source, gold, tokenizer, program, wall).data()


class OwnWords:
    """The batches of one run: `gold` ones, and those that the student writes."""

    def __init__(
        self, config: ConfigDict, workdir: Path, rows: Rows, source: BatchSource, gold: loop.Data, tokenizer: Tokenizer, program: Program,
        wall: Wall,
    ):  # fmt: skip
        self._config, self._rows, self._source, self._gold, self._wall = config, rows, source, gold, wall
        self._pad_id, self._mine = tokenizer.pad_id, sharding.host_rows(program.mesh, config.train.batch_size)
        self._starts = _answers(rows)
        self._files = RoundFiles(workdir / "rollouts", config, rows.digest)
        given = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
        self._roller = Roller(program.inference, *given, config.rl.slots, program.mesh)
        self._told: dict[int, dict[str, float]] = {}

    def data(self) -> loop.Data:
        """What the loop asks."""
        validation = self._gold.validation
        held = None if validation is None else lambda: map(_as_gold, validation())
        return loop.Data(self._batches, held, self._gold.row_id, lambda step: self._told.pop(step, {}))

    def is_own(self, step: int) -> bool:
        """Whether a step's answers are the student's: a draw that depends on the seed and the step alone."""
        bits = np.random.Philox(key=[self._config.train.seed, step]).random_raw(1)[0]
        return bool((int(bits) >> 11) * 2.0**-53 < self._config.distill.on_policy)

    def _batches(self, first: int, number: int, current: Callable[[], Params]) -> Iterator[Batch]:
        for step, batch in enumerate(self._gold.train(first, number, current), first):
            yield self._own(step, current) if self.is_own(step) else _as_gold(batch)

    def _own(self, step: int, current: Callable[[], Params]) -> Batch:
        """One step's batch by the student, from the files or written now."""
        made = self._files.read(step)
        if made is None:
            made = self._written(step, {path: value for path, value in current().items() if "/" not in path})
            self._files.write(step, made)
        config, size = self._config, self._config.train.batch_size
        prompts: list[Any] = [self._prompt(row) for row in made.prompts_N]
        order = np.arange(len(made.prompts_N))
        shape = (size, config.data.max_length, self._pad_id)
        batch = lay_out(prompts, made.completions, made.prompts_N, order, 1, *shape).batch(0)
        self._told[step] = made.told
        self._wall.lap("rollouts")
        own = {name: array[self._mine] for name, array in batch.items()}
        return own | {"gold_BT": np.zeros_like(own["weights_BT"])}

    def _prompt(self, row: int) -> np.ndarray:
        start = self._rows.offsets[row]
        return self._rows.tokens[start : start + self._starts[row]]

    def _written(self, step: int, params: Params) -> Round:
        """The student's answers to the prompts of a step's rows, as many as its batch has room for."""
        rl, room = self._config.rl, self._config.data.max_length
        sampling = Sampling(rl.temperature, rl.top_k, rl.top_p, rl.min_p)
        seed = int(np.random.SeedSequence([self._config.train.seed, step]).generate_state(1)[0])
        asked = np.asarray([row for bin_rows in self._source.bins_of(step) for row in bin_rows])
        rollouts = self._roller(
            params, [list(map(int, self._prompt(row))) for row in asked], 1, sampling, rl.max_new_tokens, seed
        )
        cut = [one.tokens[: room - self._starts[row]] for row, one in zip(asked, rollouts, strict=True)]
        ended = np.asarray(
            [one.ended and len(one.tokens) == len(tokens) for one, tokens in zip(rollouts, cut, strict=True)]
        )
        kept = _fitting(
            [int(self._starts[row]) + len(tokens) for row, tokens in zip(asked, cut, strict=True)],
            room,
            len(self._source.bins_of(step)),
        )
        lengths_N = np.asarray([len(cut[i]) for i in kept])
        told = {
            "own_words": 1.0,
            "completion_tokens": float(lengths_N.mean()),
            "truncated_share": float(1 - ended[kept].mean()),
            "left_out_completions": float(len(asked) - len(kept)),
        }
        logps_K = np.concatenate([rollouts[i].logps[: len(cut[i])] for i in kept])
        zeros_K, none_N = np.zeros_like(logps_K), np.full(len(kept), np.nan, np.float32)
        tokens_K = np.concatenate([cut[i] for i in kept])
        about = (asked[kept], lengths_N, ended[kept], none_N, np.ones(len(kept), bool))
        return Round(*about, tokens_K, logps_K, zeros_K, zeros_K, None, None, told)


def _as_gold(batch: Batch) -> Batch:
    return batch | {"gold_BT": np.ones_like(batch["weights_BT"])}


def _fitting(lengths: list[int], max_length: int, num_rows: int) -> np.ndarray:
    """The numbers of the texts that go into `num_rows` rows together: all, or all but the longest."""
    kept = np.arange(len(lengths))
    while len(packing.pack(np.asarray(lengths)[kept], max_length)) > num_rows:
        kept = np.delete(kept, np.argmax(np.asarray(lengths)[kept]))
    return kept


def _answers(rows: Rows) -> np.ndarray:
    """Of each row the number of tokens before its last answer: the last run of tokens that train.

    Raises:
      UserError: nothing stands before it.
    """
    starts = np.zeros(len(rows), np.int64)
    for row, (start, end) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
        trains = rows.weights[start:end] != 0
        begins = np.flatnonzero(np.diff(trains, prepend=False) & trains)
        starts[row] = begins[-1] if len(begins) else 0
        if starts[row] < 1:
            raise UserError(
                f"{rows.row_ids[row]}: distill.on_policy has the student answer prompts, and nothing stands before what this row "
                "trains: give it chats or prompts with answers, or set distill.on_policy=0.0"
            )
    return starts
