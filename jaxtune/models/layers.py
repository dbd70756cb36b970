"""The bricks of every family: `Linear` (the only weight matmul), embeddings, norms, and the stacked, scanned layers.

Every parameter names its logical axes once, where it is made (`axes=`); `sharding.py` maps them to mesh axes. A stack
of layers is one module whose parameters carry a leading "layers" dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models import quantised
from jaxtune.models.spec import Norm
from jaxtune.types import SAVED_NAMES, UserError

Axes = tuple[str | None, ...]
STORED_AXES = frozenset({"embed", "lora_in", "lora_out"})  # sharded to be kept, gathered to be used


def unconstrained(x: jax.Array, axes: Axes) -> jax.Array:
    """Leaves an activation's sharding to the compiler."""
    return x


class Runtime(NamedTuple):
    """How a model runs, as opposed to what it is: static, hashable, chosen by the caller, the same for every family.

    `constrain(x, axes)` pins an activation's sharding by logical axes; `mesh` and `spec(axes)` are for kernels that the
    compiler cannot partition by itself; `remat` is none | dots | block, with `save` and `offload` naming what it keeps
    beside (`SAVED_NAMES`), on the device and in the host's memory; `attention` is auto | xla | splash | flash.
    `router_loss`: whether what routers report is part of a loss, and so has a gradient. `spread_head`: see `heads.gathered`.
    `mlp_blocks`: in how many blocks of tokens a feed-forward layer works, each rematerialised on its own. `branches`:
    segment ids hold branches, which see the prompt that they share (`types.BRANCH_BITS`). `neftune_alpha`: noise on
    embeddings where a pass has a key, as training's has (`embed_noise.noisy`).
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    attention: str = "auto"
    scan: bool = True
    router_loss: bool = False
    spread_head: bool = False
    mlp_blocks: int = 1
    branches: bool = False
    neftune_alpha: float = 0.0
    mesh: jax.sharding.Mesh | None = None
    spec: Callable[[Axes], jax.sharding.PartitionSpec] | None = None
    constrain: Callable[[jax.Array, Axes], jax.Array] = unconstrained

    @property
    def platform(self) -> str:
        """Of the devices that the program is for: cpu | gpu | tpu."""
        return jax.default_backend() if self.mesh is None else str(self.mesh.devices.flat[0].platform)


# For cheap functions of large arrays: the backward pass computes them again instead of keeping what they made. Layers
# run in a scan, whose forward and backward bodies are apart, so nothing can merge the two computations again.
recomputed = partial(jax.checkpoint, prevent_cse=False)


def moved(x: jax.Array, run: Runtime, kept: Axes, used: Axes) -> jax.Array:
    """x, which lies along the logical axes `kept`, along `used`; its gradient lies along `kept` again."""

    @jax.custom_vjp
    def move(x: jax.Array) -> jax.Array:
        return run.constrain(x, used)

    move.defvjp(lambda x: (move(x), None), lambda _, dx: (run.constrain(dx, kept),))
    return move(x)


def gathered_weights(module: Any, run: Runtime) -> Any:
    """The module with its weights gathered over the axis that shards them for storage alone.

    For a module used again and again in an inner loop: the compiler would gather its weights there each time.
    """
    graphdef, state = nnx.split(module)

    def gather(variable: Any) -> Any:
        axes = variable.get_metadata()["axes"]
        used = tuple(None if axis in STORED_AXES else axis for axis in axes)
        return variable.replace(moved(variable[...], run, axes, used)) if used != axes else variable

    return nnx.merge(graphdef, jax.tree.map(gather, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def in_blocks(
    apply: Callable[[jax.Array, jax.Array | None], jax.Array], x_BTD: jax.Array, key: jax.Array | None, num_blocks: int
) -> jax.Array:
    """`apply(x, key)`, which treats every token alike, over `num_blocks` blocks of tokens, one after the other.

    Each is rematerialised on its own, so what it makes inside exists for one block at a time. A block takes every n-th
    token, so that it lies over a mesh axis which splits the rows as the whole does.
    """
    B, T, D = x_BTD.shape
    blocks_NBTD = jnp.moveaxis(x_BTD.reshape(B, T // num_blocks, num_blocks, D), 2, 0)

    @recomputed
    def one(index: jax.Array, x: jax.Array) -> jax.Array:
        return apply(x, None if key is None else jax.random.fold_in(key, index))

    out_NBTD = jax.lax.map(lambda each: one(*each), (jnp.arange(num_blocks), blocks_NBTD))
    return jnp.moveaxis(out_NBTD, 0, 2).reshape(B, T, -1)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector over the last dim, with the rank of `like`: (n,) -> (1, …, 1, n)."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """y = x W + b, with W (in, out). Adapters and quantised weights hook in here and nowhere else.

    `axes` are the logical axes of W. `adapter`, when set, is called as `adapter(x, y, kernel, key)` and returns the new y.
    `kernel` is a parameter or, once `quantised.attach` has been here, a `quantised.Kernel`.
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
        self.kernel: Any = nnx.data(nnx.Param(kernel.astype(run.param_dtype), axes=axes))
        self.bias = nnx.Param(jnp.zeros((out_dim,), run.param_dtype), axes=(axes[1],)) if use_bias else None
        self.adapter: Any = nnx.data(None)

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None, *, out_dtype: Any = None, kernel_axes: Axes | None = None
    ) -> jax.Array:
        """x: (..., in) -> (..., out) in the compute dtype, or `out_dtype`, to which products are then summed.

        `key` feeds the adapter's dropout; None switches it off. `kernel_axes` are the logical axes along which the kernel
        lies while it is used, where they are not those along which it is kept.
        """
        dtype = self.run.compute_dtype
        if isinstance(self.kernel, quantised.Kernel):
            packed, run = self.kernel.packed, self.run
            y = quantised.matmul(x.astype(dtype), packed, self.kernel.axes, run.constrain)
            y = y if out_dtype is None else y.astype(out_dtype)
            kernel = quantised.dequantize(packed, dtype)  # no work where no adapter looks at it
        else:
            kernel = self.kernel[...]
            used = kernel.astype(dtype)
            used = used if kernel_axes is None else self.run.constrain(used, kernel_axes)
            y = jnp.matmul(x.astype(dtype), used, preferred_element_type=out_dtype)
        if self.adapter is not None:
            y = self.adapter(x.astype(dtype), y, kernel, key)
        return y if self.bias is None else y + along_last(self.bias[...].astype(y.dtype), y)


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
        if self.run.spread_head:
            table_VD = self.run.constrain(table_VD, ("vocab_spread", None))
        return jnp.einsum("...d,vd->...v", hidden_D.astype(dtype), table_VD, preferred_element_type=jnp.float32)


