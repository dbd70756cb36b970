"""Frozen weights in 8 or 4 bits (QLoRA, arXiv:2305.14314): kept, and gathered over a mesh, as codes; dequantised inside the matmul.

Of a kernel W (…, in, out), `block` inputs of an output share a scale, itself kept in 8 bits with one float32 per output:

    W[i, o] ~ level(code[i, o]) * scale[i // block, o],      scale[j, o] = column[o] * (code8[j, o] / 255)^2

The square spreads the 8-bit codes over four decades. They are rounded up, so that no weight is cut off: a scale is at most
0.8% too large beside its column's largest, which is exact, and 8% at a hundredth of it. Blocks run along the inputs, so a kernel's mesh axes are those of its codes too.

Shapes here, beside the legend of `types.py`: J blocks of an output, I inputs, O outputs; P bytes of an output's codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.types import UserError, nearest

# The 16 levels of NormalFloat 4: quantiles of a standard normal, scaled to [-1, 1], with a 0 (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = {"int8": 8, "int4": 4, "nf4": 4}  # bits of a code
LEAVES = ("codes", "scales", "columns")
_LEAF = re.compile(rf"(.*\.kernel)\.({'|'.join(LEAVES)})")
_INT8, _INT4, _SCALE = 127, 7.5, 255  # codes of 1; in int4, -8 … 7, it lies between two


class Options(NamedTuple):
    """Which kernels are kept how: `kind` int8 | int4 | nf4; `block` inputs per scale, 0 or -1 for all of an output's."""

    kind: str
    block: int
    targets: str

    @classmethod
    def from_config(cls, model: Any) -> Options | None:
        """None where `model.quantize` is ""."""
        return cls(model.quantize, model.quantize_block, model.quantize_targets) if model.quantize else None


