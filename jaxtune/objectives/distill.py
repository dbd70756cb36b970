"""Distillation: a student learns what a teacher gives every next word, and not only which one came (arXiv:1503.02531).

    loss = alpha x divergence(teacher, student) + (1 - alpha) x cross-entropy, each a mean over the tokens that train

plus, where layers are paired, hidden_weight x and attention_weight x how far their hidden states and attention are apart.

`objectives/divergences.py` and `objectives/matching.py` have the formulas. The teacher is a model in the step, or what was kept
of one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.objectives import matching
from jaxtune.objectives.divergences import Form, Likeliest, taught
from jaxtune.objectives.ops import TOKEN_FIELDS, Metrics, Objective, Policy, token_loss


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    alpha: float,
    divergence: str,
    temperature: float,
    mix: float,
    top_k: int,
    non_target: bool,
    layer_map: tuple[tuple[int, int], ...],
    hidden_weight: float,
    hidden_loss: str,
    attention_weight: float,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over tokens of w * loss, and the sum of w; without a teacher (the rows are its words) that of cross-entropy."""
    kept = "teacher_logps_BTJ" in batch
    if not frozen and not kept:
        return token_loss(policy, frozen, batch, key)
    form = Form(divergence, temperature, mix, top_k, non_target)
    targets_BT, weights_BT = batch["targets_BT"], batch["weights_BT"]
    teacher = None if kept else next(iter(frozen.values()))
    seen: Any = Likeliest(batch["teacher_logps_BTJ"], batch["teacher_ids_BTJ"]) if kept else None
    weight, told, beside = jnp.sum(weights_BT), Metrics(), jnp.float32(0)
    if teacher is None or not layer_map:
        hidden_BTD = policy.hidden(batch, key)
        seen = seen if teacher is None else teacher.hidden(batch, None)
    else:
        assert policy.layers is not None
        assert teacher.layers is not None
        hidden_BTD, ours = policy.layers(batch, key, tuple(sorted({one for one, _ in layer_map})))
        seen, theirs = teacher.layers(batch, None, tuple(sorted({other for _, other in layer_map})))
        if hidden_weight:
            apart = matching.hidden(ours, theirs, layer_map, policy.projections, weights_BT, hidden_loss)
            beside, told = beside + hidden_weight * apart, told | {"hidden_distance": (apart, weight)}
        if attention_weight:
            apart = matching.attention(ours, theirs, layer_map, weights_BT)
            beside, told = beside + attention_weight * apart, told | {"attention_divergence": (apart, weight)}
    given = (targets_BT, weights_BT, form, alpha, batch.get("gold_BT"))
    total, apart, nll, right = taught(policy.head, hidden_BTD, teacher and teacher.head, seen, *given)
    told |= {"accuracy": (right, weight), "divergence": (apart, weight), "nll": (nll, weight)}
    return total + beside, weight, told


OBJECTIVE = Objective(
    fields=TOKEN_FIELDS,
    loss=loss,
    frozen=("teacher",),
    options=(
        "distill.alpha", "distill.divergence", "distill.temperature", "distill.mix", "distill.top_k", "distill.non_target",
        "distill.layer_map", "distill.hidden_weight", "distill.hidden_loss", "distill.attention_weight",
    ),
)  # fmt: skip
