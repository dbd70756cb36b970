"""Causal grouped-query attention over packed segments: one brick, its form chosen by platform.

On TPU: splash attention, the Pallas kernel in JAX (scores never leave the chip's fast memory). Elsewhere: plain XLA,
in blocks of queries once rows are long, so that memory grows with T and not with T^2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxtune.models.layers import Runtime, recomputed

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite too
_QUERY_BLOCK_TOKENS = 512


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    run: Runtime,
    *,
    offset: jax.Array | int = 0,
    self_attention: bool = True,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, within a segment and never ahead. Returns (B, T, N, H) in q's dtype.

    Query t stands at key slot `offset + t`; it sees the slots up to its own that hold its segment. Segment 0 is padding.
    Softmax is float32. K and V are never repeated for grouped queries. `self_attention` says that keys are the queries'
    own tokens (S = T, offset 0): the form that the TPU kernel takes.
    """
    if self_attention and _use_splash(run, q_BTNH):
        return _splash(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, run)
    num_tokens = q_BTNH.shape[1]
    if num_tokens <= _QUERY_BLOCK_TOKENS or num_tokens % _QUERY_BLOCK_TOKENS:
        return recomputed(_dense)(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, jnp.asarray(offset))

    num_blocks = num_tokens // _QUERY_BLOCK_TOKENS

    def blocks(x: jax.Array) -> jax.Array:  # (B, T, …) -> (blocks, B, T / blocks, …)
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, _QUERY_BLOCK_TOKENS, *x.shape[2:]), 1, 0)

    @recomputed
    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, segments, index = args
        return _dense(q, k_BSKH, v_BSKH, segments, k_segments_BS, offset + index * _QUERY_BLOCK_TOKENS)

    out = jax.lax.map(one, (blocks(q_BTNH), blocks(q_segments_BT), jnp.arange(num_blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape)


def _dense(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array, offset: jax.Array
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    behind_TS = jnp.arange(S)[None, :] <= offset + jnp.arange(T)[:, None]
    visible_BTS = (q_seg_BT[:, :, None] == k_seg_BS[:, None, :]) & behind_TS[None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def _use_splash(run: Runtime, q_BTNH: jax.Array) -> bool:
    on_tpu = run.mesh is not None and run.mesh.devices.flat[0].platform == "tpu"
    fits = q_BTNH.shape[1] % 128 == 0  # the kernel's tile; rows of other lengths take the XLA form
    return run.attention == "splash" or (run.attention == "auto" and on_tpu and fits)


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, run: Runtime) -> jax.Array:
    """Splash attention per device: the compiler cannot partition a kernel, so batch and heads are split by hand."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    assert run.mesh is not None, "splash attention needs the mesh"
    assert run.spec is not None, "splash attention needs the rules of the mesh"
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    interpret = run.mesh.devices.flat[0].platform != "tpu"
    block = next(b for b in (1024, 512, 256, 128) if T % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512), block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
    )  # fmt: skip

    def on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        mask = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(q_BTNH.shape[2])])
        kernel = splash.make_splash_mqa_single_device if k_BTKH.shape[2] == 1 else splash.make_splash_mha_single_device
        attend_row = kernel(mask=mask, block_sizes=sizes, interpret=interpret)

        def row(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, segments_T: jax.Array) -> jax.Array:
            k_KTH, v_KTH = k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)
            if k_KTH.shape[0] == 1:
                k_KTH, v_KTH = k_KTH[0], v_KTH[0]
            out_NTH = attend_row(q_TNH.swapaxes(0, 1), k_KTH, v_KTH, splash.SegmentIds(segments_T, segments_T))
            return out_NTH.swapaxes(0, 1)

        return jax.vmap(row)(q_BTNH / math.sqrt(H), k_BTKH, v_BTKH, segments_BT).astype(q_BTNH.dtype)

    heads = run.spec(("batch", "length", "heads", None))
    kv_heads = run.spec(("batch", "length", "kv_heads", None))
    rows = run.spec(("batch", "length"))
    split = jax.shard_map(
        on_device, mesh=run.mesh, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False
    )
    return split(q_BTNH, k_BTKH, v_BTKH, segments_BT)
