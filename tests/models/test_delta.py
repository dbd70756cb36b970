"""The gated delta rule in chunks against the rule itself, token by token: packed rows, padding, caches, any length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.models import delta, layers, qwen3_5_text
from jaxtune.models.layers import Runtime
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")
B, K, G, H, P = 2, 2, 3, 8, 5
PACKED = np.repeat([[0, 1, 2, 3, 0]], [7, 70, 1, 50, 12], 1)  # padding, three segments, padding
OTHER = np.repeat([[4, 6]], [64, 76], 1)  # a segment ends with a chunk


def inputs(num_tokens: int, alike: float = 0.0) -> tuple[np.ndarray, ...]:
    """(q, k, v, log decays, betas); with `alike` near 1 all keys are nearly one key, decays nearly nothing."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, B, num_tokens, K, H))
    k = (1 - alike) * k + alike
    v = rng.normal(size=(B, num_tokens, K, G, P))
    fade = -np.exp(rng.normal(size=(B, num_tokens, K, G))) * (1 - alike)
    beta = 1 / (1 + np.exp(-rng.normal(size=(B, num_tokens, K, G)))) * (1 - alike) + 0.99 * alike
    return q, k, v, fade, beta


def token_by_token(q, k, v, fade, beta, segments, state, segment) -> tuple[np.ndarray, np.ndarray]:
    """The rule as the paper's equation 10 states it, in float64."""
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    out, state, segment = np.zeros_like(v), state.copy(), list(segment)
    for b, t in np.ndindex(segments.shape):
        if not segments[b, t]:
            continue
        if segments[b, t] != segment[b]:
            state[b], segment[b] = 0, segments[b, t]
        for n in np.ndindex(K, G):
            S, k_H = state[b][n] * np.exp(fade[b, t][n]), k[b, t, n[0]]
            state[b][n] = S + np.outer(k_H, beta[b, t][n] * (v[b, t][n] - S.T @ k_H))
            out[b, t][n] = state[b][n].T @ q[b, t, n[0]] * H**-0.5
    return out, state


def ours(q, k, v, fade, beta, segments, state, before, **options: Any) -> tuple[jax.Array, jax.Array]:
    real = jnp.asarray(segments != 0)[..., None, None]
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)] + [jnp.where(real, x, 0) for x in (fade, beta)]
    before = jnp.asarray(before, jnp.int32)
    runs = delta.runs_of(jnp.asarray(segments, jnp.int32), before)
    return delta.delta_rule(
        *(x.astype(jnp.float32) for x in arrays), runs, jnp.asarray(state, jnp.float32), before, **options
    )


@pytest.mark.parametrize("chunk_tokens", [64, 16, 200])
@pytest.mark.parametrize("alike", [0.0, 0.98], ids=["any keys", "keys alike"])
@pytest.mark.parametrize("before", [(0, 0), (1, 4)], ids=["from nothing", "from a state"])
def test_chunks_are_the_rule(chunk_tokens: int, alike: float, before: tuple[int, int]) -> None:
    segments = np.concatenate([PACKED, OTHER])
    arrays = inputs(segments.shape[1], alike)
    state = np.random.default_rng(1).normal(size=(B, K, G, H, P)) * np.reshape(np.asarray(before) != 0, (B, 1, 1, 1, 1))
    out, end = ours(*arrays, segments, state, before, chunk_tokens=chunk_tokens)
    expected, expected_end = token_by_token(*arrays, segments, state, before)
    real = segments != 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)
    np.testing.assert_allclose(end, expected_end, atol=1e-5)
    assert np.isfinite(np.asarray(out)).all()


def test_one_token_at_a_time_is_the_rule_too() -> None:
    segments = np.asarray([[0, 0, 1, 1, 0, 2], [3, 3, 3, 0, 0, 3]])
    arrays = inputs(6)
    state, before = np.zeros((B, K, G, H, P)), np.zeros(B, np.int32)
    expected, expected_end = token_by_token(*arrays, segments, state, before)
    for t in range(6):
        at = slice(t, t + 1)
        out, state = ours(*(x[:, at] for x in arrays), segments[:, at], state, before)
        before = np.where(segments[:, t], segments[:, t], before)
        real = segments[:, t] != 0
        np.testing.assert_allclose(np.asarray(out)[real, 0], expected[real, t], atol=1e-5)
    np.testing.assert_allclose(state, expected_end, atol=1e-5)


