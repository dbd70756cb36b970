"""What each field of the config may be, and fields that must fit each other; checked before anything is fetched."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from jaxtune import validation_methods, validation_retention, validation_review
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
        "preference",
        "rated",
    ),
    "data.tag_subwords": ("first", "all"),
    "data.end_of_turn": ("all", "turn", "last", "none"),
    "data.too_long": ("truncate", "drop", "error"),
    "optim.name": ("adamw", "adam8bit", "adafactor", "lion", "muon", "sgd"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "train.remat": ("none", "dots", "block"),
    "train.on_nonfinite": ("stop", "skip"),
    "eval.metric": ("auto", "labels", "exact_match", "perplexity", "retrieval", "reward"),
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
    "reward.on_error": ("zero", "drop", "stop"),
    "self_training.method": ("star", "rft", "rest_em", "rewrite", "demonstration"),
    "self_distill.verifier": ("reward", "answer", "similar"),
    "self_distill.divergence": ("forward", "reverse", "js", "skew_forward", "skew_reverse"),
    "tune.init": ("auto", "a_zero", "b_zero"),
    "preference.loss_type": ("sigmoid", "hinge", "ipo", "robust"),
    "preference.share_prompts": ("auto", "always", "never"),
    "rl.loss_type": ("grpo", "dr_grpo", "bnpo", "dapo"),
    "rl.importance_level": ("token", "sequence"),
    "rl.kl_estimator": ("k1", "k2", "k3"),
    "rl.kl_in": ("loss", "reward"),
    "rl.scale_rewards": ("group", "batch", "none"),
    "rl.old_logps": ("auto", "sampler", "policy"),
    "retain.kl_direction": ("forward", "reverse", "js", "skew_forward", "skew_reverse"),
    "retain.kl_to": ("base", "start"),
    "retain.fisher_labels": ("sampled", "data"),
    "merge.majority_sign": ("total", "frequency"),
    "merge.pick": ("within", "gain", "knee"),
    "frontier.pick": ("within", "gain", "knee"),
    "distill.mode": ("online", "precomputed", "sequence"),
    "distill.divergence": ("forward", "reverse", "js", "skew_forward", "skew_reverse"),
    "distill.hidden_loss": ("mse", "cosine"),
    "distill.teacher_quantize": ("", "int8", "int4", "nf4"),
    "protect.judge_by": ("estimate", "interval"),
    "protect.on_broken": ("report", "stop", "rollback"),
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
    "optim.moment_block": 16, "optim.min_factored_dim": 1, "lr_find.num_steps": 10, "lr_find.stop_factor": 1.01, "sweep.num_runs": 0,
    "train.neftune_noise_alpha": 0, "train.z_loss_weight": 0, "train.focal_gamma": 0,
    "reward.workers": 1, "self_training.rounds": 1, "self_training.samples": 1, "self_training.max_per_prompt": 0,
    "self_training.top_k": 0, "self_training.max_new_tokens": 1, "self_training.part_prompts": 1, "self_training.slots": 1,
    "rl.prompts_per_round": 1, "rl.group_size": 1, "rl.minibatches": 1, "rl.passes": 1, "rl.top_k": 0, "rl.max_prompt_length": 1,
    "rl.max_new_tokens": 1, "rl.slots": 1, "rl.resample": 0, "rl.keep_rounds": 0, "rl.samples": 0,
    "retain.fisher_rows": 1, "merge.svd_rank": 0, "frontier.workers": 1,
    "distill.top_k": 0, "self_distill.entropy_prompts": 0,
    "protect.tolerance": 0, "protect.every_steps": 0, "protect.kl_every_steps": 0, "protect.kl_rows": 0,
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
    "reward.timeout_seconds": (0.01, 86400), "reward.threshold": (-1e9, 1e9),
    "self_training.temperature": (0, 1e6), "self_training.top_p": (1e-6, 1),
    "preference.label_smoothing": (0, 0.5), "preference.rpo_alpha": (0, 1e6), "preference.cpo_alpha": (0, 1e6),
    "preference.simpo_gamma": (0, 1e6), "preference.desirable_weight": (0, 1e6), "preference.undesirable_weight": (0, 1e6),
    "preference.center_rewards": (0, 1e6), "preference.margin_scale": (0, 1e6), "preference.beta": (0, 1e6),
    "rl.temperature": (1e-3, 1e3), "rl.top_p": (1e-6, 1), "rl.min_p": (0, 1), "rl.clip_low": (0, 1), "rl.clip_high": (0, 1e6),
    "rl.delta": (0, 1e6), "rl.beta": (0, 1e6), "rl.entropy_weight": (0, 1e6), "rl.gamma": (0, 1), "rl.gae_lambda": (0, 1),
    "rl.value_weight": (0, 1e6), "rl.value_clip": (0, 1e6),
    "self_distill.similarity": (0, 1), "self_distill.entropy_floor": (0, 1),
    "distill.hidden_weight": (0, 1e6), "distill.attention_weight": (0, 1e6),
    "merge.seed": (0, 2**32 - 1), "merge.density": (0, 1),
    "retain.kl_temperature": (1e-3, 1e3), "retain.kl_mix": (0, 1), "retain.fisher_decay": (0, 1e6), "retain.rewarm": (0, 1e6),
    "distill.alpha": (0, 1), "distill.on_policy": (0, 1), "distill.mix": (0, 1), "distill.temperature": (1e-3, 1e3),
}  # fmt: skip


_RANGES = (
    "plan.api_training_usd_per_1k_tokens", "plan.api_training_tokens", "plan.api_inference_usd_per_1k_tokens",
    "plan.monthly_requests", "plan.tokens_per_request",
)  # fmt: skip

_ABOVE_ZERO = {
    "tune.alpha": "the adapter changes nothing", "tune.lora_plus_ratio": "B stays 0, and the adapter changes nothing",
    "optim.eps": "a gradient of 0 is divided by 0", "lr_find.low": "no factor takes it anywhere",
    "preference.beta": "no answer is preferred to another",
    "meta.inner_rate": "no task takes a step of its own",
    "merge.density": "nothing of an update is kept",
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
    validation_methods.validate(config)
    validation_retention.validate(config)
    validation_review.validate(config)
    for what, own in validation_retention.of_other_rows(config):
        try:
            validate(own)
        except UserError as error:
            text = str(error)
            raise UserError(text if what in text else f"{what}: {text}") from None
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
            + (
                f"set tracking.profile_start_step={last - steps} or less"
                if steps <= last
                else f"set tracking.profile_start_step=0 and tracking.profile_steps={last} or less"
            )
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
    both = next((name for name in config.train.save if name in config.train.offload), None)
    if both:
        raise UserError(
            f"train.save and train.offload both have {both!r}, which lies on the device or in the host's memory: leave it in one"
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
    for key in ("eval.labels", "model.labels", "generate.stop", "reward.choices"):
        words = lookup(config, key)
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None or "" in words:
            raise UserError(
                f"config.{key} has {twice or ''!r}{' twice' * bool(twice)}; expected different words, none empty"
            )
    validation_methods.check_rewards(config.reward.functions)
    for key, pattern in [
        *((f"reward.{name}", config.reward[name]) for name in ("answer_regex", "completion_regex", "regex")),
        ("data.split_regex", config.data.split_regex),
        ("model.quantize_targets", config.model.quantize_targets),
        *(("mesh.rules", rule[0]) for rule in rules),
        *(("tune.freeze", pattern) for pattern in config.tune.freeze),
    ]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.{key} has {pattern!r}, which is not a regular expression: {error}") from None


def _check_range(key: str, values: tuple[Any, ...]) -> None:
    """One number or two, as numbers or (from a command line) as words."""
    try:
        numbers = [Fraction(str(value)) for value in values]
    except (ValueError, ZeroDivisionError):
        numbers = [Fraction(-1)]
    if len(numbers) > 2 or any(number < 0 for number in numbers) or numbers != sorted(numbers):
        raise UserError(f"config.{key} is {tuple(values)!r}; expected one number of 0 or more, or (low, high)")
