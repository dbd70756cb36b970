"""The mixture of experts and adapters on it: on every mesh the same values and gradients, no token dropped, reports by hand."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import config as config_lib
from jaxtune import registry, sharding
from jaxtune.adapters import lora
from jaxtune.models import FAMILIES, layers, spec
from jaxtune.models.layers import Runtime
from jaxtune.train import start, state
from jaxtune.types import UserError
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")


TOKENS = np.random.default_rng(1).integers(0, 96, (8, 16)).astype(np.int32)
SEGMENTS = (np.arange(16)[None, :] < np.arange(9, 17)[:, None]).astype(np.int32)


class Made(NamedTuple):
    config: spec.Config
    graphdef: nnx.GraphDef
    variables: dict[str, nnx.Variable]


def make(case: str, run: Runtime, **adapter: Any) -> Made:
    """A model with adapters on all of its layers, experts and routers too, or without any."""
    family = registry.load("model_type", CASES[case]["model_type"], FAMILIES)
    config = family.from_hf(CASES[case])

    def build() -> nnx.Module:
        model = family.Model(config, run, nnx.Rngs(0))
        if adapter:
            lora.attach(model, lora.Options(r"layers\..*", rank=3, alpha=3.0, **adapter))
        return model

    return Made(config, *layers.flatten(nnx.eval_shape(build)))


def values(variables: dict[str, nnx.Variable]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    near_one = ("scale", "magnitude")
    return {p: rng.normal(0, 0.2, v.shape).astype(np.float32) + p.endswith(near_one) for p, v in variables.items()}


def values_and_gradients(
    case: str, mesh_sizes: dict[str, int], use_dora: bool = False, **changes: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    run, mesh = Runtime(router_loss=True, **changes), None
    if mesh_sizes:
        options = config_lib.base()
        options.mesh.update({"fsdp": 1} | mesh_sizes)
        mesh = sharding.make_mesh(options)
        run = run._replace(mesh=mesh, spec=sharding.spec, constrain=sharding.constrain_on(mesh))
    config, graphdef, variables = make(case, run, use_dora=use_dora)
    params: dict[str, Any] = values(variables)
    if mesh:
        axes = {p: v.get_metadata()["axes"] for p, v in variables.items()}
        places = {p: sharding.param_sharding(p, v.shape, axes[p], mesh) for p, v in params.items()}
        params = {p: jax.device_put(v, places[p]) for p, v in params.items()}
        factor = next(p for p in params if p.endswith("experts.down_proj.adapter.lora_b"))
        assert places[factor].spec[1] == "expert", "each device holds its own experts' factors"

    @jax.jit
    def both(params: Any) -> Any:
        def total(params: Any) -> Any:
            model = layers.bind(graphdef, params)
            hidden, _, report = model.run_all(TOKENS, np.broadcast_to(np.arange(16), (8, 16)), SEGMENTS)
            kept = hidden * SEGMENTS[..., None]
            return jnp.sum(jnp.sin(kept)) + report["router_balance"] + 0.1 * report["router_z"], (kept, report)

        (_, (hidden, report)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return hidden, report, grads

    hidden, report, grads = both(params)
    assert float(report["layers"]) == sum(len(numbers) for block, numbers in config.blocks if block.experts)
    return np.asarray(hidden), {p: np.asarray(g) for p, g in grads.items()} | {
        k: np.asarray(v) for k, v in report.items()
    }


# case -> meshes that its dims divide over
MESHES: dict[str, tuple[dict[str, int], ...]] = {
    "mixtral": ({"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "data": 2}),
    "gpt_oss": ({"expert": 4, "tensor": 2},),
    "deepseek_v3": ({"expert": 2, "fsdp": 4},),
    "gemma4_text_experts": ({"expert": 2, "fsdp": 4},),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_changes_nothing(case: str) -> None:
    """Nor does rematerialisation, nor a scan: values, all weights' and adapters' gradients, the routers' losses in them."""
    use_dora = case == "mixtral"
    hidden, grads = values_and_gradients(case, {}, use_dora)
    assert all(np.abs(grads[p]).max() > 1e-3 for p in grads if ".experts." in p and ".adapter." in p)
    others: list[tuple[dict[str, int], dict[str, Any]]] = [(sizes, {"remat": "block"}) for sizes in MESHES[case]]
    for sizes, changes in [*others, *([({}, {"scan": False})] if use_dora else [])]:
        spread, spread_grads = values_and_gradients(case, sizes, use_dora, **changes)
        np.testing.assert_allclose(spread, hidden, atol=2e-5)
        for path, value in grads.items():
            scale = np.abs(value).max() + 1e-6
            np.testing.assert_allclose(
                spread_grads[path] / scale, value / scale, atol=1e-4, err_msg=f"{path} on {sizes} {changes}"
            )


