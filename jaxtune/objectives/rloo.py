"""REINFORCE leave-one-out (arXiv:2402.14740): a completion against the mean of the others of its prompt, as one action.

The ratio, and its clip, are those of a whole completion, and the loss is a mean over completions, as in TRL.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxtune.data import advantages
from jaxtune.objectives import grpo
from jaxtune.objectives.ops import Metrics, Policy


def loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over completions of -min(R A, clip(R) A), R the product of a completion's ratios; and their number."""
    options |= {"loss_type": "grpo", "importance_level": "trajectory"}
    return grpo.loss(policy, frozen, batch, key, **options)


OBJECTIVE = grpo.OBJECTIVE._replace(loss=loss, collect=advantages.leave_one_out)
