"""Adam whose moments take a byte each: block-wise, after arXiv:2110.02861.

A block is some numbers along the larger of a matrix's two dims that share a float32 scale, the largest of them. What is left,
in [-1, 1], is kept as an 8-bit float (4 bits of exponent, 3 of fraction): a range of 2^18 and steps of 1/8 of a power of two,
near the paper's dynamic type, made by arithmetic and not by a table, which a TPU would have to gather from. The second moment
is kept as its square root, which halves its range in powers of two; rounding never makes it 0, by which Adam would divide.
Vectors, and matrices too small or too odd to have blocks, keep float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_CODE = jnp.float8_e4m3fn
_TOP = 448.0  # its largest number
_TINY = 2.0**-9  # its smallest above 0
_FEWEST = 4096  # numbers of a matrix that are worth coding (the paper's figure)
_SMALLEST_BLOCK = 16


class Moment(NamedTuple):
    """codes: uint8, as the parameter's shape; scales: float32, likewise with one for each block."""

    codes: jax.Array
    scales: jax.Array


class Adam8BitState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # optax finds it by this name
    mu: Any  # a `Moment`, or float32, for each parameter
    nu: Any  # of the square root of the second moment


def block_of(shape: tuple[int, ...], most: int) -> tuple[int, int] | None:
    """(dim, numbers) of a block: the largest power of two up to `most` that divides the larger of the last two dims; None = no blocks.

    It depends on the shape alone, so that a checkpoint goes on on any mesh.
    """
    if len(shape) < 2 or shape[-1] * shape[-2] < _FEWEST:
        return None
    dim = -1 if shape[-1] >= shape[-2] else -2
    size = min(most, shape[dim] & -shape[dim])
    return (dim, size) if size >= _SMALLEST_BLOCK else None


def encode(x: jax.Array, dim: int, size: int, up: bool = False) -> Moment:
    """x (…, n, m) float32 as codes and scales. `up`: what is above 0 stays so."""
    blocks = _blocks(x, dim, size)
    scales = jnp.max(jnp.abs(blocks), axis=dim, keepdims=True)
    share = blocks * (_TOP / jnp.where(scales > 0, scales, 1))
    if up:
        share = jnp.where(share > 0, jnp.maximum(share, _TINY), 0)
    codes = jax.lax.bitcast_convert_type(share.astype(_CODE), jnp.uint8)
    return Moment(codes.reshape(x.shape), jnp.squeeze(scales, dim))


def decode(moment: Moment, dim: int, size: int) -> jax.Array:
    """The inverse, float32."""
    share = jax.lax.bitcast_convert_type(moment.codes, _CODE).astype(jnp.float32)
    scales = jnp.expand_dims(moment.scales, dim)
    return (_blocks(share, dim, size) * (scales / _TOP)).reshape(share.shape)


def _blocks(x: jax.Array, dim: int, size: int) -> jax.Array:
    """The dim `dim` (-1 or -2) as blocks: (…, n, m) -> (…, n, m / size, size) or (…, n / size, size, m)."""
    *lead, n, m = x.shape
    return x.reshape((*lead, n, m // size, size) if dim == -1 else (*lead, n // size, size, m))


def scale_by_adam8bit(b1: float, b2: float, eps: float, block: int) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980), its moments in blocks of at most `block` numbers; coded ones are handled a layer at a time."""

    def zeros(param: jax.Array) -> Any:
        found = block_of(param.shape, block)
        if found is None:
            return jnp.zeros(param.shape, jnp.float32)
        dim, size = found
        shape = list(param.shape)
        shape[dim] //= size
        return Moment(jnp.zeros(param.shape, jnp.uint8), jnp.zeros(shape, jnp.float32))

    def init(params: Any) -> Adam8BitState:
        return Adam8BitState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params))

    def update(updates: Any, state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        count = optax.safe_increment(state.count)
        correct = [1 - jnp.float32(b) ** count for b in (b1, b2)]

        def one(grad: jax.Array, mu: Any, root: Any) -> tuple[jax.Array, Any, Any]:
            found = block_of(grad.shape, block)
            m, r = (mu, root) if found is None else (decode(mu, *found), decode(root, *found))
            grad = grad.astype(jnp.float32)
            m = b1 * m + (1 - b1) * grad
            r = jnp.sqrt(b2 * r**2 + (1 - b2) * grad**2)
            step = (m / correct[0]) / (r / jnp.sqrt(correct[1]) + eps)
            return (step, m, r) if found is None else (step, encode(m, *found), encode(r, *found, up=True))

        def layers(grad: jax.Array, mu: Any, root: Any) -> tuple[jax.Array, Any, Any]:
            in_turn = grad.ndim > 2 and isinstance(mu, Moment)
            return jax.lax.map(lambda each: one(*each), (grad, mu, root)) if in_turn else one(grad, mu, root)

        tree: Any
        grads, tree = jax.tree.flatten(updates)
        done = [layers(*each) for each in zip(grads, *map(tree.flatten_up_to, (state.mu, state.nu)), strict=True)]
        steps, mu, nu = (
            (tree.unflatten(part) for part in zip(*done, strict=True)) if done else (updates, state.mu, state.nu)
        )
        return steps, Adam8BitState(count, mu, nu)

    return optax.GradientTransformation(init, update)
