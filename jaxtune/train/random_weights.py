"""Random base weights, for a preset: made in place, on the shards where they stay."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models import quantised
from jaxtune.train.state import Params, Program, shardings


def random_base(program: Program, seed: int) -> Params:
    """Random base weights for a preset, made in place on their shards: N(0, 0.02), norms 1, biases 0.

    Those that are quantised are so as they are made, a layer at a time.
    """
    plain = {path: like for path, like in program.base.items() if quantised.kernel_of(path) is None}

    def make(key: jax.Array) -> Params:
        def one(path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            if path.endswith((".bias", ".scale")):
                return jnp.full(like.shape, 1.0 if path.endswith(".scale") else 0.0, like.dtype)
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return (jax.random.normal(own, like.shape, jnp.float32) * 0.02).astype(like.dtype)

        return {path: one(path, like) for path, like in plain.items()}

    key = jax.random.key(seed)
    return jax.jit(make, out_shardings=shardings(plain))(key) | _random_quantised(program, key)


def _random_quantised(program: Program, key: jax.Array) -> Params:
    made: Params = {}
    for path, like in program.quantised.kernels.items() if program.quantised else ():
        where = {leaf: program.base[leaf].sharding for leaf in program.base if quantised.kernel_of(leaf) == path}
        num_layers, *shape = like.shape

        def make(key: jax.Array, path: str = path, shape: Any = shape, num_layers: int = num_layers) -> Params:
            def one(key: jax.Array) -> quantised.Packed:
                assert program.quantised is not None
                return program.quantised.quantize(jax.random.normal(key, shape, jnp.float32) * 0.02)

            return quantised.spread(path, jax.lax.map(one, jax.random.split(key, num_layers)))

        made |= jax.jit(make, out_shardings=where)(jax.random.fold_in(key, zlib.crc32(path.encode())))
    return made
