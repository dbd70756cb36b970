"""From logits to the next token: temperature, then top-k, top-p and min-p, then one draw."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config import ConfigDict

_NEVER = -1e30


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
