"""The clipped surrogate: its entropies, clips, averages and layouts, each against what it should be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import sharding
from jaxtune.objectives import surrogate
from jaxtune.objectives.logps import token_logps_and_entropy
from jaxtune.objectives.ops import Head
from jaxtune.train import start, state, step
from jaxtune.validation_methods import ON_POLICY
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D, V = 2, 12, 8, 30
OPTIONS: dict[str, Any] = {
    "loss_type": "bnpo", "importance_level": "token", "clip_low": 0.2, "clip_high": 0.3, "delta": 0.0, "beta": 0.0, "kl_estimator": "k3",
    "kl_unbiased": True, "kl_in": "loss", "entropy_weight": 0.0, "temperature": 1.0, "max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Two completions in the first row, one in the second, and padding."""
    rng = np.random.default_rng(0)
    segments = np.asarray([[1] * 5 + [2] * 5 + [0] * 2, [1] * 8 + [0] * 4], np.int32)
    weights = np.zeros((B, T), np.float32)
    weights[0, 1:4] = weights[0, 6:9] = weights[1, 3:7] = 1
    advantages = weights * np.repeat([[1.0, -2.0, 0.0], [0.5, 0.5, 0.0]], [5, 5, 2], axis=1)
    return {
        "targets_BT": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), "segment_ids_BT": jnp.asarray(segments),
        "weights_BT": jnp.asarray(weights), "advantages_BT": jnp.asarray(advantages, jnp.float32),
        "old_logps_BT": jnp.asarray(rng.normal(-3.4, 0.4, (B, T)), jnp.float32),
        "reference_logps_BT": jnp.asarray(rng.normal(-3.4, 0.4, (B, T)), jnp.float32),
    }  # fmt: skip


@pytest.fixture(scope="module")
def given() -> tuple[jax.Array, jax.Array]:
    """(output projection (D, V), hidden states)."""
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(0, 0.5, (D, V)), jnp.float32), jnp.asarray(rng.normal(0, 1, (B, T, D)), jnp.float32)


def head(kernel_DV: jax.Array, chunk: int = 4) -> Head:
    return Head(kernel_DV, lambda p, h: jnp.matmul(h, p), chunk)


