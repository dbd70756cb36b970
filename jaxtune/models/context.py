"""Attention split over devices by hand, and rows whose tokens are spread over the mesh's "context" axis.

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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.models import splash
from jaxtune.models.layers import Embed, Runtime, unconstrained

AXIS = "context"


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
    """`attention.attend` of a row's tokens to themselves, device by device; `plain` is that function, for use on one of them.

    `use_splash`: by the TPU kernel, which the compiler cannot partition; it takes shards of a multiple of `splash.TILE_TOKENS`.
    """
    mesh, spec = run.mesh, run.spec
    assert mesh is not None, "attention that is split by hand needs the mesh"
    assert spec is not None, "attention that is split by hand needs the rules of the mesh"
    num, T, N = num_shards(run), *q_BTNH.shape[1:3]
    tile = splash.TILE_TOKENS if use_splash else 1
    balanced = num > 1 and rule.causal and T % (2 * num * tile) == 0
    starts = _starts(num, T // (2 * num)) if balanced else np.arange(num)[:, None] * (T // num)
    heads_axis, kv_axis = (None, None) if rule.slopes else ("heads", "kv_heads")  # slopes are those of all heads
    heads, kv_heads = (spec(("batch", "length", axis, None)) for axis in (heads_axis, kv_axis))
    kernels = splash.kernels(rule, run, T, N // mesh.shape["tensor"], starts) if use_splash else ()
    along = NamedSharding(mesh, PartitionSpec(None, AXIS if rule.causal else None))
    places = tuple(kernel.manual_sharding_spec(along) for kernel in kernels)
    rows, whole = spec(("batch", "length")), PartitionSpec()
    specs = [whole, heads, kv_heads, kv_heads, rows, places] + ([] if sinks_N is None else [spec((heads_axis,))])

    def on_device(which: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, kernels: Any, *sinks: jax.Array) -> jax.Array:  # fmt: skip
        key_segments = segments
        if num > 1:
            k, v, key_segments = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v, segments))
        if balanced:
            q, segments = _swapped(q, num), _swapped(segments, num)
        if kernels:
            branches = [partial(splash.attend, kernel, rule.scale) for kernel in kernels]
            given = (q, k, v, segments, key_segments, *sinks)
            out = branches[0](*given) if len(branches) == 1 else jax.lax.switch(which, branches, *given)
        else:
            parts = [jnp.split(x, starts.shape[1], axis=1) for x in (q, segments)]
            alone = run._replace(mesh=None, constrain=unconstrained)
            options = {"window_index": which, "sinks_N": sinks[0] if sinks else None, "self_attention": False}
            mine = jnp.asarray(starts)[jax.lax.axis_index(AXIS)]
            out = jnp.concatenate(
                [
                    plain(q, k, v, own, key_segments, rule, alone, offset=mine[i], **options)
                    for i, (q, own) in enumerate(zip(*parts, strict=True))
                ],
                axis=1,
            )
        return _swapped(out, num, back=True) if balanced else out

    split = jax.shard_map(on_device, mesh=mesh, in_specs=tuple(specs), out_specs=heads, check_vma=False)
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
