"""Self-training, told as a story: sample, judge, keep, train, measure; again from what was trained; and gold answers beside it.

A round's folder holds `samples/` (part by part), `kept.jsonl`, `refused.jsonl` (each with its reason), `train/` (a run of its
own) and, when all is done, `round.json`. Each is whole or not there; a run that goes on makes only what is missing. Rounds end
where one costs more than it may (`limits.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import checkpoint
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.rewards import scoring
from jaxtune.selftrain import account, gold, limits, sampling, selection
from jaxtune.selftrain import task as task_lib
from jaxtune.selftrain.selection import Sample
from jaxtune.selftrain.task import Task
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import read_lines, write_lines, write_whole


class Hands(NamedTuple):
    """What `run` lends: training as its verb does it; a paired comparison of two runs; and a reward model as a judge."""

    train: Callable[[ConfigDict, Path], None]
    compare: account.Compare
    judge: Callable[[str, ConfigDict], sampling.Score]


def run(config: ConfigDict, workdir: Path, hands: Hands, show: Any, say: Callable[[str], None]) -> None:
    """Trains `self_training.rounds` rounds, then the control; writes the report.

    Raises:
      UserError: what `check` refuses; a workdir of other settings; a round that keeps nothing.
    """
    check(config)
    model = source.find(config)
    source.check_writes(model)
    tokenizer = source.find_tokenizer(config, model)
    program, _ = start.program(config, model)
    start.check_length(config, program)
    start.check_export(config, program)
    task = task_lib.read(config, tokenizer, program.model_config.max_positions, show)
    _claim(config, workdir, task)
    write_lines(workdir / "held" / "test.jsonl", [task_lib.line(example, example.answer) for example in task.held])
    say(f"self-training by {config.self_training.method}: {len(task.prompts)} prompts, {len(task.held)} held-out rows")
    untuned = limits.kept_entropy(workdir / "entropy_before.json", config, config, task, tokenizer, show)
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        judge = _judge(config, hands, stack)
        for number in range(1, config.self_training.rounds + 1):
            rounds.append(_round(config, workdir, task, number, tokenizer, judge, hands, show))
            say(account.told(rounds[-1]))
            if stopped := limits.broken(config, untuned, rounds):
                say(f"no round follows round {number}: {stopped}")
                break
    control = (
        _control(config, workdir, task, rounds, tokenizer, hands, show, say) if config.self_training.control else None
    )
    ended = account.Ended(rounds, control, untuned, stopped)
    account.write(config, workdir, model.uri, ended, hands.compare)


def _judge(config: ConfigDict, hands: Hands, stack: ExitStack) -> sampling.Judge:
    """Who says what is right; reward functions' processes end with the stack."""
    if gold.judges_itself(config):
        return gold.judge(config)
    if config.self_training.reward_model:
        return sampling.by_model(hands.judge(config.self_training.reward_model, config))
    return sampling.verifier(stack.enter_context(scoring.Rewarder(config.reward)))


def check(config: ConfigDict) -> None:
    """Refuses a config that self-training cannot follow.

    Raises:
      UserError: with the field to change.
    """
    chosen = config.self_training
    if jax.process_count() > 1:
        raise UserError(f"self_train runs in one process, and there are {jax.process_count()}: start it on one host")
    if config.train.objective != "sft":
        raise UserError(f"self_train trains on answers: train.objective is {config.train.objective!r}; set 'sft'")
    if config.eval.split != "test":
        raise UserError(f"self_train measures on the test split: eval.split is {config.eval.split!r}; set 'test'")
    for key in ("patience", "eval_every_steps"):
        if config.train[key]:
            raise UserError(f"self_train has no validation rows of its own making: set train.{key}=0")
    if chosen.temperature == 0 and chosen.samples > 1:
        raise UserError(
            f"self_training.temperature=0 gives the same answer {chosen.samples} times: raise it, or set self_training.samples=1"
        )
    if chosen.reward_model and config.reward.functions:
        raise UserError(
            "self_training.reward_model and reward.functions are both set; one of them judges: empty the other"
        )
    if config.protect.on_broken != "report":
        raise UserError(
            f"protect.on_broken={config.protect.on_broken!r} would end a round in its midst: set 'report' (self_distill.stop ends after a round)"
        )
    if not chosen.reward_model and not gold.judges_itself(config):
        scoring.names(config.reward)