@pytest.mark.parametrize("trains_head", [False, True])
def test_entropies_and_their_gradients(batch: Any, given: tuple[jax.Array, jax.Array], trains_head: bool) -> None:
    kernel_DV, hidden_BTD = given
    scales = jnp.asarray(np.random.default_rng(2).normal(size=(2, B, T)), jnp.float32)
    targets, mask = batch["targets_BT"], batch["weights_BT"]

    def chunked(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        logps, entropy = token_logps_and_entropy(head(kernel), hidden, targets, mask, trains_entropy=True)
        return jnp.sum(scales[0] * logps + scales[1] * entropy)

    def plain(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        logps_BTV = jax.nn.log_softmax(jnp.matmul(hidden, kernel))
        logps = jnp.take_along_axis(logps_BTV, targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logps_BTV) * logps_BTV, axis=-1)
        return jnp.sum((scales[0] * logps + scales[1] * entropy) * mask)

    which = (0, 1) if trains_head else (1,)
    found, expected = (jax.value_and_grad(fn, which)(kernel_DV, hidden_BTD) for fn in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def ratios(batch: Any, given: tuple[jax.Array, jax.Array], temperature: float = 1.0) -> np.ndarray:
    logps_BTV = jax.nn.log_softmax(jnp.matmul(given[1], given[0]) / temperature)
    logps = jnp.take_along_axis(logps_BTV, batch["targets_BT"][..., None], axis=-1)[..., 0]
    return np.exp(np.asarray(logps - batch["old_logps_BT"]) * np.asarray(batch["weights_BT"]))


COMPLETIONS = [(0, slice(1, 4), 1.0), (0, slice(6, 9), -2.0), (1, slice(3, 7), 0.5)]  # row, tokens, advantage


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_by_hand(batch: Any, given: tuple[jax.Array, jax.Array], loss_type: str, level: str) -> None:
    options = OPTIONS | {"loss_type": loss_type, "importance_level": level, "delta": 1.5, "temperature": 0.8}
    found = surrogate.surrogate(head(given[0]), given[1], batch, **options)
    r, sums, lengths = ratios(batch, given, 0.8), [], []
    for row, where, advantage in COMPLETIONS:
        own = r[row, where]
        if level != "token":
            own = np.full(len(own), np.prod(own) ** (1 / len(own) if level == "sequence" else 1))
        sums.append(-np.minimum(np.minimum(own, 1.5) * advantage, np.clip(own, 0.8, 1.3) * advantage).sum())
        lengths.append(len(own))
    expected = {
        "grpo": np.mean(np.divide(sums, lengths)), "dr_grpo": np.mean(sums) / 8,
        "bnpo": np.sum(sums) / np.sum(lengths), "dapo": np.sum(sums) / np.sum(lengths),
    }[loss_type]  # fmt: skip
    np.testing.assert_allclose(float(found.total / found.weight), expected, rtol=2e-5)


def test_a_clipped_token_has_no_gradient_and_is_counted(batch: Any, given: tuple[jax.Array, jax.Array]) -> None:
    def loss(hidden: jax.Array) -> tuple[jax.Array, Any]:
        found = surrogate.surrogate(head(given[0]), hidden, batch, **OPTIONS)
        return found.total, found.metrics

    grads, metrics = jax.grad(loss, has_aux=True)(given[1])
    moves = np.abs(np.asarray(grads)).sum(axis=-1) > 0
    r, a, real = ratios(batch, given), np.asarray(batch["advantages_BT"]), np.asarray(batch["weights_BT"]) != 0
    clipped = ((r > 1.3) & (a > 0)) | ((r < 0.8) & (a < 0))
    assert clipped.any()
    assert (moves == (real & ~clipped)).all()
    assert float(metrics["clip_share"][0] / metrics["clip_share"][1]) == pytest.approx(clipped.sum() / real.sum())


def test_estimates_of_the_divergence_agree_with_it() -> None:
    rng = np.random.default_rng(0)
    p, q = (jax.nn.softmax(jnp.asarray(rng.normal(0, scale, 50), jnp.float32)) for scale in (0.3, 0.0))
    exact = float(jnp.sum(p * jnp.log(p / q)))
    for estimator, tolerance in (
        ("k1", 1e-5),
        ("k3", 1e-5),
        ("k2", 0.05),
    ):  # k2 is biased, a little where they are near
        mean = float(jnp.sum(p * surrogate.kl_divergence(jnp.log(p / q), estimator)))
        assert mean == pytest.approx(exact, rel=tolerance), estimator


def test_layout_changes_nothing(tiny_config: ConfigDict) -> None:
    """PPO with all that it has, accumulated on a mesh and whole on one device: loss, gradient norm, metrics."""
    found = []
    for devices, accumulation, mesh in ((1, 1, {"fsdp": 1}), (8, 2, {"fsdp": 4, "tensor": 2})):
        config = tiny_config.copy_and_resolve_references()
        config.train.objective, config.train.accumulation = "ppo", accumulation
        config.rl.update({"loss_type": "grpo", "entropy_weight": 0.1, "beta": 0.1, "temperature": 0.9})
        config.mesh.update(mesh)
        model, where = source.find(config), sharding.make_mesh(config, jax.devices()[:devices])
        program = state.abstract(config, model.hf_config, where, 4)
        current, frozen = start.load(config, model, program, None, lambda items, *_: items)
        run = step.make(config, program)
        arrays = sharding.to_global(random_batch(config), where, config.train.batch_size)
        told = []
        for _ in range(2):
            current, metrics = run(current, frozen, arrays)
            told.append({name: float(value) for name, value in metrics.items()})
        found.append(told)
    for one, other in zip(*found, strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert found[0][1]["value_loss"] < found[0][0]["value_loss"]


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    rng, (rows, length) = np.random.default_rng(0), (config.train.batch_size, config.data.max_length)
    half = np.repeat([[1, 2]], length // 2, axis=1).repeat(rows, axis=0).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.4).astype(np.float32) * (
        np.arange(length) % (length // 2) < length // 2 - 1
    )
    logps = rng.normal(-6, 0.5, (2, rows, length)).astype(np.float32)
    noise = rng.normal(size=(3, rows, length)).astype(np.float32)
    tokens = rng.integers(4, 300, (2, rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32) % (length // 2), (rows, length))
    return {
        "tokens_BT": tokens[0], "targets_BT": tokens[1], "weights_BT": weights.astype(np.float32), "segment_ids_BT": half,
        "positions_BT": positions, "old_logps_BT": logps[0], "reference_logps_BT": logps[1], "advantages_BT": noise[0],
        "old_values_BT": noise[1], "returns_BT": 1 + noise[2],
    }  # fmt: skip


@pytest.mark.parametrize("objective", ON_POLICY)
def test_the_step_has_the_fields_that_rounds_give(tiny_config: ConfigDict, objective: str) -> None:
    tiny_config.train.objective, tiny_config.mesh.fsdp = objective, 8
    program = state.abstract(tiny_config, source.find(tiny_config).hf_config, sharding.make_mesh(tiny_config), 4)
    batch = step.abstract_batch(tiny_config, program)
    assert set(batch) <= set(random_batch(tiny_config))
    after, metrics = jax.eval_shape(step.make(tiny_config, program), program.state, program.frozen, batch)
    assert {"entropy", "clip_share", "kl_old"} < set(metrics)
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, program.state.params)
    critic = {path: program.labels[path] for path in program.base if path.startswith("value_head.")}
    assert set(critic.values()) == ({"full"} if objective == "ppo" else set())
