"""Proximal policy optimisation (arXiv:1707.06347) with a value head over the trained hidden states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data import advantages
from jaxtune.objectives import surrogate
from jaxtune.objectives.ops import Metrics, Objective, Policy


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None, *, value_weight: float,
    value_clip: float, **options: Any,
) -> tuple[jax.Array, jax.Array, Metrics]:  # fmt: skip
    """The surrogate plus `value_weight` times the clipped loss of the values V, averaged alike:

    max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2) / 2, R the return; value_clip 0 = no clip.
    """
    assert policy.value is not None
    hidden_BTD = policy.hidden(batch, key)
    found = surrogate.surrogate(policy.head, hidden_BTD, batch, **options)
    values_BT, old_BT, returns_BT = policy.value(hidden_BTD), batch["old_values_BT"], batch["returns_BT"]
    error_BT = jnp.square(values_BT - returns_BT)
    if value_clip:
        near_BT = old_BT + jnp.clip(values_BT - old_BT, -value_clip, value_clip)
        error_BT = jnp.maximum(error_BT, jnp.square(near_BT - returns_BT))
    mask_BT = (batch["weights_BT"] != 0).astype(jnp.float32)
    told = {"value_loss": error_BT / 2, "value": values_BT, "return": returns_BT}
    sums = {name: jax.lax.stop_gradient(jnp.sum(value * mask_BT)) for name, value in told.items()}
    total = found.total + value_weight * jnp.sum(error_BT / 2 * found.share_BT)
    return total, found.weight, found.metrics | {name: (value, jnp.sum(mask_BT)) for name, value in sums.items()}


OBJECTIVE = Objective(
    fields=(*surrogate.FIELDS, "old_values_BT", "returns_BT"),
    loss=loss,
    collect=advantages.generalised,
    options=(*surrogate.OPTIONS, "rl.value_weight", "rl.value_clip"),
    counted=surrogate.counted,
    has_values=True,
)
