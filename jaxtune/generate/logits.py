"""From logits to the next token: temperature, then top-k, top-p and min-p, then one draw."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config import ConfigDict

_NEVER = -1e30
_FEW = 128  # so many of the likeliest tokens are looked at before all are sorted for top-p


class Sampling(NamedTuple):
    """Static settings of a draw; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def from_config(cls, generate: ConfigDict) -> Sampling:
        return cls(generate.temperature, generate.top_k, generate.top_p, generate.min_p)


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Divides by the temperature and forbids what top-k, top-p (arXiv:1904.09751) and min-p (arXiv:2407.01082) leave out.

    The likeliest token always stays. Order as in transformers: temperature, top-k, top-p, min-p.
    """
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, _NEVER, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
        least = jnp.min(jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, _NEVER, logits_BV)
    if sampling.min_p:
        probs_BV = jax.nn.softmax(logits_BV, axis=-1)
        floor = sampling.min_p * jnp.max(probs_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(probs_BV < floor, _NEVER, logits_BV)
    return logits_BV


def draw(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """The next token (B,) int32, each row with its own key, so a row's text does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, sampling)).astype(jnp.int32)


def choose(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token (B,) int32 and its log-probability (B,) float32 under the distribution it was drawn from.

    As `draw` from `restrict`ed logits, but for the speed of many rows: no sort of the whole vocabulary unless a row needs
    it, and one random number a row, at which the cumulated probabilities are cut. A greedy token is certain: its
    log-probability is 0.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(logits_BV.shape[:1], jnp.float32)
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    least_B1 = _least(logits_BV, sampling)
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    weights_BV = jnp.where(logits_BV < least_B1, 0, jnp.exp(logits_BV - most_B1))
    cuts_B = jax.vmap(jax.random.uniform)(keys_B)
    token_B, total_B = _cut(weights_BV, cuts_B)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    return token_B, (chosen_B1 - most_B1)[:, 0] - jnp.log(total_B)


def _least(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The lowest logit (B, 1), temperature applied, that top-k, top-p and min-p leave."""
    V = logits_BV.shape[-1]
    least_B1 = jnp.full((logits_BV.shape[0], 1), _NEVER, jnp.float32)
    if sampling.top_k or sampling.top_p < 1:
        top_k = min(sampling.top_k or V, V)
        few = top_k if sampling.top_k else min(_FEW, V)
        highest_BK = jax.lax.top_k(logits_BV, few)[0]
        if sampling.top_k:
            least_B1 = highest_BK[:, -1:]
            total_B1 = jax.nn.logsumexp(jnp.where(logits_BV < least_B1, _NEVER, logits_BV), axis=-1, keepdims=True)
        else:
            total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
        if sampling.top_p < 1:
            least_B1, enough_B1 = _least_of_mass(highest_BK, total_B1, sampling.top_p)
            if few < top_k:

                def by_sorting() -> jax.Array:
                    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
                    return jnp.where(enough_B1, least_B1, _least_of_mass(sorted_BV, total_B1, sampling.top_p)[0])

                least_B1 = jax.lax.cond(jnp.all(enough_B1), lambda: least_B1, by_sorting)
    if sampling.min_p:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        least_B1 = jnp.maximum(least_B1, floor_B1)
    return least_B1


def _least_of_mass(sorted_BK: jax.Array, total_B1: jax.Array, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The lowest of these logits that top-p keeps, and whether none below them could be kept."""
    probs_BK = jnp.exp(sorted_BK - total_B1)
    upto_BK = jnp.cumsum(probs_BK, axis=-1)
    kept_BK = upto_BK - probs_BK < top_p
    return jnp.min(jnp.where(kept_BK, sorted_BK, jnp.inf), axis=-1, keepdims=True), upto_BK[:, -1:] >= top_p


def _cut(weights_BV: jax.Array, cuts_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the cumulated weights (B, V) pass `cuts_B` of their sum, and the sum; summed in stretches, then within one."""
    B, V = weights_BV.shape
    width = max(1, round(V**0.5))
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % width)))
    stretches_BZI = padded_BV.reshape(B, -1, width)
    upto_BZ = jnp.cumsum(jnp.sum(stretches_BZI, axis=-1), axis=-1)
    total_B = upto_BZ[:, -1]
    target_B1 = (cuts_B * total_B)[:, None]

    def first_above(upto_BI: jax.Array, weights_BI: jax.Array, target_B1: jax.Array) -> jax.Array:
        """Rounding may put the target at the very end: the last that weighs anything is then meant."""
        last_B = weights_BI.shape[1] - 1 - jnp.argmax(weights_BI[:, ::-1] > 0, axis=-1)
        return jnp.minimum(jnp.sum(upto_BI <= target_B1, axis=-1), last_B)

    stretch_B = first_above(upto_BZ, jnp.sum(stretches_BZI, axis=-1), target_B1)
    mine_BI = jnp.take_along_axis(stretches_BZI, stretch_B[:, None, None], axis=1)[:, 0]
    before_B1 = jnp.where(
        stretch_B > 0, jnp.take_along_axis(upto_BZ, jnp.maximum(stretch_B - 1, 0)[:, None], axis=-1)[:, 0], 0
    )[:, None]
    at_B = first_above(jnp.cumsum(mine_BI, axis=-1) + before_B1, mine_BI, target_B1)
    return (stretch_B * width + at_B).astype(jnp.int32), total_B