class VirtualTokens(nnx.Module):
    """Token ids beyond the vocabulary, which stand for vectors of their own: where a soft prompt hooks in, and nowhere else.

    `adapter`, when set, is called as `adapter(embeddings, tokens)` and returns the embeddings with its own in their places.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.adapter: Any = nnx.data(None)

    def known(self, tokens_BT: jax.Array) -> jax.Array:
        """The tokens with some id of the vocabulary wherever there is none."""
        return tokens_BT if self.adapter is None else jnp.minimum(tokens_BT, self.vocab_size - 1)

    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return x_BTD if self.adapter is None else self.adapter(x_BTD, tokens_BT)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, in float32 (arXiv:1910.07467); `plus_one` stores scale - 1."""

    def __init__(self, dim: int, eps: float, run: Runtime, plus_one: bool = False, scale: bool = True):
        self.run, self.eps, self.plus_one = run, eps, plus_one
        start = jnp.zeros if plus_one else jnp.ones
        self.scale = nnx.Param(start((dim,), run.param_dtype), axes=("norm",)) if scale else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:

        @recomputed
        def norm(x: jax.Array, scale: jax.Array | None) -> jax.Array:
            x32 = x.astype(jnp.float32)
            x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
            if scale is not None:
                x32 = x32 * along_last(scale.astype(jnp.float32) + (1.0 if self.plus_one else 0.0), x32)
            return x32.astype(self.run.compute_dtype)

        return norm(x, None if self.scale is None else self.scale[...])


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias, in float32 (arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, run: Runtime, use_bias: bool = True):
        self.run, self.eps = run, eps
        self.scale = nnx.Param(jnp.ones((dim,), run.param_dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((dim,), run.param_dtype), axes=("norm",)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:

        @recomputed
        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
            x32 = x.astype(jnp.float32)
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
            x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
            x32 = x32 * along_last(scale.astype(jnp.float32), x32)
            if bias is not None:
                x32 = x32 + along_last(bias.astype(jnp.float32), x32)
            return x32.astype(self.run.compute_dtype)

        return norm(x, self.scale[...], None if self.bias is None else self.bias[...])


def make_norm(n: Norm, dim: int, run: Runtime) -> RMSNorm | LayerNorm:
    """The norm that `n` describes, over `dim` values."""
    if n.kind == "layer":
        return LayerNorm(dim, n.eps, run, n.bias)
    return RMSNorm(dim, n.eps, run, n.plus_one, n.scale)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function that a Hugging Face config calls `name`.

    Raises:
      UserError: listing the known ones.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"unsupported activation {name!r} in config.json; supported: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `num_layers` of a layer as one module whose parameters have a leading (L,) dim."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def named(x: Any, name: str) -> Any:
    """x, under a name of `SAVED_NAMES`, by which `train.save` and `train.offload` keep it for the backward pass."""
    assert name in SAVED_NAMES, name
    return checkpoint_name(x, name)


def _policy(run: Runtime) -> Any:
    """What of a layer the backward pass finds again, and where."""
    policies = jax.checkpoint_policies
    by_name = policies.nothing_saveable
    if run.offload and run.platform != "cpu":  # whose memory is the host's
        by_name = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(run.save), names_which_can_be_offloaded=list(run.offload),
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    elif run.save or run.offload:
        by_name = policies.save_only_these_names(*run.save, *run.offload)
    if run.remat == "dots":
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, by_name)
    return by_name


def run_stack(
    stacks: Sequence[nnx.Module],
    x: jax.Array,
    body: Callable[[Sequence[Any], jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any, Any]],
    carry: Any,
    xs: Any,
    run: Runtime,
) -> tuple[jax.Array, Any, Any]:
    """Runs stacked layers in order: `x, carry, told = body(one layer of each stack, x, index, carry, xs[index])`, again and again.

    Returns (x, carry, what each round told, stacked).

    One round is compiled, whatever the depth. `carry` is any pytree of arrays that crosses layers (a KV cache); `xs` is a
    pytree of arrays with what differs between layers. The residual x is what a rematerialised step keeps per round.
    """
    graphdefs, stacked = zip(*[nnx.split(layers) for layers in stacks], strict=True)
    num_rounds = jax.tree.leaves(stacked)[0].shape[0]

    def one(x_carry: tuple[jax.Array, Any], given: Any) -> tuple[tuple[jax.Array, Any], Any]:
        params, index, own = given
        layers = [nnx.merge(graphdef, values) for graphdef, values in zip(graphdefs, params, strict=True)]
        x, carry, told = body(layers, named(x_carry[0], "block_input"), index, x_carry[1], own)
        return (x, carry), told

    if run.remat != "none":
        one = jax.checkpoint(one, policy=_policy(run), prevent_cse=not run.scan)
    indices = np.arange(num_rounds, dtype=np.int32)
    if run.scan and num_rounds > 1:
        (x, carry), told = jax.lax.scan(one, (x, carry), (stacked, indices, xs))
        return x, carry, told
    every = []
    for i in indices:
        (x, carry), told = one((x, carry), jax.tree.map(lambda p, i=i: jnp.asarray(p[i]), (stacked, indices, xs)))
        every.append(told)
    return x, carry, jax.tree.map(lambda *each: jnp.stack(each), *every)


def flatten(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """A model as its structure and a flat dictionary, dotted path -> variable."""
    graphdef, state = nnx.split(model)
    return graphdef, {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def bind(graphdef: nnx.GraphDef, params: dict[str, jax.Array]) -> Any:
    """The inverse of `flatten`: a model over these arrays. Pure; costs nothing under jit.

    Arrays of other models, "NAME/…", are left out.
    """

    def key(part: str) -> str | int:
        return int(part) if part.isdigit() else part

    return nnx.merge(
        graphdef,
        nnx.from_flat_state(
            [(tuple(map(key, path.split("."))), value) for path, value in params.items() if "/" not in path]
        ),
    )
