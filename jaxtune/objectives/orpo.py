"""ORPO (arXiv:2403.07691): supervised fine-tuning on the chosen answers, with the odds ratio of the two beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives import pairs as pairs_lib
from jaxtune.objectives.logps import token_logps
from jaxtune.objectives.ops import Metrics, Objective, Policy
from jaxtune.types import BRANCH_BITS

Batch = dict[str, jax.Array]


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: Batch,
    key: jax.Array | None,
    *,
    beta: float,
    orpo_prompts: bool,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over pairs of -beta log s(log odds(chosen) - log odds(rejected)), and the number of pairs.

    odds(y) = p / (1 - p), log p being the mean log-probability of y's tokens. To it comes the cross-entropy of the chosen
    answers, with `orpo_prompts` of their prompts too, a mean over the batch's tokens.
    """
    read_BT = _read(batch) if orpo_prompts else _chosen(batch)
    wanted_BT = (batch["weights_BT"] != 0) | read_BT
    logps_BT = token_logps(policy.head, policy.hidden(batch, key), batch["targets_BT"], wanted_BT.astype(jnp.float32))
    pairs = pairs_lib.per_token(pairs_lib.pairs(logps_BT, batch))
    log_odds = pairs.chosen - pairs.rejected - (_log1mexp(pairs.chosen) - _log1mexp(pairs.rejected))
    ratios = jax.nn.log_sigmoid(jnp.where(pairs.real > 0, log_odds, 0.0))
    scale_B1 = batch["read_scale_B" if orpo_prompts else "sft_scale_B"][:, None]
    nll, weight = -jnp.sum(logps_BT * read_BT * scale_B1), jnp.sum(read_BT * scale_B1)
    num_pairs = jnp.sum(pairs.real)
    told = {
        **pairs_lib.metrics(pairs, beta),
        "nll_loss": (nll, weight),
        "log_odds_ratio": (jnp.sum(ratios * pairs.real), num_pairs),
        "log_odds_chosen": (jnp.sum(jnp.where(pairs.real > 0, log_odds, 0.0)), num_pairs),
    }
    return nll - beta * jnp.sum(ratios * pairs.real), num_pairs, told


def _chosen(batch: Batch) -> jax.Array:
    return (batch["segment_ids_BT"] >> BRANCH_BITS == 1) & (batch["weights_BT"] != 0)


def _read(batch: Batch) -> jax.Array:
    """Where a token of a chosen answer or of its prompt predicts the next: all of a shared prompt, all but a branch's last."""
    segments_BT = batch["segment_ids_BT"]
    next_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    branch_BT = segments_BT >> BRANCH_BITS
    return (segments_BT != 0) & ((branch_BT == 0) | ((branch_BT == 1) & (next_BT == segments_BT)))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, exact near 0 too (Maechler 2012); kept away from 0, where no pair is."""
    x = jnp.minimum(x, -1e-30)
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _counted(batch: Batch) -> Batch:
    """Adds the scales of the means over tokens: of chosen answers alone, and of all that is read."""
    batch = pairs_lib.counted(batch)
    tokens_per_pair = jnp.sum(_chosen(batch)) * batch["sft_scale_B"]
    return {**batch, "read_scale_B": tokens_per_pair / jnp.maximum(jnp.sum(_read(batch)), 1)}


OBJECTIVE = Objective(
    fields=pairs_lib.FIELDS,
    loss=loss,
    options=("preference.beta", "preference.orpo_prompts"),
    counted=_counted,
)
