"""Grouped-query attention over packed segments: one brick, its form chosen by platform.

On TPU: splash attention, the Pallas kernel in JAX (scores never leave the chip's fast memory). Elsewhere: plain XLA,
in blocks of queries once rows are long, so that memory grows with T and not with T^2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models import context
from jaxtune.models.layers import Runtime, recomputed

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite too
_QUERY_BLOCK_TOKENS = 512
_FUSED_BLOCKS = 4  # of keys, up to which the backward pass of splash attention is one kernel


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

    Query t stands at key slot `offset + t`. Segment 0 is padding. Softmax is float32. K and V are never repeated for
    grouped queries. `window_index` picks one of `rule.windows` (it may differ from layer to layer of one scan). `sinks_N`
    is a learnt score per head that takes its share of the softmax and gives nothing (arXiv:2309.17453). `self_attention`
    says that keys are the queries' own tokens (S = T, offset 0): the form that the TPU kernel takes.
    """
    if self_attention and context.num_shards(run) > 1:
        by_kernel = _use_splash(run, rule, q_BTNH, v_BSKH)
        return context.attend(
            attend, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, rule, run, window_index, sinks_N, by_kernel
        )
    if self_attention and _use_splash(run, rule, q_BTNH, v_BSKH):
        return _splash(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, rule, run, window_index, sinks_N)
    num_tokens = q_BTNH.shape[1]
    window = jnp.asarray(rule.windows, jnp.int32)[window_index] if any(rule.windows) else None
    dense = recomputed(partial(_dense, rule))
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
    rule: Rule, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array,
    offset: jax.Array, window: jax.Array | None, sinks_N: jax.Array | None,
) -> jax.Array:  # fmt: skip
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap:
        scores_BKGTS = jnp.tanh(scores_BKGTS / rule.softcap) * rule.softcap
    behind_TS = offset + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]  # how far a key lies behind its query
    if rule.slopes:
        slopes_KG = jnp.asarray(rule.slopes, jnp.float32).reshape(K, N // K)
        scores_BKGTS -= slopes_KG[None, :, :, None, None] * behind_TS[None, None, None]
    seen_TS = behind_TS >= 0 if rule.causal else jnp.ones_like(behind_TS, bool)
    if window is not None:
        near_TS = behind_TS < window if rule.causal else jnp.abs(behind_TS) <= window
        seen_TS &= near_TS | (window == 0)
    visible_BTS = (q_seg_BT[:, :, None] == k_seg_BS[:, None, :]) & seen_TS[None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    if sinks_N is None:
        probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    else:
        sinks_BKGT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (B, K, N // K, T, 1))
        probs_BKGTS = jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks_BKGT1], -1), axis=-1)[..., :-1]
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS.astype(v_BSKH.dtype), v_BSKH).reshape(B, T, N, -1)


def _use_splash(run: Runtime, rule: Rule, q_BTNH: jax.Array, v_BSKH: jax.Array) -> bool:
    on_tpu = run.mesh is not None and run.mesh.devices.flat[0].platform == "tpu"
    fits = (
        q_BTNH.shape[1] % (context.TILE_TOKENS * context.num_shards(run)) == 0
    )  # the kernel's tile; rows of other lengths take the XLA form
    can = not rule.slopes and (rule.causal or not any(rule.windows))
    return can and (run.attention == "splash" or (run.attention == "auto" and on_tpu and fits))


def _blocks(num_tokens: int) -> dict[str, Any]:
    """How splash attention cuts a row into blocks.

    One backward kernel writes the queries' gradient once for each block of keys, to be summed outside; two kernels compute
    the scores once more, and need no such room.
    """
    block = next(b for b in (1024, 512, 256, 128) if num_tokens % b == 0)
    fused, inner = num_tokens // block <= _FUSED_BLOCKS, min(block, 512)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", *(() if fused else ("block_q_dq", "block_kv_dq")))
    inside = {"block_kv_compute": inner, "block_kv_dkv_compute": inner}
    return {**dict.fromkeys(names, block), **inside, "use_fused_bwd_kernel": fused}


def _splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, rule: Rule, run: Runtime,
    window_index: jax.Array | int, sinks_N: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Splash attention per device: the compiler cannot partition a kernel, so batch and heads are split by hand.

    A kernel's mask is static: layers of one scan that differ in their window choose among one kernel for each.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    assert run.mesh is not None, "splash attention needs the mesh"
    assert run.spec is not None, "splash attention needs the rules of the mesh"
    T = q_BTNH.shape[1]
    interpret = run.mesh.devices.flat[0].platform != "tpu"
    sizes = splash.BlockSizes(**_blocks(T))

    def mask(window: int) -> Any:
        if not rule.causal:
            return masks.FullMask((T, T))
        return masks.LocalMask((T, T), (window - 1, 0), 0) if 0 < window < T else masks.CausalMask((T, T))

    def with_window(window: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seg_BT: jax.Array, *sinks: jax.Array) -> jax.Array:  # fmt: skip
        kernel = splash.make_splash_mqa_single_device if k_BTKH.shape[2] == 1 else splash.make_splash_mha_single_device
        heads = masks.MultiHeadMask([mask(window) for _ in range(q_BTNH.shape[2])])
        attend_row = kernel(
            mask=heads,
            block_sizes=sizes,
            interpret=interpret,
            attn_logits_soft_cap=rule.softcap,
            residual_checkpoint_name="attention",
        )

        def row(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, segments_T: jax.Array) -> jax.Array:
            k_KTH, v_KTH = k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)
            if k_KTH.shape[0] == 1:
                k_KTH, v_KTH = k_KTH[0], v_KTH[0]
            segment_ids = splash.SegmentIds(segments_T, segments_T)
            return attend_row(q_TNH.swapaxes(0, 1), k_KTH, v_KTH, segment_ids, *sinks).swapaxes(0, 1)

        return jax.vmap(row)(q_BTNH * rule.scale, k_BTKH, v_BTKH, seg_BT).astype(q_BTNH.dtype)

    def on_device(which: jax.Array, *arrays: jax.Array) -> jax.Array:
        branches = [partial(with_window, window) for window in rule.windows]
        return branches[0](*arrays) if len(branches) == 1 else jax.lax.switch(which, branches, *arrays)

    heads = run.spec(("batch", "length", "heads", None))
    kv_heads = run.spec(("batch", "length", "kv_heads", None))
    rows, whole = run.spec(("batch", "length")), jax.sharding.PartitionSpec()
    in_specs = [whole, heads, kv_heads, kv_heads, rows] + ([] if sinks_N is None else [run.spec(("heads",))])
    split = jax.shard_map(on_device, mesh=run.mesh, in_specs=tuple(in_specs), out_specs=heads, check_vma=False)
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32),)
    return split(jnp.asarray(window_index, jnp.int32), q_BTNH, k_BTKH, v_BTKH, segments_BT, *sinks)
