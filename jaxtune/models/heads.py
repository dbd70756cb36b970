"""Output heads: from the last hidden state to scores over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models.layers import Embed, Linear


class LMHead(nnx.Module):
    """An output projection of its own: logits (..., V) in float32."""

    def __init__(self, proj: Linear):
        self.proj = proj

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        return self.proj(hidden_D).astype(jnp.float32)


class TiedHead(nnx.Module):
    """The embedding table as output projection: logits (..., V) in float32."""

    def __init__(self, embed: Embed):
        self.embed = embed

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        return self.embed.attend(hidden_D)
