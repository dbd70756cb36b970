"""What objectives that compare answers share: sums over each answer's tokens, the losses of a margin, and the metrics.

A batch row holds several rows of the data, each a number of its segment ids; their branches are answers (`types.py`). With

    r_w = log p(chosen) - log p_ref(chosen),  r_l likewise of the rejected answer,  d = r_w - r_l

(p_ref = 1 for methods without a reference), the losses of a pair, at beta b and label smoothing e:

    sigmoid   -(1 - e) log s(b d) - e log s(-b d)                       DPO, arXiv:2305.18290; conservative with e
    robust    [-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e)         arXiv:2403.00409
    hinge     max(0, 1 - b d)                                           arXiv:2305.10425
    ipo       (d - 1 / (2 b))^2, r_w and r_l means over tokens          arXiv:2310.12036
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.objectives.logps import token_logps
from jaxtune.objectives.ops import TOKEN_FIELDS, Metrics, Policy
from jaxtune.types import BRANCH_BITS

Batch = dict[str, jax.Array]
FIELDS = TOKEN_FIELDS


class Answers(NamedTuple):
    """Of each row (B, P; P is how many a batch row could hold) and branch: summed log-probabilities, and numbers of tokens."""

    logps: dict[int, jax.Array]
    tokens: dict[int, jax.Array]


class Pairs(NamedTuple):
    """Of the pairs of a batch, (B, P) each: log-ratios to the reference, log-probabilities, tokens, and which are pairs (1 or 0)."""

    chosen: jax.Array
    rejected: jax.Array
    chosen_logps: jax.Array
    rejected_logps: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array
    real: jax.Array


def branch_sums(values_BT: jax.Array, segment_ids_BT: jax.Array, branches: tuple[int, ...]) -> dict[int, jax.Array]:
    """Sums of values over each branch of each number, (B, P) by branch; number n stands at n - 1."""
    numbers_BT, branch_BT = segment_ids_BT & (1 << BRANCH_BITS) - 1, segment_ids_BT >> BRANCH_BITS
    num = max(1, segment_ids_BT.shape[1] // 2)  # an answer has two tokens at least: what it goes on from, and itself

    def one(branch: int) -> jax.Array:
        def of_row(values_T: jax.Array, numbers_T: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values_T, numbers_T, num + 1)[1:]

        return jax.vmap(of_row)(values_BT * (branch_BT == branch), numbers_BT)

    return {branch: one(branch) for branch in branches}


def answers(logps_BT: jax.Array, batch: Batch, branches: tuple[int, ...]) -> Answers:
    """Sums the log-probabilities of each answer's tokens."""
    segments_BT, trained_BT = batch["segment_ids_BT"], (batch["weights_BT"] != 0).astype(jnp.float32)
    return Answers(
        branch_sums(logps_BT * trained_BT, segments_BT, branches), branch_sums(trained_BT, segments_BT, branches)
    )


def reference_logps(frozen: dict[str, Policy], batch: Batch) -> jax.Array:
    """The reference's log-probability of each token that trains, (B, T): its own pass, or what was computed before."""
    if "reference" not in frozen:
        return batch["reference_logps_BT"]
    policy = frozen["reference"]
    logps_BT = token_logps(policy.head, policy.hidden(batch, None), batch["targets_BT"], batch["weights_BT"])
    return jax.lax.stop_gradient(logps_BT)


def pairs(logps_BT: jax.Array, batch: Batch, reference_BT: jax.Array | None = None) -> Pairs:
    """Pairs the branches 1 (chosen) and 2 (rejected) of each number."""
    found = answers(logps_BT, batch, (1, 2))
    base = {1: 0.0, 2: 0.0} if reference_BT is None else answers(reference_BT, batch, (1, 2)).logps
    chosen, rejected = (found.logps[branch] - base[branch] for branch in (1, 2))
    real = (found.tokens[1] > 0) & (found.tokens[2] > 0)
    rest = (found.logps[1], found.logps[2], found.tokens[1], found.tokens[2], real.astype(jnp.float32))
    return Pairs(chosen, rejected, *rest)


