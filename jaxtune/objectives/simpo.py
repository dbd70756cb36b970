"""SimPO (arXiv:2405.14734): the reward is the mean log-probability of an answer's tokens, so no reference is needed."""

from __future__ import annotations

import jax

from jaxtune.objectives import pairs as pairs_lib
from jaxtune.objectives.ops import Metrics, Objective, Policy


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float,
    rpo_alpha: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over pairs of -log s(beta (mean log p(chosen) - mean log p(rejected)) - gamma), smoothed, and the number of pairs.

    `rpo_alpha` adds so much of the chosen answers' cross-entropy, a mean over the batch's tokens.
    """
    logps_BT = pairs_lib.of_batch(policy, batch, key)
    pairs = pairs_lib.per_token(pairs_lib.pairs(logps_BT, batch))
    losses = pairs_lib.sigmoid(beta * (pairs.chosen - pairs.rejected) - simpo_gamma, label_smoothing)
    return pairs_lib.summed(losses, pairs, beta, logps_BT, batch, rpo_alpha)


OBJECTIVE = Objective(
    fields=pairs_lib.FIELDS,
    loss=loss,
    options=("preference.beta", "preference.simpo_gamma", "preference.label_smoothing", "preference.rpo_alpha"),
    counted=pairs_lib.counted,
)
