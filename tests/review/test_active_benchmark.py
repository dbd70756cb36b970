"""The benchmark of active learning at tiny size: what it asks, what it holds out, and what it says was needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'jaxtune[review]'")
    monkeypatch.syspath_prepend(str(FOLDER))
    import active_learning

    monkeypatch.setattr(active_learning, "COUNTS", (20, 40, 60, 80, 100))
    return active_learning


def rated(bench, noise: float = 0.0):
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(400, 6))
    ratings = 3.0 * np.sign(x_ND[:, :1]) + noise * rng.normal(size=(400, 20))
    return bench.Rated(x_ND, ratings, np.arange(400) // 4)


def test_whole_reviews_are_held_out_and_every_order_starts_alike(bench) -> None:
    data = rated(bench)
    pool, held = bench.split(data, 0)
    assert not set(data.review_N[pool]) & set(data.review_N[held])
    assert sorted([*pool, *held]) == list(range(400))
    assert 0.2 < len(held) / 400 < 0.3
    curves = {name: bench.curve(data, name, 0) for name in bench.active.ORDERS}
    assert len({one.scores["accuracy"][0] for one in curves.values()}) == 1
    assert len({one.scores["accuracy"][-1] for one in curves.values()}) == 1  # all labels: nothing is left to choose
    assert len({one.scores["accuracy"][2] for one in curves.values()}) > 1
    assert curves["random"].labels == [20, 40, 60, 80, 100, len(pool)]
    assert (
        curves["margin"].scores["accuracy"][4] > curves["random"].scores["accuracy"][4]
    )  # no noise: the border is all


def test_labels_needed(bench) -> None:
    assert bench.needed([10, 20, 30, 100], [0.2, 0.6, 0.8, 1.0], 0.7) == pytest.approx(25)
    assert bench.needed([10, 20, 30, 100], [0.9, 0.9, 0.9, 1.0], 0.7) == 10
    assert bench.needed([10, 20, 30, 100], [0.5, 0.7, 0.6, 1.0], 0.575) == pytest.approx(15)  # 0.5, 0.65, 0.65 rise
    middle, low, high = bench.told([100.0, 100.0, 100.0])
    assert (middle, low, high) == pytest.approx((100, 100, 100))
    assert bench.macro_f1(np.array([0, 1, 2]), np.array([0, 1, 2])) == 1.0
    assert bench.macro_f1(np.array([0, 0, 0]), np.array([0, 0, 1])) == pytest.approx(0.8 / 3)


def test_stop_rules_are_asked_at_each_count(bench) -> None:
    data = rated(bench)
    curves = {"random": [bench.curve(data, "random", seed) for seed in range(2)]}
    found = bench.stops(data, curves, "random")
    assert set(found) == {"kappa 0.99", "kappa 0.95", "gain < 0.01", "gain < 0.005"}
    assert all(count in (0, *bench.COUNTS) for given in found.values() for count, _ in given)
