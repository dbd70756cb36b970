"""Mixture of experts: dropless routing by a sorted, grouped matmul (`jax.lax.ragged_dot`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import quantised, spec
from jaxtune.models.layers import Axes, Linear, RMSNorm, Runtime, activation, along_last, unconstrained


class ExpertLinear(nnx.Module):
    """y_i = x_i W_e(i) + b_e(i): one matmul per expert over the rows that chose it, W (E, in, out).

    `axes` are the logical axes of one expert's W. The arrays leave the module (`arrays`) before they are used (`apply`),
    because on a mesh the use happens on each device, with that device's experts. `adapter`, when set, adds its own: called
    as `adapter.arrays(kernel)`, it returns any of "lora_a" (E, in, r), "lora_b" (E, r, out), scaled, and "gain" (E, out).
    """

    def __init__(
        self, num: int, in_dim: int, out_dim: int, axes: Axes, run: Runtime, rngs: nnx.Rngs, *, use_bias: bool
    ):
        self.run, self.axes = run, axes
        kernel = jax.random.normal(rngs.params(), (num, in_dim, out_dim), jnp.float32) * 0.02
        self.kernel: Any = nnx.data(nnx.Param(kernel.astype(run.param_dtype), axes=("expert", *axes)))
        bias = jnp.zeros((num, out_dim), run.param_dtype)
        self.bias = nnx.Param(bias, axes=("expert", axes[1])) if use_bias else nnx.data(None)
        self.adapter: Any = nnx.data(None)

    def arrays(self) -> dict[str, Any]:
        """What is used, in the compute dtype; a quantised kernel as it is, for each device to dequantise its own."""
        dtype, packed = self.run.compute_dtype, None
        if isinstance(self.kernel, quantised.Kernel):
            packed = self.kernel.packed
            kernel = quantised.dequantize(packed, dtype)  # no work where no adapter looks at it
        else:
            kernel = self.kernel[...]
        found = {"kernel": kernel}
        if self.bias is not None:
            found["bias"] = self.bias[...]
        if self.adapter is not None:
            found |= self.adapter.arrays(kernel)
        arrays = {name: array.astype(dtype) for name, array in found.items()}
        return arrays if packed is None else {**arrays, "kernel": packed}

    def device_axes(self, name: str) -> Axes:
        """The logical axes by which one of `arrays` lies on devices while in use: whole over "embed" and over ranks."""
        into, out = (axis if axis == "mlp" else None for axis in self.axes)
        parts = {"kernel": (into, out), "bias": (out,), "lora_a": (into, None), "lora_b": (None, out), "gain": (out,)}
        return ("expert", *parts[name])

    def place(self, name: str, array: Any) -> Any:
        """`device_axes` as mesh axes; for a quantised kernel, of each of its parts."""
        assert self.run.spec is not None
        where = self.run.spec(self.device_axes(name))
        if not isinstance(array, quantised.Packed):
            return where
        expert, _, out = self.device_axes(name)
        return quantised.Packed(where, where, self.run.spec((expert, None, out)), array.kind)


# x_n . W_e(n) over W's last dim, (E, out, in). In the form of `ragged_dot` XLA's kernel for TPUs asks for more scratch memory
# than it has where `in` is as small as a rank (libtpu 0.0.52: 17 of 16 MiB on v5e).
_OVER_LAST = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def apply(w: dict[str, Any], x_NI: jax.Array, sizes_E: jax.Array, expert_N: jax.Array, with_bias: Any = 1) -> jax.Array:
    """x: rows sorted by expert; `sizes_E` how many each has; `expert_N` whose each is. Returns (rows, out).

    (x W + x A B) * gain + b: linear in x but for b, so partial sums over x's width add up.
    """
    if isinstance(w["kernel"], quantised.Packed):
        y_NO = _dequantised_dot(x_NI, w["kernel"], sizes_E)
    else:
        x_NI = x_NI.astype(w["kernel"].dtype)
        y_NO = jax.lax.ragged_dot(x_NI, w["kernel"], sizes_E)
    if "lora_a" in w:
        h_NR, b_EOR = jax.lax.ragged_dot(x_NI, w["lora_a"], sizes_E), jnp.swapaxes(w["lora_b"], 1, 2)
        y_NO += jax.lax.ragged_dot_general(h_NR, b_EOR, sizes_E, _OVER_LAST)
    if "gain" in w:
        y_NO *= w["gain"][expert_N]
    return y_NO + w["bias"][expert_N] * with_bias if "bias" in w else y_NO


@jax.checkpoint
def _dequantised_dot(x_NI: jax.Array, kernel: quantised.Packed, sizes_E: jax.Array) -> jax.Array:
    """`ragged_dot` of which the backward pass keeps the codes, and dequantises again."""
    return jax.lax.ragged_dot(x_NI, quantised.dequantize(kernel, x_NI.dtype), sizes_E)


def halves(w: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A linear layer whose outputs are two halves, as two; they share the adapter's inner factor."""

    def half(number: int) -> dict[str, Any]:
        def of(name: str, value: Any) -> Any:
            return value if name == "lora_a" else jax.tree.map(lambda array: jnp.split(array, 2, -1)[number], value)

        return {name: of(name, value) for name, value in w.items()}

    return half(0), half(1)