def per_token(pairs: Pairs) -> Pairs:
    """The same with means over each answer's tokens in place of sums."""
    chosen, rejected = (jnp.maximum(tokens, 1.0) for tokens in (pairs.chosen_tokens, pairs.rejected_tokens))
    return pairs._replace(
        chosen=pairs.chosen / chosen,
        rejected=pairs.rejected / rejected,
        chosen_logps=pairs.chosen_logps / chosen,
        rejected_logps=pairs.rejected_logps / rejected,
    )


def sigmoid(margin: jax.Array, smoothing: float) -> jax.Array:
    """-(1 - e) log s(m) - e log s(-m) of margins that beta is in."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def robust(margin: jax.Array, smoothing: float) -> jax.Array:
    """Unbiased where a share e < 1/2 of the pairs is the wrong way round."""
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)


_OF_MARGIN: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": lambda margin, _: jax.nn.relu(1 - margin),
}


def pair_losses(pairs: Pairs, beta: float, loss_type: str, smoothing: float, normalised: bool) -> jax.Array:
    """The loss of each pair, (B, P), by the formulas above; `normalised` takes means over tokens, as ipo always does."""
    means = per_token(pairs) if normalised or loss_type == "ipo" else pairs
    margin = means.chosen - means.rejected
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return _OF_MARGIN[loss_type](beta * margin, smoothing)


def counted(batch: Batch) -> Batch:
    """Adds `sft_scale_B`: pairs of the whole batch over tokens of its chosen answers.

    A mean over tokens beside one over pairs: times this, its sum may be divided by the number of pairs, whatever the shards
    and micro-batches.
    """
    found = answers(jnp.zeros_like(batch["weights_BT"]), batch, (1, 2)).tokens
    num_pairs = jnp.sum((found[1] > 0) & (found[2] > 0))
    scale = num_pairs / jnp.maximum(jnp.sum(found[1]), 1.0)
    return {**batch, "sft_scale_B": jnp.broadcast_to(scale, batch["weights_BT"].shape[:1])}


def chosen_nll(logps_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(sum of -log p over the tokens of chosen answers, scaled by `sft_scale_B`; the mean's weight in pairs' stead)."""
    chosen_BT = (batch["segment_ids_BT"] >> BRANCH_BITS == 1) & (batch["weights_BT"] != 0)
    return -jnp.sum(logps_BT * chosen_BT * batch["sft_scale_B"][:, None]), jnp.sum(
        chosen_BT * batch["sft_scale_B"][:, None]
    )


def of_batch(policy: Policy, batch: Batch, key: jax.Array | None) -> jax.Array:
    """The policy's log-probability of each token's target, (B, T); 0 where nothing trains."""
    return token_logps(policy.head, policy.hidden(batch, key), batch["targets_BT"], batch["weights_BT"])


def summed(
    losses: jax.Array, pairs: Pairs, beta: float, logps_BT: jax.Array, batch: Batch, sft_weight: float
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(sum over pairs of their losses, the number of pairs, metrics); to the sum comes `sft_weight` times `chosen_nll`."""
    total, told = jnp.sum(losses * pairs.real), metrics(pairs, beta)
    if sft_weight:
        nll, weight = chosen_nll(logps_BT, batch)
        total, told = total + sft_weight * nll, {**told, "nll_loss": (nll, weight)}
    return total, jnp.sum(pairs.real), told


def metrics(pairs: Pairs, beta: float) -> Metrics:
    """TRL's names: rewards (beta times the log-ratio), their margins, how often the chosen one is the higher, and log-probabilities."""
    fixed = jax.tree.map(jax.lax.stop_gradient, pairs)
    weight, chosen, rejected = jnp.sum(fixed.real), beta * fixed.chosen, beta * fixed.rejected
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": fixed.chosen_logps,
        "logps/rejected": fixed.rejected_logps,
    }
    return {name: (jnp.sum(value * fixed.real), weight) for name, value in values.items()}
