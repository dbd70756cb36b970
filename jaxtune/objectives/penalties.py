"""Penalties that hold a model near what it was: added to any objective, each with its weight.

    kl_base      mean over trained tokens of KL(base || model)                        `objectives/divergences.py`; with a temperature
                                                                                      learning without forgetting (arXiv:1606.09282)
    l2_start     1/2 ||theta - theta_0||^2                                            L2-SP, arXiv:1802.01483
    ewc          1/2 sum_i F_i (theta_i - theta_0,i)^2                                arXiv:1612.00796, equation 3
    orthogonal   sum over earlier adapters i and layers of ||A_i^T A||_F^2            O-LoRA, arXiv:2310.14152

theta_0 is where training starts. A LoRA's factors are no parameters of the function that it learns (A M and M^-1 B are the same
adapter), so `l2_start` measures its weight change instead, s (A B - A_0 B_0), without ever making it. DoRA's magnitudes, heads
and all else that trains count plainly.

Parameters are flat, dotted path -> array; layers and experts may be stacked in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Arrays = Mapping[str, jax.Array]
_EXACT = jax.lax.Precision.HIGHEST


def l2_start(params: Arrays, frozen: Arrays, start: Arrays, scale: Callable[[str], float]) -> jax.Array:
    """Half the squared distance of `params` to `start`, () float32.

    `frozen` has what does not train, of which only factors of an adapter are looked at; `scale` gives s by the path of a linear.
    """
    total, linears = jnp.float32(0), []
    for path, value in params.items():
        linear, _, kind = path.partition(".adapter.")
        if kind in ("lora_a", "lora_b"):
            linears.append(linear)
        else:
            total += jnp.sum(_difference(value, start[path]) ** 2)
    for linear in dict.fromkeys(linears):
        pairs = []
        for path in (f"{linear}.adapter.lora_a", f"{linear}.adapter.lora_b"):
            now = params[path] if path in params else frozen[path]
            pairs.append((now, start.get(path, now)))
        (a, a_0), (b, b_0) = pairs
        total += scale(linear) ** 2 * _change(a, a_0, b, b_0)
    return total / 2


def _change(a: jax.Array, a_0: jax.Array, b: jax.Array, b_0: jax.Array) -> jax.Array:
    """||A B - A_0 B_0||_F^2 = ||P Q||_F^2 = tr((P^T P)(Q Q^T)), where P = [A - A_0, A_0] and Q = [B; B - B_0].

    Its products are as thin as the factors; and as differences stand in P and Q themselves, nothing cancels near the start.
    """
    p = jnp.concatenate([_difference(a, a_0), a_0.astype(jnp.float32)], axis=-1)
    q = jnp.concatenate([b.astype(jnp.float32), _difference(b, b_0)], axis=-2)
    inner = jnp.einsum("...ir,...is->...rs", p, p, precision=_EXACT)
    outer = jnp.einsum("...ro,...so->...rs", q, q, precision=_EXACT)
    return jnp.sum(inner * outer)


def ewc(params: Arrays, start: Arrays, fisher: Arrays) -> jax.Array:
    """Half the squared distance of `params` to `start`, each weighed by its Fisher information, () float32."""
    total = jnp.float32(0)
    for path, value in params.items():
        total += jnp.sum(fisher[path] * _difference(value, start[path]) ** 2)
    return total / 2


def orthogonal(params: Arrays, earlier: Arrays) -> jax.Array:
    """How much the inputs that an adapter reads overlap with those of earlier ones, () float32.

    `earlier`: "LINEAR.adapter.lora_a" -> their A side by side, (…, in, r_1 + r_2 + …): a sum over adapters is one over columns.
    """
    total = jnp.float32(0)
    for path, before in earlier.items():
        now = params[path].astype(jnp.float32)
        overlap = jnp.einsum("...ir,...is->...rs", before.astype(jnp.float32), now, precision=_EXACT)
        total += jnp.sum(overlap**2)
    return total


def _difference(now: jax.Array, then: jax.Array) -> jax.Array:
    return now.astype(jnp.float32) - then.astype(jnp.float32)