def test_gradients_are_those_of_one_token_at_a_time() -> None:
    """Also where decays are so strong that e^-F overflows, and exactly nothing crosses from one segment to another."""
    segments = np.concatenate([PACKED, OTHER])[:, :130]
    q, k, v, fade, beta = inputs(130)
    fade[:, 20:25] = -200.0
    state, before = np.zeros((B, K, G, H, P)), np.zeros(B, np.int32)

    def loss(arrays: Any, one: bool) -> jax.Array:
        if not one:
            return jnp.sum(jnp.sin(ours(*arrays, segments, state, before)[0]) * (segments != 0)[..., None, None, None])
        runs = delta.runs_of(jnp.asarray(segments, jnp.int32), jnp.asarray(before))

        def step(carry: Any, t: jax.Array) -> Any:
            now, last = carry
            here = [jax.lax.dynamic_slice_in_dim(jnp.asarray(x), t, 1, 1) for x in (*arrays, segments)]
            out, now = ours(*here, now, last)
            return (now, jax.lax.dynamic_index_in_dim(runs, t, 1, keepdims=False)), out[:, 0]

        start = (jnp.asarray(state, jnp.float32), jnp.asarray(before, jnp.int32))
        _, out = jax.lax.scan(step, start, jnp.arange(130))
        return jnp.sum(jnp.sin(jnp.moveaxis(out, 0, 1)) * (segments != 0)[..., None, None, None])

    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, fade, beta))
    found, expected = (jax.jit(jax.grad(lambda a, one=one: loss(a, one)))(arrays) for one in (False, True))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)

    def of_third(arrays: Any) -> jax.Array:
        return jnp.sum(ours(*arrays, segments, state, before)[0][0, 80:])

    for grad in jax.jit(jax.grad(of_third))(arrays):
        assert (np.asarray(grad)[0, :78] == 0).all()
        assert (np.asarray(grad)[0, 78:128] != 0).any()


@pytest.fixture(scope="module")
def tiny() -> Any:
    one_period = {"num_hidden_layers": 3, "layer_types": CASES["qwen3_5_text"]["layer_types"][:3]}
    config = qwen3_5_text.from_hf(CASES["qwen3_5_text"] | one_period)
    graphdef, variables = layers.flatten(qwen3_5_text.Model(config, Runtime(), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graphdef, {p: jnp.asarray(rng.normal(0, 0.1, v.shape) + p.endswith("scale"), jnp.float32) for p, v in variables.items()}  # fmt: skip


def test_a_model_packs_and_pads_over_many_chunks(tiny: Any) -> None:
    model = layers.bind(*tiny)
    tokens = np.random.default_rng(1).integers(0, 96, (1, 150))

    @jax.jit
    def run(*batch: jax.Array) -> jax.Array:
        return model.head(model(*batch)[0])

    def alone(start: int, stop: int) -> np.ndarray:
        width = np.arange(150)
        shifted = np.roll(tokens, -start, axis=1)
        return np.asarray(run(shifted, width[None], (width < stop - start).astype(np.int32)[None]))[0, : stop - start]

    segments = np.repeat([[0, 1, 2, 0]], [5, 75, 67, 3], 1)
    positions = np.concatenate([np.zeros(5, int), np.arange(75), np.arange(67), np.zeros(3, int)])[None]
    packed = np.asarray(run(tokens, positions, segments))[0]
    np.testing.assert_allclose(packed[5:80], alone(5, 80), atol=1e-4)  # a state over 75 tokens, sums in another order
    np.testing.assert_allclose(packed[80:147], alone(80, 147), atol=1e-4)


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 70, 1, 1), (75, 1), (2, 74)], ids=str)
def test_a_cache_filled_in_any_steps_is_the_full_forward(tiny: Any, steps: tuple[int, ...]) -> None:
    """Rows of different lengths, padded at the left and, before they go on, at the right."""
    model = layers.bind(*tiny)
    rng = np.random.default_rng(1)
    total, lengths = sum(steps), (sum(steps), sum(steps) - 3)
    tokens = rng.integers(0, 96, (2, total))
    segments = np.stack([np.arange(total) >= total - length for length in lengths]).astype(np.int32)
    positions = np.maximum(np.stack([np.arange(total) - (total - length) for length in lengths]), 0)

    @jax.jit
    def further(cache: Any, *batch: jax.Array) -> Any:
        hidden, cache = model(*batch, cache)
        return model.head(hidden), cache

    full = np.asarray(jax.jit(lambda *batch: model.head(model(*batch)[0]))(tokens, positions, segments))
    cache, at, found = model.empty_cache(2, total + 8), 0, []
    for size in steps:
        batch = [x[:, at : at + size] for x in (tokens, positions, segments)]
        out, cache = further(cache, *batch)
        found.append(out)
        at += size
        if at == total - 1:  # padding between a row's tokens leaves no trace
            _, cache = further(cache, *(np.zeros((2, 3), np.int32) for _ in range(3)))
    real = segments != 0
    np.testing.assert_allclose(np.concatenate(found, 1)[real], full[real], atol=1e-4)
