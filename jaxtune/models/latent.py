"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import rope, spec
from jaxtune.models.attention import Rule
from jaxtune.models.grouped import At, Cache, Where, attend_cached, distinct, empty_slots
from jaxtune.models.layers import Linear, RMSNorm, Runtime

_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Keys and values come from one low-rank latent of each token; a part of each key turns, and is shared by all heads."""

    def __init__(self, c: spec.Config, a: spec.Latent, run: Runtime, rngs: nnx.Rngs):
        self.a, self.run, self.windows = a, run, distinct(c.windows)
        none: Any = nnx.data(None)
        q_dim = a.num_heads * (a.nope_dim + a.rope_dim)
        self.q_proj = none if a.q_rank else Linear(c.dim, q_dim, ("embed", "heads"), run, rngs)
        self.q_a_proj = Linear(c.dim, a.q_rank, ("embed", None), run, rngs, use_bias=a.bias) if a.q_rank else none
        self.q_a_layernorm = RMSNorm(a.q_rank, _EPS, run) if a.q_rank else none
        self.q_b_proj = Linear(a.q_rank, q_dim, ("embed", "heads"), run, rngs) if a.q_rank else none
        self.kv_a_proj_with_mqa = Linear(c.dim, a.kv_rank + a.rope_dim, ("embed", None), run, rngs, use_bias=a.bias)
        self.kv_a_layernorm = RMSNorm(a.kv_rank, _EPS, run)
        self.kv_b_proj = Linear(a.kv_rank, a.num_heads * (a.nope_dim + a.value_dim), ("embed", "heads"), run, rngs)
        self.o_proj = Linear(a.num_heads * a.value_dim, c.dim, ("heads", "embed"), run, rngs, use_bias=a.bias)

    def __call__(
        self, x_BTD: jax.Array, where: Where, at: At, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        a, run = self.a, self.run
        B, T, _ = x_BTD.shape
        if self.q_proj is not None:
            q = self.q_proj(x_BTD, key)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD, key)), key)
        q_BTNH = q.reshape(B, T, a.num_heads, a.nope_dim + a.rope_dim)
        latent, turning = jnp.split(self.kv_a_proj_with_mqa(x_BTD, key), [a.kv_rank], axis=-1)
        kv_BTNH = self.kv_b_proj(self.kv_a_layernorm(latent), key).reshape(B, T, a.num_heads, a.nope_dim + a.value_dim)
        k_nope, v_BTNH = jnp.split(kv_BTNH, [a.nope_dim], axis=-1)
        q_nope, q_turning = jnp.split(q_BTNH, [a.nope_dim], axis=-1)
        cos, sin = where.rotary(at.rope)
        q_turned = rope.rotate(q_turning, cos, sin, None, a.interleaved)
        k_turned = rope.rotate(turning[:, :, None], cos, sin, None, a.interleaved)
        k_turned = jnp.broadcast_to(k_turned, (B, T, a.num_heads, a.rope_dim))

        def heads(*parts: jax.Array) -> jax.Array:
            return run.constrain(jnp.concatenate(parts, axis=-1), ("batch", "length", "heads", None))

        rule = Rule(a.scale, windows=self.windows)
        q_BTNH, k_BTNH = heads(q_nope, q_turned), heads(k_nope, k_turned)
        out_BTNH, cache = attend_cached(rule, run, q_BTNH, k_BTNH, heads(v_BTNH), where, at, cache)
        return self.o_proj(out_BTNH.reshape(B, T, a.num_heads * a.value_dim), key), cache

    @staticmethod
    def empty(a: spec.Latent, layers: int, rows: int, slots: int, dtype: Any) -> Cache:
        return empty_slots(layers, rows, slots, a.num_heads, a.nope_dim + a.rope_dim, a.value_dim, dtype)
