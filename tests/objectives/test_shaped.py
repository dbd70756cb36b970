"""Losses beside cross-entropy, chunk by chunk: their formulas, values and gradients; and that none of them costs the plain one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.models.embed_noise import noisy, text_lengths
from jaxtune.objectives import ops
from jaxtune.train import state, step
from jaxtune.types import UserError
from jaxtune.weights import source

B, T, D, V = 2, 7, 5, 11
RNG = np.random.default_rng(0)
HIDDEN_BTD, KERNEL_DV = (RNG.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V)))
TARGETS_BT = RNG.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS_BT = (RNG.random((B, T)) * (RNG.random((B, T)) < 0.6)).astype(np.float32)
SHAPES = {
    "plain": ops.PLAIN,
    "label smoothing": ops.Shape(label_smoothing=0.2),
    "z-loss": ops.Shape(z_weight=0.3),
    "both": ops.Shape(label_smoothing=0.1, z_weight=0.2),
    "focal": ops.Shape(focal_gamma=2.0),
    "focal below 1": ops.Shape(focal_gamma=0.5, z_weight=0.1),
}


def head(kernel: Any, num_shards: int = 1) -> ops.Head:
    return ops.Head(kernel, lambda kernel, hidden: jnp.einsum("...d,dv->...v", hidden, kernel), 3, num_shards)


def whole(hidden_BTD: Any, kernel_DV: Any, shape: ops.Shape) -> jax.Array:
    """The formula, on the full logits."""
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, kernel_DV)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    own_BT = jnp.take_along_axis(logp_BTV, TARGETS_BT[..., None], -1)[..., 0]
    if shape.focal_gamma:
        loss_BT = -((1 - jnp.exp(own_BT)) ** shape.focal_gamma) * own_BT
    else:
        loss_BT = -(1 - shape.label_smoothing) * own_BT - shape.label_smoothing * jnp.mean(logp_BTV, axis=-1)
    loss_BT += shape.z_weight * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    return jnp.sum(WEIGHTS_BT * loss_BT)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_give_the_formula_and_its_gradients(name: str) -> None:
    shape = SHAPES[name]

    def chunked(hidden_BTD: Any, kernel_DV: Any) -> jax.Array:
        return ops._by_chunks(head(kernel_DV), hidden_BTD, TARGETS_BT, WEIGHTS_BT, shape)[0]

    found, wanted = (
        jax.value_and_grad(fn, (0, 1))(HIDDEN_BTD, KERNEL_DV) for fn in (chunked, lambda h, k: whole(h, k, shape))
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)  # float32, sums in another order


def test_a_sure_target_has_a_finite_focal_gradient() -> None:
    """Where p(target) is 1 in float32 the factor (1 - p)^(gamma - 1) is infinite, and the gradient all the same 0."""
    kernel = jnp.eye(D, V) * 200
    hidden_BTD = jax.nn.one_hot(np.zeros((1, 1), int), D)
    given = (np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), ops.Shape(focal_gamma=0.5))
    value, grad = jax.value_and_grad(lambda h: ops._by_chunks(head(kernel), h, *given)[0])(hidden_BTD)
    assert float(value) == 0
    np.testing.assert_array_equal(grad, 0)


def test_the_metrics_tell_the_plain_loss_beside() -> None:
    batch = {"targets_BT": TARGETS_BT, "weights_BT": WEIGHTS_BT}
    plain, weight, told = ops.classed(head(KERNEL_DV), HIDDEN_BTD, batch)
    _, same, metrics = ops.classed(head(KERNEL_DV), HIDDEN_BTD, batch, label_smoothing=0.3)
    assert set(told) == {"accuracy"}
    assert (float(metrics["nll"][0]), float(same)) == (float(plain), float(weight))


def test_an_objective_that_takes_no_such_option_says_so(tiny_config: ConfigDict) -> None:
    tiny_config.train.objective, tiny_config.train.focal_gamma = "contrastive", 2.0
    with pytest.raises(UserError, match=r"train\.focal_gamma.*contrastive"):
        step.objective(tiny_config, source.find(tiny_config).hf_config)
    tiny_config.train.objective, tiny_config.train.focal_gamma, tiny_config.train.class_weights = "sft", 0.0, (1, 2)
    with pytest.raises(UserError, match=r"train\.class_weights.*sft"):
        step.objective(tiny_config, source.find(tiny_config).hf_config)


# ---- NEFTune ----


def test_noise_has_the_length_of_its_text_whatever_it_is_packed_with() -> None:
    segments_BT = np.asarray([[1] * 40 + [2] * 10 + [0] * 14, [1] * 64], np.int32)
    np.testing.assert_array_equal(text_lengths(segments_BT)[0, [0, 39, 40, 49]], [40, 40, 10, 10])
    width, alpha = 128, 5.0
    x_BTD = jnp.zeros((2, 64, width))
    noise = np.asarray(noisy(x_BTD, segments_BT, alpha, jax.random.key(0)))
    for row, start, end in ((0, 0, 40), (0, 40, 50), (1, 0, 64)):
        text, bound = noise[row, start:end], alpha / np.sqrt((end - start) * width)
        assert np.abs(text).max() <= bound
        # E |e|^2 = L D bound^2 / 3 = alpha^2 / 3, for a text of any length (three standard errors of the shortest)
        np.testing.assert_allclose((text**2).sum(), alpha**2 / 3, rtol=0.08)
    assert (noise[0, 50:] == 0).all()


def test_noise_is_in_training_alone(tiny_config: ConfigDict) -> None:
    tiny_config.mesh.fsdp = -1
    hf_config = source.find(tiny_config).hf_config

    def hidden(alpha: float, key: jax.Array | None) -> np.ndarray:
        from jaxtune import sharding

        tiny_config.train.neftune_noise_alpha = alpha
        program = state.abstract(tiny_config, hf_config, sharding.make_mesh(tiny_config, jax.devices()[:1]), 1)
        params = state.random_base(program, 0)
        params |= state._initial_adapter(program, params, 0)
        tokens_BT = np.arange(16, dtype=np.int32)[None] % 7
        batch = {"tokens_BT": tokens_BT, "segment_ids_BT": tokens_BT * 0 + 1, "positions_BT": np.arange(16)[None]}
        return np.asarray(jax.jit(lambda p: step.policy(program, p, 8).hidden(batch, key))(params))

    key = jax.random.key(0)
    plain = hidden(0.0, key)
    np.testing.assert_array_equal(hidden(5.0, None), plain)
    assert np.abs(hidden(5.0, key) - plain).max() > 1e-3
