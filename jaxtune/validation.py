"""What each field of the config may be, and fields that must fit each other; checked before anything is fetched."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from jaxtune.config import ConfigDict, base, keys, lookup
from jaxtune.types import SAVED_NAMES, UserError, nearest

CHOICES: dict[str, tuple[str, ...]] = {
    "model.head": ("", "lm", "sequence", "token", "none"),
    "model.problem_type": ("", "single_label_classification", "multi_label_classification", "regression"),
    "model.pooling": ("", "first", "mean", "last"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "splash", "flash"),
    "model.quantize": ("", "int8", "int4", "nf4"),
    "tune.method": ("lora", "full", "head", "prompt"),
    "tune.dtype": ("float32", "bfloat16"),
    "data.format": (
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "text",
        "labelled",
        "tagged",
        "pair",
    ),
    "data.tag_subwords": ("first", "all"),
    "data.end_of_turn": ("all", "turn", "last", "none"),
    "data.too_long": ("truncate", "drop", "error"),
    "optim.name": ("adamw", "adam8bit", "adafactor", "lion", "muon", "sgd"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "train.remat": ("none", "dots", "block"),
    "train.on_nonfinite": ("stop", "skip"),
    "eval.metric": ("auto", "labels", "exact_match", "perplexity", "retrieval"),
    "eval.corpus": ("split", "all"),
    "eval.split": ("train", "validation", "test"),
    "export.dtype": ("", "float32", "bfloat16", "float16"),
    "tracking.progress": ("auto", "bar", "lines", "off"),
    "tune.virtual_init": ("vocabulary", "text", "random"),
    "meta.algorithm": ("", "reptile", "fomaml"),
    "meta.inner_optimizer": ("adam", "sgd"),
    "optim.decay_shape": ("linear", "cosine", "exponential", "sqrt"),
    "sweep.method": ("grid", "random"),
    "sweep.goal": ("min", "max"),
}

_AT_LEAST: dict[str, float] = {
    "tune.rank": 1, "data.max_length": 2, "data.max_passage_length": 2, "data.mined_negatives": 0, "train.batch_size": 1,
    "train.accumulation": 1, "train.loss_chunk_tokens": 1, "train.mlp_block_tokens": 0,
    "optim.clip_norm": 0, "eval.batch_size": 1, "eval.bootstrap_samples": 1, "generate.max_new_tokens": 1,
    "generate.top_k": 0, "checkpoint.keep": 1, "data.limit": 0, "data.prefetch_batches": 1,
    "train.eval_every_steps": 0,
    "train.eval_batches": 0, "train.patience": 0, "train.max_skipped_steps": 0, "train.explode_factor": 0, "train.router_balance_weight": 0,
    "train.router_z_weight": 0, "train.log_every_steps": 1,
    "plan.num_slices": 1, "plan.confirm": 0,
    "tracking.profile_start_step": 0, "tracking.peak_tflops": 0,
    "checkpoint.every_steps": 0, "checkpoint.every_seconds": 0, "eval.limit": 0, "generate.batch_size": 1, "mesh.heartbeat_seconds": 2,
    "model.quantize_block": -1, "tune.virtual_tokens": 1,
    "meta.demonstrations": 0, "meta.contexts": 0, "meta.tasks": 1, "meta.inner_steps": 1, "meta.draws": 1, "meta.adapt_steps": 1,
    "meta.adapt_rate": 0,
    "optim.moment_block": 16, "optim.min_factored_dim": 1, "lr_find.steps": 10, "lr_find.stop_factor": 1.01, "sweep.num_runs": 0,
    "train.neftune_noise_alpha": 0, "train.z_loss_weight": 0, "train.focal_gamma": 0,
}  # fmt: skip

_BETWEEN: dict[str, tuple[float, float]] = {
    "tune.dropout": (0, 0.999), "data.validation_fraction": (0, 0.95), "data.test_fraction": (0, 0.95),
    "generate.top_p": (1e-6, 1), "generate.min_p": (0, 1), "eval.confidence": (0.01, 0.999), "optim.final_ratio": (0, 1),
    "optim.b1": (0, 0.999999), "optim.b2": (0, 0.999999), "optim.learning_rate": (0, 1e6), "optim.warmup_steps": (0, 2**31 - 1),
    "train.steps": (0, 2**31 - 1), "train.epochs": (0, 1e9), "train.seed": (0, 2**32 - 1), "generate.seed": (0, 2**32 - 1),
    "tune.alpha": (0, 1e6), "tune.lora_plus_ratio": (0, 1e6), "optim.weight_decay": (0, 1e6), "generate.temperature": (0, 1e6), "train.temperature": (1e-3, 100),
    "tracking.profile_steps": (0, 100), "compile_cache_gib": (0.001, 1e6),
    "data.mask_fraction": (0.001, 1), "data.mask_token_share": (0, 1), "data.mask_random_share": (0, 1),
    "plan.efficiency": (0.01, 1),
    "mesh.max_unsharded": (0, 1),
    "optim.stable_share": (0, 1), "optim.layer_decay": (0.001, 1), "optim.ema_decay": (0, 0.999999), "optim.muon_momentum": (0, 0.999999),
    "optim.muon_rms": (1e-6, 1e3), "train.label_smoothing": (0, 0.99), "lr_find.smoothing": (0, 0.999), "lr_find.high": (0, 1e6),
    "sweep.seed": (0, 2**32 - 1),
}  # fmt: skip

_RANGES = (
    "plan.api_training_usd_per_1k_tokens", "plan.api_training_tokens", "plan.api_inference_usd_per_1k_tokens",
    "plan.monthly_requests", "plan.tokens_per_request",
)  # fmt: skip

_ABOVE_ZERO = {
    "tune.alpha": "the adapter changes nothing", "tune.lora_plus_ratio": "B stays 0, and the adapter changes nothing",
    "optim.eps": "a gradient of 0 is divided by 0", "meta.inner_rate": "no task takes a step of its own",
    "lr_find.low": "no factor takes it anywhere",
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    known = keys(base())
    for key in keys(config):
        if key not in known:
            raise UserError(f"config key {key!r} does not exist{nearest(key, known)}")
    missing = [key for key in known if key not in keys(config)]
    if missing:
        raise UserError(f"config lacks {missing[0]!r}: start get_config() from jaxtune.config.base()")
    for key, allowed in CHOICES.items():
        value = lookup(config, key)
        if value not in allowed:
            raise UserError(
                f"config.{key} is {value!r}; expected one of {', '.join(map(repr, allowed))}{nearest(str(value), allowed)}"
            )
    for key, low in _AT_LEAST.items():
        if not lookup(config, key) >= low:  # said so that NaN is refused too
            raise UserError(f"config.{key} is {lookup(config, key)}; expected at least {low}")
    for key, (low, high) in _BETWEEN.items():
        if not low <= lookup(config, key) <= high:
            raise UserError(f"config.{key} is {lookup(config, key)}; expected {low} to {high}")
    for key, otherwise in _ABOVE_ZERO.items():
        if not lookup(config, key) > 0:
            raise UserError(f"config.{key} is {lookup(config, key)}; expected above 0, or {otherwise}")
    _check_forms(config)
    _check_prompt(config)
    _check_meta(config)
    _check_losses(config)
    _check_sweep(config)
    check_profile(config)
    if not config.train.steps and not config.train.epochs:
        raise UserError("train.steps=0 and train.epochs=0.0 train nothing: set one of them")
    if config.train.patience and not config.train.eval_every_steps:
        raise UserError(
            f"train.patience={config.train.patience} counts evaluations, and train.eval_every_steps=0 makes none on the way: "
            "set train.eval_every_steps"
        )
    if config.train.batch_size % config.train.accumulation:
        raise UserError(
            f"train.batch_size={config.train.batch_size} does not divide by train.accumulation="
            f"{config.train.accumulation}: choose a multiple"
        )
    if config.export.checkpoint not in ("best", "latest") and not str(config.export.checkpoint).isdecimal():
        raise UserError(
            f"config.export.checkpoint is {config.export.checkpoint!r}; expected 'best', 'latest' or a step number"
        )
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        raise UserError(
            "data.validation_fraction + data.test_fraction leave no training rows: their sum must be below 1"
        )
    if config.data.mask_token_share + config.data.mask_random_share > 1:
        raise UserError(
            "data.mask_token_share + data.mask_random_share are shares of one whole: their sum is at most 1"
        )


def check_profile(config: ConfigDict) -> None:
    """Refuses to trace steps that the run will not take; says nothing while epochs have not become steps.

    Raises:
      UserError: with the steps.
    """
    first, last, steps = config.tracking.profile_start_step, config.train.steps, config.tracking.profile_steps
    if steps and 0 < last < first + steps:
        raise UserError(
            f"tracking.profile_steps={steps} from tracking.profile_start_step={first} on: the run has {last} steps, 0 to {last - 1}; "
            f"set tracking.profile_start_step={max(0, last - steps)} or less"
            + (f" and tracking.profile_steps={last}" if steps > last else "")
        )


def _check_forms(config: ConfigDict) -> None:
    """The fields that are patterns or nested tuples."""
    for key in ("train.save", "train.offload"):
        for name in lookup(config, key):
            if name not in SAVED_NAMES:
                raise UserError(
                    f"config.{key} has {name!r}; expected any of {', '.join(SAVED_NAMES)}{nearest(name, SAVED_NAMES)}"
                )
        if lookup(config, key) and config.train.remat == "none":
            raise UserError(
                f"config.{key} names what a rematerialised step keeps, and train.remat='none' keeps all: set train.remat='block'"
            )
    if config.train.mlp_block_tokens and "mlp" in (*config.train.save, *config.train.offload):
        raise UserError(
            "train.save and train.offload cannot keep 'mlp' of blocks that are recomputed one by one: leave it out, or set "
            "train.mlp_block_tokens=0"
        )
    rules, bins = config.mesh.rules, config.data.label_bins
    for rule in rules:
        if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], tuple | list):
            raise UserError(f"config.mesh.rules has {rule!r}; expected (regex, (mesh axis or '' per dim, …))")
        axes = [axis for axis in rule[1] if axis]
        if len(set(axes)) < len(axes):
            raise UserError(f"config.mesh.rules has {rule!r}; expected each mesh axis once at most")
    for one in bins:
        if isinstance(one, str) or len(one) != 3 or not all(isinstance(bound, int | float) for bound in one[:2]):
            raise UserError(f"config.data.label_bins has {one!r}; expected (low, high, name) with two numbers")
    for key in _RANGES:
        _check_range(key, lookup(config, key))
    for key in ("eval.labels", "model.labels", "generate.stop"):
        words = lookup(config, key)
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None or "" in words:
            raise UserError(
                f"config.{key} has {twice or ''!r}{' twice' * bool(twice)}; expected different words, none empty"
            )
    for key, pattern in [
        ("data.split_regex", config.data.split_regex),
        ("model.quantize_targets", config.model.quantize_targets),
        *(("mesh.rules", rule[0]) for rule in rules),
    ]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.{key} has {pattern!r}, which is not a regular expression: {error}") from None


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
        if values[0] in ("linear", "log"):
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


def _check_range(key: str, values: tuple[Any, ...]) -> None:
    """One number or two, as numbers or (from a command line) as words."""
    try:
        numbers = [Fraction(str(value)) for value in values]
    except (ValueError, ZeroDivisionError):
        numbers = [Fraction(-1)]
    if len(numbers) > 2 or any(number < 0 for number in numbers) or numbers != sorted(numbers):
        raise UserError(f"config.{key} is {tuple(values)!r}; expected one number of 0 or more, or (low, high)")


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
