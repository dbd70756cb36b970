"""Log-probabilities of chosen tokens, whose gradient keeps no logits: the brick of objectives that weigh whole answers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Head, shards_as_rows


def token_logps(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, wanted_BT: jax.Array) -> jax.Array:
    """log p(target) of the tokens where `wanted` is not 0, float32 (B, T); 0 elsewhere.

    As in `ops.cross_entropy`, wanted tokens come first in each row, the projection runs chunk by chunk and skips chunks
    with nothing wanted. What comes later, a function of whole answers, only scales each token's gradient: so
    d log p / d hidden is taken while the logits are at hand and kept in the logits' place, D numbers a token and not V. Where the
    head trains too, its own gradient needs the scales first, and the backward pass makes the logits again.
    """
    B, T = targets_BT.shape
    hidden_BTD, targets_BT, wanted_BT = (shards_as_rows(head, x) for x in (hidden_BTD, targets_BT, wanted_BT))
    order_BT = jnp.argsort(wanted_BT == 0, axis=1, stable=True)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1)
    targets_BT, wanted_BT = (jnp.take_along_axis(x, order_BT, axis=1) for x in (targets_BT, wanted_BT))
    chunk = min(head.chunk_tokens, targets_BT.shape[1])
    logps_BT = _chunked(head.apply, chunk, head.params, hidden_BTD, targets_BT, wanted_BT)
    logps_BT = jnp.take_along_axis(logps_BT, jnp.argsort(order_BT, axis=1), axis=1)
    C = head.num_shards
    return logps_BT if C == 1 else logps_BT.reshape(C, B, T // C).swapaxes(0, 1).reshape(B, T)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    apply: Any, chunk: int, params: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> jax.Array:
    return _scan(apply, chunk, params, hidden, targets, wanted, False)[0]


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, …) -> (chunks, B, chunk, …)."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def _log_p(apply: Any, params: Any, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    logits_V = apply(params, hidden)
    target_logits = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    return target_logits - jax.nn.logsumexp(logits_V, axis=-1)


def _scan(
    apply: Any,
    chunk: int,
    params: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    pulled: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """(log p (B, T), d log p / d hidden (B, T, D) where `pulled`)."""

    def value_and_pull(hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> Any:
        keep = wanted != 0
        if not pulled:
            return _log_p(apply, params, hidden, targets) * keep, None
        logps, pull = jax.vjp(lambda h: _log_p(apply, params, h, targets), hidden)
        return logps * keep, pull(keep.astype(logps.dtype))[0]

    def one(_: None, xs: Any) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_pull, *xs))
        return None, jax.lax.cond(jnp.any(xs[2] != 0), value_and_pull, lambda *_: zeros, *xs)

    xs = tuple(_split(x, chunk) for x in (hidden_BTD, targets_BT, wanted_BT))
    logps, pulls = jax.lax.scan(one, None, xs)[1]
    length = targets_BT.shape[1]
    return _joined(logps, length), None if pulls is None else _joined(pulls, length)


def _forward(apply: Any, chunk: int, params: Any, hidden: Any, targets: Any, wanted: Any) -> Any:
    is_primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
    values = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=is_primal)
    trains = any(leaf.perturbed for leaf in jax.tree.leaves(params, is_leaf=is_primal))
    given = (hidden.value, targets.value, wanted.value)
    logps_BT, pulls_BTD = _scan(apply, chunk, values, *given, hidden.perturbed and not trains)
    return logps_BT, (pulls_BTD, (values, *given) if trains else None)


def _backward(apply: Any, chunk: int, saved: Any, scales_BT: Any) -> Any:
    pulls_BTD, again = saved
    if isinstance(scales_BT, jax.custom_derivatives.SymbolicZero) or (pulls_BTD is None and again is None):
        return None, None, None, None
    if again is None:
        return None, (pulls_BTD * scales_BT[..., None].astype(pulls_BTD.dtype)).astype(pulls_BTD.dtype), None, None
    values, hidden_BTD, targets_BT, wanted_BT = again

    def pull_one(hidden: jax.Array, targets: jax.Array, scales: jax.Array) -> Any:
        _, pull = jax.vjp(lambda p, h: _log_p(apply, p, h, targets), values, hidden)
        return pull(scales)

    def one(d_params: Any, xs: Any) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(pull_one, *xs))
        more, d_hidden = jax.lax.cond(jnp.any(xs[2] != 0), pull_one, lambda *_: zeros, *xs)
        return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), d_params, more), d_hidden

    scales_BT = scales_BT * (wanted_BT != 0)
    start = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), values)
    xs = tuple(_split(x, chunk) for x in (hidden_BTD, targets_BT, scales_BT))
    d_params, d_hidden = jax.lax.scan(one, start, xs)
    d_params = jax.tree.map(lambda g, like: g.astype(like.dtype), d_params, values)
    return d_params, _joined(d_hidden, targets_BT.shape[1]), None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
