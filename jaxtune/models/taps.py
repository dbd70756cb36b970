"""What single layers make of a batch, for objectives that compare layers: hidden states, and attention where a layer can say it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models import spec

_MASKED = -1e30


class Tap(NamedTuple):
    """One layer: the residual stream after it, (B, T, D); and what makes its attention, log-probabilities (B, N, T, S) float32.

    `attention` is None where a layer has none that its queries and keys alone decide (a recurrence, ALiBi, sinks). It is made from
    them when it is called, whatever kernel attends: T x S numbers for each head.
    """

    hidden_BTD: jax.Array
    attention: Callable[[], jax.Array] | None


def of_block(block: Any, cache: Any, x_BTD: jax.Array) -> dict[str, jax.Array]:
    """What a scan keeps of one layer."""
    return {"x": x_BTD} | ({name: cache[name] for name in "qk"} if maps(block.b.attention) else {})


def maps(a: Any) -> bool:
    """Whether a layer's attention can be told from its queries and keys."""
    return not isinstance(a, spec.Delta) and not getattr(a, "slopes", ()) and not getattr(a, "sinks", False)


def tap(block: spec.Block, window: int, seen: dict[str, jax.Array], segment_ids_BT: jax.Array) -> Tap:
    """A layer by what a scan kept of it; `window` in tokens, 0 for none."""
    a = block.attention
    made = partial(_attention, a, window, seen["q"], seen["k"], segment_ids_BT) if maps(a) else None
    return Tap(seen["x"], made)


def _attention(a: Any, window: int, q_BTNH: jax.Array, k_BKHS: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K, scale = k_BKHS.shape[1], a.scale if a.scale is not None else a.head_dim**-0.5
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bkhs->bkgts", q_BTKGH, k_BKHS, preferred_element_type=jnp.float32) * scale
    softcap = getattr(a, "softcap", None)
    scores_BKGTS = jnp.tanh(scores_BKGTS / softcap) * softcap if softcap else scores_BKGTS
    behind_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    causal = getattr(a, "causal", True)
    seen_TS = behind_TS >= 0 if causal else jnp.ones_like(behind_TS, bool)
    if window:
        seen_TS &= behind_TS < window if causal else jnp.abs(behind_TS) <= window
    visible_BTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & seen_TS[None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    return jax.nn.log_softmax(scores_BKGTS, axis=-1).reshape(B, N, T, T)
