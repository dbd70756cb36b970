"""Answers of the policy to the prompts, judged, in parts: each part a file that is whole or not there, and is not made twice."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import templates
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller
from jaxtune.rewards import scoring
from jaxtune.selftrain import gold
from jaxtune.selftrain import task as task_lib
from jaxtune.selftrain.selection import Sample, is_right
from jaxtune.selftrain.task import Task
from jaxtune.train.state import Params, Program
from jaxtune.workdir import write_whole

# (examples, their completions) -> (rewards, errors by name: kind, the first message of each).
Judge = Callable[[Sequence[Example], Sequence[str]], tuple[np.ndarray, dict[str, int], dict[str, str]]]
# (pairs of prompt and answer) -> their scores: a reward model.
Score = Callable[[Sequence[tuple[str, str]]], np.ndarray]
# (prompts, answers to each, seed) -> (text, whether it ended by itself) of each, a prompt's together.
Answer = Callable[[Sequence[Sequence[int]], int, int], list[tuple[str, bool]]]


class Part(NamedTuple):
    """Samples to some prompts in a row, and what went wrong in judging them."""

    samples: list[Sample]
    errors: dict[str, int]
    first_errors: dict[str, str]


def parts(
    config: ConfigDict, task: Task, number: int, folder: Path, tokenizer: Tokenizer, policy: Callable[[], Answer], judge: Judge,
    show: Any,
) -> list[Part]:  # fmt: skip
    """Every part of round `number`: those that `folder` holds are read, the others made and written.

    What is drawn depends on the seed, the round and the prompt's number: not on which parts were there before. `policy`
    loads the model, if there is anything left to ask it.
    """
    size, answer = config.self_training.part_prompts, None
    starts = range(0, len(task.prompts), size)
    found = []
    for start in show(starts, len(starts), f"round {number}: sampling"):
        path = folder / f"part_{start // size:04d}.json"
        if not path.exists():
            answer = answer or policy()
            part = _sample(
                config, task, number, range(start, min(start + size, len(task.prompts))), tokenizer, answer, judge
            )
            told = {**part._asdict(), "samples": [_plain(sample) for sample in part.samples]}
            write_whole(path, json.dumps(told, ensure_ascii=False))
        saved = json.loads(path.read_text("utf-8"))
        samples = [
            Sample(**{**one, "reward": math.nan if one["reward"] is None else one["reward"]})
            for one in saved["samples"]
        ]
        found.append(Part(samples, saved["errors"], saved["first_errors"]))
    return found


def _plain(sample: Sample) -> dict[str, Any]:
    return {**sample._asdict(), "reward": None if math.isnan(sample.reward) else sample.reward}


def _sample(
    config: ConfigDict, task: Task, number: int, which: range, tokenizer: Tokenizer, answer: Answer, judge: Judge
) -> Part:
    """Asks some prompts; those without a right answer once more, with a hint, where the method gives one."""
    chosen, errors, first = config.self_training, Counter[str](), dict[str, str]()

    def ask(numbers: list[int], template: str) -> list[Sample]:
        plain = [task.prompts[i] for i in numbers]
        asked = [task_lib.hinted(one, template) if template else gold.asked(config, one) for one in plain]
        ids = [templates.prompt_ids(example, tokenizer) for example in asked]
        entropy = [config.train.seed, number, which.start, int(bool(template))]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        made = answer(ids, chosen.samples, seed)
        of = [i for i in numbers for _ in range(chosen.samples)]
        rewards, wrong, said = judge([task.prompts[i] for i in of], [text for text, _ in made])
        errors.update(wrong)
        for kind, message in said.items():
            first.setdefault(kind, message)
        return [
            Sample(i, text, ended, float(reward), bool(template))
            for i, (text, ended), reward in zip(of, made, rewards, strict=True)
        ]

    samples = ask(list(which), "")
    if chosen.method == "star" and chosen.hint:
        solved = {sample.prompt for sample in samples if is_right(sample, config.reward.threshold)}
        room = config.data.max_length - chosen.max_new_tokens
        failed = [i for i in which if i not in solved and task.prompts[i].answer is not None]
        told = {i: templates.prompt_ids(task_lib.hinted(task.prompts[i], chosen.hint), tokenizer) for i in failed}
        failed = [i for i in failed if len(told[i]) <= room]
        samples += ask(failed, chosen.hint) if failed else []
    return Part(sorted(samples, key=lambda sample: (sample.prompt, sample.hinted)), dict(errors), first)


def verifier(rewarder: scoring.Rewarder) -> Judge:
    """Judges by reward functions."""

    def judge(examples: Sequence[Example], completions: Sequence[str]) -> Any:
        rows = [scoring.row_of(example) for example in examples]
        scores = rewarder([scoring.prompt_of(example) for example in examples], completions, rows)
        return scores.total, scores.errors, {kind: rewarder.first_errors[kind] for kind in scores.errors}

    return judge


def by_model(score: Score) -> Judge:
    """Judges by a reward model; an empty answer has no score, and a score that is not finite is counted."""

    def judge(examples: Sequence[Example], completions: Sequence[str]) -> Any:
        pairs = [(scoring.prompt_of(e), text) for e, text in zip(examples, completions, strict=True)]
        there = np.asarray([bool(text.strip()) for _, text in pairs], bool)
        rewards = np.full(len(pairs), np.nan)
        if there.any():
            rewards[there] = score([pair for pair, is_there in zip(pairs, there, strict=True) if is_there])
        wrong = int((there & ~np.isfinite(rewards)).sum())
        kind = "reward_model: not_a_number"
        said = {kind: "its score is NaN or infinite"} if wrong else {}
        return np.where(np.isfinite(rewards), rewards, np.nan), {kind: wrong} if wrong else {}, said

    return judge


def answers(config: ConfigDict, tokenizer: Tokenizer, program: Program, params: Params) -> Answer:
    """Asks this model, as `self_training` says."""
    chosen = config.self_training
    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p)
    places = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
    roller = Roller(program.inference, *places, chosen.slots, program.mesh)

    def answer(prompts: Sequence[Sequence[int]], group: int, seed: int) -> list[tuple[str, bool]]:
        made = roller(params, prompts, group, sampling, chosen.max_new_tokens, seed)
        return [(tokenizer.decode(one.tokens[: len(one.tokens) - one.ended]), one.ended) for one in made]

    return answer