@pytest.mark.parametrize(("case", "use_dora"), [("mixtral", True), ("gpt_oss", False), ("gemma4_text_experts", True)])
def test_a_merged_adapter_is_the_adapter(case: str, use_dora: bool) -> None:
    _, graphdef, variables = make(case, Runtime(), use_dora=use_dora)
    _, plain, bare = make(case, Runtime())
    params = values(variables)
    merged = {path: params[path] for path in bare}
    for linear in {path.split(".adapter.")[0] for path in params if ".adapter." in path}:
        factors = [params.get(f"{linear}.adapter.{kind}") for kind in ("lora_a", "lora_b", "magnitude")]
        merged[f"{linear}.kernel"] = lora.merged(params[f"{linear}.kernel"], *factors, scale=1.0)

    def hidden(graphdef: nnx.GraphDef, params: Any) -> jax.Array:
        model = layers.bind(graphdef, params)
        return model(TOKENS, np.broadcast_to(np.arange(16), (8, 16)), SEGMENTS)[0]

    run = jax.jit(hidden, static_argnums=0)
    adapted, without = run(graphdef, params), run(plain, {path: params[path] for path in bare})
    assert np.abs(np.asarray(adapted - without)).max() > 0.1
    np.testing.assert_allclose(run(plain, merged), adapted, atol=1e-4)


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


def test_an_adapter_that_peft_cannot_have_is_refused_before_training() -> None:
    """DoRA reaches all layers; PEFT's folder format does not go along with it on experts, routers and MLPs named like experts."""
    config = config_lib.base()
    config.mesh.fsdp, config.tune.use_dora = 1, True
    mesh = sharding.make_mesh(config, jax.devices()[:1])

    def checked(targets: str, merge: bool = False) -> None:
        config.tune.targets, config.export.merge = targets, merge
        start.check_export(config, state.abstract(config, CASES["qwen3_moe"], mesh, 1))

    checked(r".*attn.*")
    for targets, found in ((r"layers\..*", "experts"), (r".*router", "router"), (r".*mlp\.gate_proj", "gate_proj")):
        with pytest.raises(UserError, match=rf"use_dora on layers.*{found}.*export.merge=True"):
            checked(targets)
        checked(targets, merge=True)


def test_adapters_leave_experts_alone_unless_asked() -> None:
    model = nnx.eval_shape(
        lambda: registry.load("model_type", "deepseek_v3", FAMILIES).Model(  # fmt: skip
            make("deepseek_v3", Runtime()).config, Runtime(), nnx.Rngs(0)
        )
    )
    all_ = set(lora.linears(model))
    chosen = {path for path in all_ if re.fullmatch(config_lib.base().tune.targets, path)}
    left = {path for path in all_ if path.startswith("layers.")} - chosen
    assert left == {
        f"layers.1.mlp.{name}" for name in ("router", "experts.gate_proj", "experts.up_proj", "experts.down_proj")
    }
    assert {"layers.0.mlp.up_proj", "layers.1.mlp.shared.up_proj", "layers.1.attn.o_proj"} < chosen
