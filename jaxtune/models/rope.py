"""Rotary position embeddings (arXiv:2104.09864) and their published scalings.

Frequencies are computed in float64 NumPy when the model is made: they are constants of the program. Only "dynamic"
depends on the sequence at hand. Rotation is the half-split form (dims i and i + H/2 form a pair), as Hugging Face has it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.types import UserError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "proportional")


class Rope(NamedTuple):
    """inverse_freqs: H/2 floats; `scale` multiplies cos and sin (yarn's attention factor); `dynamic` = (theta, factor, length)."""

    inverse_freqs: tuple[float, ...]
    scale: float = 1.0
    dynamic: tuple[float, float, int] | None = None


def still(dims: int) -> Rope:
    """A rope that turns nothing, for layers without positions."""
    return Rope((0.0,) * (dims // 2))


def from_hf(config: dict[str, Any], head_dim: int, parameters: dict[str, Any] | None = None) -> Rope:
    """Reads `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`, of a Hugging Face config.

    `head_dim` is how many dims of a head turn; `parameters` replaces the config's own (one kind of layer's).

    Raises:
      UserError: the rope type is not one of `KINDS`, or a field it needs is missing.
    """
    scaling: dict[str, Any] = dict(parameters or config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in KINDS:
        raise UserError(f"unsupported rope_type {kind!r} in config.json; supported: {', '.join(KINDS)}")
    proportion = float(scaling.pop("partial_rotary_factor", None) or 1.0)  # else the family's: how many dims turn
    max_length = int(config.get("max_position_embeddings", 2048))
    base = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    try:
        if kind == "linear":
            return Rope(tuple(base / float(scaling["factor"])))
        if kind == "proportional":  # the first pairs turn as in a whole head, the others stand still
            turning = int(proportion * head_dim // 2)
            still = (0.0,) * (head_dim // 2 - turning)
            return Rope((*(base[:turning] / float(scaling.get("factor") or 1.0)), *still))
        if kind == "dynamic":  # transformers ignores `original_max_position_embeddings` for this type alone
            return Rope(tuple(base), 1.0, (theta, float(scaling["factor"]), max_length))
        if kind == "llama3":
            return Rope(tuple(_llama3(base, scaling)))
        if kind == "yarn":
            return _yarn(base, theta, head_dim, scaling, max_length)
    except KeyError as missing:
        raise UserError(f"rope_type {kind!r} in config.json lacks {missing}; it has {sorted(scaling)}") from None
    return Rope(tuple(base))


def _llama3(base: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / base
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * base / factor + smooth * base
    return np.where(wavelength > length / low, base / factor, np.where(wavelength < length / high, base, blended))


def _yarn(base: np.ndarray, theta: float, head_dim: int, scaling: dict[str, Any], max_length: int) -> Rope:
    """YaRN (arXiv:2309.00071): interpolate slow dims, keep fast ones, and warm the attention's temperature."""
    length = float(scaling.get("original_max_position_embeddings") or max_length)
    factor = float(scaling["factor"]) if scaling.get("factor") is not None else max_length / length

    def temperature(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(factor)
        if mscale and mscale_all:
            attention = temperature(factor, mscale) / temperature(factor, mscale_all)

    def dim_of(rotations: float) -> float:  # the dim that turns so many times within the original length
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return Rope(tuple(base / factor * ramp + base * (1 - ramp)), float(attention))


def tables(rope: Rope, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (cos, sin), each (B, T, H/2)."""
    inverse = jnp.asarray(np.asarray(rope.inverse_freqs, np.float32))
    if rope.dynamic is not None:  # NTK-aware: the base grows with the longest position of the batch, as in transformers
        theta, factor, length = rope.dynamic
        head_dim = 2 * len(rope.inverse_freqs)
        longest = jnp.maximum(jnp.max(positions_BT) + 1, length).astype(jnp.float32)
        grown = theta * ((factor * longest / length) - (factor - 1)) ** (head_dim / (head_dim - 2))
        inverse = grown ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse[None, None, :]
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(
    x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array, dims: int | None = None, interleaved: bool = False
) -> jax.Array:
    """Rotates each pair by its angle, in float32; returns x's dtype.

    Pairs are (i, i + H/2), or (2i, 2i + 1) when `interleaved`; only the first `dims` of a head turn (None: all).
    """
    dims = x_BTNH.shape[-1] if dims is None else dims
    turned, kept = x_BTNH[..., :dims], x_BTNH[..., dims:]
    cos, sin = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
    turned32 = turned.astype(jnp.float32)
    if interleaved:
        first, second = turned32[..., ::2], turned32[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        out = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned32, 2, axis=-1)
        out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    out = out.astype(x_BTNH.dtype)
    return jnp.concatenate([out, kept], axis=-1) if dims < x_BTNH.shape[-1] else out