class Experts(nnx.Module):
    """The feed-forward block of a mixture: a router picks `top_k` of the experts for each token."""

    def __init__(self, dim: int, e: spec.Experts, run: Runtime, rngs: nnx.Rngs, make_mlp: Callable[..., Any]):
        self.e, self.run = e, run
        none: Any = nnx.data(None)
        self.router = Linear(dim, e.num_experts, ("embed", None), run, rngs, use_bias=e.router_bias)
        zeros = jnp.zeros((e.num_experts,), run.param_dtype)
        self.select_bias = nnx.Param(zeros, axes=(None,)) if e.select_bias else none
        self.router_scale = nnx.Param(jnp.ones((dim,), run.param_dtype), axes=("norm",)) if e.router_norm else none
        self.expert_scale = nnx.Param(zeros + 1, axes=(None,)) if e.expert_scale else none

        def linear(in_dim: int, out_dim: int, axes: Axes) -> ExpertLinear:
            return ExpertLinear(e.num_experts, in_dim, out_dim, axes, run, rngs, use_bias=e.bias)

        # Gate and up come as one weight, in halves or alternating, or as two.
        into = {"gate_up_proj": 2 * e.dim} if e.joined or e.clamp else {"gate_proj": e.dim, "up_proj": e.dim}
        made = {name: linear(dim, width, ("embed", "mlp")) for name, width in into.items()}
        self.experts = nnx.Dict(made | {"down_proj": linear(e.dim, dim, ("mlp", "embed"))})
        self.shared = make_mlp(dim, e.shared, run, rngs) if e.shared else none

    @staticmethod
    def nothing(blocks: Sequence[spec.Block]) -> dict[str, jax.Array]:
        """The router's report before the first layer of a group of blocks; empty where none of them has experts."""
        if not any(block.experts for block in blocks):
            return {}
        names = ("router_balance", "router_z", "router_entropy", "router_max_load", "layers")
        return dict.fromkeys(names, jnp.float32(0))

    def route(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, key: jax.Array | None, seen_BTD: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, T, D) -> (y (B, T, D), what the router reports of tokens that are not padding).

        `seen_BTD` is what the router reads in place of x. The report has a gradient where `run.router_loss` says so.
        """
        logits_BTE = self.router(self._normed(x_BTD if seen_BTD is None else seen_BTD), key).astype(jnp.float32)
        weights_BTK, chosen_BTK = self._chosen(logits_BTE)
        y_BTD = self._on_mesh(x_BTD, weights_BTK, chosen_BTK)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, key)
        told_BTE = logits_BTE if self.run.router_loss else jax.lax.stop_gradient(logits_BTE)
        return y_BTD, self._report(told_BTE, chosen_BTK, segment_ids_BT != 0)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        if self.router_scale is None:
            return x_BTD
        scale_D = self.router_scale[...] * x_BTD.shape[-1] ** -0.5
        normed_BTD = RMSNorm(x_BTD.shape[-1], self.e.router_norm or 0.0, self.run, scale=False)(x_BTD)
        return normed_BTD * along_last(scale_D.astype(x_BTD.dtype), x_BTD)

    def _chosen(self, logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (…, E) -> (weights, expert numbers) of each token's experts, (…, k) each."""
        e = self.e
        if e.scoring == "top_softmax":
            top_MK, chosen_MK = jax.lax.top_k(logits_ME, e.top_k)
            return jax.nn.softmax(top_MK, axis=-1), chosen_MK
        scores_ME = jax.nn.sigmoid(logits_ME) if e.scoring == "sigmoid" else jax.nn.softmax(logits_ME, axis=-1)
        ranked_ME = scores_ME
        if self.select_bias is not None:
            ranked_ME = scores_ME + along_last(self.select_bias[...].astype(jnp.float32), scores_ME)
        if e.groups > 1:
            grouped = ranked_ME.reshape(*ranked_ME.shape[:-1], e.groups, e.num_experts // e.groups)
            best_MG = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
            _, kept = jax.lax.top_k(best_MG, e.top_groups)
            in_MG = jnp.sum(jax.nn.one_hot(kept, e.groups), axis=-2) > 0
            ranked_ME = jnp.where(in_MG[..., None], grouped, 0.0).reshape(ranked_ME.shape)
        _, chosen_MK = jax.lax.top_k(ranked_ME, e.top_k)
        weights_MK = jnp.take_along_axis(scores_ME, chosen_MK, axis=-1)
        if e.normalised:
            weights_MK = weights_MK / (jnp.sum(weights_MK, axis=-1, keepdims=True) + 1e-20)
        if self.expert_scale is not None:
            weights_MK = weights_MK * self.expert_scale[...].astype(jnp.float32)[chosen_MK]
        return weights_MK * e.weight_scale, chosen_MK

    def _on_mesh(self, x_BTD: jax.Array, weights_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Sum over a token's experts of weight * expert(x), each device for its own experts and its share of their width.

        Tokens go around the "expert" axis (all-gather), partial sums come back (reduce-scatter). Nothing is dropped.
        """
        run = self.run
        linears = dict(self.experts.items())
        w = {name: linear.arrays() for name, linear in linears.items()}
        if run.mesh is None or run.spec is None or run.mesh.size == 1 or run.constrain is unconstrained:
            return self._on_device(x_BTD, weights_BTK, chosen_BTK, w, self.e.num_experts)
        if self.e.joined:  # halves of one weight cannot be split by width as they stand
            w["gate_proj"], w["up_proj"] = halves(w.pop("gate_up_proj"))
            linears |= dict.fromkeys(("gate_proj", "up_proj"), linears["gate_up_proj"])
        num_local, axis = self.e.num_experts // run.mesh.shape["expert"], "expert"

        def on_device(x: jax.Array, weights: jax.Array, chosen: jax.Array, w: Any) -> jax.Array:
            first = jax.lax.axis_index(axis) * num_local
            x, weights, chosen = (jax.lax.all_gather(each, axis, tiled=True) for each in (x, weights, chosen))
            own = (chosen >= first) & (chosen < first + num_local)
            chosen, weights = jnp.where(own, chosen - first, num_local), jnp.where(own, weights, 0)
            y = self._on_device(x, weights, chosen, w, num_local, jax.lax.axis_index("tensor") == 0)
            return jax.lax.psum_scatter(jax.lax.psum(y, "tensor"), axis, tiled=True)

        rows = run.spec(("batch", "length", None))
        places = {name: {k: linears[name].place(k, array) for k, array in arrays.items()} for name, arrays in w.items()}
        specs = (rows, rows, rows, places)
        split = jax.shard_map(on_device, mesh=run.mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return split(x_BTD, weights_BTK, chosen_BTK, w)

    def _on_device(
        self, x_BTD: jax.Array, weights_BTK: jax.Array, chosen_BTK: jax.Array, w: Any, num: int, with_bias: Any = True
    ) -> jax.Array:
        """Experts 0 … num - 1 of `w` for these tokens; a token that chose number `num` gets nothing for it.

        Rows are sorted by expert, so that each expert is one dense matmul. `with_bias`: whether the output's bias is added.
        """
        k, lead = self.e.top_k, x_BTD.shape[:-1]
        x_MD, expert_N = x_BTD.reshape(-1, x_BTD.shape[-1]), chosen_BTK.reshape(-1)
        order_N = jnp.argsort(expert_N, stable=True)
        sorted_N = expert_N[order_N]
        sizes_E = jnp.bincount(expert_N, length=num + 1)[:num].astype(jnp.int32)
        mine_N, at_N = (sorted_N < num)[:, None], jnp.minimum(sorted_N, num - 1)
        rows_ND = x_MD[order_N // k]
        hidden_NF = self._hidden(w, rows_ND, sizes_E, at_N)
        out_ND = apply(w["down_proj"], hidden_NF, sizes_E, at_N, jnp.asarray(with_bias, rows_ND.dtype))
        out_ND = jnp.where(mine_N, out_ND, 0) * weights_BTK.reshape(-1)[order_N, None].astype(out_ND.dtype)
        return jnp.zeros_like(x_MD).at[order_N // k].add(out_ND).reshape(*lead, -1)

    def _hidden(self, w: Any, rows_ND: jax.Array, sizes_E: jax.Array, expert_N: jax.Array) -> jax.Array:
        if self.e.clamp is None:
            if "gate_up_proj" in w:
                gate, up = jnp.split(apply(w["gate_up_proj"], rows_ND, sizes_E, expert_N), 2, axis=-1)
            else:
                gate, up = (apply(w[name], rows_ND, sizes_E, expert_N) for name in ("gate_proj", "up_proj"))
            return activation(self.e.act)(gate) * up
        alpha, limit = self.e.clamp
        both_NF = apply(w["gate_up_proj"], rows_ND, sizes_E, expert_N)
        gate, up = jnp.minimum(both_NF[..., ::2], limit), jnp.clip(both_NF[..., 1::2], -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)

    def _report(self, logits_BTE: jax.Array, chosen_BTK: jax.Array, real_BT: jax.Array) -> dict[str, jax.Array]:
        """Over the N tokens that are not padding, f_e the share of them that chose expert e, p its normalised scores:

        router_balance   E sum_e f_e mean(p_e) / k, 1 where experts share evenly (Switch, arXiv:2101.03961 eq. 4)
        router_z         mean of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906 eq. 5)
        router_entropy   mean of -sum_e p_e log p_e, nats
        router_max_load  the busiest expert's tokens over the mean expert's
        """
        e, real_BT1 = self.e, real_BT.astype(jnp.float32)[..., None]
        num, tokens = jnp.maximum(jnp.sum(real_BT1), 1.0), (0, 1)
        if e.scoring == "sigmoid":
            scores_BTE = jax.nn.sigmoid(logits_BTE)
            probs_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
        else:
            probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        counts_BTE = jnp.sum(jax.nn.one_hot(chosen_BTK, e.num_experts), axis=-2)
        share_E, mean_E = (jnp.sum(each * real_BT1, axis=tokens) / num for each in (counts_BTE, probs_BTE))
        entropy_BT1 = -jnp.sum(probs_BTE * jnp.log(probs_BTE + 1e-20), axis=-1, keepdims=True)
        z_BT1 = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True))
        return {
            "router_balance": e.num_experts * jnp.sum(share_E * mean_E) / e.top_k,
            "router_z": jnp.sum(z_BT1 * real_BT1) / num,
            "router_entropy": jnp.sum(entropy_BT1 * real_BT1) / num,
            "router_max_load": jnp.max(share_E) * e.num_experts / e.top_k,
            "layers": jnp.float32(1),
        }
