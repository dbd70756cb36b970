"""Every attention path and loss path, value and gradients, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.models.attention import Rule, attend
from jaxtune.models.heads import LMHead, TiedHead
from jaxtune.models.layers import Embed, Linear, Runtime
from jaxtune.objectives import ops

NUM_HEADS, NUM_KV_HEADS = 4, 2
RULES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "causal": (Rule(0.2), {}),
    "softcap": (Rule(0.2, softcap=2.0), {}),
    "the second of two windows": (Rule(0.2, windows=(0, 9)), {"window_index": 1}),
    "sinks": (Rule(0.2), {"sinks": True}),
    "both ways": (Rule(0.2, causal=False), {}),
    "slopes": (Rule(0.2, slopes=(0.5, 0.25, 0.125, 0.0625)), {}),
    "both ways, windowed": (Rule(0.2, causal=False, windows=(7,)), {}),
}
PATHS = {
    "plain": ("xla", 40, 16),
    "blocks of queries": ("xla", 1024, 16),
    "the TPU's kernel, interpreted": ("splash", 256, 128),
    "the GPU's kernel, interpreted": ("flash", 256, 16),
}


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    config = config_lib.base()
    config.mesh.fsdp = num_devices
    return sharding.make_mesh(config, jax.devices()[:num_devices])


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, rule: Rule, window: int, sinks: np.ndarray | None, d_out: np.ndarray
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """(out, dq, dk, dv) of one row, head by head: softmax's gradient is P * (dP - sum(P * dP))."""
    T, N, _ = q.shape
    out, dq, dk, dv = np.zeros((T, N, v.shape[2])), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    behind = np.arange(T)[:, None] - np.arange(T)
    seen = (segments[:, None] == segments) & (behind >= 0 if rule.causal else True)
    if window:
        seen &= behind < window if rule.causal else abs(behind) <= window
    for n in range(N):
        kv = n // (N // k.shape[1])
        scores = q[:, n] @ k[:, kv].T * rule.scale
        slope = np.ones_like(scores)
        if rule.softcap:
            capped = np.tanh(scores / rule.softcap)
            scores, slope = capped * rule.softcap, 1 - capped**2
        if rule.slopes:
            scores = scores - rule.slopes[n] * behind
        weights = np.where(seen, np.exp(scores - scores.max(where=seen, axis=1, keepdims=True, initial=-1e9)), 0)
        top = scores.max(where=seen, axis=1, initial=-1e9)
        total = weights.sum(1) + (0 if sinks is None else np.exp(sinks[n] - top))
        probs = weights / total[:, None]
        out[:, n] = probs @ v[:, kv]
        d_probs = d_out[:, n] @ v[:, kv].T
        d_scores = probs * (d_probs - (probs * d_probs).sum(1, keepdims=True)) * slope * rule.scale
        dq[:, n] = d_scores @ k[:, kv]
        dk[:, kv] += d_scores.T @ q[:, n]
        dv[:, kv] += probs.T @ d_out[:, n]
    return out, dq, dk, dv


def has(path: str, rule: Rule) -> bool:
    """Splash has neither slopes nor windows to both sides, flash the plain rule alone: `attend` takes the plain form."""
    if PATHS[path][0] == "flash":
        return rule in (RULES["causal"][0], RULES["both ways"][0])
    return path in ("plain", "blocks of queries") or not (rule.slopes or (not rule.causal and any(rule.windows)))


