"""Splash attention, the Pallas kernel for TPUs that comes with JAX: its masks, its blocks, and rows through it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np

from jaxtune.models.layers import Runtime

TILE_TOKENS = 128  # the kernel takes queries, and keys, in blocks of a multiple of this
_FUSED_BLOCKS = 4  # of keys, up to which the backward pass is one kernel


def kernels(rule: Any, run: Runtime, num_tokens: int, num_heads: int, starts: np.ndarray) -> tuple[Any, ...]:
    """One kernel for each of `rule.windows`, for the queries of a row in the order in which devices hold them.

    `starts`: (devices, chunks), where in the row of `num_tokens` each chunk of queries starts; `num_heads` on a device. What a
    device's kernel must know of its queries is in its arrays, which `shard_map` splits as it splits the queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, chunk = num_tokens, num_tokens // starts.size

    def mask(window: int) -> Any:
        if not rule.causal:  # the same for all queries, so for all devices
            return masks.FullMask((T // len(starts), T))
        local = 0 < window < T
        kind = _by_block(masks.LocalMask if local else masks.CausalMask, window if local else T)
        one = kind((T, T), (window - 1, 0), 0) if local else kind((T, T))
        one.q_sequence = (starts.reshape(-1, 1) + np.arange(chunk)[None]).reshape(-1).astype(np.int32)
        return one

    def kernel(window: int) -> Any:
        return splash.make_splash_mha(
            mask=masks.MultiHeadMask([mask(window)] * num_heads), block_sizes=_sizes(chunk, T), head_shards=1,
            q_seq_shards=len(starts) if rule.causal else 1, attn_logits_soft_cap=rule.softcap,
            interpret=run.platform != "tpu", residual_checkpoint_name="attention",
        )  # fmt: skip

    return tuple(kernel(window) for window in rule.windows)


def attend(
    kernel: Any, scale: float, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array,
    *sinks: jax.Array,
) -> jax.Array:  # fmt: skip
    """One device's rows through its kernel: (B, T, N, H of v) in q's dtype."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    def row(q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, q_seg_T: jax.Array, k_seg_S: jax.Array) -> jax.Array:
        k_KSH, v_KSH = k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1)
        found: jax.Array = kernel(q_TNH.swapaxes(0, 1), k_KSH, v_KSH, splash.SegmentIds(q_seg_T, k_seg_S), *sinks)
        return found.swapaxes(0, 1)

    return jax.vmap(row)(q_BTNH * scale, k_BSKH, v_BSKH, q_seg_BT, k_seg_BS).astype(q_BTNH.dtype)


def _sizes(num_queries: int, num_keys: int) -> Any:
    """How the kernel cuts stretches of so many queries, and all keys, into blocks.

    One backward kernel writes the queries' gradient once for each block of keys, to be summed outside; two kernels compute
    the scores once more, and need no such room.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    q, kv = (next(b for b in (1024, 512, 256, TILE_TOKENS) if num % b == 0) for num in (num_queries, num_keys))
    fused, inner = num_keys // kv <= _FUSED_BLOCKS, min(kv, 512)
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=inner, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=inner,
        block_q_dq=None if fused else q, block_kv_dq=None if fused else kv, use_fused_bwd_kernel=fused,
    )  # fmt: skip


def _by_block(kind: Any, window: int) -> Any:
    """A mask whose blocks wholly seen, or not at all, are told by their corners: most are, and rows are long."""

    class Mask(kind):  # type: ignore[misc]
        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            rows, keys = self.q_sequence[index[0]], np.arange(self.shape[1])[index[1]]
            nearest, farthest = rows.min() - keys[-1], rows.max() - keys[0]
            if farthest < 0 or nearest >= window:
                return _constant(False, len(rows), len(keys))
            if nearest >= 0 and farthest < window:
                return _constant(True, len(rows), len(keys))
            found: np.ndarray = super().__getitem__(index)
            return found

    return Mask


@cache
def _constant(value: bool, *shape: int) -> np.ndarray:
    return np.full(shape, value)
