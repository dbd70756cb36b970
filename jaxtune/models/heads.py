"""Output heads: from the last hidden state to scores over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models.layers import Embed, Linear


class LMHead(nnx.Module):
    """An output projection of its own: logits (..., V) in float32."""

    def __init__(self, proj: Linear, softcap: float | None = None):
        self.proj, self.softcap = proj, softcap

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        return capped(self.proj(hidden_D).astype(jnp.float32), self.softcap)


class TiedHead(nnx.Module):
    """The embedding table as output projection: logits (..., V) in float32."""

    def __init__(self, embed: Embed, softcap: float | None = None):
        self.embed, self.softcap = embed, softcap

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        return capped(self.embed.attend(hidden_D), self.softcap)


def capped(logits_V: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(logits / c) (arXiv:2408.00118)."""
    return logits_V if not softcap else jnp.tanh(logits_V / softcap) * softcap
