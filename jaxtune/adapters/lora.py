"""LoRA (arXiv:2106.09685), with rsLoRA (2312.03732) and DoRA (2402.09353), on any `Linear` or `ExpertLinear` that a regex names."""

from __future__ import annotations

import math
import re
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.config import ConfigDict
from jaxtune.models import quantised
from jaxtune.models.experts import ExpertLinear
from jaxtune.models.layers import Linear, along_last
from jaxtune.types import UserError, nearest


class Options(NamedTuple):
    """`rank_pattern` and `alpha_pattern` map a linear's path to its own rank or alpha (PEFT has the same).

    `zero` is the factor that starts at 0, a or b: see `initial`. `layers` are the numbers of the layers that it is on, () = all:
    the factors of the others are there, in the stack, and stay as they are.
    """

    targets: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    dtype: Any = jnp.float32
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    zero: str = "b"
    layers: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, tune: ConfigDict) -> Options:
        layers, dtype = tuple(sorted(tune.train_layers)), jnp.dtype(tune.dtype)
        return cls(
            tune.targets, tune.rank, tune.alpha, tune.dropout, tune.use_rslora, tune.use_dora, dtype, layers=layers
        )

    def scale(self, path: str) -> float:
        """What the update of this linear layer is multiplied by."""
        rank, alpha = dict(self.rank_pattern).get(path, self.rank), dict(self.alpha_pattern).get(path, self.alpha)
        return self.scale_of(alpha, rank)

    def scale_of(self, alpha: float, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_of(self, scale: float, rank: int) -> float:
        """The alpha that gives this scale; the adapter's own, to the bit, where that is it."""
        alpha = scale * (math.sqrt(rank) if self.use_rslora else rank)
        return self.alpha if math.isclose(alpha, self.alpha, rel_tol=1e-12) else alpha


class LowRank(nnx.Module):
    """y + s drop(x) A B, with A (in, r) and B (r, out); with DoRA, columns rescaled to a learnt magnitude m (out,).

    On experts each has its own: A (E, in, r), B (E, r, out), m (E, out). Their inputs are not dropped (nor are they in PEFT).
    """

    def __init__(self, linear: Linear | ExpertLinear, path: str, options: Options):
        (*stacked, in_dim, out_dim), (*lead, _, _) = quantised.shape_and_axes(linear.kernel)
        rank = dict(options.rank_pattern).get(path, options.rank)
        self.scale, self.dropout = options.scale(path), options.dropout
        self.salt = zlib.crc32(path.encode()) & 0x7FFFFFFF  # each linear drops its own elements
        self.lora_a = nnx.Param(
            jnp.zeros((*stacked, in_dim, rank), options.dtype), axes=(*lead, "lora_in", "lora_rank")
        )
        self.lora_b = nnx.Param(
            jnp.zeros((*stacked, rank, out_dim), options.dtype), axes=(*lead, "lora_rank", "lora_out")
        )
        magnitude = nnx.Param(jnp.zeros((*stacked, out_dim), options.dtype), axes=(*lead, "lora_out"))
        self.magnitude = magnitude if options.use_dora else nnx.data(None)

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """x (..., in), y = x W (..., out) -> the adapted y, before any bias. No key, no dropout."""
        dtype = x.dtype
        a, b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(dtype)
        update = _low_rank(x, a, b) * jnp.asarray(self.scale, dtype)
        if self.magnitude is None:
            return y + update.astype(y.dtype)
        return ((y + update) * along_last(self._gain(kernel), y)).astype(y.dtype)

    def arrays(self, kernel: jax.Array) -> dict[str, jax.Array]:
        """What experts use: factors, the second one scaled, and DoRA's gain of each output (`experts.apply`)."""
        found = {"lora_a": self.lora_a[...], "lora_b": self.lora_b[...] * self.scale}
        return found if self.magnitude is None else found | {"gain": self._gain(kernel)}

    def _gain(self, kernel: jax.Array) -> jax.Array:
        """DoRA's m / ||W + s A B||, the norm a constant to the gradient."""
        assert self.magnitude is not None
        norms = column_norms(kernel, self.lora_a[...], self.lora_b[...], self.scale)
        return self.magnitude[...] / jax.lax.stop_gradient(norms)


@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x A B, in the cheaper order: (x A) B. Its gradients transpose the thin factor, never the wide activation."""
    return jnp.matmul(jnp.matmul(x, a), b)


def _low_rank_fwd(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    h = jnp.matmul(x, a)
    return jnp.matmul(h, b), (x, h, a, b)


def _low_rank_bwd(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, h, a, b = saved
    dh = jnp.matmul(dy, b.T)
    da_RI = jnp.einsum("...r,...i->ri", dh, x)
    db_RO = jnp.einsum("...r,...o->ro", h, dy)
    return jnp.matmul(dh, a.T), da_RI.T.astype(a.dtype), db_RO.astype(b.dtype)


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """DoRA eq. 5's ||W + s A B|| over inputs, per output: (..., in, out) -> (..., out), float32."""
    update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * scale
    return jnp.linalg.norm(kernel.astype(jnp.float32) + update, axis=-2)


def linears(model: nnx.Module) -> dict[str, Linear | ExpertLinear]:
    """Every linear layer of a model, those of experts too, by its dotted path."""
    kinds = (Linear, ExpertLinear)
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kinds)}


