"""Checks of the fields that belong to one way of teaching, or to one verb; `validation.validate` calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtune.config import ConfigDict, base, keys
from jaxtune.types import UserError, nearest

ON_POLICY = ("grpo", "rloo", "reinforce_pp", "ppo")  # objectives whose batches the model writes itself


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_prompt(config)
    _check_meta(config)
    _check_losses(config)
    _check_sweep(config)
    _check_preference(config)
    if config.train.objective in ON_POLICY:
        _check_rl(config)


def _check_preference(config: ConfigDict) -> None:
    options = config.preference
    kind, smoothing = options.loss_type, options.label_smoothing
    if kind == "robust" and smoothing >= 0.5:
        raise UserError(
            f"preference.label_smoothing={smoothing} says that pairs are as often wrong as right, and preference.loss_type='robust' "
            "divides by 1 - 2 x it: expected below 0.5"
        )
    if kind in ("hinge", "ipo") and smoothing and config.train.objective in ("dpo", "cpo"):
        raise UserError(
            f"preference.label_smoothing={smoothing} does nothing with preference.loss_type={kind!r}: set it to 0, or loss_type to "
            "'sigmoid' or 'robust'"
        )


def _check_rl(config: ConfigDict) -> None:
    name, rl, train = f"train.objective={config.train.objective!r}", config.rl, config.train
    if not config.reward.functions:
        raise UserError(
            f"{name} learns from rewards, and reward.functions is empty: name at least one, such as (('exact_answer', 1.0),)"
        )
    if train.beside:
        raise UserError(
            f"train.beside={train.beside}: {name} writes its own batches, and nothing can stand beside it; set it to ()"
        )
    if rl.beta and config.tune.method != "lora":
        raise UserError(
            f"rl.beta={rl.beta} asks for the KL divergence to the model with its adapter off, and tune.method={config.tune.method!r} has no "
            "adapter: set tune.method='lora', or rl.beta=0"
        )
    if rl.group_size < 2 and (config.train.objective in ("grpo", "rloo") or rl.resample):
        raise UserError(
            f"rl.group_size={rl.group_size}: {name} compares the completions of a prompt{' (rl.resample too)' * bool(rl.resample)}; "
            "expected 2 or more"
        )
    if rl.delta and rl.delta <= 1 + rl.clip_high:
        raise UserError(f"rl.delta={rl.delta}; expected above 1 + rl.clip_high = {1 + rl.clip_high:g}, or 0 = no bound")
    for key in ("eval_every_steps", "patience"):
        if train[key]:
            raise UserError(
                f"train.{key}={train[key]}: {name} has no validation loss; set it to 0 (before and after are measured by eval.metric)"
            )
    number, parts = rl.prompts_per_round * rl.group_size, rl.minibatches
    if number % parts:
        raise UserError(
            f"rl.minibatches={parts} does not divide a round's rl.prompts_per_round x rl.group_size = {number} completions"
        )
    if config.tune.method == "lora" and config.tune.dropout:
        raise UserError(
            f"tune.dropout={config.tune.dropout}: {name} compares a token's probability with the one that it was drawn with, and dropout "
            "would make it another model's; set tune.dropout=0.0"
        )
    if train.neftune_noise_alpha:
        raise UserError(
            f"train.neftune_noise_alpha={train.neftune_noise_alpha}: {name} compares a token's probability with the one that it was drawn "
            "with, and noise would make it another model's; set it to 0.0"
        )
    if train.explode_factor:
        raise UserError(
            f"train.explode_factor={train.explode_factor}: the loss of {name} is about 0, above and below, and no multiple of its mean "
            "says that it explodes; set it to 0.0"
        )
    longest = rl.max_prompt_length + rl.max_new_tokens
    fit = train.batch_size * (config.data.max_length // longest)
    if fit < number // parts:
        raise UserError(
            f"a step has {number // parts} completions (rl.prompts_per_round x rl.group_size / rl.minibatches) of up to rl.max_prompt_length + "
            f"rl.max_new_tokens = {longest} tokens, and train.batch_size={train.batch_size} rows of data.max_length="
            f"{config.data.max_length} hold {fit} of that length: raise train.batch_size or rl.minibatches, or make them shorter"
        )


def _check_losses(config: ConfigDict) -> None:
    """What shapes a loss, and how its rate falls."""
    train, optim = config.train, config.optim
    if train.focal_gamma and train.label_smoothing:
        raise UserError(
            f"train.focal_gamma={train.focal_gamma} and train.label_smoothing={train.label_smoothing} undo each other: set one to 0"
        )
    if any(
        isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1e9 for one in train.class_weights
    ):
        raise UserError(
            f"config.train.class_weights is {train.class_weights!r}; expected a number of 0 or more for each label"
        )
    for one in train.beside:
        if not (
            isinstance(one, tuple | list) and 2 <= len(one) <= 3 and isinstance(one[0], str) and isinstance(one[-1], str | int | float)
            and isinstance(one[1], int | float) and 0 < one[1] < 1e9 and (len(one) == 2 or isinstance(one[2], str))
        ):  # fmt: skip
            raise UserError(
                f"config.train.beside has {one!r}; expected (objective, weight above 0) or (objective, weight, URI of its training rows)"
            )
        if one[0] in ON_POLICY:
            raise UserError(
                f"config.train.beside has {one[0]!r}, which writes its own batches and stands beside nothing: make it train.objective"
            )
    if optim.schedule == "wsd" and optim.decay_shape == "exponential" and not optim.final_ratio:
        raise UserError(
            "optim.decay_shape='exponential' never reaches optim.final_ratio=0.0: set optim.final_ratio above 0 (e.g. 0.1), or "
            "another optim.decay_shape"
        )
    if config.lr_find.high <= config.lr_find.low:
        raise UserError(f"lr_find.high={config.lr_find.high} is not above lr_find.low={config.lr_find.low}")


def _check_sweep(config: ConfigDict) -> None:
    known, sweep = keys(base()), config.sweep
    for axis in sweep.axes:
        if not (
            isinstance(axis, tuple | list)
            and len(axis) == 2
            and isinstance(axis[0], str)
            and isinstance(axis[1], tuple | list)
        ):
            raise UserError(f"config.sweep.axes has {axis!r}; expected (config key, (value, …))")
        key, values = axis
        if key not in known or key.startswith("sweep.") or key in ("name", "workdir", "checkpoint.resume"):
            raise UserError(
                f"config.sweep.axes: config key {key!r} does not exist, or is the sweep's own{nearest(key, known)}"
            )
        if not values:
            raise UserError(f"config.sweep.axes: {key!r} has no values; expected at least one")
        if is_range(values):
            low_high = values[1:]
            if sweep.method != "random":
                raise UserError(
                    f"config.sweep.axes: {key!r} is a range, which sweep.method='grid' cannot list: name its values"
                )
            if (
                len(low_high) != 2
                or not all(isinstance(x, int | float) for x in low_high)
                or not low_high[0] < low_high[1]
            ):
                raise UserError(f"config.sweep.axes: {key!r} is {values!r}; expected ({values[0]!r}, low, high)")
            if values[0] == "log" and low_high[0] <= 0:
                raise UserError(f"config.sweep.axes: {key!r} is {values!r}; expected a low above 0")
    names = [key for key, _ in sweep.axes]
    if len(set(names)) < len(names):
        raise UserError(f"config.sweep.axes names a key twice; expected each once: {', '.join(names)}")
    if sweep.method == "random" and sweep.axes and not sweep.num_runs:
        raise UserError("sweep.method='random' draws sweep.num_runs combinations, and that is 0: set sweep.num_runs")


def is_range(values: Sequence[Any]) -> bool:
    """Whether a sweep's values are a range, ("linear" | "log", low, high), and no list of words that begins alike."""
    return values[0] in ("linear", "log") and not all(isinstance(value, str) for value in values)


