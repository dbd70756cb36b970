"""The gated delta rule (Gated DeltaNet, arXiv:2412.06464): a linear recurrence over time with a matrix for a state.

Of one head, with keys and queries of length 1: S_t = a_t S_{t-1} + k_t u_t', u_t = b_t (v_t - a_t S_{t-1}' k_t),
o_t = S_t' q_t. A segment begins with S = 0; padding leaves S as it is.

Shapes here, beside the legend: K key heads of H dims, G value heads for each of them, of P dims; Z chunks of tokens I (or J,
where they are the ones looked at); C channels of the convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import spec
from jaxtune.models.grouped import At, Cache, Where
from jaxtune.models.layers import Linear, RMSNorm, Runtime, activation, along_last, recomputed

_CHUNK_TOKENS = 64
_EPS = 1e-6  # of the keys' and queries' lengths
# The rule itself is a small part of a layer's work, and errors in its state add up over time.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class GatedDelta(nnx.Module):
    """Mixes tokens by the gated delta rule, after a short causal convolution; its output is normed and gated."""

    def __init__(self, c: spec.Config, a: spec.Delta, run: Runtime, rngs: nnx.Rngs):
        self.a, self.run = a, run
        values = a.num_value_heads * a.value_dim
        channels = 2 * a.num_key_heads * a.key_dim + values

        def linear(out_dim: int) -> Linear:
            return Linear(c.dim, out_dim, ("embed", "heads"), run, rngs)

        self.in_proj_qkv, self.in_proj_z = linear(channels), linear(values)
        self.in_proj_b, self.in_proj_a = linear(a.num_value_heads), linear(a.num_value_heads)
        taps = jax.random.normal(rngs.params(), (channels, a.kernel), jnp.float32) * a.kernel**-0.5
        self.conv = nnx.Param(taps.astype(run.param_dtype), axes=("heads", None))
        rates = jax.random.uniform(rngs.params(), (a.num_value_heads,), jnp.float32, 0.01, 16.0)
        self.a_log = nnx.Param(jnp.log(rates).astype(run.param_dtype), axes=("heads",))
        self.dt_bias = nnx.Param(jnp.ones((a.num_value_heads,), run.param_dtype), axes=("heads",))
        self.norm = RMSNorm(a.value_dim, c.norm.eps, run)
        self.out_proj = Linear(values, c.dim, ("heads", "embed"), run, rngs)

    def __call__(
        self, x_BTD: jax.Array, where: Where, at: At, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        a, run = self.a, self.run
        (B, T, _), K = x_BTD.shape, a.num_key_heads
        segments_BT, before_B = where.segment_ids_BT, jnp.zeros((B,), jnp.int32)
        state_BKGHP, tail_BTC = self._remembered(cache, at.row, B)
        if where.key_segments_BS is not None and where.used is not None:
            written = jnp.arange(where.key_segments_BS.shape[1])[None] < where.used
            before_B = runs_of(jnp.where(written, where.key_segments_BS, 0), before_B)[:, -1]
        runs_BT = runs_of(segments_BT, before_B)
        mixed_BTC, tail_BTC = convolve(
            self.in_proj_qkv(x_BTD, key), tail_BTC, self.conv[...], segments_BT, before_B, runs_BT, activation(a.act)
        )
        q, k, v = jnp.split(mixed_BTC, [K * a.key_dim, 2 * K * a.key_dim], axis=-1)
        real_BT1 = (segments_BT != 0)[..., None]
        rate, speed = jnp.exp(self.a_log[...].astype(jnp.float32)), self.dt_bias[...].astype(jnp.float32)
        a_BTN = self.in_proj_a(x_BTD, key).astype(jnp.float32)
        fade_BTN = jnp.where(real_BT1, -along_last(rate, a_BTN) * jax.nn.softplus(a_BTN + along_last(speed, a_BTN)), 0)
        beta_BTN = jnp.where(real_BT1, jax.nn.sigmoid(self.in_proj_b(x_BTD, key).astype(jnp.float32)), 0)

        def heads(x: jax.Array, *dims: int) -> jax.Array:
            x = x.reshape(B, T, K, *dims)
            return run.constrain(x, ("batch", "length", "kv_heads", *[None] * len(dims)))

        G = a.num_value_heads // K
        out_BTKGP, state_BKGHP = delta_rule(
            heads(q, a.key_dim), heads(k, a.key_dim), heads(v, G, a.value_dim), heads(fade_BTN, G), heads(beta_BTN, G),
            runs_BT, state_BKGHP, before_B,
        )  # fmt: skip
        z_BTKGP = heads(self.in_proj_z(x_BTD, key), G, a.value_dim).astype(jnp.float32)
        out_BTKGP = (self.norm(out_BTKGP) * jax.nn.silu(z_BTKGP)).astype(run.compute_dtype)
        if cache is not None:
            new = {"state": state_BKGHP, "tail": tail_BTC}
            cache = {name: jax.lax.dynamic_update_index_in_dim(cache[name], new[name].astype(cache[name].dtype), at.row, 0) for name in new}  # fmt: skip
        return self.out_proj(out_BTKGP.reshape(B, T, -1), key), cache

    def _remembered(self, cache: Cache | None, row: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """(state, the last inputs of the convolution) of this layer."""
        found = self.empty(self.a, 1, rows, 0, self.run.compute_dtype) if cache is None else cache
        at = 0 if cache is None else row
        state, tail = (jax.lax.dynamic_index_in_dim(found[name], at, keepdims=False) for name in ("state", "tail"))
        return state, tail

    @staticmethod
    def empty(a: spec.Delta, layers: int, rows: int, slots: int, dtype: Any) -> Cache:
        K, N = a.num_key_heads, a.num_value_heads
        channels = 2 * K * a.key_dim + N * a.value_dim
        return {
            "state": jnp.zeros((layers, rows, K, N // K, a.key_dim, a.value_dim), jnp.float32),
            "tail": jnp.zeros((layers, rows, a.kernel - 1, channels), dtype),
        }


def runs_of(segments_BT: jax.Array, before_B: jax.Array) -> jax.Array:
    """The segment of the last token at or before each place; `before_B` where there is none."""
    last_BT = jax.lax.cummax(jnp.where(segments_BT != 0, jnp.arange(segments_BT.shape[1])[None], -1), axis=1)
    found_BT = jnp.take_along_axis(jnp.asarray(segments_BT), jnp.maximum(last_BT, 0), axis=1)
    return jnp.where(last_BT >= 0, found_BT, before_B[:, None])


def convolve(
    x_BTC: jax.Array, tail_BTC: jax.Array, taps_CI: jax.Array, segments_BT: jax.Array, before_B: jax.Array, runs_BT: jax.Array,
    act: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """act(causal depthwise convolution) within segments; `tail_BTC` are the last inputs of segment `before_B`.

    Returns also the last inputs of the segment that the row ends in, padding left out.
    """
    num_tail, T = tail_BTC.shape[1], x_BTC.shape[1]
    longer_BTC = jnp.concatenate([tail_BTC.astype(x_BTC.dtype), x_BTC], axis=1)
    longer_BT = jnp.concatenate([jnp.broadcast_to(before_B[:, None], tail_BTC.shape[:2]), segments_BT], axis=1)

    @recomputed
    def run(longer_BTC: jax.Array, taps_CI: jax.Array) -> jax.Array:
        total_BTC = jnp.zeros(x_BTC.shape, jnp.float32)
        for i in range(num_tail + 1):
            same_BT = (longer_BT[:, i : i + T] == segments_BT) & (segments_BT != 0)
            tap = along_last(taps_CI[:, i].astype(jnp.float32), total_BTC)
            total_BTC += jnp.where(same_BT[..., None], longer_BTC[:, i : i + T].astype(jnp.float32) * tap, 0)
        return act(total_BTC).astype(x_BTC.dtype)

    mine_BT = (longer_BT == runs_BT[:, -1:]) & (longer_BT != 0)
    at_BT = jnp.flip(jax.lax.top_k(jnp.where(mine_BT, jnp.arange(longer_BT.shape[1])[None], -1), num_tail)[0], axis=1)
    ends_BTC = jnp.take_along_axis(longer_BTC, jnp.maximum(at_BT, 0)[..., None], axis=1)
    return run(longer_BTC, taps_CI), jnp.where(at_BT[..., None] >= 0, ends_BTC, 0)


def delta_rule(
    q_BTKH: jax.Array, k_BTKH: jax.Array, v_BTKGP: jax.Array, fade_BTKG: jax.Array, beta_BTKG: jax.Array, runs_BT: jax.Array,
    state_BKGHP: jax.Array, before_B: jax.Array, chunk_tokens: int = _CHUNK_TOKENS,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The rule over a row: (outputs (B, T, K, G, P) in v's dtype, the state after it), float32 inside.

    fade: log a_t, and beta: b_t, both 0 in padding. `runs_BT` says whose state is read and written (`runs_of`), `before_B`
    whose `state_BKGHP` is.
    """
    rule = _step if q_BTKH.shape[1] == 1 else partial(_chunked, chunk_tokens)

    @recomputed
    def run(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS) for x in (q, k))
        return rule(q * q.shape[-1] ** -0.5, k, v, *rest)

    out, state = run(q_BTKH, k_BTKH, v_BTKGP, fade_BTKG, beta_BTKG, runs_BT, state_BKGHP, before_B)
    return out.astype(v_BTKGP.dtype), state


