"""Prompt tuning (arXiv:2104.08691): a few learnt vectors in front of every text; the model itself stays as it is.

The vectors stand at token ids of their own, from the model's vocabulary size on. The tokenizer puts these ids in front of
each text, so packing, batches, caches and samplers see tokens like all others: every segment has its prompt before it,
and attention over segments does the rest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.config import ConfigDict
from jaxtune.types import UserError

PATH = "virtual_tokens.adapter.prompt"


class Options(NamedTuple):
    """`init`: random | vocabulary | text, whose tokens are `init_ids`; `num_tokens`: virtual tokens in front of each text."""

    num_tokens: int
    init: str = "vocabulary"
    init_ids: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, tune: ConfigDict, init_ids: tuple[int, ...] = ()) -> Options:
        return cls(tune.virtual_tokens, tune.virtual_init, init_ids, jnp.dtype(tune.dtype))


class SoftPrompt(nnx.Module):
    """Vectors (P, D) for the token ids `vocab_size` to `vocab_size + P - 1`."""

    def __init__(self, vocab_size: int, dim: int, options: Options):
        self.vocab_size = vocab_size
        self.prompt = nnx.Param(jnp.zeros((options.num_tokens, dim), options.dtype), axes=(None, None))

    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings (B, T, D) of tokens, virtual ones replaced by their vectors."""
        index_BT = tokens_BT - self.vocab_size
        virtual_BTD = jnp.take(self.prompt[...], jnp.maximum(index_BT, 0), axis=0, mode="clip").astype(x_BTD.dtype)
        return jnp.where((index_BT >= 0)[..., None], virtual_BTD, x_BTD)


def attach(model: Any, options: Options) -> None:
    """Puts a `SoftPrompt` in front of a decoder.

    Raises:
      UserError: an encoder, or a decoder whose layers look every token up in a table of their own.
    """
    c = model.c
    if not all(getattr(block.attention, "causal", True) for block, _ in c.blocks):
        raise UserError("tune.method='prompt' goes before what a decoder reads; this model is an encoder: use 'lora'")
    if c.layer_input_vocab:
        raise UserError(
            "tune.method='prompt': each layer of this model looks tokens up in a table of its own, where virtual tokens are not: "
            "use 'lora'"
        )
    model.virtual_tokens.adapter = SoftPrompt(c.vocab_size, c.embed_dim or c.dim, options)


def initial(shape: tuple[int, ...], table_VD: jax.Array, scale: float, options: Options, key: jax.Array) -> jax.Array:
    """The first vectors: those of `options.init_ids` in turn, of tokens drawn from the vocabulary, or of its spread.

    `table_VD` times `scale` is what the model's first layer reads; "random" draws N(0, s) with s its standard deviation.
    """
    if options.init == "random":
        spread = jnp.std(table_VD.astype(jnp.float32)) * scale
        return (jax.random.normal(key, shape, jnp.float32) * spread).astype(options.dtype)
    if options.init == "text":
        repeats = math.ceil(shape[0] / len(options.init_ids))
        ids = jnp.asarray((options.init_ids * repeats)[: shape[0]], jnp.int32)
    else:
        ids = jax.random.randint(key, shape[:1], 0, table_VD.shape[0])
    return (jnp.take(table_VD, ids, axis=0).astype(jnp.float32) * scale).astype(options.dtype)
