"""The routers of a mixture of experts in a training step: what they report, and what of it the step minimises."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtune.config import ConfigDict
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Report = dict[str, jax.Array]


def wanted(train: ConfigDict) -> bool:
    """Whether routers have a loss."""
    return bool(train.router_balance_weight or train.router_z_weight)


def check(train: ConfigDict, model_config: Config) -> None:
    """Refuses a router's loss where there is no router.

    Raises:
      UserError: naming the key.
    """
    if not any(block.experts for block, _ in model_config.blocks):
        for name in ("router_balance_weight", "router_z_weight"):
            if train[name]:
                raise UserError(
                    f"train.{name}={train[name]} is for mixtures of experts, and this model has none: set it to 0"
                )


def means(reports: Sequence[Report]) -> Report:
    """The mean over layers and passes of what `models.experts` reports of each; empty for a dense model.

    The balance loss multiplies two means over tokens, so what they are taken over matters: all tokens of one pass of one
    layer that are not padding, on whatever devices they lie. Sharding changes nothing. Micro-batches of an accumulated step
    are balanced each for itself, and averaged by their loss weight; the z-loss is a plain mean, the same for all splits of a
    batch into equal parts. transformers' `load_balancing_loss_func` is top_k times as large, and takes both means over all
    layers at once, so that layers can make up for each other; there it is off unless `output_router_logits` is set.
    """
    found: Report = {}
    for report in reports:
        found = {name: value + found.get(name, 0.0) for name, value in report.items()}
    layers = found.pop("layers", None)
    return {} if layers is None else {name: value / layers for name, value in found.items()}


def loss(train: ConfigDict, found: Report) -> jax.Array:
    """Weighted balance loss (arXiv:2101.03961 eq. 4) and z-loss (arXiv:2202.08906 eq. 5) of `means`; 0 for a dense model."""
    if not found or not wanted(train):
        return jnp.float32(0)
    return train.router_balance_weight * found["router_balance"] + train.router_z_weight * found["router_z"]
