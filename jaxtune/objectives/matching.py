"""Layers of a student that are to be like a teacher's: hidden states and attention, by pairs of layers.

    mse        mean over dims of (W h_student - h_teacher)^2      FitNets (arXiv:1412.6550), TinyBERT (arXiv:1909.10351)
    cosine     1 - cos(W h_student, h_teacher)                    DistilBERT (arXiv:1910.01108)
    attention  KL(teacher's || student's), a mean over heads      MiniLM (arXiv:2002.10957), equation 4

W is learned where the two are not equally wide, and left out where they are. Where heads are not equally many, the means over
each model's heads are compared. All are means over the pairs of layers, and sums over tokens by their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Pairs = Sequence[tuple[int, int]]  # (student's layer, teacher's)


def hidden(
    student: Mapping[int, Any], teacher: Mapping[int, Any], pairs: Pairs, projections: jax.Array | None, weights_BT: jax.Array, kind: str
) -> jax.Array:  # fmt: skip
    """Sum over tokens of w * the distance of hidden states, `kind` mse or cosine; taps by layer; projections (pairs, D, E)."""
    total = jnp.float32(0)
    for at, (ours, theirs) in enumerate(pairs):
        x_BTE = student[ours].hidden_BTD.astype(jnp.float32)
        y_BTE = jax.lax.stop_gradient(teacher[theirs].hidden_BTD.astype(jnp.float32))
        x_BTE = x_BTE if projections is None else x_BTE @ projections[at].astype(jnp.float32)
        total += jnp.sum(weights_BT * _DISTANCES[kind](x_BTE, y_BTE))
    return total / len(pairs)


def attention(student: Mapping[int, Any], teacher: Mapping[int, Any], pairs: Pairs, weights_BT: jax.Array) -> jax.Array:
    """Sum over tokens, as queries, of w * the divergence of attention; maps (B, heads, T, T) exist for one pair of layers at a time."""
    total = jnp.float32(0)
    for ours, theirs in pairs:

        @jax.checkpoint
        def apart(weights_BT: jax.Array, ours: int = ours, theirs: int = theirs) -> jax.Array:
            q_BNTS, p_BNTS = student[ours].attention(), jax.lax.stop_gradient(teacher[theirs].attention())
            if q_BNTS.shape[1] != p_BNTS.shape[1]:
                q_BNTS, p_BNTS = (_mean_over_heads(x) for x in (q_BNTS, p_BNTS))
            kl_BNT = jnp.sum(jnp.exp(p_BNTS) * (p_BNTS - q_BNTS), axis=-1)
            return jnp.sum(weights_BT * jnp.mean(kl_BNT, axis=1))

        total += apart(weights_BT)
    return total / len(pairs)


def _mean_over_heads(logps_BNTS: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logps_BNTS, axis=1, keepdims=True) - jnp.log(logps_BNTS.shape[1])


def _mse(x_BTE: jax.Array, y_BTE: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x_BTE - y_BTE), axis=-1)


def _cosine(x_BTE: jax.Array, y_BTE: jax.Array) -> jax.Array:
    lengths = jnp.sum(x_BTE**2, axis=-1) * jnp.sum(y_BTE**2, axis=-1)
    return 1 - jnp.sum(x_BTE * y_BTE, axis=-1) * jax.lax.rsqrt(jnp.maximum(lengths, 1e-24))


_DISTANCES = {"mse": _mse, "cosine": _cosine}
