"""Every mesh trains the same: rows, tokens of a row, heads, experts and slices apart; and which mesh a run gets."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.models.attention import Rule, attend
from jaxtune.models.layers import Runtime
from jaxtune.train import layout, start, state, step
from jaxtune.types import UserError
from tests.families import CASES, TASKS

pytestmark = pytest.mark.usefixtures("quick_compile")
T = 32


def config_of(mesh: dict[str, int], objective: str = "sft") -> ConfigDict:
    """Full fine-tuning by SGD at rate 1, so that a step takes each weight's gradient from it."""
    config = config_lib.base()
    config.tune.method, config.optim.name, config.optim.learning_rate, config.optim.clip_norm = "full", "sgd", 1.0, 0.0
    config.optim.schedule, config.optim.warmup_steps, config.train.steps = "constant", 0, 1
    config.data.max_length, config.train.objective, config.train.loss_chunk_tokens = T, objective, 16
    config.mesh.update({"fsdp": 1} | mesh)
    return config


def packed() -> dict[str, np.ndarray]:
    """Eight rows of two or three segments, which cross every boundary between shards, and padding."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 96, (8, T + 1)).astype(np.int32)
    ends = np.sort(rng.integers(5, T + 1, (8, 3)), axis=1)
    at = np.arange(T)
    segments = (1 + np.sum(at[None, :, None] >= ends[:, None, :], axis=-1)).astype(np.int32)
    segments[segments == 4] = 0
    starts = np.concatenate([np.zeros((8, 1), int), ends], axis=1)
    positions = np.where(segments > 0, at - np.take_along_axis(starts, np.maximum(segments - 1, 0), axis=1), 0)
    return {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:] % 3, "segment_ids_BT": segments,
        "weights_BT": ((segments > 0) * (rng.random((8, T)) < 0.6)).astype(np.float32), "positions_BT": positions.astype(np.int32),
    }  # fmt: skip


def gradients(config: ConfigDict, settings: dict[str, Any], num_devices: int) -> tuple[float, dict[str, np.ndarray]]:
    """(the loss of a batch, what one step takes from each weight)."""
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    program, rng = state.abstract(config, settings, mesh, 1), np.random.default_rng(0)
    values = {
        path: (rng.normal(0, 0.2, like.shape) + path.endswith("scale")).astype(np.float32)
        for path, like in program.base.items()
    }
    current, frozen = state.create(program, sharding.put(values, state.shardings(program.base)), 0)
    found, metrics = step.make(config, program)(current, frozen, sharding.to_global(packed(), mesh, 8))
    return float(metrics["loss"]), {path: values[path] - np.asarray(value) for path, value in found.params.items()}


@cache
def on_one(case: str) -> tuple[float, dict[str, np.ndarray]]:
    return gradients(config_of({}, OBJECTIVES.get(case, "sft")), ({**CASES, **TASKS})[case], 1)


OBJECTIVES = {"ModernBertForSequenceClassification": "classify"}
LAYOUTS: list[tuple[str, dict[str, int]]] = [
    ("llama", {"context": 8}),
    ("llama", {"fsdp": 2, "context": 4}),
    ("llama", {"data": 2, "context": 2, "tensor": 2}),
    ("llama", {"dcn_data": 2, "dcn_context": 2, "fsdp": 2}),
    ("gpt_oss", {"expert": 4, "context": 2}),  # windows in some layers, sinks, experts
    ("ModernBertForSequenceClassification", {"fsdp": 2, "context": 4}),  # both ways, mean over a text's tokens
]


@pytest.mark.parametrize(("case", "mesh"), LAYOUTS)
def test_a_mesh_changes_no_gradient(case: str, mesh: dict[str, int]) -> None:
    config = config_of(mesh, OBJECTIVES.get(case, "sft"))
    loss, found = gradients(config, ({**CASES, **TASKS})[case], 8)
    expected_loss, expected = on_one(case)
    assert abs(loss - expected_loss) <= 1e-5
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5 * max(1.0, float(np.abs(value).max())), err_msg=path)


RULES: dict[str, tuple[Rule, str, dict[str, int], dict[str, Any]]] = {
    "softcap, a window among two": (Rule(0.3, 3.0, windows=(0, 9)), "xla", {"context": 4}, {"window_index": jnp.int32(1)}),
    "a shard of odd length": (Rule(0.3), "xla", {"context": 4}, {"tokens": 36}),
    "ALiBi": (Rule(0.3, slopes=(0.1, 0.2, 0.3, 0.4)), "xla", {"context": 2, "tensor": 2}, {}),
    "both ways, a window, sinks": (Rule(0.3, causal=False, windows=(5,)), "xla", {"context": 2, "fsdp": 2}, {"sinks": True}),
    "kernel: softcap, two windows": (
        Rule(0.1, 3.0, windows=(0, 100)), "splash", {"context": 2, "tensor": 2}, {"tokens": 512, "window_index": jnp.int32(1)},
    ),
    "kernel: both ways, sinks": (Rule(0.1, causal=False), "splash", {"context": 2}, {"tokens": 256, "sinks": True}),
    "GPU kernel: rows and heads apart": (Rule(0.3), "flash", {"fsdp": 2, "tensor": 2}, {"tokens": 128}),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_attention_of_a_row_in_shards_is_that_of_the_whole(case: str) -> None:
    """Values and gradients, by every rule; the kernels interpreted."""
    rule, kind, sizes, options = RULES[case]
    tokens, sinks, which = options.get("tokens", T), options.get("sinks"), options.get("window_index", 0)
    rng, head_dim = np.random.default_rng(0), 128 if kind == "splash" else 16
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, n, head_dim)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [tokens // 2 - 3, tokens // 2 - 2, 5], 1).repeat(2, 0), jnp.int32)
    sinks_N = jnp.asarray([0.5, -1.0, 2.0, 0.0], jnp.float32) if sinks else None
    mesh = sharding.make_mesh(config_of(sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    apart = Runtime(attention=kind, mesh=mesh, spec=sharding.spec, constrain=sharding.constrain_on(mesh))

    def total(run: Runtime) -> Any:
        def value(*qkv: jax.Array) -> jax.Array:
            out = attend(*qkv, segments, segments, rule, run, sinks_N=sinks_N, window_index=which)
            return jnp.mean(jnp.where((segments != 0)[..., None, None], jnp.sin(3 * out), 0)) * 1e3

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(q, k, v)

    (value, grads), (expected, expected_grads) = total(apart), total(Runtime(attention="xla"))
    np.testing.assert_allclose(value, expected, atol=1e-3)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


# ---- where weights lie ----


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(config_of(sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def test_weights_lie_over_all_that_has_tokens_of_its_own() -> None:
    mesh = mesh_of(fsdp=2, context=2, tensor=2)
    found = sharding.param_sharding("layers.mlp.up_proj.kernel", (3, 32, 48), ("embed", "mlp"), mesh)
    assert found.shard_shape((3, 32, 48)) == (3, 8, 24)
    expert = sharding.param_sharding("e.kernel", (3, 8, 32, 48), ("expert", "embed", "mlp"), mesh_of(expert=4, fsdp=2))
    assert expert.shard_shape((3, 8, 32, 48)) == (3, 2, 16, 48)  # an axis splits one dim alone


def test_another_dim_takes_an_axis_that_does_not_divide() -> None:
    mesh = mesh_of(fsdp=4, tensor=2)
    table = sharding.param_sharding("embed.table", (97, 32), ("vocab", "embed"), mesh)
    assert table.shard_shape((97, 32)) == (97, 4)
    program = state.abstract(config_of({"fsdp": 4, "tensor": 2}), {**CASES["llama"], "vocab_size": 97}, mesh, 1)
    assert "another dim" in program.layout
    assert "embed.table" in program.layout
    none = sharding.param_sharding("r", (30, 7), ("embed", None), mesh)
    assert none.shard_shape((30, 7)) == (30, 7)  # nothing divides


def test_weights_left_whole_are_refused_unless_asked_for() -> None:
    settings = {**CASES["mixtral"], "num_local_experts": 5, "hidden_size": 36, "head_dim": 8, "vocab_size": 99}
    with pytest.raises(
        UserError, match=r"leaves \d+% of the parameters whole .* mesh.max_unsharded=2%: embed.table \(99, 36\)"
    ):
        state.abstract(config_of({"fsdp": 8}), settings, mesh_of(fsdp=8), 1)
    config = config_of({"fsdp": 8})
    config.mesh.rules = ((r"embed\.table", ("", "")), (r"lm_head\.kernel", ("", "")))
    state.abstract(config, settings, mesh_of(fsdp=8), 1)  # asked for
    config.mesh.rules = ()
    config.mesh.max_unsharded = 1.0
    state.abstract(config, settings, mesh_of(fsdp=8), 1)


def test_slices_are_cut_from_the_devices_in_order() -> None:
    mesh = mesh_of(dcn_data=2, fsdp=2, tensor=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    within = sharding.make_mesh(config_of({"dcn_fsdp": 2, "fsdp": 4}))
    assert within.shape["fsdp"] == 8
    with pytest.raises(UserError, match="mesh of 3 slices does not fit 8 devices"):
        sharding.make_mesh(config_of({"dcn_data": 3}))


@pytest.mark.parametrize(
    ("mesh", "settings", "words"),
    [
        ({"context": 2}, CASES["qwen3_5_text"], "mesh.context=2 .* gated delta rule"),
        ({"context": 2, "fsdp": 4, "dcn_data": -1, "dcn_fsdp": -1}, CASES["llama"], "dcn_data=-1.*at most one may be -1"),
        ({"context": -1, "tensor": -1}, CASES["llama"], "at most one may be -1"),
        ({"context": 3}, CASES["llama"], "context=3.* does not fit 8 devices"),
    ],
)  # fmt: skip
def test_meshes_that_cannot_be_are_refused(mesh: dict[str, int], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        layout.program(config_of({"fsdp": -1 if mesh == {"context": 2} else 1} | mesh), settings)


def test_rows_that_do_not_divide_are_refused() -> None:
    config = config_of({"fsdp": 1, "context": 8})
    config.data.max_length = 60
    with pytest.raises(
        UserError, match=r"data.max_length=60 does not divide by mesh.context=8: use a multiple, e.g. 64"
    ):
        start.check_length(config, state.abstract(config, CASES["llama"], mesh_of(context=8), 1))


# ---- the mesh that is chosen ----

GIB = 1 << 30
SMALL = layout.Need(2 * GIB, 16, 2048, 0, 8, True)


@pytest.mark.parametrize(
    ("need", "devices", "slices", "sizes", "words"),
    [
        (SMALL, 16, 1, {"data": 16}, "2.0 GiB .* leave room in 16.0 GiB"),
        (SMALL._replace(state_bytes=16 * GIB), 16, 1, {"fsdp": 16}, "too much for replicas"),
        (SMALL._replace(state_bytes=16 * GIB, rows=4), 16, 1, {"data": 4, "tensor": 4}, "4 rows of 2,048 tokens for 16 devices"),
        (SMALL._replace(rows=1, row_tokens=131072), 16, 1, {"context": 16}, "1 rows of 131,072"),
        (SMALL._replace(rows=1, row_tokens=131072, splits_rows=False), 8, 1, {"tensor": 8}, "1 rows"),
        (SMALL._replace(state_bytes=90 * GIB, num_experts=8), 16, 1, {"expert": 8, "fsdp": 2}, "too much"),
        (SMALL._replace(state_bytes=16 * GIB, rows=32), 16, 2, {"dcn_data": 2, "fsdp": 16}, "2 slices split the rows;"),
        (SMALL._replace(state_bytes=900 * GIB, rows=32), 16, 2, {"dcn_fsdp": 2, "fsdp": 16}, "rows and the weights"),
        (SMALL._replace(rows=12, head_divisor=1), 8, 1, {"data": 8}, ""),  # fits nothing: refused by the batch's own check
    ],
)  # fmt: skip
def test_the_mesh_follows_from_model_and_devices(
    need: layout.Need, devices: int, slices: int, sizes: dict[str, int], words: str
) -> None:
    import re

    found, why = layout.choose(need, devices, slices, 16 * GIB)
    assert found == sizes
    assert re.search(words, why)
    assert "\n" not in why


def test_a_run_says_which_mesh_it_chose_and_sizes_that_are_given_win(tiny_config: ConfigDict) -> None:
    from jaxtune.weights import source

    model = source.find(tiny_config)
    chosen, _ = start.program(tiny_config, model)
    assert chosen.mesh.shape["data"] == 8
    assert "mesh data=8 x fsdp=1" in start.summary(model, chosen)
    assert "leave room" in start.summary(model, chosen)
    tiny_config.mesh.fsdp = 4
    tiny_config.mesh.tensor = 2
    given, _ = start.program(tiny_config, model)
    assert (given.mesh.shape["fsdp"], given.mesh.shape["tensor"], given.layout) == (4, 2, "")
    tiny_config.mesh.fsdp, tiny_config.mesh.tensor, tiny_config.mesh.auto = -1, 1, False
    assert start.program(tiny_config, model)[0].mesh.shape["fsdp"] == 8