def attach(model: nnx.Module, options: Options) -> None:
    """Hangs a `LowRank` on every linear layer whose whole path matches `options.targets`.

    Raises:
      UserError: the regex is broken or matches nothing; the message lists near paths.
    """
    found = linears(model)
    try:
        chosen = [path for path in found if re.fullmatch(options.targets, path)]
    except re.error as error:
        raise UserError(f"tune.targets={options.targets!r} is not a regular expression: {error}") from None
    if not chosen:
        near = nearest(options.targets, list(found))
        raise UserError(
            f"tune.targets={options.targets!r} matches no linear layer{near or '.'} "
            f"The regex must match a whole path; the model has: {', '.join(sorted(found))}"
        )
    for path in chosen:
        found[path].adapter = LowRank(found[path], path, options)


def initial(path: str, shape: tuple[int, ...], dtype: Any, key: jax.Array, kernel: Any, zero: str = "b") -> jax.Array:
    """PEFT's initial values: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, DoRA's m = ||W|| per output of `kernel`, quantised or not.

    With `zero` "a": A = 0 and B ~ N(0, 1/out). Where policy and reference are equal at first, all that Adam's first step sees
    of B = 0 is which way the sums over shards were rounded, and takes for a sign (marin#4755); A's gradient is whole.
    """
    kind = path.rsplit(".", 1)[-1]
    if zero == "a" and kind == "lora_b":
        return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])).astype(dtype)
    if zero == "b" and kind == "lora_a":
        bound = 1 / math.sqrt(shape[-2])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
    if kind == "magnitude":
        assert kernel is not None, "a magnitude starts from its kernel"
        if isinstance(kernel, quantised.Packed):
            dequantized = partial(quantised.dequantize, dtype=jnp.float32)
            return quantised.of_layers(lambda layer: jnp.linalg.norm(dequantized(layer), axis=-2), kernel).astype(dtype)
        return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2).astype(dtype)
    return jnp.zeros(shape, dtype)


def merged(
    kernel: jax.Array | quantised.Packed,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array | None,
    scale: float,
    dtype: Any = None,
) -> jax.Array:
    """W' = W + s A B, columns rescaled to m with DoRA; computed in float32, a layer of a stack at a time.

    Its dtype is W's, unless `dtype` says otherwise: a quantised W has none.
    """

    def one(layer: tuple[Any, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        kernel, a, b, magnitude = layer
        whole = kernel if isinstance(kernel, jax.Array) else quantised.dequantize(kernel, jnp.float32)
        total = whole.astype(jnp.float32) + jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * scale
        if magnitude is not None:
            total = total * (magnitude.astype(jnp.float32) / jnp.linalg.norm(total, axis=-2))[..., None, :]
        return total.astype(dtype or whole.dtype)

    layers = (kernel, a, b, magnitude)
    return jax.lax.map(one, layers) if len(kernel.shape) > 2 else one(layers)
