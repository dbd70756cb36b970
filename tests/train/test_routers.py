"""The routers' losses in a training step: their weights reach the gradient, however the step is laid out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.models import layers
from jaxtune.train import state, step
from jaxtune.types import UserError
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")

STATISTICS = {"router_balance", "router_z", "router_entropy", "router_max_load"}
WEIGHTS = {"router_balance_weight": 3.0, "router_z_weight": 0.5}


def config_with(**changes: Any) -> ConfigDict:
    config = config_lib.base()
    config.tune.method, config.optim.name, config.optim.learning_rate, config.optim.clip_norm = "full", "sgd", 1.0, 0.0
    config.optim.schedule, config.optim.warmup_steps, config.train.steps = "constant", 0, 1
    config.data.max_length, config.mesh.fsdp = 16, 1
    config.update_from_flattened_dict({f"train.{name}": value for name, value in changes.items()})
    return config


def batch() -> dict[str, np.ndarray]:
    """Eight rows, each twice in a row, so that two micro-batches hold the same; some padding, some of it untrained."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 96, (4, 17)).astype(np.int32)
    segments = (np.arange(16)[None] < np.asarray([16, 9, 12, 5])[:, None]).astype(np.int32)
    found = {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "segment_ids_BT": segments,
        "weights_BT": (segments * (rng.random((4, 16)) < 0.6)).astype(np.float32),
        "positions_BT": np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
    }  # fmt: skip
    return {name: np.repeat(array, 2, axis=0) for name, array in found.items()}


def moved(config: ConfigDict, num_devices: int = 1) -> tuple[dict[str, np.ndarray], dict[str, float], Any]:
    """(what one SGD step at rate 1 takes from each weight: its gradient, the step's metrics, program and weights)."""
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    program = state.abstract(config, CASES["mixtral"], mesh, 1)
    rng = np.random.default_rng(0)
    values = {
        path: (rng.normal(0, 0.3, like.shape) + path.endswith("scale")).astype(np.float32)
        for path, like in program.base.items()
    }
    current, frozen = state.create(program, sharding.put(values, state.shardings(program.base)), 0)
    found, metrics = step.make(config, program)(current, frozen, sharding.to_global(batch(), mesh, 8))
    gradient = {path: values[path] - np.asarray(value) for path, value in found.params.items()}
    return gradient, {name: float(value) for name, value in metrics.items()}, (program, values)


@pytest.fixture(scope="module")
def weighted() -> Any:
    return moved(config_with(**WEIGHTS))


def test_the_weights_reach_the_gradient(weighted: Any) -> None:
    gradient, metrics, (program, values) = weighted
    plain, unweighted, _ = moved(config_with())

    @jax.jit
    def of_routers(params: Any) -> Any:
        given = batch()
        model = layers.bind(program.graphdef, params)
        report = model.run_all(given["tokens_BT"], given["positions_BT"], given["segment_ids_BT"])[2]
        return (3.0 * report["router_balance"] + 0.5 * report["router_z"]) / report["layers"]

    expected = jax.grad(of_routers)(values)
    router = "layers.mlp.router.kernel"
    assert np.abs(expected[router]).max() > 1e-2
    for path, value in expected.items():
        scale = np.abs(gradient[path]).max() + 1e-6
        np.testing.assert_allclose((gradient[path] - plain[path]) / scale, value / scale, atol=1e-4, err_msg=path)
    assert metrics["loss"] == pytest.approx(unweighted["loss"], abs=1e-5)  # the objective's alone, to be compared
    for name in STATISTICS:
        assert metrics[name] == pytest.approx(unweighted[name], rel=1e-5)
    assert metrics["router_max_load"] >= 1
    assert 0 < metrics["router_entropy"] <= np.log(4)


LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "experts over 4": (8, {"expert": 4, "data": 2}, {}),
    "experts, tokens and heads over 2": (8, {"expert": 2, "context": 2, "tensor": 2}, {}),
    "equal micro-batches over fsdp 4, dots": (4, {"fsdp": 4}, {"accumulation": 2, "remat": "dots"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(weighted: Any, layout: str) -> None:
    num_devices, mesh, changes = LAYOUTS[layout]
    config = config_with(**WEIGHTS, **changes)
    config.mesh.update(mesh)
    gradient, metrics, _ = moved(config, num_devices)
    for path, value in weighted[0].items():
        np.testing.assert_allclose(gradient[path], value, atol=1e-4 * float(np.abs(value).max()) + 1e-6, err_msg=path)
    for name in {*STATISTICS, "loss"}:
        assert metrics[name] == pytest.approx(weighted[1][name], rel=1e-4)


def test_a_dense_model_has_no_routers() -> None:
    config = config_with(router_z_weight=0.1)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    with pytest.raises(UserError, match=r"train.router_z_weight=0.1 .* has none"):
        state.abstract(config, CASES["llama"], mesh, 1)
    program = state.abstract(config_with(), CASES["llama"], mesh, 1)
    made = step.make(config_with(), program)
    metrics = jax.eval_shape(made, program.state, program.frozen, step.abstract_batch(config, program))[1]
    assert not any(name.startswith("router") for name in metrics)
