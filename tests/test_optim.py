"""Schedules, optimizers by name, layer-wise rates and the average of the weights: what each one does to numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import moments, optim, sharding
from jaxtune.train import state, step
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")
RNG = np.random.default_rng(0)
PARAMS = {
    "embed.table": RNG.normal(size=(64, 128)),
    "layers.attn.q_proj.kernel": RNG.normal(size=(3, 128, 64)),
    "layers.attn.q_proj.bias": RNG.normal(size=(3, 64)),
    "layers.mlp.experts.kernel": RNG.normal(size=(3, 2, 64, 128)),
    "layers.attn.q_proj.adapter.lora_a": RNG.normal(size=(3, 128, 4)),
    "norm.scale": RNG.normal(size=(64,)),
}
PARAMS = {path: value.astype(np.float32) for path, value in PARAMS.items()}
GRADS = {path: RNG.normal(size=value.shape).astype(np.float32) for path, value in PARAMS.items()}
LABELS = {path: "lora_a" if path.endswith("lora_a") else "full" for path in PARAMS}


@pytest.fixture
def config() -> ConfigDict:
    """A constant rate of 1e-2, nothing clipped."""
    made = config_lib.base()
    made.optim.update({"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0})
    return made


def updates(config: ConfigDict, num_steps: int = 1, **more: Any) -> tuple[dict[str, Any], Any]:
    """The last of some steps' updates, with the gradients of a seed each."""
    made, params = optim.make(config, LABELS, 100, **more), PARAMS
    current, update = made.init(params), jax.jit(made.update)
    for number in range(num_steps):
        grads = {path: grad * (1 + 0.1 * number) for path, grad in GRADS.items()}
        found, current = update(grads, current, params)
        params = optax.apply_updates(params, found)
    return found, current


# ---- schedules ----


def test_wsd_warms_up_stays_and_decays(config: ConfigDict) -> None:
    config.optim.update({"schedule": "wsd", "warmup_steps": 10, "stable_share": 0.8, "final_ratio": 0.1})
    at = [0, 5, 10, 50, 81, 82, 91, 100]
    for shape, half in (("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5), ("sqrt", 1 - 0.9 * 0.5**0.5)):
        config.optim.decay_shape = shape
        rate = optim.schedule(config.optim, 100)
        wanted = np.asarray([0, 0.5, 1, 1, 1, 1, half, 0.1]) * 1e-2
        np.testing.assert_allclose([float(rate(step)) for step in at], wanted, rtol=1e-5, err_msg=shape)


# ---- optimizers ----


def test_lion_steps_by_the_sign(config: ConfigDict) -> None:
    config.optim.name = "lion"
    found, _ = updates(config)
    for path, update in found.items():
        np.testing.assert_allclose(update, -1e-2 * np.sign(GRADS[path]), rtol=1e-6)


def test_muon_makes_every_layers_matrix_orthogonal_by_itself(config: ConfigDict) -> None:
    config.optim.name = "muon"
    found, _ = updates(config)
    for path in ("layers.attn.q_proj.kernel", "layers.mlp.experts.kernel", "layers.attn.q_proj.adapter.lora_a"):
        update = np.asarray(found[path]).reshape(-1, *PARAMS[path].shape[-2:])
        n, m = update.shape[1:]
        values = np.linalg.svd(update, compute_uv=False) / (1e-2 * config.optim.muon_rms * max(n, m) ** 0.5)
        assert ((values > 0.6) & (values < 1.3)).all(), path  # five Newton-Schulz steps leave about 0.7 to 1.2
        directions = [np.vdot(one, -grad) for one, grad in zip(update, GRADS[path].reshape(update.shape), strict=True)]
        assert min(directions) > 0
    config.optim.name = "adamw"
    plain, _ = updates(config)
    for path in ("embed.table", "norm.scale", "layers.attn.q_proj.bias"):
        np.testing.assert_array_equal(found[path], plain[path])


def test_muon_of_a_stack_is_muon_of_its_layers(config: ConfigDict) -> None:
    config.optim.name = "muon"
    path = "layers.attn.q_proj.kernel"
    made = optim.make(config, {path: "full"}, 9)
    whole, _ = made.update({path: GRADS[path]}, made.init({path: PARAMS[path]}), {path: PARAMS[path]})
    one = {path: PARAMS[path][1:2]}
    alone, _ = made.update({path: GRADS[path][1:2]}, made.init(one), one)
    np.testing.assert_allclose(whole[path][1:2], alone[path], rtol=1e-4, atol=1e-7)


def test_adafactor_factors_each_layer_by_itself(config: ConfigDict) -> None:
    config.optim.update({"name": "adafactor", "min_factored_dim": 64})
    found, current = updates(config)
    path = "layers.attn.q_proj.kernel"
    slots = [leaf.shape for _, each in optax.tree.get_all_with_path(current, "v_row") for leaf in jax.tree.leaves(each)]
    assert PARAMS[path].shape not in slots
    assert any(len(shape) == 2 and shape[0] == 3 for shape in slots)
    by_hand = optax.adafactor(1e-2, min_dim_size_to_factor=64, multiply_by_parameter_scale=False)
    for layer in range(3):
        param = PARAMS[path][layer]
        alone, _ = by_hand.update(GRADS[path][layer], by_hand.init(param), param)
        np.testing.assert_allclose(found[path][layer], alone, rtol=1e-5)
    assert np.asarray(optax.tree.get_all_with_path(current, "count")[0][1]).shape == ()


def test_8_bit_moments_go_where_float32_ones_go(config: ConfigDict) -> None:
    wanted, full = updates(config, 30)
    config.optim.name = "adam8bit"
    found, current = updates(config, 30)
    assert isinstance(optax.tree.get_all_with_path(current, "mu")[0][1]["embed.table"], moments.Moment)
    for path, update in found.items():
        # moments are within 1/16 of theirs, so an update is within about an eighth
        # (numbers 2^15 below the largest of their block, one in ten thousand, apart).
        assert np.quantile(np.abs(update - wanted[path]), 0.999) < 0.15 * np.abs(wanted[path]).max(), path
        cosine = np.vdot(update, wanted[path]) / np.linalg.norm(update) / np.linalg.norm(wanted[path])
        assert cosine > 0.998, path
    np.testing.assert_allclose(found["norm.scale"], wanted["norm.scale"], rtol=1e-4)  # vectors keep float32
    coded, plain = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(each[0].inner_states["full"])) for each in (current, full)
    )
    assert coded < 0.3 * plain


