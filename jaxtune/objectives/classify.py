"""Classification of whole texts: one label of many, any of them, or a number; the loss that transformers takes for each.

What is to be learnt stands at the token that the head reads: a text's first (encoders) or last (decoders). Segments keep
packed texts apart. With mean pooling every token of a text holds its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.objectives.ops import CLASSING, TOKEN_FIELDS, Metrics, Objective, Policy, classed, segment_mean

Batch = dict[str, jax.Array]


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: Batch, key: jax.Array | None, **shaping: Any
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of w * -log p(class) over the tokens that carry a class (`targets_BT`, not shifted), and the sum of w."""
    return classed(policy.head, _read(policy, batch, key), batch, **shaping)


def labels_loss(
    policy: Policy, frozen: dict[str, Policy], batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of w * mean over labels of the binary cross-entropy of sigmoid(score), and the sum of w.

    `scores_BTC` holds 1 for a text's labels, else 0. The metric is the share of labels judged right at 0.5.
    """
    wanted_BTC = batch["scores_BTC"]
    right = lambda scores_BTC: jnp.mean((scores_BTC > 0) == (wanted_BTC > 0.5), axis=-1)  # noqa: E731
    return _scored(policy, batch, key, optax.sigmoid_binary_cross_entropy, {"accuracy": right})


def number_loss(
    policy: Policy, frozen: dict[str, Policy], batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of w * (score - number)^2, and the sum of w."""
    return _scored(policy, batch, key, lambda scores_BTC, wanted_BTC: (scores_BTC - wanted_BTC) ** 2, {})


def _read(policy: Policy, batch: Batch, key: jax.Array | None) -> jax.Array:
    hidden_BTD = policy.hidden(batch, key)
    return segment_mean(hidden_BTD, batch["segment_ids_BT"]) if policy.pool == "mean" else hidden_BTD


def _scored(
    policy: Policy,
    batch: Batch,
    key: jax.Array | None,
    error: Callable[[jax.Array, jax.Array], jax.Array],
    metrics: dict[str, Callable[[jax.Array], jax.Array]],
) -> tuple[jax.Array, jax.Array, Metrics]:
    # Labels are few, so scores of every token cost little beside the layers below.
    scores_BTC, weights_BT = policy.head.apply(policy.head.params, _read(policy, batch, key)), batch["weights_BT"]
    weight = jnp.sum(weights_BT)
    total = jnp.sum(weights_BT * jnp.mean(error(scores_BTC, batch["scores_BTC"]), axis=-1))
    return total, weight, {name: (jnp.sum(weights_BT * metric(scores_BTC)), weight) for name, metric in metrics.items()}


_SCORE_FIELDS = tuple("scores_BTC" if name == "targets_BT" else name for name in TOKEN_FIELDS)
OBJECTIVE = Objective(
    fields=TOKEN_FIELDS,
    loss=loss,
    options=CLASSING,
    problems={
        "multi_label_classification": Objective(fields=_SCORE_FIELDS, loss=labels_loss),
        "regression": Objective(fields=_SCORE_FIELDS, loss=number_loss),
    },
)
