"""What objectives of reinforcement share: the clipped surrogate of sampled completions, how it is averaged, KL and entropy.

A batch row holds prompts with a completion each, one a segment; the completions' tokens have a loss weight. With

    r_t = p(token) / p_old(token),   A_t its advantage,   q_t = log p(token) - log p_ref(token)

a token's loss is  -min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL(q)  (arXiv:1707.06347; a higher
clip_high: DAPO, arXiv:2503.14476; delta bounds r where A < 0, INTELLECT-2, arXiv:2505.07291). The ratio is a token's own, its
completion's geometric mean ("sequence": GSPO, arXiv:2507.18071), or its completion's whole ("trajectory"). Estimates of the
KL divergence (arXiv:2402.03300; Schulman 2020):

    k1   q                      k2   q^2 / 2                     k3   exp(-q) + q - 1

in the loss times r where `kl_unbiased`: the gradient is then the divergence's own (arXiv:2512.02556). Without it, k1's is 0 on
average. The averages, over N completions of T_i tokens (L: the most that a completion may have):

    grpo      1/N sum_i 1/T_i sum_t     arXiv:2402.03300
    dr_grpo   1/N sum_i 1/L sum_t       arXiv:2503.20783
    bnpo      1/(sum_i T_i) sum_t       of this step's batch
    dapo      the same, the tokens of all minibatches shared out among them equally; arXiv:2503.14476
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.objectives.logps import token_logps_and_entropy
from jaxtune.objectives.ops import TOKEN_FIELDS, Head, Metrics

Batch = dict[str, jax.Array]
FIELDS = (*TOKEN_FIELDS, "old_logps_BT", "reference_logps_BT", "advantages_BT")
OPTIONS = (
    "rl.loss_type", "rl.importance_level", "rl.clip_low", "rl.clip_high", "rl.delta", "rl.beta", "rl.kl_estimator",
    "rl.kl_unbiased", "rl.kl_in",
    "rl.entropy_weight", "rl.temperature", "rl.max_new_tokens",
)  # fmt: skip


class Surrogate(NamedTuple):
    """The summed loss, the weight that divides it, the metrics; `share_BT` is what each token's loss counts in the sum."""

    total: jax.Array
    weight: jax.Array
    metrics: Metrics
    share_BT: jax.Array


def of_segment(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """At every token the sum over its own segment, (B, T)."""

    def of_row(values_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_T, ids_T, ids_T.shape[0] + 1)[ids_T]

    return jax.vmap(of_row)(values_BT, segment_ids_BT)


def kl_divergence(q: Any, estimator: str) -> Any:
    """The estimate k1, k2 or k3 from log-ratios q = log p - log p_ref; also of NumPy arrays."""
    return {"k1": lambda: q, "k2": lambda: q * q / 2, "k3": lambda: jnp.expm1(-q) + q}[estimator]()


def cooled(head: Head, temperature: float) -> Head:
    """The head with its logits divided by the temperature that completions are drawn with."""
    return head if temperature == 1 else head._replace(apply=partial(_cooled, head.apply, temperature))


def _cooled(apply: Any, temperature: float, params: Any, hidden: jax.Array) -> jax.Array:
    logits_V: jax.Array = apply(params, hidden) / temperature
    return logits_V


def counted(batch: Batch) -> Batch:
    """Adds `sequences_per_token_B`: completions of the whole batch over their tokens.

    A mean over tokens beside one over completions: times this, its sum may be divided by the number of completions,
    whatever the shards and micro-batches.
    """
    mask_BT = (batch["weights_BT"] != 0).astype(jnp.float32)
    tokens = jnp.sum(mask_BT)
    length_BT = jnp.maximum(of_segment(mask_BT, batch["segment_ids_BT"]), 1.0)
    ratio = jnp.sum(mask_BT / length_BT) / jnp.maximum(tokens, 1.0)
    return {**batch, "sequences_per_token_B": jnp.broadcast_to(ratio, mask_BT.shape[:1])}


def surrogate(
    head: Head, hidden_BTD: jax.Array, batch: Batch, *, loss_type: str, importance_level: str, clip_low: float, clip_high: float,
    delta: float, beta: float, kl_estimator: str, kl_unbiased: bool, kl_in: str, entropy_weight: float, temperature: float, max_new_tokens: int,
) -> Surrogate:  # fmt: skip
    """The loss by the formulas above, less `entropy_weight` times the mean entropy of a token."""
    segments_BT, advantages_BT = batch["segment_ids_BT"], batch["advantages_BT"]
    mask_BT = (batch["weights_BT"] != 0).astype(jnp.float32)
    length_BT = jnp.maximum(of_segment(mask_BT, segments_BT), 1.0)
    given = (cooled(head, temperature), hidden_BTD, batch["targets_BT"], batch["weights_BT"])
    logps_BT, entropy_BT = token_logps_and_entropy(*given, trains_entropy=entropy_weight > 0)
    own_BT = (logps_BT - batch["old_logps_BT"]) * mask_BT
    log_ratio_BT = own_BT if importance_level == "token" else of_segment(own_BT, segments_BT)
    log_ratio_BT = log_ratio_BT / length_BT if importance_level == "sequence" else log_ratio_BT
    ratio_BT = jnp.exp(log_ratio_BT)
    bounded_BT = jnp.minimum(ratio_BT, delta) if delta else ratio_BT
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    loss_BT = -jnp.minimum(bounded_BT * advantages_BT, clipped_BT * advantages_BT)
    kl_BT = kl_divergence((logps_BT - batch["reference_logps_BT"]) * mask_BT, kl_estimator)
    if beta and kl_in == "loss":
        loss_BT = loss_BT + beta * (kl_BT * ratio_BT if kl_unbiased else kl_BT)

    by_token = loss_type in ("bnpo", "dapo")
    per_BT = {"grpo": length_BT, "dr_grpo": jnp.float32(max_new_tokens)}.get(loss_type, jnp.float32(1))
    share_BT = batch["weights_BT"] / per_BT
    tokens, sequences = jnp.sum(mask_BT), jnp.sum(mask_BT / length_BT)
    total, weight = jnp.sum(loss_BT * share_BT), tokens if by_token else sequences
    if entropy_weight:
        one_BT = jnp.ones_like(mask_BT) if by_token else batch["sequences_per_token_B"][:, None]
        total = total - entropy_weight * jnp.sum(entropy_BT * mask_BT * one_BT)
    low_BT = (ratio_BT < 1 - clip_low) & (advantages_BT < 0)
    high_BT = (ratio_BT > 1 + clip_high) & (advantages_BT > 0)
    found = {
        "entropy": entropy_BT,
        "clip_share": low_BT | high_BT,
        "clip_low_share": low_BT,
        "clip_high_share": high_BT,
    }
    found |= {"kl_old": jnp.expm1(own_BT) - own_BT} | ({"kl": kl_BT} if beta else {})
    told = {name: (jax.lax.stop_gradient(jnp.sum(value * mask_BT)), tokens) for name, value in found.items()}
    return Surrogate(total, weight, told, share_BT)