def check_rewards(functions: tuple[Any, ...]) -> None:
    for one in functions:
        pair = tuple(one) if isinstance(one, tuple | list) else (one,)
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], int | float):
            raise UserError(
                f"config.reward.functions has {one!r}; expected (reward, weight), such as ('exact_answer', 1.0)"
            )


def _check_prompt(config: ConfigDict) -> None:
    """What a soft prompt needs."""
    tune = config.tune
    if tune.method != "prompt":
        return
    if (tune.virtual_init == "text") != bool(tune.virtual_text.strip()):
        raise UserError(
            f"tune.virtual_init={tune.virtual_init!r} with tune.virtual_text={tune.virtual_text!r:.60}: a text goes with 'text', and "
            "'text' with a text"
        )
    if tune.virtual_tokens >= config.data.max_length:
        raise UserError(
            f"tune.virtual_tokens={tune.virtual_tokens} leaves no room in data.max_length={config.data.max_length}: raise the latter"
        )


def _check_meta(config: ConfigDict) -> None:
    """What learning from tasks needs."""
    meta, train = config.meta, config.train
    if meta.demonstrations and train.objective != "sft":
        raise UserError(
            f"meta.demonstrations={meta.demonstrations} goes with train.objective='sft', not {train.objective!r}"
        )
    if tuple(meta.shots) != tuple(sorted({int(k) for k in meta.shots if k >= 0})):
        raise UserError(f"config.meta.shots is {tuple(meta.shots)!r}; expected whole numbers from 0 on, ascending")
    for way in meta.ways or ("",):
        if way not in ("shown", "adapted"):
            raise UserError(
                f"config.meta.ways has {way!r}; expected 'shown', 'adapted' or both{nearest(way, ['shown', 'adapted'])}"
            )
    if meta.shots and train.objective != "sft" and (train.objective != "classify" or "shown" in meta.ways):
        raise UserError(
            f"meta.shots={tuple(meta.shots)} with meta.ways={tuple(meta.ways)} goes with train.objective='sft', and 'adapted' alone "
            f"with 'classify', not with {train.objective!r}"
        )
    if meta.shots and not meta.held_out:
        raise UserError(
            f"meta.shots={tuple(meta.shots)} measures tasks that are never trained on: name them in meta.held_out"
        )
    if not meta.algorithm:
        return
    if train.objective not in ("sft", "classify", "token_classify"):
        raise UserError(
            f"meta.algorithm={meta.algorithm!r} goes with train.objective='sft', 'classify' or 'token_classify', not {train.objective!r}"
        )
    if meta.tasks % train.accumulation:
        raise UserError(
            f"meta.tasks={meta.tasks} does not divide by train.accumulation={train.accumulation}, the groups of tasks taken one after "
            "the other: choose a multiple"
        )
    if train.beside:
        raise UserError(f"meta.algorithm={meta.algorithm!r} does not go with train.beside: leave one of them out")
    batches = meta.inner_steps + (meta.algorithm == "fomaml")
    parts = meta.tasks * batches
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size={train.batch_size} does not divide among meta.tasks={meta.tasks} x {batches} batches of each: use a "
            f"multiple of {parts}, e.g. {-(-train.batch_size // parts) * parts}"
        )