@pytest.mark.parametrize(
    ("path", "case"), [(path, case) for path in PATHS for case in RULES if has(path, RULES[case][0])]
)
def test_attention_is_that_of_float64(path: str, case: str) -> None:
    (kind, num_tokens, head_dim), (rule, given) = PATHS[path], RULES[case]
    rng = np.random.default_rng(0)
    q, d_out = (rng.normal(size=(num_tokens, NUM_HEADS, head_dim)) for _ in range(2))
    k, v = (rng.normal(size=(num_tokens, NUM_KV_HEADS, head_dim)) for _ in range(2))
    segments = np.repeat([1, 2, 3], [num_tokens // 4, num_tokens // 2, num_tokens // 4]).astype(np.int32)
    sinks = rng.normal(size=NUM_HEADS) if "sinks" in given else None
    index = given.get("window_index", 0)
    run = Runtime(attention=kind, mesh=mesh_of(1), spec=sharding.spec)

    @jax.jit
    def ours(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        options = {
            "window_index": jnp.int32(index),
            "sinks_N": None if sinks is None else jnp.asarray(sinks, jnp.float32),
        }
        ids = jnp.asarray(segments)[None]
        out, pull = jax.vjp(
            lambda q, k, v: attend(q[None], k[None], v[None], ids, ids, rule, run, **options)[0], q, k, v
        )
        return out, *pull(d_out)

    found = ours(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, d_out)))
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"),
        found,
        reference(q, k, v, segments, rule, rule.windows[index], sinks, d_out),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(np.abs(want).max())), err_msg=name)


def heads(kind: str, run: Runtime, kernel_DV: np.ndarray) -> nnx.Module:
    dim, vocab_size = kernel_DV.shape
    if kind == "tied":
        embed = Embed(vocab_size, dim, run, nnx.Rngs(0))
        embed.table = nnx.Param(jnp.asarray(kernel_DV.T, jnp.float32), axes=("vocab", "embed"))
        return TiedHead(embed, 5.0)
    proj = Linear(dim, vocab_size, ("embed", "vocab"), run, nnx.Rngs(0))
    proj.kernel = nnx.Param(jnp.asarray(kernel_DV, jnp.float32), axes=("embed", "vocab"))
    return LMHead(proj, 5.0)


@pytest.mark.parametrize("kind", ["tied", "its own"])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_loss_is_that_of_float64(kind: str, num_devices: int) -> None:
    """Chunks that divide nothing, a vocabulary that the mesh does not divide, a soft cap, weights of 0 and others."""
    rng = np.random.default_rng(1)
    B, T, D, V = 8, 21, 16, 101
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    targets, weights = rng.integers(0, V, (B, T)), (rng.random((B, T)) < 0.6) * rng.random((B, T))
    mesh = mesh_of(num_devices)
    spread = num_devices > 1
    run = Runtime(mesh=mesh, spec=sharding.spec, constrain=sharding.constrain_on(mesh), spread_head=spread)
    graphdef, params = nnx.split(heads(kind, run, kernel))

    @jax.jit
    def ours(hidden: Any, params: Any) -> Any:
        def head(params: Any) -> ops.Head:
            return ops.Head(params, lambda p, h: nnx.merge(graphdef, p)(h), 4)

        given = (jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
        loss, grads = jax.value_and_grad(lambda h, p: ops.cross_entropy(head(p), h, *given)[0], (0, 1))(hidden, params)
        by_token = jax.grad(lambda h: jnp.sum(ops.token_nll(head(params), h, given[0]) * given[1]))(hidden)
        return loss, *grads, by_token

    loss, d_hidden, d_params, by_token = ours(jnp.asarray(hidden, jnp.float32), params)
    capped = np.tanh(hidden @ kernel / 5.0)
    logits = capped * 5.0
    log_total = np.log(np.exp(logits).sum(-1))
    at = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    d_logits = (np.exp(logits - log_total[..., None]) - np.eye(V)[targets]) * weights[..., None] * (1 - capped**2)
    np.testing.assert_allclose(loss, ((log_total - at) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(d_hidden, d_logits @ kernel.T, atol=2e-5)
    np.testing.assert_allclose(by_token, d_logits @ kernel.T, atol=2e-5)
    wanted = np.einsum("btd,btv->dv", hidden, d_logits)
    np.testing.assert_allclose(jax.tree.leaves(d_params)[0], wanted.T if kind == "tied" else wanted, atol=1e-4)
