"""Grouped-query attention, and what every mixer of tokens is told: where the tokens stand, and which layer it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import rope, spec
from jaxtune.models.attention import Rule, attend
from jaxtune.models.layers import Linear, Runtime, make_norm, named

Cache = dict[str, jax.Array]


class Where(NamedTuple):
    """Where each token stands: its segment (B, T), and for each of the model's ropes (cos, sin), each (B, T, H/2) float32."""

    segment_ids_BT: jax.Array
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    key_segments_BS: jax.Array | None  # of the cache's slots, where there is a cache
    used: jax.Array | None

    def rotary(self, which: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of the rope that a layer picks."""
        if isinstance(which, int):
            return self.tables[which]
        cos, sin = (jnp.stack(each) for each in zip(*self.tables, strict=True))
        return cos[which], sin[which]


# Of a cache: the dim of each array that counts slots. Both lie as the matmuls of one new token read them: k (L, B, K, H, S) and
# v (L, B, K, S, H).
SLOTS_DIM = {"k": 4, "v": 3}


def empty_slots(layers: int, rows: int, slots: int, heads: int, k_dim: int, v_dim: int, dtype: Any) -> Cache:
    """Keys and values of no token yet."""
    return {
        "k": jnp.zeros((layers, rows, heads, k_dim, slots), dtype),
        "v": jnp.zeros((layers, rows, heads, slots, v_dim), dtype),
    }


class At(NamedTuple):
    """Which layer of a scan this is: its row in the stack, what it picks from the model's windows and ropes, what it gets."""

    row: jax.Array
    window: jax.Array | int
    rope: jax.Array | int
    kv: tuple[jax.Array, jax.Array] | None = None  # keys and values of the layer whose it reuses
    layer_input_BTP: jax.Array | None = None  # what the tokens bring for this layer


class Attention(nnx.Module):
    """Grouped-query attention in every form that `spec.Attention` can say."""

    def __init__(self, c: spec.Config, a: spec.Attention, run: Runtime, rngs: nnx.Rngs):
        self.a, self.run, self.windows = a, run, distinct(c.windows)
        q_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        none: Any = nnx.data(None)
        self.qkv_proj = self.q_proj = self.k_proj = self.v_proj = none
        own = a.reuse is None
        if a.projection == "split":
            made = q_dim * 2 if a.gated else q_dim
            self.q_proj = Linear(c.dim, made, ("embed", "heads"), run, rngs, use_bias=a.bias)
            if own:
                self.k_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=a.bias)
            if own and not a.shared_kv:
                self.v_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=a.bias)
        else:
            self.qkv_proj = Linear(c.dim, q_dim + 2 * kv_dim, ("embed", "heads"), run, rngs, use_bias=a.bias)
        self.o_proj = Linear(q_dim, c.dim, ("heads", "embed"), run, rngs, use_bias=a.out_bias)
        per_head = a.qk_norm == "head"
        self.q_norm = make_norm(c.norm, a.head_dim if per_head else q_dim, run) if a.qk_norm else none
        self.k_norm = make_norm(c.norm, a.head_dim if per_head else kv_dim, run) if a.qk_norm and own else none
        self.v_norm = make_norm(c.norm._replace(scale=False), a.head_dim, run) if a.v_norm and own else none
        zeros = jnp.zeros((a.num_heads,), run.param_dtype)
        self.sinks = nnx.Param(zeros, axes=("heads",)) if a.sinks else none

    def __call__(
        self, x_BTD: jax.Array, where: Where, at: At, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        a, run = self.a, self.run
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH, gate_BTNH = self._projected(x_BTD, key)
        if a.rope_dims:
            cos, sin = where.rotary(at.rope)
            q_BTNH = rope.rotate(q_BTNH, cos, sin, a.rope_dims, a.interleaved)
            k_BTKH = k_BTKH if k_BTKH is None else rope.rotate(k_BTKH, cos, sin, a.rope_dims, a.interleaved)
        scale = a.head_dim**-0.5 if a.scale is None else a.scale
        rule = Rule(scale, a.softcap, a.causal, a.slopes, self.windows)
        sinks = None if self.sinks is None else self.sinks[...]
        out_BTNH, cache = attend_cached(rule, run, q_BTNH, k_BTKH, v_BTKH, where, at, cache, sinks)
        if gate_BTNH is not None:
            out_BTNH = out_BTNH * jax.nn.sigmoid(gate_BTNH)
        return self.o_proj(out_BTNH.reshape(B, T, a.num_heads * a.head_dim), key), cache

    def _projected(self, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any, Any, jax.Array | None]:
        """(queries, keys, values, the gate of the output); no keys and values where the layer has none of its own."""
        a, run = self.a, self.run
        lead, N, K, H = x_BTD.shape[:2], a.num_heads, a.num_kv_heads, a.head_dim
        k: Any = None
        v = gate = k
        if a.projection == "split":
            q = self.q_proj(x_BTD, key)
            if a.gated:
                q, gate = jnp.split(q.reshape(*lead, N, 2 * H), 2, axis=-1)
            if a.reuse is None:
                k = self.k_proj(x_BTD, key)
                v = k if a.shared_kv else self.v_proj(x_BTD, key)
        elif a.projection == "joined":
            q, k, v = jnp.split(self.qkv_proj(x_BTD, key), [N * H, (N + K) * H], axis=-1)
        else:
            grouped = self.qkv_proj(x_BTD, key).reshape(*lead, K, N // K + 2, H)
            q, k, v = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]

        def heads(x: jax.Array | None, norm: Any, num: int, axis: str) -> Any:
            if x is None:
                return None
            x = norm(x.reshape(*lead, num * H)) if a.qk_norm == "all" and norm is not None else x
            x = run.constrain(x.reshape(*lead, num, H), ("batch", "length", axis, None))
            return norm(x) if a.qk_norm != "all" and norm is not None else x

        v_norm = None if a.qk_norm == "all" else self.v_norm
        q_BTNH, k_BTKH = heads(q, self.q_norm, N, "heads"), heads(k, self.k_norm, K, "kv_heads")
        return q_BTNH, k_BTKH, heads(v, v_norm, K, "kv_heads"), gate

    @staticmethod
    def empty(a: spec.Attention, layers: int, rows: int, slots: int, dtype: Any) -> Cache:
        """What `layers` of these remember, with nothing in it."""
        return (
            {}
            if a.reuse is not None
            else empty_slots(layers, rows, slots, a.num_kv_heads, a.head_dim, a.head_dim, dtype)
        )


def attend_cached(
    rule: Rule, run: Runtime, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, where: Where, at: At, cache: Cache | None,
    sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Attention over the tokens themselves or, with a cache, over all slots once these tokens are written to theirs.

    Returns its output and the cache; without one, the keys and values themselves, in case a later layer reuses
    them, and the queries. A single token goes on where the slots end: they are a ring.
    """
    options: dict[str, Any] = {"window_index": at.window, "sinks_N": sinks_N}
    segments_BT = where.segment_ids_BT
    q_BTNH, k_BTKH, v_BTKH = named((q_BTNH, k_BTKH, v_BTKH), "qkv")
    if cache is None:
        k_BTKH, v_BTKH = (k_BTKH, v_BTKH) if at.kv is None else _by_token(*at.kv)
        out = attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, rule, run, **options)
        return out, {"q": q_BTNH} | dict(zip("kv", _by_head(k_BTKH, v_BTKH), strict=True))
    assert where.key_segments_BS is not None
    assert where.used is not None
    first = where.used % where.key_segments_BS.shape[1]
    if at.kv is None:
        made = [
            _write(cache[name], new, at.row, first, SLOTS_DIM[name])
            for name, new in zip("kv", _by_head(k_BTKH, v_BTKH), strict=True)
        ]
        cache, mine = {"k": made[0][0], "v": made[1][0]}, [each[1] for each in made]
    else:
        mine = list(at.kv)
    out = attend(
        q_BTNH, *_by_token(*mine), segments_BT, where.key_segments_BS, rule, run, offset=first, self_attention=False, **options
    )  # fmt: skip
    return out, cache


def _write(kept: jax.Array, new: jax.Array, row: jax.Array, first: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Puts new tokens into a layer's slots from `first` on: (all layers, that layer)."""
    new, alone = new.astype(kept.dtype), kept.shape[0] == 1
    start: list[Any] = [row, 0, 0, 0, 0]
    start[dim] = first
    if alone:  # written without the dim of layers, it is the same array that is read and that a loop carries on
        mine = jax.lax.dynamic_update_slice(kept[0], new, start[1:])
        return mine[None], mine
    kept = jax.lax.dynamic_update_slice(kept, new[None], start)
    return kept, jax.lax.dynamic_index_in_dim(kept, row, keepdims=False)


def _by_head(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys (B, K, H, T) and values (B, K, T, H), as a cache keeps them."""
    return jnp.transpose(k_BTKH, (0, 2, 3, 1)), jnp.swapaxes(v_BTKH, 1, 2)


def _by_token(k_BKHS: jax.Array, v_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.transpose(k_BKHS, (0, 3, 1, 2)), jnp.swapaxes(v_BKSH, 1, 2)


def distinct(windows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(windows))) or (0,)
