"""Distances of layers by hand, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.taps import Tap
from jaxtune.objectives import matching

B, T, D, E, N = 2, 5, 4, 6, 3
RNG = np.random.default_rng(0)
WEIGHTS = RNG.uniform(0.5, 2, (B, T)) * (RNG.random((B, T)) < 0.7)
PAIRS = ((0, 2), (1, 5))


def taps(numbers: tuple[int, ...], dim: int, heads: int) -> dict[int, Tap]:
    def one() -> Tap:
        logps = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(B, heads, T, T)), jnp.float32))
        return Tap(jnp.asarray(RNG.normal(size=(B, T, dim)), jnp.float32), lambda: logps)

    return {number: one() for number in numbers}


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states(kind: str) -> None:
    student, teacher = taps((0, 1), D, N), taps((2, 5), E, N)
    projections = RNG.normal(size=(2, D, E))
    expected = 0.0
    for at, (ours, theirs) in enumerate(PAIRS):
        x = np.asarray(student[ours].hidden_BTD, np.float64) @ projections[at]
        y = np.asarray(teacher[theirs].hidden_BTD, np.float64)
        cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        expected += (WEIGHTS * (((x - y) ** 2).mean(-1) if kind == "mse" else 1 - cos)).sum() / 2
    given = (jnp.asarray(projections, jnp.float32), jnp.asarray(WEIGHTS, jnp.float32), kind)
    np.testing.assert_allclose(matching.hidden(student, teacher, PAIRS, *given), expected, rtol=1e-5)


@pytest.mark.parametrize("heads", [N, 1])
def test_attention(heads: int) -> None:
    """Head by head where both have as many, else of the heads' means."""
    student, teacher = taps((0, 1), D, N), taps((2, 5), E, heads)
    expected = 0.0
    for ours, theirs in PAIRS:
        q, p = (np.exp(np.asarray(each.attention(), np.float64)) for each in (student[ours], teacher[theirs]))  # type: ignore[misc]
        q = q if heads == N else q.mean(1, keepdims=True)
        expected += (WEIGHTS * (p * np.log(p / q)).sum(-1).mean(1)).sum() / 2
    found = matching.attention(student, teacher, PAIRS, jnp.asarray(WEIGHTS, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
