"""Grouped-query attention over packed segments: one brick, its form chosen by platform.

On TPU: splash attention, and on GPU: flash attention, the Pallas kernels in JAX (scores never leave the chip's fast memory).
Elsewhere, and for what the kernels cannot say: plain XLA, in blocks of queries once rows are long, so that memory grows
with T and not with T^2.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models import context, flash, splash
from jaxtune.models.layers import Runtime, named, recomputed
from jaxtune.types import BRANCH_BITS

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite too
_QUERY_BLOCK_TOKENS = 512


class Rule(NamedTuple):
    """Who sees whom, and how scores are made: static, the same for all layers of a stack.

    scale: of q k^T. softcap: c tanh(s / c) (arXiv:2408.00118). causal: no key ahead of its query. slopes: ALiBi's, one per
    query head (arXiv:2108.12409). windows: the distinct window sizes of the layers, in tokens; 0 is no window. A causal
    query sees the last `window` tokens, itself included; another sees `window` tokens to either side.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True
    slopes: tuple[float, ...] = ()
    windows: tuple[int, ...] = (0,)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    rule: Rule,
    run: Runtime,
    *,
    window_index: jax.Array | int = 0,
    sinks_N: jax.Array | None = None,
    offset: jax.Array | int = 0,
    self_attention: bool = True,
) -> jax.Array:
    """softmax(scores) v within a segment, by `rule`. Returns (B, T, N, H of v) in q's dtype.

    Query t stands at key slot `offset + t`. Segment 0 is padding; with `run.branches`, a token of a
    branch sees the prompt of its number, too. Softmax is float32. K and V are never repeated for
    grouped queries. `window_index` picks one of `rule.windows` (it may differ from layer to layer of one scan). `sinks_N`
    is a learnt score per head that takes its share of the softmax and gives nothing (arXiv:2309.17453). `self_attention`
    says that keys are the queries' own tokens (S = T, offset 0): the form that the kernels take.
    """
    if self_attention and _use_flash(run) and flash.can(rule, run, q_BTNH, v_BSKH, sinks_N):
        return named(flash.attend(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, rule, run), "attention")
    by_kernel = self_attention and _use_splash(run, rule, q_BTNH.shape[1])
    if by_kernel or (self_attention and context.num_shards(run) > 1):
        given = (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, rule, run, window_index, sinks_N)
        return context.attend(attend, *given, by_kernel)
    rest = (rule, window_index, sinks_N, offset, run.branches)
    out = _by_xla(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *rest)
    return named(out, "attention")


def _by_xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_segments_BT: jax.Array, k_segments_BS: jax.Array, rule: Rule,
    window_index: jax.Array | int, sinks_N: jax.Array | None, offset: jax.Array | int, branches: bool,
) -> jax.Array:  # fmt: skip
    num_tokens = q_BTNH.shape[1]
    window = jnp.asarray(rule.windows, jnp.int32)[window_index] if any(rule.windows) else None
    dense = recomputed(partial(_dense, rule, branches))
    if num_tokens <= _QUERY_BLOCK_TOKENS or num_tokens % _QUERY_BLOCK_TOKENS:
        return dense(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, jnp.asarray(offset), window, sinks_N)

    num_blocks = num_tokens // _QUERY_BLOCK_TOKENS

    def blocks(x: jax.Array) -> jax.Array:  # (B, T, …) -> (blocks, B, T / blocks, …)
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, _QUERY_BLOCK_TOKENS, *x.shape[2:]), 1, 0)

    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, segments, index = args
        start = offset + index * _QUERY_BLOCK_TOKENS
        return dense(q, k_BSKH, v_BSKH, segments, k_segments_BS, start, window, sinks_N)

    out = jax.lax.map(one, (blocks(q_BTNH), blocks(q_segments_BT), jnp.arange(num_blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(*q_BTNH.shape[:3], v_BSKH.shape[3])


def _dense(
    rule: Rule, branches: bool, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array,
    offset: jax.Array, window: jax.Array | None, sinks_N: jax.Array | None,
) -> jax.Array:  # fmt: skip
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if T == 1:  # without that dim, XLA's CPU compiler reads keys and values as a cache keeps them, by its fast matmul
        scores_BKGS = jnp.einsum("bkgh,bskh->bkgs", q_BTKGH[:, 0], k_BSKH, preferred_element_type=jnp.float32)
        scores_BKGTS = scores_BKGS[:, :, :, None] * rule.scale
    else:
        scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap:
        scores_BKGTS = jnp.tanh(scores_BKGTS / rule.softcap) * rule.softcap
    behind_TS = offset + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]  # how far a key lies behind its query
    if T == 1:  # whose slots may be a ring: what seems to lie ahead is of the round before, or empty (segment 0)
        behind_TS %= S
    if rule.slopes:
        slopes_KG = jnp.asarray(rule.slopes, jnp.float32).reshape(K, N // K)
        scores_BKGTS -= slopes_KG[None, :, :, None, None] * behind_TS[None, None, None]
    seen_TS = behind_TS >= 0 if rule.causal else jnp.ones_like(behind_TS, bool)
    if window is not None:
        near_TS = behind_TS < window if rule.causal else jnp.abs(behind_TS) <= window
        seen_TS &= near_TS | (window == 0)
    visible_BTS = q_seg_BT[:, :, None] == k_seg_BS[:, None, :]
    if branches:  # of the same number: its own branch, and the prompt that it goes on from
        visible_BTS |= (q_seg_BT & (1 << BRANCH_BITS) - 1)[:, :, None] == k_seg_BS[:, None, :]
    visible_BTS &= seen_TS[None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    if sinks_N is None:
        probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    else:
        sinks_BKGT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (B, K, N // K, T, 1))
        probs_BKGTS = jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks_BKGT1], -1), axis=-1)[..., :-1]
    probs_BKGTS = probs_BKGTS.astype(v_BSKH.dtype)
    if T == 1:
        return jnp.einsum("bkgs,bskh->bkgh", probs_BKGTS[:, :, :, 0], v_BSKH).reshape(B, T, N, -1)
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, -1)


def _use_splash(run: Runtime, rule: Rule, num_tokens: int) -> bool:
    fits = num_tokens % (splash.TILE_TOKENS * context.num_shards(run)) == 0  # rows of other lengths take the XLA form
    can = not rule.slopes and not run.branches and (rule.causal or not any(rule.windows))
    on_tpu = run.mesh is not None and run.platform == "tpu"
    return can and (run.attention == "splash" or (run.attention == "auto" and on_tpu and fits))


def _use_flash(run: Runtime) -> bool:
    if run.attention != "auto" or run.mesh is None:
        return run.attention == "flash"
    return flash.at_home(run.mesh.devices.flat[0])
