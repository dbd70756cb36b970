"""Supervised fine-tuning: next-token cross-entropy on the tokens whose loss weight is not zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Metrics, Objective, Policy, cross_entropy


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over tokens of w_t * -log p(target_t | tokens up to t), and the sum of w_t."""
    hidden_BTD = policy.hidden(batch, key)
    nll, correct = cross_entropy(policy.head, hidden_BTD, batch["targets_BT"], batch["weights_BT"])
    weight = jnp.sum(batch["weights_BT"])
    return nll, weight, {"accuracy": (correct, weight)}


OBJECTIVE = Objective(fields=("tokens_BT", "targets_BT", "weights_BT", "segment_ids_BT", "positions_BT"), loss=loss)
