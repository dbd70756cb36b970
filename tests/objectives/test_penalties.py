"""Penalties against hand-computed values, the matrices that they never make, and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import penalties


@pytest.fixture
def factors() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Two stacked layers of an adapter, DoRA's magnitudes and a head: now, and at the start."""
    rng = np.random.default_rng(0)
    shapes = {"layers.q.adapter.lora_a": (2, 5, 3), "layers.q.adapter.lora_b": (2, 3, 4)}
    shapes |= {"layers.q.adapter.magnitude": (2, 4), "task_head.kernel": (5, 2)}
    now, then = ({path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()} for _ in range(2))
    return now, then


def test_l2_start_by_hand() -> None:
    """1/2 ((3 - 1)^2 + (0 - 2)^2) = 4."""
    now, start = {"norm.scale": jnp.asarray([3.0, 0.0])}, {"norm.scale": jnp.asarray([1.0, 2.0])}
    assert penalties.l2_start(now, {}, start, lambda path: 1.0) == 4.0


def test_l2_of_a_new_adapter_is_that_of_its_weight_change(factors) -> None:
    now, start = factors
    start = start | {"layers.q.adapter.lora_b": jnp.zeros((2, 3, 4))}
    a, b = now["layers.q.adapter.lora_a"], now["layers.q.adapter.lora_b"]
    plain = sum(np.sum((now[p] - start[p]) ** 2) for p in ("layers.q.adapter.magnitude", "task_head.kernel"))
    wanted = 0.5 * (np.sum((2.0 * np.matmul(a, b)) ** 2) + plain)
    np.testing.assert_allclose(penalties.l2_start(now, {}, start, lambda path: 2.0), wanted, rtol=1e-5)


def test_l2_is_told_from_where_an_adapter_stood_and_not_from_its_factors(factors) -> None:
    now, start = factors
    a, b, a_0, b_0 = (side[f"layers.q.adapter.lora_{kind}"] for side in (now, start) for kind in "ab")
    pair = {path: value for path, value in now.items() if ".lora_" in path}
    wanted = 0.5 * np.sum((np.matmul(a, b) - np.matmul(a_0, b_0)) ** 2)
    np.testing.assert_allclose(penalties.l2_start(pair, {}, start, lambda path: 1.0), wanted, rtol=1e-5)
    turned = {
        "layers.q.adapter.lora_a": a_0 @ (2 * jnp.eye(3)),
        "layers.q.adapter.lora_b": jnp.linalg.inv(2 * jnp.eye(3)) @ b_0,
    }
    assert penalties.l2_start(turned, {}, start, lambda path: 1.0) < 1e-9  # other factors, the same adapter
    only_b = {"layers.q.adapter.lora_b": b}
    frozen = {"layers.q.adapter.lora_a": a_0}
    wanted = 0.5 * np.sum(np.matmul(a_0, b - b_0) ** 2)
    np.testing.assert_allclose(penalties.l2_start(only_b, frozen, start, lambda path: 1.0), wanted, rtol=1e-5)


def test_ewc_by_hand_and_beside_l2() -> None:
    """1/2 (2 x 3^2 + 0.5 x 2^2 + 0 x 7^2) = 10; with a Fisher information of 1 it is L2-SP."""
    now, start = {"w": jnp.asarray([4.0, 0.0, 7.0])}, {"w": jnp.asarray([1.0, 2.0, 0.0])}
    assert penalties.ewc(now, start, {"w": jnp.asarray([2.0, 0.5, 0.0])}) == 10.0
    one = {"w": jnp.ones(3)}
    assert penalties.ewc(now, start, one) == penalties.l2_start(now, {}, start, lambda path: 1.0) == 31.0


def test_orthogonal_by_hand() -> None:
    """Columns (1, 1) and (2, 0) against (1, 0): products 1 and 2, squares 1 + 4; an orthogonal one adds nothing."""
    path = "layers.q.adapter.lora_a"
    now = {path: jnp.asarray([[1.0, 2.0], [1.0, 0.0]])}
    earlier = {path: jnp.asarray([[1.0], [0.0]])}
    assert penalties.orthogonal(now, earlier) == 5.0
    apart = {path: jnp.asarray([[0.0, 0.0], [1.0, 3.0]])}
    assert penalties.orthogonal(apart, earlier) == 0.0


@pytest.mark.parametrize("name", ["l2_start", "ewc", "orthogonal"])
def test_gradients_are_those_of_finite_differences(factors, name: str) -> None:
    now, start = factors
    known = {
        "l2_start": lambda p: penalties.l2_start(p, {}, start, lambda path: 2.0),
        "ewc": lambda p: penalties.ewc(p, start, jax.tree.map(jnp.square, start)),
        "orthogonal": lambda p: penalties.orthogonal(p, {"layers.q.adapter.lora_a": start["layers.q.adapter.lora_a"]}),
    }
    for path, grad in jax.grad(known[name])(now).items():
        step = jnp.asarray(np.random.default_rng(1).normal(size=grad.shape), jnp.float32)
        ahead, behind = (known[name](now | {path: now[path] + sign * 1e-2 * step}) for sign in (1, -1))
        found = (float(ahead) - float(behind)) / 2e-2  # exact for a quadratic, which all are in one parameter
        np.testing.assert_allclose(jnp.sum(grad * step), found, rtol=2e-3, atol=1e-3, err_msg=path)