def test_codes_are_close_and_no_second_moment_becomes_0() -> None:
    x = jnp.asarray(RNG.normal(size=(2, 64, 128)) * 10.0 ** RNG.uniform(-3, 0, (2, 64, 128)), jnp.float32)
    for shape in ((-1, 128), (-2, 64)):
        coded = moments.encode(x, *shape)
        assert coded.codes.dtype == jnp.uint8
        found = np.asarray(moments.decode(coded, *shape))
        top = np.abs(np.asarray(x)).max(shape[0], keepdims=True)
        assert (np.abs(found - x) <= np.maximum(np.abs(x) / 16, top * 2.0**-18)).all()
    tiny = jnp.asarray([[1.0, 1e-12] * 32, [0.0] * 64], jnp.float32)
    found = np.asarray(moments.decode(moments.encode(tiny, -1, 64, up=True), -1, 64))
    assert (found[0] > 0).all()
    assert (found[1] == 0).all()


def test_blocks_depend_on_the_shape_alone_and_lie_with_their_weights(tiny_config: ConfigDict) -> None:
    assert moments.block_of((2, 4096, 14336), 256) == (-1, 256)
    assert moments.block_of((2, 4096, 16), 256) == (-2, 256)
    assert moments.block_of((576, 576), 256) == (-1, 64)
    assert moments.block_of((64, 16), 256) is None
    assert moments.block_of((4096,), 256) is None
    tiny_config.tune.method, tiny_config.optim.name, tiny_config.optim.moment_block = "full", "adam8bit", 16
    mesh = sharding.make_mesh(tiny_config, jax.devices())
    program = state.abstract(tiny_config, source.find(tiny_config).hf_config, mesh, 1)
    mu = optax.tree.get(program.state.opt_state, "mu")
    path = "layers.mlp.gate_proj.kernel"
    assert mu[path].codes.sharding == program.state.params[path].sharding
    assert mu[path].scales.sharding.spec == program.state.params[path].sharding.spec
    assert not mu[path].scales.sharding.is_fully_replicated


