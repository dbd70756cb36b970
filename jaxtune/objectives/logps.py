"""Log-probabilities of chosen tokens, whose gradient keeps no logits: the brick of objectives that weigh whole answers."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Head, shards_as_rows


class _Form(NamedTuple):
    """What is taken of a token's logits, a chunk of tokens at a time: log p(target), and with `entropy` that too, as a last
    dim of 1 or 2; the first `num_pulled` of them have a gradient.
    """

    apply: Any
    chunk: int
    entropy: bool
    num_pulled: int

    def of(self, params: Any, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """(…, D) -> (…, 1 or 2)."""
        logits_V = self.apply(params, hidden)
        log_total = jax.nn.logsumexp(logits_V, axis=-1)
        found = [jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0] - log_total]
        if self.entropy:
            probs_V = jnp.exp(logits_V - log_total[..., None])
            found.append(log_total - jnp.sum(probs_V * logits_V, axis=-1))
        return jnp.stack(found, axis=-1)


def token_logps(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, wanted_BT: jax.Array) -> jax.Array:
    """log p(target) of the tokens where `wanted` is not 0, float32 (B, T); 0 elsewhere.

    As in `ops.cross_entropy`, wanted tokens come first in each row, the projection runs chunk by chunk and skips chunks
    with nothing wanted. What comes later, a function of whole answers, only scales each token's gradient: so
    d log p / d hidden is taken while the logits are at hand and kept in the logits' place, D numbers a token and not V. Where the
    head trains too, its own gradient needs the scales first, and the backward pass makes the logits again.
    """
    return _of_tokens(head, hidden_BTD, targets_BT, wanted_BT, False, 1)[..., 0]


def token_logps_and_entropy(
    head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, wanted_BT: jax.Array, trains_entropy: bool
) -> tuple[jax.Array, jax.Array]:
    """`token_logps`, and the entropy (nats) of the distribution that each was drawn from, which has a gradient where
    `trains_entropy`."""
    found = _of_tokens(head, hidden_BTD, targets_BT, wanted_BT, True, 2 if trains_entropy else 1)
    return found[..., 0], found[..., 1] if trains_entropy else jax.lax.stop_gradient(found[..., 1])


def _of_tokens(
    head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, wanted_BT: jax.Array, entropy: bool, num_pulled: int
) -> jax.Array:
    B, T = targets_BT.shape
    hidden_BTD, targets_BT, wanted_BT = (shards_as_rows(head, x) for x in (hidden_BTD, targets_BT, wanted_BT))
    order_BT = jnp.argsort(wanted_BT == 0, axis=1, stable=True)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1)
    targets_BT, wanted_BT = (jnp.take_along_axis(x, order_BT, axis=1) for x in (targets_BT, wanted_BT))
    form = _Form(head.apply, min(head.chunk_tokens, targets_BT.shape[1]), entropy, num_pulled)
    found = _chunked(form, head.params, hidden_BTD, targets_BT, wanted_BT)
    found = jnp.take_along_axis(found, jnp.argsort(order_BT, axis=1)[..., None], axis=1)
    C = head.num_shards
    return found if C == 1 else found.reshape(C, B, T // C, -1).swapaxes(0, 1).reshape(B, T, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(form: _Form, params: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> jax.Array:
    return _scan(form, params, hidden, targets, wanted, 0)[0]


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, …) -> (chunks, B, chunk, …)."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def _scan(
    form: _Form, params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, wanted_BT: jax.Array, num_pulled: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(what `form` takes, (B, T, 1 or 2); the gradient of each of the first `num_pulled`, (B, T, D))."""

    def value_and_pulls(hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> Any:
        keep = (wanted != 0)[..., None]
        if not num_pulled:
            return form.of(params, hidden, targets) * keep, ()
        found, pull = jax.vjp(lambda h: form.of(params, h, targets), hidden)
        which = jnp.arange(found.shape[-1])
        ones = [jnp.broadcast_to(keep & (which == i)[None, None], found.shape) for i in range(num_pulled)]
        return found * keep, tuple(pull(one.astype(found.dtype))[0] for one in ones)

    def one(_: None, xs: Any) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_pulls, *xs))
        return None, jax.lax.cond(jnp.any(xs[2] != 0), value_and_pulls, lambda *_: zeros, *xs)

    xs = tuple(_split(x, form.chunk) for x in (hidden_BTD, targets_BT, wanted_BT))
    found, pulls = jax.lax.scan(one, None, xs)[1]
    length = targets_BT.shape[1]
    return _joined(found, length), tuple(_joined(pulled, length) for pulled in pulls)


def _forward(form: _Form, params: Any, hidden: Any, targets: Any, wanted: Any) -> Any:
    is_primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
    values = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=is_primal)
    trains = any(leaf.perturbed for leaf in jax.tree.leaves(params, is_leaf=is_primal))
    given = (hidden.value, targets.value, wanted.value)
    found, pulls = _scan(form, values, *given, form.num_pulled if hidden.perturbed and not trains else 0)
    return found, (pulls, (values, *given) if trains else None)


def _backward(form: _Form, saved: Any, scales_BTO: Any) -> Any:
    pulls, again = saved
    if isinstance(scales_BTO, jax.custom_derivatives.SymbolicZero) or (not pulls and again is None):
        return None, None, None, None
    if again is None:
        scaled = [pulled * scales_BTO[..., i, None].astype(pulled.dtype) for i, pulled in enumerate(pulls)]
        return None, sum(scaled[1:], scaled[0]).astype(pulls[0].dtype), None, None
    values, hidden_BTD, targets_BT, wanted_BT = again

    def pull_one(hidden: jax.Array, targets: jax.Array, scales: jax.Array) -> Any:
        _, pull = jax.vjp(lambda p, h: form.of(p, h, targets), values, hidden)
        return pull(scales)

    def one(d_params: Any, xs: Any) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(pull_one, *xs))
        more, d_hidden = jax.lax.cond(jnp.any(xs[2] != 0), pull_one, lambda *_: zeros, *xs)
        return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), d_params, more), d_hidden

    scales_BTO = scales_BTO * (wanted_BT != 0)[..., None]
    start = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), values)
    xs = tuple(_split(x, form.chunk) for x in (hidden_BTD, targets_BT, scales_BTO))
    d_params, d_hidden = jax.lax.scan(one, start, xs)
    d_params = jax.tree.map(lambda g, like: g.astype(like.dtype), d_params, values)
    return d_params, _joined(d_hidden, targets_BT.shape[1]), None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