@partial(jax.tree_util.register_dataclass, data_fields=list(LEAVES), meta_fields=["kind"])
@dataclass(frozen=True)
class Packed:
    """A quantised kernel: `codes` (…, P, O) uint8, two 4-bit codes a byte, or int8; `scales` (…, J, O) uint8; `columns` (…, 1, O) float32.

    Of a block's 4-bit codes, the first half of its inputs are the low halves of bytes, the second the high ones.
    """

    codes: Any
    scales: Any
    columns: Any
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel: (…, in, out)."""
        *lead, rows, outs = self.codes.shape
        return (*lead, rows * 8 // KINDS[self.kind], outs)


def block_of(num_inputs: int, wanted: int, kind: str) -> int:
    """The largest block of at most `wanted` inputs that divides them, and for 4-bit codes is even; 0 where there is none."""
    step = 8 // KINDS[kind]
    most = num_inputs if wanted < 1 else min(wanted, num_inputs)
    return next((size for size in range(most, 0, -1) if num_inputs % size == 0 and size % step == 0), 0)


def quantize(kernel: jax.Array, kind: str, block: int) -> Packed:
    """A kernel (…, in, out) -> its codes, each the nearest to what the kept scale leaves. `block` divides in, and is even at 4 bits."""
    *lead, num_in, num_out = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(*lead, num_in // block, block, num_out)
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    columns = jnp.max(largest, axis=-2, keepdims=True)
    scales = jnp.ceil(jnp.sqrt(largest / jnp.where(columns > 0, columns, 1)) * _SCALE)
    scales = jnp.clip(scales, 1, _SCALE).astype(jnp.uint8)  # 0 would lose a block whose weights are small
    scale = _scale(scales, columns)[..., None, :]
    codes = _encoded(blocks / jnp.where(scale > 0, scale, 1), kind)
    if KINDS[kind] == 4:
        low, high = jnp.split(codes, 2, axis=-2)
        codes = low | (high << 4)
    return Packed(codes.reshape(*lead, -1, num_out), scales, columns, kind)


def dequantize(packed: Packed, dtype: Any) -> jax.Array:
    """The kernel (…, in, out) in `dtype`; elementwise from its codes, so that it can be a part of what uses it."""
    *lead, num_rows, num_out = packed.codes.shape
    scale, num_blocks = _scale(packed.scales, packed.columns), packed.scales.shape[-2]
    if KINDS[packed.kind] == 8:
        unit = packed.codes.reshape(*lead, num_blocks, -1, num_out).astype(jnp.float32) / _INT8
        return (unit * scale[..., None, :]).reshape(packed.shape).astype(dtype)
    # Taken apart as bytes: of wider numbers XLA for TPUs would write the whole kernel out before it is multiplied.
    bytes_ = packed.codes.reshape(*lead, num_blocks, 1, num_rows // num_blocks, num_out)
    shift = jnp.array([0, 4], jnp.uint8).reshape(*[1] * len(lead), 1, 2, 1, 1)
    codes = ((bytes_ >> shift) & 15).astype(jnp.int32)
    unit = (codes - 8).astype(jnp.float32) / _INT4 if packed.kind == "int4" else _looked_up(codes)
    return (unit * scale[..., None, None, :]).reshape(packed.shape).astype(dtype)


def _scale(scales: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.square(scales.astype(jnp.float32)) * (columns / _SCALE**2)


def _encoded(unit: jax.Array, kind: str) -> jax.Array:
    """Values of -1 … 1 -> the numbers of the nearest levels."""
    if kind == "int8":
        return jnp.clip(jnp.round(unit * _INT8), -_INT8, _INT8).astype(jnp.int8)
    if kind == "int4":
        return (jnp.clip(jnp.round(unit * _INT4), -8, 7) + 8).astype(jnp.uint8)
    above = [(unit > (low + high) / 2).astype(jnp.uint8) for low, high in zip(NF4, NF4[1:], strict=False)]
    return sum(above[1:], above[0])


def _looked_up(codes: jax.Array) -> jax.Array:
    """NF4[code], by a tree of selects on the code's bits: no chip here gathers single elements fast."""
    levels: list[Any] = list(NF4)
    for bit in (1, 2, 4, 8):
        is_set = (codes & bit) != 0
        pairs = zip(levels[::2], levels[1::2], strict=True)
        levels = [jnp.where(is_set, jnp.float32(high), jnp.float32(low)) for low, high in pairs]
    return levels[0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: jax.Array, packed: Packed, axes: tuple[str | None, ...], constrain: Callable[..., jax.Array]
) -> jax.Array:
    """x W in x's dtype. What the backward pass keeps are the codes: it dequantises again, for dx = dy W^T alone.

    `axes` are the kernel's logical axes. Devices that share it hand each other codes, not the dequantised kernel.
    """
    return jnp.matmul(x, dequantize(gathered(packed, axes, constrain), x.dtype))


def _matmul_fwd(x: jax.Array, packed: Packed, axes: Any, constrain: Any) -> tuple[jax.Array, Packed]:
    return matmul(x, packed, axes, constrain), packed


def _matmul_bwd(axes: Any, constrain: Any, packed: Packed, dy: jax.Array) -> tuple[jax.Array, None]:
    # Behind a barrier, or the compiler would keep what a recomputed forward pass dequantised.
    whole = jax.lax.optimization_barrier(gathered(packed, axes, constrain))
    return jnp.matmul(dy, dequantize(whole, dy.dtype).T), None


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def gathered(packed: Packed, axes: tuple[str | None, ...], constrain: Callable[..., jax.Array]) -> Packed:
    """`packed` whole over "embed", the axis that weights are spread over between uses; split as the matmul splits it."""
    *lead, into, out = (None if axis == "embed" else axis for axis in axes)
    return Packed(
        constrain(packed.codes, (*lead, into, out)),
        constrain(packed.scales, (*lead, None, out)),
        constrain(packed.columns, (*lead, None, out)),
        packed.kind,
    )


