"""Inputs of a layer's own: each token brings a small vector for every layer, beside the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import spec
from jaxtune.models.layers import Embed, Linear, Runtime, activation, make_norm, recomputed


class LayerInputs(nnx.Module):
    """What tokens bring for all layers: (e + norm(x W / sqrt(D))) / sqrt(2), e from a table of L vectors for each token."""

    def __init__(self, c: spec.Config, run: Runtime, rngs: nnx.Rngs):
        self.c, self.run = c, run
        all_layers = c.num_layers * c.layer_input
        self.embed_tokens_per_layer = Embed(c.layer_input_vocab, all_layers, run, rngs)
        self.per_layer_model_projection = Linear(c.dim, all_layers, ("embed", None), run, rngs)
        self.per_layer_projection_norm = make_norm(c.norm, c.layer_input, run)

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """tokens and their embeddings -> (L, B, T, P)."""
        c, shape = self.c, (*tokens_BT.shape, self.c.num_layers, self.c.layer_input)
        own_BTLP = self.embed_tokens_per_layer(tokens_BT).reshape(shape) * c.layer_input**0.5
        made_BTLP = (self.per_layer_model_projection(x_BTD, key) * c.dim**-0.5).reshape(shape)
        both_BTLP = (self.per_layer_projection_norm(made_BTLP) + own_BTLP) * 2**-0.5
        return jnp.moveaxis(both_BTLP, 2, 0)


class LayerInput(nnx.Module):
    """How one layer takes its input p: norm((act(x W) * p) W')."""

    def __init__(self, c: spec.Config, b: spec.Block, run: Runtime, rngs: nnx.Rngs):
        self.b = b
        self.per_layer_input_gate = Linear(c.dim, b.layer_input, ("embed", None), run, rngs)
        self.per_layer_projection = Linear(b.layer_input, c.dim, (None, "embed"), run, rngs)
        self.post_per_layer_input_norm = make_norm(c.norm, c.dim, run)

    def __call__(self, x_BTD: jax.Array, input_BTP: jax.Array, key: jax.Array | None) -> jax.Array:
        act = activation(self.b.ffn.act)
        gated_BTP = recomputed(lambda gate, p: act(gate) * p)(self.per_layer_input_gate(x_BTD, key), input_BTP)
        return self.post_per_layer_input_norm(self.per_layer_projection(gated_BTP, key))
