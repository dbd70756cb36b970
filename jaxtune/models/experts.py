"""Mixture of experts: dropless routing by a sorted, grouped matmul (`jax.lax.ragged_dot`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import spec
from jaxtune.models.layers import Axes, Linear, Runtime, activation


class ExpertLinear(nnx.Module):
    """y_i = x_i W_e(i) + b_e(i): one matmul per expert over the rows that chose it, W (E, in, out)."""

    def __init__(
        self, num: int, in_dim: int, out_dim: int, axes: Axes, run: Runtime, rngs: nnx.Rngs, *, use_bias: bool
    ):
        self.run = run
        kernel = jax.random.normal(rngs.params(), (num, in_dim, out_dim), jnp.float32) * 0.02
        self.kernel = nnx.Param(kernel.astype(run.param_dtype), axes=("expert", *axes))
        bias = jnp.zeros((num, out_dim), run.param_dtype)
        self.bias = nnx.Param(bias, axes=("expert", axes[1])) if use_bias else nnx.data(None)

    def __call__(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        """x: rows sorted by expert; `sizes_E` how many each has; `expert_M` whose each is. Returns (rows, out)."""
        dtype = self.run.compute_dtype
        y_MO = jax.lax.ragged_dot(x_MI.astype(dtype), self.kernel[...].astype(dtype), sizes_E)
        return y_MO if self.bias is None else y_MO + self.bias[...].astype(dtype)[expert_M]


class Experts(nnx.Module):
    """The feed-forward block of a mixture: a router picks `top_k` of the experts for each token."""

    def __init__(self, dim: int, e: spec.Experts, run: Runtime, rngs: nnx.Rngs, make_mlp: Callable[..., Any]):
        self.e, self.run = e, run
        none: Any = nnx.data(None)
        self.router = Linear(dim, e.num_experts, ("embed", None), run, rngs, use_bias=e.router_bias)
        zeros = jnp.zeros((e.num_experts,), run.param_dtype)
        self.select_bias = nnx.Param(zeros, axes=(None,)) if e.select_bias else none

        def linear(in_dim: int, out_dim: int, axes: Axes) -> ExpertLinear:
            return ExpertLinear(e.num_experts, in_dim, out_dim, axes, run, rngs, use_bias=e.bias)

        # Interleaved halves come as one weight; else gate and up are two.
        self.gate_up_proj = linear(dim, 2 * e.dim, ("embed", "mlp")) if e.clamp else none
        self.gate_proj = none if e.clamp else linear(dim, e.dim, ("embed", "mlp"))
        self.up_proj = none if e.clamp else linear(dim, e.dim, ("embed", "mlp"))
        self.down_proj = linear(e.dim, dim, ("mlp", "embed"))
        self.shared = make_mlp(dim, e.shared, run, rngs) if e.shared else none

    @staticmethod
    def nothing(blocks: Sequence[spec.Block]) -> dict[str, jax.Array]:
        """The router's report before the first layer of a group of blocks; empty where none of them has experts."""
        if not any(isinstance(block.ffn, spec.Experts) for block in blocks):
            return {}
        return dict.fromkeys(("balance", "router_z", "router_entropy", "max_load", "layers"), jnp.float32(0))

    def route(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, T, D) -> (y (B, T, D), what the router reports of tokens that are not padding)."""
        B, T, D = x_BTD.shape
        x_MD = x_BTD.reshape(B * T, D)
        logits_ME = self.router(x_MD, key).astype(jnp.float32)
        weights_MK, chosen_MK = self._chosen(logits_ME)
        y_MD = self._experts(x_MD, weights_MK, chosen_MK)
        if self.shared is not None:
            y_MD = y_MD + self.shared(x_BTD, key).reshape(B * T, D)
        return y_MD.reshape(B, T, D), self._report(logits_ME, chosen_MK, segment_ids_BT.reshape(B * T) != 0)

    def _chosen(self, logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights, expert numbers) of each token's experts, (M, k) each."""
        e = self.e
        if e.scoring == "top_softmax":
            top_MK, chosen_MK = jax.lax.top_k(logits_ME, e.top_k)
            return jax.nn.softmax(top_MK, axis=-1), chosen_MK
        scores_ME = jax.nn.sigmoid(logits_ME) if e.scoring == "sigmoid" else jax.nn.softmax(logits_ME, axis=-1)
        ranked_ME = scores_ME
        if self.select_bias is not None:
            ranked_ME = scores_ME + self.select_bias[...].astype(jnp.float32)[None]
        if e.groups > 1:
            grouped = ranked_ME.reshape(-1, e.groups, e.num_experts // e.groups)
            best_MG = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
            _, kept = jax.lax.top_k(best_MG, e.top_groups)
            in_MG = jnp.sum(jax.nn.one_hot(kept, e.groups), axis=-2) > 0
            ranked_ME = jnp.where(in_MG[..., None], grouped, 0.0).reshape(ranked_ME.shape)
        _, chosen_MK = jax.lax.top_k(ranked_ME, e.top_k)
        weights_MK = jnp.take_along_axis(scores_ME, chosen_MK, axis=-1)
        if e.normalised:
            weights_MK = weights_MK / (jnp.sum(weights_MK, axis=-1, keepdims=True) + 1e-20)
        return weights_MK * e.weight_scale, chosen_MK

    def _experts(self, x_MD: jax.Array, weights_MK: jax.Array, chosen_MK: jax.Array) -> jax.Array:
        """Sum over a token's experts of weight * expert(x): rows sorted by expert, so that each is one dense matmul."""
        e, k = self.e, self.e.top_k
        expert_N = chosen_MK.reshape(-1)
        order_N = jnp.argsort(expert_N, stable=True)
        sorted_N = expert_N[order_N]
        sizes_E = jnp.bincount(expert_N, length=e.num_experts).astype(jnp.int32)
        rows_ND = x_MD[order_N // k]
        out_ND = self.down_proj(self._hidden(rows_ND, sizes_E, sorted_N), sizes_E, sorted_N)
        out_ND = out_ND * weights_MK.reshape(-1)[order_N, None].astype(out_ND.dtype)
        return jnp.zeros_like(x_MD).at[order_N // k].add(out_ND)

    def _hidden(self, rows_ND: jax.Array, sizes_E: jax.Array, expert_N: jax.Array) -> jax.Array:
        if self.e.clamp is None:
            gate = self.gate_proj(rows_ND, sizes_E, expert_N)
            return activation(self.e.act)(gate) * self.up_proj(rows_ND, sizes_E, expert_N)
        alpha, limit = self.e.clamp
        both_NF = self.gate_up_proj(rows_ND, sizes_E, expert_N)
        gate, up = jnp.minimum(both_NF[..., ::2], limit), jnp.clip(both_NF[..., 1::2], -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)

    def _report(self, logits_ME: jax.Array, chosen_MK: jax.Array, real_M: jax.Array) -> dict[str, jax.Array]:
        """Switch's load balance loss E sum_e f_e P_e / k (arXiv:2101.03961 eq. 4) and ST-MoE's z-loss (2202.08906 eq. 5)."""
        e, real = self.e, real_M.astype(jnp.float32)
        num = jnp.maximum(jnp.sum(real), 1.0)
        probs_ME = jax.nn.softmax(logits_ME, axis=-1)
        share_E = jnp.sum(jax.nn.one_hot(chosen_MK, e.num_experts) * real[:, None, None], axis=(0, 1)) / num
        mean_E = jnp.sum(probs_ME * real[:, None], axis=0) / num
        entropy_M = -jnp.sum(probs_ME * jnp.log(probs_ME + 1e-20), axis=-1)
        z_M = jnp.square(jax.nn.logsumexp(logits_ME, axis=-1))
        return {
            "balance": e.num_experts * jnp.sum(share_E * mean_E) / e.top_k,
            "router_z": jnp.sum(z_M * real) / num,
            "router_entropy": jnp.sum(entropy_M * real) / num,
            "max_load": jnp.max(share_E) * e.num_experts / e.top_k,
            "layers": jnp.float32(1),
        }
