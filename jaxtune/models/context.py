"""A row whose tokens are spread over the mesh's "context" axis: its attention, and its way there from the embedding table.

Each device gathers keys and values of the whole row and attends with its own queries. Gathering, and not passing them
around a ring: grouped-query keys and values are a small part of a layer's activations (Llama-3.1-8B: 2 x 1024 of 4096 + 2 x
14336 numbers a token), a query's softmax is taken at once as on one device (so the result is the same, and every rule of
`attention.Rule` holds as it stands), and the kernels for one device serve. What a ring would save is their memory: 4 KiB a
token of that model in bfloat16, one layer at a time.

Causal queries see ever more keys towards the end of a row, so equal stretches of a row would be unequal work. Devices
therefore swap half of their queries for the time of attention: of 2 C chunks device d takes d and 2 C - 1 - d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.models.layers import Embed, Runtime, unconstrained

AXIS = "context"
TILE_TOKENS = 128  # of the splash kernel
_FUSED_BLOCKS = 8  # of keys: the fused backward kernel keeps a gradient of the queries for each, until they are summed


def num_shards(run: Runtime) -> int:
    """In how many parts a row's tokens lie on the devices; 1 where activations lie as they like."""
    return 1 if run.mesh is None or run.constrain is unconstrained else run.mesh.shape.get(AXIS, 1)


def embedded(embed: Embed, tokens_BT: jax.Array, run: Runtime) -> jax.Array:
    """Tokens' vectors, from a table that is split by its width to where its tokens lie: one mesh axis moves at a time.

    All at once, the compiler would bring every token's whole vector to every device.
    """
    if run.mesh is None or run.constrain is unconstrained:
        return embed(tokens_BT)
    sizes = [run.mesh.shape["data"], run.mesh.shape["fsdp"] * run.mesh.shape["expert"], run.mesh.shape[AXIS]]
    if sum(size > 1 for size in sizes) < 2 or embed.table.shape[-1] % (sizes[1] * sizes[2]):
        return embed(tokens_BT)
    x_BTD = embed(run.constrain(tokens_BT, ("batch_replicas", None)))
    for axes in (("batch_replicas", None, "embed"), ("batch_replicas", "length", "embed_rows")):
        x_BTD = run.constrain(x_BTD, axes)
    return x_BTD


def attend(
    plain: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    rule: Any,
    run: Runtime,
    window_index: jax.Array | int,
    sinks_N: jax.Array | None,
    use_splash: bool,
) -> jax.Array:
    """`attention.attend` of a row's tokens to themselves; `plain` is that function, for use on one device.

    `use_splash`: by the TPU kernel, which takes shards of a multiple of `TILE_TOKENS`.
    """
    assert run.mesh is not None
    assert run.spec is not None
    num, T = num_shards(run), q_BTNH.shape[1]
    tile = TILE_TOKENS if use_splash else 1
    balanced = rule.causal and T % (2 * num * tile) == 0
    heads_axis, kv_axis = (None, None) if rule.slopes else ("heads", "kv_heads")  # slopes are those of all heads
    heads, kv_heads = (run.spec(("batch", "length", axis, None)) for axis in (heads_axis, kv_axis))
    rows, whole = run.spec(("batch", "length")), PartitionSpec()
    kernels = _kernels(rule, run, q_BTNH.shape, balanced) if use_splash else ()
    along = NamedSharding(run.mesh, PartitionSpec(None, AXIS if rule.causal else None))
    places = tuple(kernel.manual_sharding_spec(along) for kernel in kernels)
    specs = [whole, heads, kv_heads, kv_heads, rows, places] + ([] if sinks_N is None else [run.spec((heads_axis,))])

    def on_device(which: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, kernels: Any, *sinks: jax.Array) -> jax.Array:  # fmt: skip
        k, v, key_segments = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v, segments))
        if balanced:
            q, segments = _swapped(q, num), _swapped(segments, num)
        if kernels:
            branches = [partial(_by_kernel, kernel, rule.scale) for kernel in kernels]
            given = (q, k, v, segments, key_segments, *sinks)
            out = branches[0](*given) if len(branches) == 1 else jax.lax.switch(which, branches, *given)
        else:
            parts = [jnp.split(x, 2, axis=1) if balanced else [x] for x in (q, segments)]
            alone = run._replace(mesh=None, constrain=unconstrained)
            options = {"window_index": which, "sinks_N": sinks[0] if sinks else None, "self_attention": False}
            at = jax.lax.axis_index(AXIS)
            starts = jnp.asarray(_starts(num, T // (2 * num)))[at] if balanced else (at * (T // num))[None]
            out = jnp.concatenate(
                [
                    plain(q, k, v, own, key_segments, rule, alone, offset=starts[i], **options)
                    for i, (q, own) in enumerate(zip(*parts, strict=True))
                ],
                axis=1,
            )
        return _swapped(out, num, back=True) if balanced else out

    split = jax.shard_map(on_device, mesh=run.mesh, in_specs=tuple(specs), out_specs=heads, check_vma=False)
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32),)
    return split(jnp.asarray(window_index, jnp.int32), q_BTNH, k_BTKH, v_BTKH, segments_BT, kernels, *sinks)


