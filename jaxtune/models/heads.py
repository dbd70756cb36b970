"""Output heads: from the last hidden state to scores over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import spec
from jaxtune.models.layers import Embed, Linear, Runtime, activation, along_last, make_norm, moved


class LMHead(nnx.Module):
    """An output projection of its own: logits (..., V) in float32."""

    def __init__(self, proj: Linear, softcap: float | None = None):
        self.proj, self.softcap = proj, softcap

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        spread = (None, "vocab_spread") if self.proj.run.spread_head else None
        hidden_D = gathered(hidden_D, self.proj.run)
        return capped(self.proj(hidden_D, out_dtype=jnp.float32, kernel_axes=spread), self.softcap)


class TiedHead(nnx.Module):
    """The embedding table as output projection: logits (..., V) in float32."""

    def __init__(self, embed: Embed, softcap: float | None = None):
        self.embed, self.softcap = embed, softcap

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        return capped(self.embed.attend(gathered(hidden_D, self.embed.run)), self.softcap)


def gathered(hidden_D: jax.Array, run: Runtime) -> jax.Array:
    """With `run.spread_head`: the hidden states of all devices that share the vocabulary's parts; the gradient goes back to each.

    Every device then projects all their tokens onto its own part of the vocabulary, as in Megatron-LM (arXiv:1909.08053, 3):
    what moves is hidden states, not the head, which no device ever holds whole.
    """
    if not run.spread_head or hidden_D.ndim != 3:
        return hidden_D
    return moved(hidden_D, run, ("head_rows", None, None), ("head_rows_gathered", None, None))


def capped(logits_V: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(logits / c) (arXiv:2408.00118)."""
    return logits_V if not softcap else jnp.tanh(logits_V / softcap) * softcap


class TaskHead(nnx.Module):
    """dense → activation → norm → out, each where `spec.Head` has it: scores (..., out_dim) in float32."""

    def __init__(self, h: spec.Head, norm: spec.Norm, dim: int, run: Runtime, rngs: nnx.Rngs):
        self.h, none = h, nnx.data(None)
        self.dense = Linear(dim, dim, ("embed", None), run, rngs, use_bias=h.dense_bias) if h.dense else none
        self.norm = make_norm(norm, dim, run) if h.norm else none
        self.out = Linear(dim, h.out_dim, ("embed", None), run, rngs, use_bias=h.bias) if h.out and not h.tied else none
        zeros = jnp.zeros((h.out_dim,), run.param_dtype)
        self.bias = nnx.Param(zeros, axes=("vocab",)) if h.tied and h.out else none

    def features(self, hidden_D: jax.Array) -> jax.Array:
        """What the last linear reads, (..., D)."""
        if self.dense is not None:
            hidden_D = activation(self.h.act)(self.dense(hidden_D))
        return hidden_D if self.norm is None else self.norm(hidden_D)


class ScoreHead(nnx.Module):
    """A `TaskHead` and, where it is tied, the embedding table: ready to be applied."""

    def __init__(self, task: TaskHead, embed: Embed | None):
        self.task, self.embed = task, nnx.data(embed)

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        features_D = self.task.features(hidden_D)
        if self.embed is not None:
            scores_V = self.embed.attend(gathered(features_D, self.embed.run))
            bias = self.task.bias
            return scores_V if bias is None else scores_V + along_last(bias[...].astype(jnp.float32), scores_V)
        if self.task.out is None:
            return features_D.astype(jnp.float32)
        return self.task.out(features_D).astype(jnp.float32)


class ValueHead(nnx.Module):
    """What a critic expects at each hidden state: (..., D) -> (...) float32; 0 at the start."""

    def __init__(self, dim: int, run: Runtime):
        self.kernel = nnx.Param(jnp.zeros((dim,), run.param_dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((), run.param_dtype), axes=())

    def __call__(self, hidden_D: jax.Array) -> jax.Array:
        kernel_D = self.kernel[...].astype(jnp.float32)
        return jnp.einsum("...d,d->...", hidden_D.astype(jnp.float32), kernel_D) + self.bias[...].astype(jnp.float32)