def _step(
    q: jax.Array, k: jax.Array, v: jax.Array, fade: jax.Array, beta: jax.Array, runs: jax.Array, state: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One token."""
    q, k, v, fade, beta = (x[:, 0] for x in (q, k, v, fade, beta))
    kept = jnp.where((runs[:, 0] == before)[:, None, None], jnp.exp(fade), 0)
    state = state * kept[..., None, None]
    u = beta[..., None] * (v - _einsum("bkh,bkghp->bkgp", k, state))
    state = state + _einsum("bkh,bkgp->bkghp", k, u)
    return _einsum("bkh,bkghp->bkgp", q, state)[:, None], state


def _chunked(
    size: int, q: jax.Array, k: jax.Array, v: jax.Array, fade: jax.Array, beta: jax.Array, runs: jax.Array, state: jax.Array,
    before: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Chunks of tokens at once (section 3.3 of the paper), the state from one to the next.

    Within a chunk that state S enters, U solves (1 + A) U = b (V - e^F K S): A_ij = b_i e^(F_i - F_j) k_i'k_j for j < i, F
    the sum of the log decays. Then O = e^F Q S + (e^(F_i - F_j) q_i'k_j, j <= i) U. Whatever would cross into another
    segment is 0.
    """
    B, T = runs.shape
    size = min(size, T)
    more = -T % size
    pad = [(0, 0), (0, more)]

    def chunks(x: jax.Array, mode: Any = "constant") -> jax.Array:
        x = jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(B, -1, size, *x.shape[2:])

    q, k, v, fade, beta = (chunks(x) for x in (q, k, v, fade, beta))
    runs_BZI = chunks(runs, "edge")
    enter_BZ = jnp.concatenate([before[:, None], runs_BZI[:, :-1, -1]], axis=1)
    fade_BZKGI, tri = jnp.moveaxis(fade, 2, -1), jnp.tri(size, dtype=jnp.float32)
    # Each pair's own sum, not a difference of two: after a strong decay that would have lost its digits.
    between_BZKGIJ = _einsum("il,bzkgl,lj->bzkgij", tri, fade_BZKGI, jnp.tri(size, k=-1, dtype=jnp.float32))
    seen_BZIJ = (runs_BZI[..., :, None] == runs_BZI[..., None, :]) & jnp.tri(size, dtype=bool)[None, None]
    seen = seen_BZIJ[:, :, None, None]
    decay_BZKGIJ = jnp.where(seen, jnp.exp(between_BZKGIJ), 0)
    entered_BZI = runs_BZI == enter_BZ[..., None]
    lead_BZKGI = jnp.where(entered_BZI[:, :, None, None], jnp.exp(jnp.cumsum(fade_BZKGI, axis=-1)), 0)

    beta_BZKGI = jnp.moveaxis(beta, 2, -1)
    below = jnp.tri(size, k=-1, dtype=bool)[None, None, None, None]
    kk_BZKIJ = _einsum("bzikh,bzjkh->bzkij", k, k)
    a_BZKGIJ = jnp.where(below, beta_BZKGI[..., None] * decay_BZKGIJ * kk_BZKIJ[:, :, :, None], 0)
    values = beta_BZKGI[..., None] * jnp.moveaxis(v, 2, -2)
    reads = (beta_BZKGI * lead_BZKGI)[..., None] * jnp.moveaxis(k, 2, -2)[:, :, :, None]
    solved = jax.lax.linalg.triangular_solve(
        a_BZKGIJ, jnp.concatenate([values, reads], axis=-1), left_side=True, lower=True, unit_diagonal=True
    )
    u0_BZKGIP, w_BZKGIH = jnp.split(solved, [v.shape[-1]], axis=-1)
    scores_BZKGIJ = _einsum("bzikh,bzjkh->bzkij", q, k)[:, :, :, None] * decay_BZKGIJ
    q_BZKGIH = lead_BZKGI[..., None] * jnp.moveaxis(q, 2, -2)[:, :, :, None]
    k_BZKGIH = decay_BZKGIJ[..., -1, :, None] * jnp.moveaxis(k, 2, -2)[:, :, :, None]

    def chunk(state: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        u0, w, scores, q, k, kept = given
        u = u0 - _einsum("bkgih,bkghp->bkgip", w, state)
        out = _einsum("bkgih,bkghp->bkgip", q, state) + _einsum("bkgij,bkgjp->bkgip", scores, u)
        return kept[..., None, None] * state + _einsum("bkgih,bkgip->bkghp", k, u), out

    each = (u0_BZKGIP, w_BZKGIH, scores_BZKGIJ, q_BZKGIH, k_BZKGIH, lead_BZKGI[..., -1])
    state, out = jax.lax.scan(chunk, state, tuple(jnp.moveaxis(x, 1, 0) for x in each))
    out_BTKGP = jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(B, -1, *v.shape[3:])
    return out_BTKGP[:, :T], state