def _home(chunk: int, num: int) -> int:
    """Which of `num` devices attends with this one of 2 `num` chunks of queries."""
    return min(chunk, 2 * num - 1 - chunk)


def _starts(num: int, chunk_tokens: int) -> np.ndarray:
    """(device, 2): where in the row its two chunks of queries start, in the order in which `_swapped` leaves them."""
    at = np.zeros((num, 2), np.int32)
    for chunk in range(2 * num):
        at[_home(chunk, num), chunk % 2] = chunk * chunk_tokens
    return at


def _swapped(x_BT: jax.Array, num: int, back: bool = False) -> jax.Array:
    """Each device's two chunks for the two that it is at home to; `back` for the inverse. One half of the bytes moves."""
    moved = []
    for half, x in enumerate(jnp.split(x_BT, 2, axis=1)):
        pairs = [(device, _home(2 * device + half, num)) for device in range(num)]
        moved.append(jax.lax.ppermute(x, AXIS, [pair[::-1] for pair in pairs] if back else pairs))
    return jnp.concatenate(moved, axis=1)


def _kernels(rule: Any, run: Runtime, shape: tuple[int, ...], balanced: bool) -> tuple[Any, ...]:
    """One splash kernel for each of `rule.windows`, of all queries of a row in the order in which devices hold them.

    What a device's kernel must know of its queries is in its arrays, which `shard_map` splits as it splits the queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    assert run.mesh is not None
    num, (_, T, N, _) = num_shards(run), shape
    chunk = T // (2 * num if balanced else num)
    starts = _starts(num, chunk) if balanced else np.arange(num)[:, None] * chunk
    block, kv_block = (next(b for b in (1024, 512, 256, TILE_TOKENS) if tokens % b == 0) for tokens in (chunk, T))
    fused = T // kv_block <= _FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=block, block_kv=kv_block, block_kv_compute=min(kv_block, 512), block_q_dkv=block, block_kv_dkv=kv_block,
        block_kv_dkv_compute=min(kv_block, 512), use_fused_bwd_kernel=fused, block_q_dq=None if fused else block,
        block_kv_dq=None if fused else kv_block,
    )  # fmt: skip

    def mask(window: int) -> Any:
        if not rule.causal:  # the same for all queries, so for all devices
            return masks.FullMask((chunk, T))
        local = 0 < window < T
        kind = _by_block(masks.LocalMask if local else masks.CausalMask, window if local else T)
        one = kind((T, T), (window - 1, 0), 0) if local else kind((T, T))
        one.q_sequence = (starts.reshape(-1, 1) + np.arange(chunk)[None]).reshape(-1).astype(np.int32)
        return one

    def kernel(window: int) -> Any:
        heads = masks.MultiHeadMask([mask(window)] * (N // run.mesh.shape["tensor"]))  # type: ignore[union-attr]
        return splash.make_splash_mha(
            mask=heads, block_sizes=sizes, head_shards=1, q_seq_shards=num if rule.causal else 1, attn_logits_soft_cap=rule.softcap,
            interpret=run.mesh.devices.flat[0].platform != "tpu",  # type: ignore[union-attr]
        )  # fmt: skip

    return tuple(kernel(window) for window in rule.windows)


def _by_block(kind: Any, window: int) -> Any:
    """A splash mask whose blocks wholly seen, or not at all, are told by their corners: most are, and rows are long."""

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


def _by_kernel(
    kernel: Any, scale: float, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_seg_BT: jax.Array, k_seg_BS: jax.Array,
    *sinks: jax.Array,
) -> jax.Array:  # fmt: skip
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    def row(q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, q_seg_T: jax.Array, k_seg_S: jax.Array) -> jax.Array:
        k_KSH, v_KSH = k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1)
        found: jax.Array = kernel(q_TNH.swapaxes(0, 1), k_KSH, v_KSH, splash.SegmentIds(q_seg_T, k_seg_S), *sinks)
        return found.swapaxes(0, 1)

    return jax.vmap(row)(q_BTNH * scale, k_BSKH, v_BSKH, q_seg_BT, k_seg_BS).astype(q_BTNH.dtype)
