"""Kahneman-Tversky optimisation (arXiv:2402.01306): of each answer by itself, whether it is one to be given."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives import pairs as pairs_lib
from jaxtune.objectives.ops import Metrics, Objective, Policy

_DESIRABLE, _UNDESIRABLE, _MISMATCHED = 1, 2, 3  # branches
_BRANCHES = (_DESIRABLE, _UNDESIRABLE, _MISMATCHED)


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over answers of w (1 - s(beta (r - z))), with r - z turned round where an answer is undesirable; and their number.

    r is an answer's log-ratio to the reference. z, the reference point, is the batch's mean log-ratio of answers to other
    prompts, at least 0, and has no gradient: so the rows of a batch belong together.
    """
    logps_BT = pairs_lib.of_batch(policy, batch, key)
    found = pairs_lib.answers(logps_BT, batch, _BRANCHES)
    base = pairs_lib.answers(pairs_lib.reference_logps(frozen, batch), batch, _BRANCHES)
    ratio = {branch: found.logps[branch] - base.logps[branch] for branch in _BRANCHES}
    real = {branch: (found.tokens[branch] > 0).astype(jnp.float32) for branch in _BRANCHES}

    def mean_of(values: jax.Array, branch: int) -> tuple[jax.Array, jax.Array]:
        return jax.lax.stop_gradient(jnp.sum(values * real[branch])), jnp.sum(real[branch])

    divergence, num_mismatched = mean_of(ratio[_MISMATCHED], _MISMATCHED)
    z = jnp.maximum(divergence / jnp.maximum(num_mismatched, 1.0), 0.0)
    good = desirable_weight * (1 - jax.nn.sigmoid(beta * (ratio[_DESIRABLE] - z)))
    bad = undesirable_weight * (1 - jax.nn.sigmoid(beta * (z - ratio[_UNDESIRABLE])))
    weight = jnp.sum(real[_DESIRABLE]) + jnp.sum(real[_UNDESIRABLE])
    told = {"kl": (z * weight, weight)}
    for name, branch in (("chosen", _DESIRABLE), ("rejected", _UNDESIRABLE)):
        told |= {
            f"rewards/{name}": mean_of(beta * ratio[branch], branch),
            f"logps/{name}": mean_of(found.logps[branch], branch),
        }
    return jnp.sum(good * real[_DESIRABLE]) + jnp.sum(bad * real[_UNDESIRABLE]), weight, told


OBJECTIVE = Objective(
    fields=pairs_lib.FIELDS,
    loss=loss,
    frozen=("reference",),
    options=("preference.beta", "preference.desirable_weight", "preference.undesirable_weight"),
    whole_batch=True,
)
