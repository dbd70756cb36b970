"""Classification: cross-entropy of a head's scores, where the data put a class: one token of a text, or every word."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Metrics, Objective, Policy, cross_entropy, segment_mean


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of w * -log p(class) over the tokens that carry a class (`targets_BT`, not shifted), and the sum of w.

    A text's class stands at the token that its head reads: the first (encoders) or the last (decoders). Segments keep
    packed texts apart. With mean pooling every token of a text holds its mean.
    """
    hidden_BTD = policy.hidden(batch, key)
    if policy.pool == "mean":
        hidden_BTD = segment_mean(hidden_BTD, batch["segment_ids_BT"])
    nll, correct = cross_entropy(policy.head, hidden_BTD, batch["targets_BT"], batch["weights_BT"])
    weight = jnp.sum(batch["weights_BT"])
    return nll, weight, {"accuracy": (correct, weight)}


OBJECTIVE = Objective(fields=("tokens_BT", "targets_BT", "weights_BT", "segment_ids_BT", "positions_BT"), loss=loss)
