"""Reward modelling (Bradley and Terry 1952; arXiv:2203.02155): a head of one score learns which of two answers people prefer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives import pairs as pairs_lib
from jaxtune.objectives.ops import Metrics, Objective, Policy, segment_mean


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    center_rewards: float,
    margin_scale: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over pairs of -log s(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2, and the number of pairs.

    m is the row's margin (`scores_BTC`; arXiv:2307.09288) times `margin_scale`; c, `center_rewards`, keeps scores about 0
    (arXiv:2312.09244).
    """
    hidden_BTD = policy.hidden(batch, key)
    if policy.pool == "mean":
        hidden_BTD = segment_mean(hidden_BTD, batch["segment_ids_BT"])
    # One score a token costs little beside the layers below.
    scores_BT = policy.head.apply(policy.head.params, hidden_BTD)[..., 0]
    read_BT, segments_BT = (batch["weights_BT"] != 0).astype(jnp.float32), batch["segment_ids_BT"]
    there = pairs_lib.branch_sums(read_BT, segments_BT, (1, 2))
    score = pairs_lib.branch_sums(scores_BT * read_BT, segments_BT, (1, 2))
    margin = margin_scale * pairs_lib.branch_sums(batch["scores_BTC"][..., 0] * read_BT, segments_BT, (1,))[1]
    real, apart = (there[1] * there[2] > 0).astype(jnp.float32), score[1] - score[2]
    losses = -jax.nn.log_sigmoid(apart - margin) + center_rewards * (score[1] + score[2]) ** 2
    weight = jnp.sum(real)
    values = {
        "accuracy": (apart > 0).astype(jnp.float32),
        "margin": apart,
        "mean_reward": (score[1] + score[2]) / 2,
    }
    told = {name: (jax.lax.stop_gradient(jnp.sum(value * real)), weight) for name, value in values.items()}
    return jnp.sum(losses * real), weight, told


OBJECTIVE = Objective(
    fields=("tokens_BT", "weights_BT", "scores_BTC", "segment_ids_BT", "positions_BT"),
    loss=loss,
    options=("preference.center_rewards", "preference.margin_scale"),
)