def _claim(config: ConfigDict, workdir: Path, task: Task) -> None:
    """Makes the workdir this run's, or finds that it is.

    Raises:
      UserError: it is used and not to be resumed, or what steers the rounds has changed.
    """
    file = workdir / "self_training_began.json"
    if not file.exists():
        checkpoint.check_workdir(str(workdir), resume=False)
        write_whole(file, json.dumps({"config": config.to_dict(), "prompts": task.digest}, indent=2, default=list))
        write_whole(workdir / "config.json", config_lib.to_json(config) + "\n")
        return
    if not config.checkpoint.resume:
        raise UserError(
            f"workdir {workdir} holds an earlier run: add --config.checkpoint.resume=True to go on with it, or choose another "
            "--workdir"
        )
    began = json.loads(file.read_text("utf-8"))
    free = [key for key in checkpoint.FREE if key not in ("reward.", "self_training.", "self_distill.")]
    changed = checkpoint.first_change(began["config"], config, (*free, "self_training.rounds", "reward.workers"))
    if changed:
        key, then, now = changed
        raise UserError(
            f"the rounds in {workdir} are of another config: {key} was {then!r} and is now {now!r}; set it back to resume, or "
            "start in another --workdir"
        )
    if began["prompts"] != task.digest:
        raise UserError(
            f"the rounds in {workdir} are of other rows: data.train ({config.data.train}) or data.test has changed since; put "
            "it back to resume, or start in another --workdir"
        )


def _round(
    config: ConfigDict, workdir: Path, task: Task, number: int, tokenizer: Tokenizer, judge: sampling.Judge, hands: Hands,
    show: Any,
) -> dict[str, Any]:  # fmt: skip
    """One round, or what is missing of it; what is to be told of it."""
    folder, done = _folder(workdir, number), _folder(workdir, number) / "round.json"
    if done.exists():
        told: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return told

    def policy() -> sampling.Answer:
        asked = _policy(config, _folder(workdir, number - 1))
        model = source.find(asked)
        program, values = start.program(asked, model)
        state, frozen = start.load(asked, model, program, values, show)
        return sampling.answers(config, tokenizer, program, {**frozen, **state.params})

    taught = config.self_training.method == "demonstration"  # by answers that the run itself samples
    asked = (config, task, number, folder / "samples", tokenizer, policy, judge, show)
    parts = [] if taught else sampling.parts(*asked)
    samples = [sample for part in parts for sample in part.samples]
    counts = _keep(config, workdir, task, number, samples)
    errors: Counter[str] = sum((Counter(part.errors) for part in parts), Counter())
    rows = folder / ("trained.jsonl" if counts["gold"] else "kept.jsonl")
    training = _training(config, workdir, task, number, rows)
    if taught:
        gold.distilling(config, training)
    _measured_once(workdir, folder)
    hands.train(training, Path(training.workdir))
    first = {kind: message for part in reversed(parts) for kind, message in part.first_errors.items()}
    told = {"round": number, **counts, "errors": {kind: [num, first[kind]] for kind, num in errors.items()}}
    told |= account.of_run(Path(training.workdir))
    told["entropy"] = limits.entropy(config, _policy(config, folder), task, tokenizer, show)
    write_whole(done, json.dumps(told, indent=2) + "\n")
    return told


def _keep(config: ConfigDict, workdir: Path, task: Task, number: int, samples: list[Sample]) -> dict[str, Any]:
    """Writes kept.jsonl and refused.jsonl; returns their counts.

    Raises:
      UserError: there is nothing to train on.
    """
    folder, chosen, threshold = _folder(workdir, number), config.self_training, gold.threshold(config)
    before = folder.with_name(_folder(workdir, number - 1).name) / "kept.jsonl"
    earlier = [Sample(**one["sample"]) for one in read_lines(before)] if before.exists() else []
    choice = selection.choose(chosen.method, samples, threshold, chosen.max_per_prompt, earlier)
    refused = [
        {"row_id": task.prompts[sample.prompt].row_id, "reason": reason, **_judged(sample),
         "prompt": scoring.prompt_of(task.prompts[sample.prompt])}
        for sample, reason in choice.refused
    ]  # fmt: skip
    refused += [{"row_id": example.row_id, "reason": selection.TOO_LONG} for example in task.too_long]
    write_lines(folder / "refused.jsonl", refused)
    reasons = Counter(one["reason"] for one in refused)
    listed = ", ".join(f"{reason} {num}" for reason, num in reasons.most_common())
    if not choice.kept and chosen.method not in gold.GOLD:
        raise UserError(
            f"round {number} kept none of {len(samples)} answers ({listed}; {folder / 'refused.jsonl'} has each): raise "
            "self_training.samples or max_new_tokens, lower reward.threshold, or begin with a model that solves some, in another --workdir"
        )
    lines = [
        {**task_lib.line(task.prompts[sample.prompt], sample.completion), "row_id": task.prompts[sample.prompt].row_id,
         "sample": sample._asdict()}
        for sample in choice.kept
    ]  # fmt: skip
    learned = {sample.prompt for sample in choice.kept}
    others = (
        [example for i, example in enumerate(task.prompts) if i not in learned] if chosen.method in gold.GOLD else []
    )
    others = task.gold if chosen.with_gold else others
    write_lines(folder / "kept.jsonl", lines)
    if others:
        write_lines(folder / "trained.jsonl", lines + [task_lib.line(one, one.answer) for one in others])
    plain = [sample for sample in samples if not sample.hinted]
    right = [sample for sample in plain if selection.is_right(sample, threshold)]
    return {
        "sampled": len(samples), "kept": len(choice.kept), "gold": len(others), "refused": dict(reasons),
        "hinted": sum(sample.hinted for sample in choice.kept), "prompts": len(task.prompts),
        "right_share": len(right) / len(plain) if plain else None,
        "solved_share": len({s.prompt for s in right}) / len(task.prompts) if plain else None,
    }  # fmt: skip