# ---- layer-wise rates ----


def test_each_layer_has_its_own_rate(config: ConfigDict, tiny_config: ConfigDict) -> None:
    plain, _ = updates(config)
    config.optim.layer_decay = 0.5
    depth = {"embed": 0, "norm": 4}
    found, _ = updates(config, depths=lambda path: np.asarray(depth.get(path.split(".")[0], np.arange(3) + 1)))
    for path, update in found.items():
        factor = 0.5 ** (4.0 - np.asarray(depth.get(path.split(".")[0], [1, 2, 3])))
        factor = factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))
        np.testing.assert_allclose(update, plain[path] * factor, rtol=1e-6)


def test_a_models_parameters_know_how_deep_they_lie(tiny_config: ConfigDict) -> None:
    from jaxtune.models import transformer

    program = state.abstract(
        tiny_config, source.find(tiny_config).hf_config, sharding.make_mesh(tiny_config, jax.devices()[:1]), 1
    )
    depth = {path: transformer.depths(program.model_config, path) for path in program.labels}
    assert {int(depth[path]) for path in ("embed.table",)} == {0}
    assert {int(depth[path]) for path in ("norm.scale", "lm_head.kernel")} == {3}
    for path in [path for path in program.labels if path.startswith("layers.")]:
        assert depth[path].tolist() == [1, 2]


# ---- averages ----


def test_the_average_is_its_formula(config: ConfigDict) -> None:
    config.optim.ema_decay = 0.6
    made = optim.make(config, LABELS, 100)
    current, params = made.init(PARAMS), PARAMS
    wanted = {path: value.astype(np.float64) for path, value in params.items()}
    for number in range(12):
        found, current = made.update(GRADS, current, params)
        params = optax.apply_updates(params, found)
        d = min(0.6, (1 + number) / (10 + number))
        wanted = {path: d * wanted[path] + (1 - d) * np.asarray(params[path]) for path in params}
    given = state.State(0, params, current, None, None)
    for path, value in optim.in_use(config.optim, given).items():
        np.testing.assert_allclose(value, wanted[path], rtol=2e-5, atol=1e-6)
    config.optim.use_ema = False
    assert optim.in_use(config.optim, given) is params


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "adafactor", "lion", "muon", "sgd"])
def test_every_optimizer_trains_sharded_and_skips_broken_steps(tiny_config: ConfigDict, name: str) -> None:
    """The state keeps its dtypes and places; a step that is not finite leaves it, average included, to the bit."""
    tiny_config.optim.update(
        {"name": name, "ema_decay": 0.9, "layer_decay": 0.9, "moment_block": 16, "warmup_steps": 0}
    )
    tiny_config.optim.update({"learning_rate": 0.1 if name == "sgd" else 1e-3, "clip_norm": 0.0})
    mesh = sharding.make_mesh(tiny_config, jax.devices())
    program = state.abstract(tiny_config, source.find(tiny_config).hf_config, mesh, 10)
    base = state.random_base(program, 0)
    current, frozen = state.create(program, base, 0)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.state)
    run = step.make(tiny_config, program)
    rng = np.random.default_rng(0)
    one = {
        "tokens_BT": rng.integers(4, 40, (8, 64)),
        "segment_ids_BT": np.ones((8, 64)),
        "weights_BT": np.ones((8, 64)),
    }
    one |= {"targets_BT": np.roll(one["tokens_BT"], -1, 1), "positions_BT": np.broadcast_to(np.arange(64), (8, 64))}
    kinds = {"weights_BT": np.float32}
    arrays = sharding.to_global({key: x.astype(kinds.get(key, np.int32)) for key, x in one.items()}, mesh, 8)
    losses = []
    for _ in range(6):
        current, metrics = run(current, frozen, arrays)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), current) == shapes
    kept = jax.tree.map(np.asarray, (current.params, current.opt_state))
    broken = {path: value * np.nan if path == "norm.scale" else value for path, value in frozen.items()}
    current, metrics = run(current, broken, arrays)
    assert not metrics["ok"]
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, (current.params, current.opt_state)))
