"""The optimizer: an optax chain, one group per label, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxtune.config import ConfigDict


def schedule(optim: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine, linear or constant. `warmup_steps` below 1 is a share of all steps."""
    warmup = optim.warmup_steps if optim.warmup_steps >= 1 else round(optim.warmup_steps * num_steps)
    warmup, peak = int(warmup), optim.learning_rate
    rest = max(num_steps - warmup, 1)
    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=optim.final_ratio)
    elif optim.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optim.final_ratio, rest)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make(config: ConfigDict, labels: Mapping[str, str], num_steps: int) -> optax.GradientTransformation:
    """Clips by the global norm, then runs AdamW (or SGD) on each label's group; LoRA+ gives B a rate of its own."""
    optim, rate = config.optim, schedule(config.optim, num_steps)
    trained = {path: name for path, name in labels.items() if name != "frozen"}

    def group(name: str) -> optax.GradientTransformation:
        ratio = config.tune.lora_plus_ratio if name == "lora_b" else 1.0
        scaled = (lambda step: rate(step) * ratio) if ratio != 1.0 else rate
        if optim.name == "sgd":
            return optax.chain(optax.add_decayed_weights(optim.weight_decay, _decaying), optax.sgd(scaled))
        return optax.adamw(scaled, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay, mask=_decaying)

    groups = {name: group(name) for name in sorted(set(trained.values()))}
    chain = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    return optax.chain(*chain, optax.partition(groups, trained))


def _decaying(params: Any) -> Any:
    """Weight decay falls on matrices only: not on norms, biases or DoRA magnitudes."""

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key.rsplit(".", 1)[-1] in ("kernel", "table", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(one, params)