def _judged(sample: Sample) -> dict[str, Any]:
    return {"completion": sample.completion, "reward": None if math.isnan(sample.reward) else sample.reward}


def _control(
    config: ConfigDict, workdir: Path, task: Task, rounds: list[dict[str, Any]], tokenizer: Tokenizer, hands: Hands, show: Any,
    say: Callable[[str], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Trains on gold answers, as many rows as the last round and as many steps as it took from the first model; where there are fewer
    rows, on all of them."""
    last = rounds[-1]
    if not task.gold:
        say("the rows have no answers: there is no control on gold answers")
        return None
    folder, num = workdir / f"control_{last['round']:02d}", last["kept"] + last["gold"]
    done = folder / "control.json"
    if done.exists():
        told: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return told
    taken = pipeline.limited(task.gold, num)
    write_lines(folder / "gold.jsonl", [task_lib.line(example, example.answer) for example in taken])
    training = _training(config, workdir, task, 0, folder / "gold.jsonl")
    training.name = f"{config.name}, control on gold answers"
    training.train.steps = last["steps"] if config.self_training.from_base else sum(one["steps"] for one in rounds)
    if config.self_training.method == "demonstration":  # whose steps have as many rows
        training.data.packing = False
    _measured_once(workdir, folder)
    hands.train(training, Path(training.workdir))
    told = {"gold": len(taken), "wanted": num, **account.of_run(Path(training.workdir))}
    told["entropy"] = limits.entropy(config, _policy(config, folder), task, tokenizer, show)
    write_whole(done, json.dumps(told, indent=2) + "\n")
    return told


def _folder(workdir: Path, number: int) -> Path:
    return workdir / f"round_{number:02d}"


def _policy(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config of the model that was trained in a folder; of the first one, for round 0."""
    config = config.copy_and_resolve_references()
    if folder.name == "round_00":
        return config
    if config.tune.method == "lora":
        config.tune.adapter = str(folder / "train" / "adapter")
    else:
        config.model.source, config.model.tokenizer = str(folder / "train" / "model"), ""
        config.model.keep_layers = ()
    return config


def _training(config: ConfigDict, workdir: Path, task: Task, number: int, rows: Path) -> ConfigDict:
    """The config of a run on these rows: from the first model, or (`from_base` off) from the one of the round before."""
    restarts = config.self_training.from_base or number == 0
    made = _policy(config, _folder(workdir, 0 if restarts else number - 1))
    made.name, made.workdir = f"{config.name}, round {number}", str(rows.parent / "train")
    task_lib.options(made.data, task.prompts[0].messages is not None, rows, workdir / "held" / "test.jsonl")
    if made.eval.metric == "auto" and config.reward.functions:
        made.eval.metric = "reward"
    made.export.merge, made.export.output, made.export.checkpoint = False, "", "latest"
    made.checkpoint.resume, made.tracking.report = True, True
    return made


def _measured_once(workdir: Path, folder: Path) -> None:
    """Hands the first round's measurements of the untuned model on, which `train` takes where it asks the same."""
    for name in ("before.json", "protected_before.json"):
        known, here = _folder(workdir, 1) / "train" / name, folder / "train" / name
        if known.exists() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known, here.with_name(f"{name}.partial"))
            here.with_name(f"{name}.partial").replace(here)
