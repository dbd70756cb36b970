"""The batches of on-policy objectives, which the model writes itself: prompts → completions → rewards → advantages → steps.

A round is a pure function of (parameters at its start, config, its number). Its completions and what they are worth are in
WORKDIR/rollouts before the first step on them, so a run that was killed in mid-round goes on exactly. Its `rl.minibatches`
x `rl.passes` steps after the first are off-policy: the loss knows the probability that each token was drawn with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.data import advantages
from jaxtune.data.completions import Layout, lay_out
from jaxtune.data.prompts import PromptSource
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller, Rollout
from jaxtune.objectives.surrogate import kl_divergence
from jaxtune.rewards import scoring
from jaxtune.train import loop, own_words, scored, step
from jaxtune.train import rows as rows_lib
from jaxtune.train.goodput import Wall
from jaxtune.train.round_files import Round, RoundFiles, add_lines, keep_lines
from jaxtune.train.state import Params, Program
from jaxtune.types import Batch

_SHOWN_CHARACTERS = 2000  # of a sample


def for_loop(
    config: ConfigDict, workdir: Path, rows: rows_lib.Rows, tokenizer: Tokenizer, program: Program, say: Callable[[str], None], wall: Wall
) -> loop.Data:  # fmt: skip
    """A run's batches as the loop asks for them: rounds of prompts, or the rows that are there."""
    source = rows.batches
    if own_words.wanted(config):
        return own_words.for_loop(config, workdir, rows, tokenizer, program, wall)
    if not isinstance(source, PromptSource):
        return rows_lib.for_loop(config, rows, tokenizer, program)
    made = Rounds(config, workdir, source, tokenizer, program, say, wall)
    return loop.Data(made.batches, None, lambda row: rows.train.row_ids[row], made.told)


