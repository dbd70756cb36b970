"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings of training's tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_STREAM = 0x6E656674  # of random numbers: layers draw theirs from streams by their number


def noisy(x_BTD: jax.Array, segment_ids_BT: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """x + u alpha / sqrt(L D), u uniform in [-1, 1] for each number, L the tokens of the text that a token is of.

    So the noise of a text has the same expected length whatever it is packed with; padding has none. Texts lie in one piece.
    """
    D, lengths_BT = x_BTD.shape[-1], text_lengths(segment_ids_BT)
    size_BT = jnp.where(segment_ids_BT != 0, alpha * jax.lax.rsqrt(lengths_BT.astype(jnp.float32) * D), 0)
    noise_BTD = jax.random.uniform(jax.random.fold_in(key, _STREAM), x_BTD.shape, jnp.float32, -1, 1)
    return x_BTD + (noise_BTD * size_BT[..., None]).astype(x_BTD.dtype)


def text_lengths(segment_ids_BT: jax.Array) -> jax.Array:
    """How many tokens the segment of each token has, (B, T) int32."""
    at_BT = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, 1)
    edge = jnp.full_like(segment_ids_BT[:, :1], -1)
    begins_BT = segment_ids_BT != jnp.concatenate([edge, segment_ids_BT[:, :-1]], axis=1)
    ends_BT = segment_ids_BT != jnp.concatenate([segment_ids_BT[:, 1:], edge], axis=1)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, at_BT, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, at_BT, segment_ids_BT.shape[1]), axis=1, reverse=True)
    return last_BT - first_BT + 1
