"""Flash attention on GPUs: the Pallas kernel in Triton that comes with JAX, for what it can say: packed causal or two-way rows.

Not cuDNN's: to the public `jax.nn.dot_product_attention` the segments of a packed row are a mask of T^2 numbers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax

from jaxtune.models.layers import Runtime

TILE_TOKENS = 128  # rows are multiples of it
_HEAD_DIMS = (16, 32, 64, 128)  # what Triton multiplies: powers of two
_HEAD_BYTES = 256  # of one token and head; tiles of wider ones outgrow the 99 KiB of shared memory of the smaller GPUs
_KERNEL = "jax.experimental.pallas.ops.gpu.attention"


def at_home(device: Any) -> bool:
    """Whether a device is a GPU with room for the kernel's tiles: NVIDIA's, of compute capability 8.0 or later."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and major.isdigit() and int(major) >= 8


def can(rule: Any, run: Runtime, q_BTNH: jax.Array, v_BTKH: jax.Array, sinks_N: jax.Array | None) -> bool:
    """Whether the kernel computes this: no soft cap, slopes, windows, sinks or branches; whole rows, of whole tiles, on each device."""
    plain = not (rule.softcap or rule.slopes or any(rule.windows)) and sinks_N is None
    head_dims = {q_BTNH.shape[3], v_BTKH.shape[3]}
    narrow = q_BTNH.shape[3] * q_BTNH.dtype.itemsize <= _HEAD_BYTES
    fits = narrow and len(head_dims) == 1 and head_dims <= set(_HEAD_DIMS) and q_BTNH.shape[1] % TILE_TOKENS == 0
    whole = run.mesh is not None and run.mesh.shape["context"] == 1 and not run.branches
    return plain and fits and whole and find_spec(_KERNEL) is not None  # a later JAX may not have it


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, rule: Any, run: Runtime
) -> jax.Array:
    """A row's tokens to themselves, for which `can` holds; each device its rows and heads. (B, T, N, H) in q's dtype."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    assert run.mesh is not None
    assert run.spec is not None
    sizes = BlockSizes(block_q=TILE_TOKENS, block_k=64, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)

    def on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]

        def one(q_BTKH: jax.Array) -> jax.Array:  # one query head of each group: keys and values are not repeated
            out: jax.Array = mha(
                q_BTKH, k_BTKH, v_BTKH, segments_BT, rule.scale, rule.causal, sizes, interpret=run.platform != "gpu"
            )
            return out

        return jax.vmap(one, 3, 3)(q_BTNH.reshape(B, T, K, N // K, H)).reshape(B, T, N, H)

    heads, kv_heads = (run.spec(("batch", None, axis, None)) for axis in ("heads", "kv_heads"))
    given = (heads, kv_heads, kv_heads, run.spec(("batch", None)))
    split = jax.shard_map(on_device, mesh=run.mesh, in_specs=given, out_specs=heads, check_vma=False)
    return split(q_BTNH, k_BTKH, v_BTKH, segments_BT)
