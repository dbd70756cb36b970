"""The bricks of every family: `Linear` (the only weight matmul), embeddings, norms, and the stacked, scanned layers.

Every parameter names its logical axes once, where it is made (`axes=`); `sharding.py` maps them to mesh axes. A stack
of layers is one module whose parameters carry a leading "layers" dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Axes = tuple[str | None, ...]


def unconstrained(x: jax.Array, axes: Axes) -> jax.Array:
    """Leaves an activation's sharding to the compiler."""
    return x


class Runtime(NamedTuple):
    """How a model runs, as opposed to what it is: static, hashable, chosen by the caller, the same for every family.

    `constrain(x, axes)` pins an activation's sharding by logical axes; `mesh` and `spec(axes)` are for kernels that the
    compiler cannot partition by itself; `remat` is none | dots | block; `attention` is auto | xla | splash.
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    mesh: jax.sharding.Mesh | None = None
    spec: Callable[[Axes], jax.sharding.PartitionSpec] | None = None
    constrain: Callable[[jax.Array, Axes], jax.Array] = unconstrained


# For cheap functions of large arrays: the backward pass computes them again instead of keeping what they made. Layers
# run in a scan, whose forward and backward bodies are apart, so nothing can merge the two computations again.
recomputed = partial(jax.checkpoint, prevent_cse=False)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector over the last dim, with the rank of `like`: (n,) -> (1, …, 1, n)."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """y = x W + b, with W (in, out). Adapters (and, later, quantised weights) hook in here and nowhere else.

    `axes` are the logical axes of W. `adapter`, when set, is called as `adapter(x, y, kernel, key)` and returns the new y.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        run: Runtime,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = False,
        std: float = 0.02,
    ):
        self.run = run
        kernel = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32) * std
        self.kernel = nnx.Param(kernel.astype(run.param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), run.param_dtype), axes=(axes[1],)) if use_bias else None
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x: (..., in) -> (..., out) in the compute dtype. `key` feeds the adapter's dropout; None switches it off."""
        dtype = self.run.compute_dtype
        y = jnp.matmul(x.astype(dtype), self.kernel[...].astype(dtype))
        if self.adapter is not None:
            y = self.adapter(x.astype(dtype), y, self.kernel[...], key)
        return y if self.bias is None else y + along_last(self.bias[...].astype(dtype), y)


class Embed(nnx.Module):
    """Token embedding table (V, D); `attend` is the same table used as the output projection (tied head)."""

    def __init__(self, vocab_size: int, dim: int, run: Runtime, rngs: nnx.Rngs, std: float = 0.02):
        self.run = run
        table_VD = jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32) * std
        self.table = nnx.Param(table_VD.astype(run.param_dtype), axes=("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """tokens (B, T) -> (B, T, D) in the compute dtype."""
        return jnp.take(self.table[...], tokens_BT, axis=0).astype(self.run.compute_dtype)

    def attend(self, hidden_D: jax.Array) -> jax.Array:
        """(..., D) -> logits (..., V) in float32: h E^T."""
        dtype = self.run.compute_dtype
        table_VD = self.table[...].astype(dtype)
        return jnp.einsum("...d,vd->...v", hidden_D.astype(dtype), table_VD, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, run: Runtime):
        self.run, self.eps = run, eps
        self.scale = nnx.Param(jnp.ones((dim,), run.param_dtype), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:

        @recomputed
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            x32 = x.astype(jnp.float32)
            x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
            return (x32 * along_last(scale.astype(jnp.float32), x32)).astype(self.run.compute_dtype)

        return norm(x, self.scale[...])


class KVCache(NamedTuple):
    """Keys and values of all layers for S slots. `segment_ids_BS` is 0 for empty or padding slots.

    k, v: (L, B, S, K, H); segment_ids: (B, S) int32; used: () int32, the slots written so far, the same in every row.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segment_ids_BS: jax.Array
    used: jax.Array

    @classmethod
    def zeros(cls, layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> KVCache:
        shape = (layers, rows, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows, slots), jnp.int32), jnp.int32(0))


def stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `num_layers` of a layer as one module whose parameters have a leading (L,) dim."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


_POLICIES: dict[str, Any] = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_stack(
    layers: nnx.Module,
    x: jax.Array,
    body: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    carry: Any,
    run: Runtime,
) -> tuple[jax.Array, Any]:
    """Runs stacked layers in order: `x, carry = body(layer, x, index, carry)` for each.

    One layer is compiled, whatever the depth. `carry` is any pytree of arrays that crosses layers (a KV cache) or None.
    The residual x is what a rematerialised step keeps per layer.
    """
    graphdef, stacked = nnx.split(layers)
    num_layers = jax.tree.leaves(stacked)[0].shape[0]

    def one(x_carry: tuple[jax.Array, Any], params_index: Any) -> tuple[tuple[jax.Array, Any], None]:
        params, index = params_index
        return body(nnx.merge(graphdef, params), x_carry[0], index, x_carry[1]), None

    if run.remat != "none":
        one = jax.checkpoint(one, policy=_POLICIES[run.remat], prevent_cse=not run.scan)
    indices = np.arange(num_layers, dtype=np.int32)
    if run.scan:
        (x, carry), _ = jax.lax.scan(one, (x, carry), (stacked, indices))
    else:
        for i in indices:
            (x, carry), _ = one((x, carry), (jax.tree.map(lambda p, i=i: p[i], stacked), jnp.int32(i)))
    return x, carry


def flatten(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """A model as its structure and a flat dictionary, dotted path -> variable."""
    graphdef, state = nnx.split(model)
    return graphdef, {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def bind(graphdef: nnx.GraphDef, params: dict[str, jax.Array]) -> Any:
    """The inverse of `flatten`: a model over these arrays. Pure; costs nothing under jit."""

    def key(part: str) -> str | int:
        return int(part) if part.isdigit() else part

    return nnx.merge(
        graphdef, nnx.from_flat_state([(tuple(map(key, path.split("."))), value) for path, value in params.items()])
    )
