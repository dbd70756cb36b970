"""Group-relative policy optimisation (arXiv:2402.03300): completions of a prompt against their own mean. Variants by `rl`:
Dr. GRPO (loss_type="dr_grpo", scale_rewards="none"), DAPO (loss_type="dapo", clip_high, resample), GSPO (importance_level="sequence").
"""

from __future__ import annotations

from typing import Any

import jax

from jaxtune.data import advantages
from jaxtune.objectives import surrogate
from jaxtune.objectives.ops import Metrics, Objective, Policy


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The surrogate's sum by `loss_type`, and the number of completions (grpo, dr_grpo) or of their tokens (bnpo, dapo)."""
    found = surrogate.surrogate(policy.head, policy.hidden(batch, key), batch, **options)
    return found.total, found.weight, found.metrics


OBJECTIVE = Objective(
    fields=surrogate.FIELDS,
    loss=loss,
    collect=advantages.group_relative,
    options=surrogate.OPTIONS,
    counted=surrogate.counted,
)
