"""What a round may cost: protected sets, as its run has measured them, and the entropy of the answers; why rounds end early."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, templates
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller
from jaxtune.selftrain.task import Task
from jaxtune.train import start
from jaxtune.validation_retention import GOLD
from jaxtune.weights import source
from jaxtune.workdir import write_whole


def counts_entropy(config: ConfigDict) -> bool:
    """Whether entropy is measured: by the methods of `self_distill`, and where it is a limit."""
    options = config.self_distill
    return bool(options.entropy_prompts and (config.self_training.method in GOLD or options.entropy_floor))


def entropy(config: ConfigDict, asked: ConfigDict, task: Task, tokenizer: Tokenizer, show: Any) -> float | None:
    """The entropy of a token (nats) of the answers of the model that `asked` names: the mean of -log p over tokens drawn at temperature 1.

    One answer to each of `self_distill.entropy_prompts` training prompts; None where it is not measured.
    """
    if not counts_entropy(config):
        return None
    model, chosen = source.find(asked), config.self_training
    program, values = start.program(asked, model)
    state, frozen = start.load(asked, model, program, values, show)
    places = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
    roller = Roller(program.inference, *places, chosen.slots, program.mesh)
    prompts = [
        templates.prompt_ids(example, tokenizer)
        for example in pipeline.limited(task.prompts, config.self_distill.entropy_prompts)
    ]
    params = {**frozen, **state.params}
    made = roller(params, prompts, 1, Sampling(1.0, 0, 1.0), chosen.max_new_tokens, config.train.seed)
    return float(-np.concatenate([one.logps for one in made]).mean())


def kept_entropy(file: Path, config: ConfigDict, asked: ConfigDict, task: Task, tokenizer: Tokenizer, show: Any) -> Any:
    """`entropy`, measured once: what the file says, or what is then written to it."""
    if not counts_entropy(config):
        return None
    if not file.exists():
        found = entropy(config, asked, task, tokenizer, show)
        write_whole(file, json.dumps({"entropy": found}) + "\n")
    return json.loads(file.read_text("utf-8"))["entropy"]


def broken(config: ConfigDict, untuned: float | None, rounds: Sequence[dict[str, Any]]) -> str:
    """Why no round may follow the last one, in words; "" where one may.

    Sets are held against the untuned model: by the last round's own run where that began with it, else, as measured, by what the
    first round's had before. `untuned` is the entropy then.
    """
    if not config.self_distill.stop:
        return ""
    reasons, told = [], rounds[-1]
    for name, one in told["protected"].items():
        before, after = (
            each["protected"][name][side][one["metric"]]["value"]
            for each, side in ((rounds[0], "before"), (told, "after"))
        )
        worse = before - after if one["higher_is_better"] else after - before
        if one["broken"] if config.self_training.from_base else not worse <= one["tolerance"]:
            reasons.append(
                f"protected set {name} is broken: {one['metric']} {after:.4g}, {before:.4g} before (tolerance {one['tolerance']:g})"
            )
    floor, now = config.self_distill.entropy_floor, told["entropy"]
    if floor and untuned and now is not None and now < floor * untuned:
        reasons.append(
            f"the entropy of its answers is {now:.3f} nats a token, below self_distill.entropy_floor={floor:g} of the untuned model's "
            f"{untuned:.3f}"
        )
    return "; ".join(reasons)
