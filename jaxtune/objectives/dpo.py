"""Direct preference optimisation (arXiv:2305.18290) and its relatives: which of two answers a model should rather give.

The reference keeps it near the model that it started from. `rpo_alpha` adds so much of the chosen answers' cross-entropy
(arXiv:2404.19733), a mean over the batch's tokens.
"""

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
    length_normalised: bool,
    rpo_alpha: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over pairs of the loss that `loss_type` names (`objectives/pairs.py`), and the number of pairs."""
    logps_BT = pairs_lib.of_batch(policy, batch, key)
    pairs = pairs_lib.pairs(logps_BT, batch, pairs_lib.reference_logps(frozen, batch))
    losses = pairs_lib.pair_losses(pairs, beta, loss_type, label_smoothing, length_normalised)
    return pairs_lib.summed(losses, pairs, beta, logps_BT, batch, rpo_alpha)


OBJECTIVE = Objective(
    fields=pairs_lib.FIELDS,
    loss=loss,
    frozen=("reference",),
    options=(
        "preference.beta", "preference.loss_type", "preference.label_smoothing", "preference.length_normalised",
        "preference.rpo_alpha",
    ),
    counted=pairs_lib.counted,
)  # fmt: skip