class Kernel(nnx.Module):
    """What stands in a linear layer where its `kernel` parameter stood: parameters for `Packed`, under the kernel's logical axes."""

    def __init__(self, packed: Packed, axes: tuple[str | None, ...]):
        self.kind, self.axes = packed.kind, axes
        self.codes, self.scales, self.columns = (nnx.Param(getattr(packed, leaf), axes=axes) for leaf in LEAVES)

    @property
    def packed(self) -> Packed:
        return Packed(self.codes[...], self.scales[...], self.columns[...], self.kind)


def shape_and_axes(kernel: nnx.Param | Kernel) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Of a linear layer's kernel, quantised or not: (…, in, out), and the logical axes."""
    if isinstance(kernel, Kernel):
        return kernel.packed.shape, kernel.axes
    return kernel.shape, kernel.get_metadata()["axes"]


def attach(linears: Mapping[str, Any], options: Options) -> None:
    """Quantises the kernel of every linear layer of a stack of layers whose whole path matches `options.targets`.

    Embedding tables, norms, biases and the output head are none.

    Raises:
      UserError: the regex matches nothing, or 4-bit codes do not go into bytes.
    """
    chosen = [path for path in linears if path.startswith("layers.") and re.fullmatch(options.targets, path)]
    if not chosen:
        near = nearest(options.targets, list(linears)) or f"; there are {', '.join(sorted(linears))}"
        raise UserError(f"model.quantize_targets={options.targets!r} matches no linear layer of a block{near}")
    for path in chosen:
        shape, axes = shape_and_axes(linears[path].kernel)
        block = block_of(shape[-2], options.block, options.kind)
        if not block:
            raise UserError(
                f"model.quantize={options.kind!r}: {path} has {shape[-2]} inputs, which is odd, and two codes go into a byte: "
                "use 'int8', or leave it out of model.quantize_targets"
            )
        linears[path].kernel = Kernel(quantize(linears[path].kernel[...], options.kind, block), axes)


def kernel_of(path: str) -> str | None:
    """The kernel that a parameter is a part of: "….kernel" for "….kernel.codes"; None for any other parameter."""
    found = _LEAF.fullmatch(path)
    return found[1] if found else None


def collect(params: Mapping[str, Any], kernel: str, kind: str) -> Packed:
    """One kernel of a flat dictionary of parameters."""
    codes, scales, columns = (params[f"{kernel}.{leaf}"] for leaf in LEAVES)
    return Packed(codes, scales, columns, kind)


def spread(kernel: str, packed: Packed) -> dict[str, Any]:
    """The inverse of `collect`."""
    return {f"{kernel}.{leaf}": getattr(packed, leaf) for leaf in LEAVES}


class Base(NamedTuple):
    """What of a base model is quantised: kernel path -> its shape, dtype and sharding as if it were not."""

    options: Options
    kernels: dict[str, jax.ShapeDtypeStruct]

    def packed(self, params: Mapping[str, Any], kernel: str) -> Packed:
        return collect(params, kernel, self.options.kind)

    def quantize(self, kernel: jax.Array) -> Packed:
        block = block_of(kernel.shape[-2], self.options.block, self.options.kind)
        return quantize(kernel, self.options.kind, block)

    def num_params(self, shapes: Mapping[str, Any]) -> int:
        """Weights of a model whose leaves are `shapes`: those of a quantised kernel, not its codes and scales."""
        plain = sum(like.size for path, like in shapes.items() if kernel_of(path) is None)
        return plain + sum(like.size for path, like in self.kernels.items() if f"{path}.codes" in shapes)


def of_layers(fn: Callable[[Packed], jax.Array], packed: Packed) -> jax.Array:
    """`fn` of a kernel (in, out), for each of a stack in turn: no more than one of them is ever dequantised."""
    if packed.codes.ndim == 2:
        return fn(packed)
    return jax.lax.map(partial(of_layers, fn), packed)
