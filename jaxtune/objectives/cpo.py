"""Contrastive preference optimisation (arXiv:2401.08417): DPO without a reference, and the chosen answers' cross-entropy."""

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
    loss_type: str,
    label_smoothing: float,
    cpo_alpha: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over pairs of the loss that `loss_type` names, at p_ref = 1, and the number of pairs.

    To it comes `cpo_alpha` times the cross-entropy of the chosen answers, a mean over the batch's tokens.
    """
    logps_BT = pairs_lib.of_batch(policy, batch, key)
    pairs = pairs_lib.pairs(logps_BT, batch)
    losses = pairs_lib.pair_losses(pairs, beta, loss_type, label_smoothing, False)
    return pairs_lib.summed(losses, pairs, beta, logps_BT, batch, cpo_alpha)


OBJECTIVE = Objective(
    fields=pairs_lib.FIELDS,
    loss=loss,
    options=("preference.beta", "preference.loss_type", "preference.label_smoothing", "preference.cpo_alpha"),
    counted=pairs_lib.counted,
)
