"""The mixture of experts: on every mesh the same values and gradients, no token dropped, reports by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import config as config_lib
from jaxtune import registry, sharding
from jaxtune.models import FAMILIES, layers
from jaxtune.models.layers import Runtime
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")


def values_and_gradients(case: str, mesh_sizes: dict[str, int] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    family = registry.load("model_type", CASES[case]["model_type"], FAMILIES)
    config, run = family.from_hf(CASES[case]), Runtime(router_loss=True)
    if mesh_sizes:
        options = config_lib.base()
        options.mesh.update({"fsdp": 1} | mesh_sizes)
        mesh = sharding.make_mesh(options)
        run = run._replace(mesh=mesh, spec=sharding.spec, constrain=sharding.constrain_on(mesh))
    graphdef, variables = layers.flatten(nnx.eval_shape(lambda: family.Model(config, run, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = {p: rng.normal(0, 0.2, v.shape).astype(np.float32) + p.endswith("scale") for p, v in variables.items()}
    if mesh_sizes:
        axes = {p: v.get_metadata()["axes"] for p, v in variables.items()}
        places = {p: sharding.param_sharding(p, v.shape, axes[p], mesh) for p, v in params.items()}
        params = {p: jax.device_put(v, places[p]) for p, v in params.items()}
    tokens = np.random.default_rng(1).integers(0, 96, (8, 16)).astype(np.int32)
    segments = (np.arange(16)[None, :] < np.arange(9, 17)[:, None]).astype(np.int32)

    @jax.jit
    def both(params: Any) -> Any:
        def total(params: Any) -> Any:
            model = layers.bind(graphdef, params)
            hidden, _, report = model.run_all(tokens, np.broadcast_to(np.arange(16), (8, 16)), segments)
            kept = hidden * segments[..., None]
            return jnp.sum(jnp.sin(kept)) + report["router_balance"] + 0.1 * report["router_z"], (kept, report)

        (_, (hidden, report)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return hidden, report, grads

    hidden, report, grads = both(params)
    routed = [len(n) for b, n in config.blocks if b.beside or hasattr(b.ffn, "top_k")]
    assert float(report["layers"]) == sum(routed)
    return np.asarray(hidden), {p: np.asarray(g) for p, g in grads.items()} | {
        k: np.asarray(v) for k, v in report.items()
    }


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_mesh_changes_nothing(case: str) -> None:
    hidden, grads = values_and_gradients(case, None)
    for sizes in ({"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "data": 2}):
        if case == "deepseek_v3" and sizes.get("tensor") == 2:
            sizes = {"expert": 2, "fsdp": 4}  # its tiny heads do not split
        spread, spread_grads = values_and_gradients(case, sizes)
        np.testing.assert_allclose(spread, hidden, atol=2e-5)
        for path, value in grads.items():
            scale = np.abs(value).max() + 1e-6
            np.testing.assert_allclose(
                spread_grads[path] / scale, value / scale, atol=1e-4, err_msg=f"{path} on {sizes}"
            )


def test_the_report_by_hand() -> None:
    """Four tokens, one of them padding, two experts of three each."""
    from jaxtune.models import experts, spec
    from jaxtune.models.transformer import Mlp

    module = experts.Experts(4, spec.Experts(3, 2, 5), Runtime(), nnx.Rngs(0), Mlp)
    logits = np.asarray([[[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [5.0, 5.0, -5.0], [1.0, 0.0, 3.0]]], np.float32)
    chosen = np.asarray([[[0, 1], [1, 2], [0, 1], [2, 0]]])
    report = module._report(jnp.asarray(logits), jnp.asarray(chosen), jnp.asarray([[True, True, False, True]]))
    real = logits[0, [0, 1, 3]]
    probs = np.exp(real) / np.exp(real).sum(-1, keepdims=True)
    share = np.asarray([2, 2, 2]) / 3
    np.testing.assert_allclose(report["router_balance"], 3 * (share * probs.mean(0)).sum() / 2, rtol=1e-5)
    np.testing.assert_allclose(report["router_z"], np.square(np.log(np.exp(real).sum(-1))).mean(), rtol=1e-5)
    np.testing.assert_allclose(report["router_max_load"], 1.0, rtol=1e-5)