class Rounds:
    """The rounds of one run; `batches` is what the loop asks.

    Args:
      say: shows a line to the user.
      wall: the process's stopwatch.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, source: PromptSource, tokenizer: Tokenizer, program: Program, say: Callable[[str], None],
        wall: Wall,
    ):  # fmt: skip
        self._config, self._rl, self._source, self._tokenizer = config, config.rl, source, tokenizer
        self._objective, self._mesh = step.objective(config, program.hf_config), program.mesh
        self._samples, self._say, self._wall = workdir / "samples.jsonl", say, wall
        self._files = RoundFiles(workdir / "rollouts", config, _digest(source))
        names = scored.wanted(config, self._objective.has_values)
        self._score = scored.scorer(config, program, names)
        given = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
        self._roller = Roller(program.inference, *given, self._rl.slots, program.mesh)
        self._told: dict[int, dict[str, float]] = {}
        self._errors: dict[str, int] = {}  # of rewards, of the round that is being made
        self._first_errors: set[str] = set()

    def told(self, step: int) -> dict[str, float]:
        """What is to be logged with a step beside its own metrics: a round's, with its first."""
        return self._told.pop(step, {})

    def batches(self, first_step: int, num_steps: int, current: Callable[[], Params]) -> Iterator[Batch]:
        """Yields this host's part of each step's batch; `current` gives all parameters as they are when a round begins.

        Raises:
          UserError: a reward failed, and `reward.on_error` is "stop"; or the disk is full.
        """
        mine, steps = sharding.host_rows(self._mesh, self._config.train.batch_size), self._source.steps_per_round
        is_main, made, layout = jax.process_index() == 0, None, None
        if is_main:
            keep_lines(self._samples, lambda line: line["round"] < first_step // steps)
        with scoring.Rewarder(self._config.reward) if is_main else nullcontext() as rewarder:
            for now in range(first_step, first_step + num_steps):
                number, at = divmod(now, steps)
                if made is None or at == 0:
                    made = self._round(number, at, current, rewarder)
                    layout = self._layout(number, made)
                    self._told |= {now: made.told} if at == 0 else {}
                    if is_main:
                        add_lines(self._samples, self._shown(number, made))
                    self._wall.lap("rollouts")
                assert layout is not None
                batch = self._batch(layout, made, at % self._rl.minibatches, now)
                yield {name: array[mine] for name, array in batch.items()}

    # ---- a round ----

    def _round(self, number: int, at: int, current: Callable[[], Params], rewarder: scoring.Rewarder | None) -> Round:
        """The round that is kept, or a new one by the present parameters."""
        found = self._files.read(number)
        if found is not None:
            return found
        if at:
            self._say(
                f"WARNING: WORKDIR/rollouts lacks round {number}, in the midst of which the run goes on: its completions are written anew, by "
                "the weights of now, so losses will not be those of a run that was never stopped"
            )
        made = self._made(number, current(), rewarder)
        self._files.write(number, made)
        if at:
            self._told[number * self._source.steps_per_round + at] = {"written_anew": 1}
        return made

    def _made(self, number: int, params: Params, rewarder: scoring.Rewarder | None) -> Round:
        rl, told = self._rl, dict[str, float]()
        self._errors = {}
        chosen = self._source.of_round(number)
        rollouts, scores = self._answered(number, 0, chosen, params, rewarder)
        groups_N = np.repeat(np.arange(len(chosen)), rl.group_size)
        others, replaced = self._source.others(number), 0
        for again in range(1, rl.resample + 1):
            flat = np.unique(groups_N[advantages.is_flat(scores["total"], groups_N)])[: len(others)]
            if not len(flat):
                break
            chosen[flat], others, replaced = others[: len(flat)], others[len(flat) :], replaced + len(flat)
            fresh, judged = self._answered(number, again, chosen[flat], params, rewarder)
            for i, group in enumerate(flat):
                old, new = (slice(one * rl.group_size, (one + 1) * rl.group_size) for one in (group, i))
                rollouts[old] = fresh[new]
                for name, values in scores.items():
                    values[old] = judged[name][new]
        told |= {"resampled_prompts": replaced} if rl.resample else {}
        told |= self._errors
        prompts_N, rewards_N = np.repeat(chosen, rl.group_size), scores.pop("total")
        told |= _metrics(rollouts, rewards_N, scores, groups_N)
        return self._worth(number, rollouts, (prompts_N, groups_N, rewards_N), params, told)

    def _answered(
        self, number: int, again: int, chosen: np.ndarray, params: Params, rewarder: scoring.Rewarder | None
    ) -> tuple[list[Rollout], dict[str, np.ndarray]]:
        """Rollouts to prompts, and their rewards by name, "total" first, which process 0 gives for all."""
        rl = self._rl
        sampling = Sampling(rl.temperature, rl.top_k, rl.top_p, rl.min_p)
        seed = int(np.random.SeedSequence([self._config.train.seed, number, again]).generate_state(1)[0])
        prompts = [self._source.tokens(i) for i in chosen]
        rollouts = self._roller(params, prompts, rl.group_size, sampling, rl.max_new_tokens, seed)
        names = ["total", *scoring.names(self._config.reward)]
        values = np.zeros((len(names), len(rollouts)), np.float32)
        if rewarder is not None:
            examples = [self._source.examples[i] for i in np.repeat(chosen, rl.group_size)]
            rows = [scoring.row_of(example) for example in examples]
            scores = rewarder([scoring.prompt_of(one) for one in examples], [self._text(one) for one in rollouts], rows)
            values[0], values[1:] = scores.total, list(scores.parts.values())
            self._note(scores.errors, rewarder)
        if jax.process_count() > 1:
            values = np.asarray(multihost_utils.broadcast_one_to_all(values))
        return rollouts, {name: values[i].copy() for i, name in enumerate(names)}

    def _worth(
        self,
        number: int,
        rollouts: list[Rollout],
        about: tuple[np.ndarray, ...],
        params: Params,
        told: dict[str, float],
    ) -> Round:
        """The round with what its model, reference and critic say of it, and the advantages that follow."""
        rl, (prompts_N, groups_N, rewards_N) = self._rl, about
        ended_N = np.asarray([one.ended for one in rollouts])
        learned_N = np.isfinite(rewards_N) & (ended_N | (not rl.mask_truncated))
        tokens_K, logps_K = (np.concatenate([getattr(one, name) for one in rollouts]) for name in ("tokens", "logps"))
        lengths_N = np.asarray([len(one.tokens) for one in rollouts])
        zeros_K = np.zeros(len(tokens_K), np.float32)
        kept = (zeros_K, None, None, told)
        plain = Round(prompts_N, lengths_N, ended_N, rewards_N, learned_N, tokens_K, logps_K, zeros_K, *kept)
        said = self._score(params, self._layout(number, plain))
        old_K, reference_K = said.get("policy", logps_K), said.get("reference", zeros_K)
        penalty_K = zeros_K
        if rl.beta:
            kl_K = np.asarray(kl_divergence(old_K - reference_K, rl.kl_estimator))
            penalty_K = rl.beta * kl_K if rl.kl_in == "reward" else zeros_K
            told = told | {"kl_at_start": float(kl_K.mean())}
        judged = advantages.Judged(groups_N, rewards_N, lengths_N, penalty_K, said.get("values"), ended_N)
        assert self._objective.collect is not None
        worth = self._objective.collect(judged, rl)
        return plain._replace(
            old_logps_K=old_K, reference_logps_K=reference_K, advantages_K=worth.advantages_K, values_K=judged.values_K,
            returns_K=worth.returns_K, told=told,
        )  # fmt: skip

    # ---- batches ----

    def _layout(self, number: int, made: Round) -> Layout:
        rl, config, order = self._rl, self._config, np.arange(len(made.prompts_N))
        if rl.minibatches > 1:
            bits = np.random.Philox(key=[config.train.seed, number]).random_raw(len(order))
            order = np.argsort(bits, kind="stable")
        prompts = [self._source.tokens(i) for i in made.prompts_N]
        shape = (config.train.batch_size, config.data.max_length, self._tokenizer.pad_id)
        return lay_out(prompts, made.completions, made.prompts_N, order, rl.minibatches, *shape)

    def _batch(self, layout: Layout, made: Round, minibatch: int, now: int) -> Batch:
        """One step's batch; without any weight where all its advantages are 0 and nothing else would teach."""
        rl = self._rl
        extra = {"old_logps_BT": made.old_logps_K, "reference_logps_BT": made.reference_logps_K}
        extra |= {"advantages_BT": made.advantages_K}
        if made.values_K is not None and made.returns_K is not None:
            extra |= {"old_values_BT": made.values_K, "returns_BT": made.returns_K}
        batch = layout.batch(minibatch) | {name: layout.lay(values_K)[minibatch] for name, values_K in extra.items()}
        weights_PBT = layout.lay(np.repeat(made.learned_N, made.lengths_N).astype(np.float32))
        if rl.loss_type == "dapo" and self._config.train.objective != "rloo":
            # All minibatches share the tokens out equally: a step divides by its own, which may be more or fewer.
            share = np.count_nonzero(weights_PBT[minibatch]) * rl.minibatches / max(1, np.count_nonzero(weights_PBT))
            weights_PBT = weights_PBT * np.float32(share)
        weights_BT = weights_PBT[minibatch]
        teaches = made.values_K is not None or (rl.beta and rl.kl_in == "loss") or rl.entropy_weight
        if not (weights_BT if teaches else batch["advantages_BT"] * weights_BT).any():
            weights_BT = np.zeros_like(weights_BT)
            self._told[now] = {**self._told.get(now, {}), "nothing_to_learn": 1}
            self._say(f"WARNING: step {now}: no completion of its batch is better than another; it changes nothing")
        return batch | {"weights_BT": weights_BT}

    # ---- what people see ----

    def _text(self, one: Rollout) -> str:
        return self._tokenizer.decode(one.tokens[: len(one.tokens) - one.ended])

    def _note(self, errors: dict[str, int], rewarder: scoring.Rewarder) -> None:
        """Says what went wrong in a reward, the first time that it does."""
        for kind, num in errors.items():
            self._errors[f"reward_errors/{kind}"] = self._errors.get(f"reward_errors/{kind}", 0) + num
            if kind not in self._first_errors:
                self._first_errors.add(kind)
                self._say(f"WARNING: reward {kind}, {num} times in a round, at first: {rewarder.first_errors[kind]}")

    def _shown(self, number: int, made: Round) -> Iterator[dict[str, Any]]:
        """Some completions, of as many prompts as can be."""
        firsts = np.argsort(np.arange(len(made.prompts_N)) % self._rl.group_size, kind="stable")
        starts = np.cumsum(made.lengths_N) - made.lengths_N
        for i in firsts[: self._rl.samples]:
            tokens = made.completions[i]
            yield {
                "round": number,
                "step": number * self._source.steps_per_round,
                "row_id": self._source.examples[made.prompts_N[i]].row_id,
                "prompt": self._tokenizer.decode(self._source.tokens(made.prompts_N[i]))[:_SHOWN_CHARACTERS],
                "completion": self._tokenizer.decode(tokens[: len(tokens) - bool(made.ended_N[i])])[:_SHOWN_CHARACTERS],
                "reward": float(made.rewards_N[i]) if np.isfinite(made.rewards_N[i]) else None,
                "advantage": float(made.advantages_K[starts[i]]),
                "ended": bool(made.ended_N[i]),
            }


def _metrics(
    rollouts: Sequence[Rollout], rewards_N: np.ndarray, parts: dict[str, np.ndarray], groups_N: np.ndarray
) -> dict[str, float]:
    """What a round's metrics say of its completions."""
    real_N = np.isfinite(rewards_N)
    told: dict[str, float] = {} if real_N.all() else {"dropped_completions": int((~real_N).sum())}
    if real_N.any():
        told |= {"reward": float(rewards_N[real_N].mean()), "reward_std": float(rewards_N[real_N].std())}
        told |= {f"rewards/{name}": float(np.nanmean(part)) for name, part in parts.items() if np.isfinite(part).any()}
    flat_P = advantages.is_flat(rewards_N, groups_N)[np.unique(groups_N, return_index=True)[1]]
    lengths_N = np.asarray([len(one.tokens) for one in rollouts])
    return told | {
        "zero_advantage_share": float(flat_P.mean()),
        "completion_tokens": float(lengths_N.mean()),
        "truncated_share": float(np.mean([not one.ended for one in rollouts])),
    }


def _digest(source: PromptSource) -> str:
    """A hash of the prompts and of what rewards read of their rows."""
    rows = [source.rows.digest, *(scoring.row_of(example) for example in source.examples)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
