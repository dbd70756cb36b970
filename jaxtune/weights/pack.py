"""Weights on their way in, quantised: one tensor's codes and scales go to their place, and the tensor is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtune.models import quantised


def put(
    base: quantised.Base,
    kernel: str,
    arrays: Mapping[str, jax.Array],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    tensor: jax.Array,
    place: tuple[int, ...],
) -> dict[str, jax.Array]:
    """Returns a kernel's parts with those of `tensor` at `place` of its stack; the parts in `arrays` are donated."""
    likes = {path: targets[path] for path in (f"{kernel}.{leaf}" for leaf in quantised.LEAVES)}
    stacks = tuple(
        arrays[path] if path in arrays else zeros(like.shape, like.dtype, like.sharding)()
        for path, like in likes.items()
    )
    made = _packer(base.options, tuple(like.sharding for like in likes.values()), len(place))(stacks, tensor, place)
    return dict(zip(likes, jax.block_until_ready(made), strict=True))


@cache
def zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Callable[[], jax.Array]:
    """A function that makes an array of zeros on its shards."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@cache
def _packer(options: quantised.Options, wheres: tuple[NamedSharding, ...], depth: int) -> Callable[..., Any]:
    @partial(jax.jit, donate_argnums=0, out_shardings=wheres)
    def pack(stacks: tuple[jax.Array, ...], tensor: jax.Array, place: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        packed = quantised.Base(options, {}).quantize(tensor)
        parts = (packed.codes, packed.scales, packed.columns)
        return tuple(
            jax.lax.dynamic_update_slice(stack, part[(None,) * depth], (*place, *[0] * part.ndim))
            for stack, part in zip(stacks, parts, strict=True)
        )

    return pack
