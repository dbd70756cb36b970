"""Merged adapters against PEFT's own `add_weighted_adapter`, and tensors against its merge functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxtune.adapters import arithmetic
from jaxtune.adapters.arithmetic import Factors, Options

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-5
WEIGHTS = (0.7, -0.4, 1.3)
NAMES = ("first", "second", "third")
SCALES = {"first": (4, 8.0), "second": (4, 3.0), "third": (4, 4.0)}  # rank, alpha
MIXED_RANKS = {"first": (4, 8.0), "second": (2, 3.0), "third": (5, 4.0)}


def peft_model(ranks: dict[str, tuple[int, float]]) -> Any:
    """Two linear layers with three random adapters, the third on the first layer alone."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("up", torch.nn.Linear(6, 7, bias=False))
    net.add_module("down", torch.nn.Linear(7, 5, bias=False))
    model = None
    for name, (rank, alpha) in ranks.items():
        targets = ["up"] if name == "third" else ["up", "down"]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if model is None:
            model = get_peft_model(net, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.normal_()
    return model


def layers(model: Any) -> dict[str, Any]:
    return {name: getattr(model.base_model.model, name) for name in ("up", "down")}


def ours(model: Any) -> list[dict[str, Factors]]:
    """PEFT's adapters as ours: transposed, a stack of one layer."""
    parts: list[dict[str, Factors]] = [{} for _ in NAMES]
    for linear, layer in layers(model).items():
        for part, name in zip(parts, NAMES, strict=True):
            if name in layer.lora_A:
                a, b = (side[name].weight.detach().numpy().T[None] for side in (layer.lora_A, layer.lora_B))
                part[linear] = Factors(a, b, layer.scaling[name])
    return parts


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What we drop, in the order of our draws, is what torch drops."""
    import torch

    drawn: list[np.ndarray] = []
    draw = arithmetic.mask

    def remembered(*args: Any) -> np.ndarray:
        drawn.append(draw(*args))
        return drawn[-1]

    def told(input: Any) -> Any:  # noqa: A002
        kept = drawn.pop(0)
        return torch.from_numpy(kept.T.copy()).to(input.dtype).reshape(input.shape)

    monkeypatch.setattr(arithmetic, "mask", remembered)
    monkeypatch.setattr(torch, "bernoulli", told)
    yield drawn
    assert not drawn


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", [m for m in arithmetic.METHODS if m not in ("slerp", "cat", "svd", "linear")])
def test_pruned_merges_are_pefts(method: str, majority: str, same_masks: list[np.ndarray]) -> None:
    compare(method, majority, SCALES)


@pytest.mark.parametrize("ranks", [SCALES, MIXED_RANKS], ids=["one_rank", "ranks"])
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd"])
def test_sums_are_pefts(method: str, ranks: dict[str, tuple[int, float]]) -> None:
    if method == "linear" and ranks is MIXED_RANKS:
        pytest.skip("refused, here and there")
    compare(method, "total", ranks)


def compare(method: str, majority: str, ranks: dict[str, tuple[int, float]]) -> None:
    model = peft_model(ranks)
    rank = max(
        rank for rank, _ in ranks.values()
    )  # PEFT's is the largest of all adapters', ours of those that change a linear
    merged, partly = arithmetic.adapters(ours(model), WEIGHTS, Options(method, 0.6, majority, rank, seed=3))
    assert partly == {"down": 2}
    density = None if method in ("cat", "svd", "linear") else 0.6
    model.add_weighted_adapter(
        list(NAMES), list(WEIGHTS), "merged", method, density=density, majority_sign_method=majority
    )
    for linear, layer in layers(model).items():
        theirs = layer.get_delta_weight("merged").detach().numpy().T
        mine = merged[linear].dense[0]
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_tensors_merge_as_pefts_do(same_masks: list[np.ndarray]) -> None:
    import torch
    from peft.utils import merge_utils

    rng = np.random.default_rng(0)
    tensors = [rng.normal(size=(8, 9)).astype(np.float32) for _ in range(3)]
    torches, weights = [torch.from_numpy(tensor.T.copy()) for tensor in tensors], torch.tensor(WEIGHTS)
    for method in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        mine = arithmetic.dense(tensors, WEIGHTS, Options(method, 0.4), "w")
        theirs = getattr(merge_utils, method)(torches, weights, 0.4).numpy().T
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
