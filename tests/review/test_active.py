"""What to ask next and when to stop, against figures worked out by hand, by brute force or by scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxtune.review import active, queue, store
from jaxtune.review.record import Person, make_item
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

LOG2 = math.log(2)


def test_uncertainty() -> None:
    sure, two, three = [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]
    p = np.array([two, sure, three, [0.6, 0.3, 0.1]])
    np.testing.assert_allclose(active.entropy(p)[:3], [LOG2, 0, math.log(3)], atol=1e-9)
    np.testing.assert_allclose(active.margin(p), [1, 0, 1, 0.7], atol=1e-9)
    assert active.highest(active.entropy(p), 3).tolist() == [2, 3, 0]
    assert active.highest(active.margin(p), 2).tolist() == [0, 2]  # of equal ones the first


def test_disagreement_is_not_uncertainty() -> None:
    """Two models that are unsure alike do not disagree; two that are sure of different things do."""
    unsure = np.array([[[0.5, 0.5]], [[0.5, 0.5]]])
    split = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    p = np.concatenate([unsure, split], 1)
    np.testing.assert_allclose(active.vote_entropy(p), [0, LOG2], atol=1e-9)
    np.testing.assert_allclose(active.mean_kl(p), [0, LOG2], atol=1e-9)
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], (4, 50))
    mean_of_entropies = np.mean([active.entropy(one) for one in p], 0)
    np.testing.assert_allclose(
        active.mean_kl(p), active.entropy(p.mean(0)) - mean_of_entropies, atol=1e-9
    )  # BALD's form


def radius(x: np.ndarray, centers: np.ndarray) -> float:
    return float(np.sqrt(((x[:, None] - centers[None]) ** 2).sum(-1)).min(1).max())


def test_k_center_is_within_twice_the_best() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        x = rng.normal(size=(12, 2))
        chosen = active.k_center(x, np.zeros((0, 2)), 3)
        best = min(radius(x, x[list(three)]) for three in itertools.combinations(range(12), 3))
        assert len(set(chosen.tolist())) == 3
        assert radius(x, x[chosen]) <= 2 * best + 1e-9


def test_k_center_goes_where_nothing_is_labelled() -> None:
    x = np.array([[0.0, 0], [0, 0], [0, 1], [10, 0], [10, 1], [0, 20]])
    assert active.k_center(x, np.array([[0.0, 0]]), 2).tolist() == [5, 4]
    assert sorted(active.k_center(x, np.array([[0.0, 0]]), 9).tolist()) == list(range(6))  # twins as well, each once


def test_badge_draws_as_from_the_gradients_themselves() -> None:
    rng = np.random.default_rng(2)
    p, h = rng.dirichlet([1, 1, 1], 40), rng.normal(size=(40, 5))
    g = ((p - np.eye(3)[p.argmax(-1)])[:, :, None] * h[:, None, :]).reshape(40, -1)
    draws, weight, expected = np.random.default_rng(7), (g**2).sum(-1), []
    for _ in range(10):
        weight[expected] = 0
        expected.append(int(draws.choice(40, p=weight / weight.sum())))
        weight = np.minimum(weight, ((g - g[expected[-1]]) ** 2).sum(-1))
    assert active.badge(p, h, 10, 7).tolist() == expected
    certain = np.eye(3)[rng.integers(0, 3, 40)]
    assert len(set(active.badge(certain, h, 40, 0).tolist())) == 40  # no gradient tells them apart, and all are drawn


def test_the_combination_asks_about_each_kind_of_doubt() -> None:
    """Thirty twins that are the most unsure, and nine lone rows nearly as unsure: uncertainty alone asks ten times about the twins."""
    rng = np.random.default_rng(3)
    h = np.concatenate([np.tile([[1.0, *[0] * 9]], (30, 1)) + 1e-3 * rng.normal(size=(30, 10)), np.eye(10)[1:]])
    p = np.concatenate([np.tile([[0.5, 0.5]], (30, 1)), np.tile([[0.55, 0.45]], (9, 1))])
    pool = active.Pool(p[None], h, np.zeros((0, 10)))
    assert (active.order("margin", pool, 10, 0) < 30).all()
    assert (active.order("combined", pool, 10, 0) >= 30).sum() >= 8


def test_orders_by_name() -> None:
    rng = np.random.default_rng(4)
    pool = active.Pool(rng.dirichlet([1, 1, 1], (3, 30)), rng.normal(size=(30, 4)), rng.normal(size=(5, 4)))
    for name in active.ORDERS:
        chosen = active.order(name, pool, 12, 5)
        assert len(set(chosen.tolist())) == 12
        assert chosen.tolist() == active.order(name, pool, 12, 5).tolist()
        assert len(active.order(name, pool, 99, 5)) == 30
    with pytest.raises(UserError, match="did you mean 'margin'"):
        active.order("margins", pool, 1, 0)
    with pytest.raises(UserError, match="give two or more"):
        active.order("mean_kl", pool._replace(probabilities_MNC=pool.probabilities_MNC[:1]), 1, 0)


def test_an_order_reaches_the_queue(url: str) -> None:
    asked = [make_item(1, "mood", {"text": str(i)}, {}) for i in range(4)]
    task = Task("mood", "label", labels=("bad", "good"), order="priority")
    with store.opened(url) as db:
        store.add_items(db, asked)
        with store.writing(db) as connection:
            row = {"id": "a", "name": "a", "role": "expert", "skills": [], "active": True, "at": 0.0}
            connection.execute(store.people.insert().values(row))
        active.write(db, [one.id for one in asked], [0.1, 0.9, 0.2, 0.3], "margin, step 100")
        active.write(db, [asked[2].id], [5.0], "margin, step 200")
        given = queue.assign(db, Person("a", "a", "expert"), {"mood": task}, 1)
        assert given is not None
        assert given.item.id == asked[2].id
        with pytest.raises(UserError, match="no number"):
            active.write(db, [asked[0].id], [float("nan")], "")
        active.write(db, [], [], "")


def test_stops_when_predictions_no_longer_change() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(5)
    first = rng.integers(0, 3, 500)
    rounds = [first]
    for changes in (50, 20, 5, 2, 1):
        after = rounds[-1].copy()
        after[rng.choice(500, changes, replace=False)] = rng.integers(0, 3, changes)
        rounds.append(after)
    told = active.stabilised(np.array(rounds))
    assert told.value == pytest.approx(np.mean([cohen_kappa_score(*rounds[i : i + 2]) for i in (2, 3, 4)]))
    assert told.stop
    assert not active.stabilised(np.array(rounds[:4])).stop
    assert not active.stabilised(np.array(rounds[2:5])).stop  # too few to tell
    assert active.stabilised(np.ones((4, 9))).value == 1.0  # one class alone


def scores(labels: np.ndarray, rows: int, a: float, b: float, power: float, seed: int) -> np.ndarray:
    """Held-out rows of a learning curve: each has a difficulty of its own, the same at every point."""
    hard = np.random.default_rng(seed).uniform(size=rows)
    return (hard[None] > (a + b * labels**-power)[:, None]).astype(float)


def test_stops_when_more_labels_no_longer_pay() -> None:
    labels = np.arange(50, 1001, 50)
    flat, steep = scores(labels, 4000, 0.2, 0.5, 1.5, 0), scores(labels, 4000, 0.0, 3.0, 0.5, 0)
    told = active.no_longer_pays(labels, flat, 200, 0.005)
    assert told.stop
    assert told.value < 0.001
    told = active.no_longer_pays(labels, steep, 200, 0.005)
    expected = 3.0 * (1000**-0.5 - 1200**-0.5)
    assert not told.stop
    assert told.value == pytest.approx(expected, rel=0.2)
    assert told.low < expected < told.high
    assert not active.no_longer_pays(labels[:4], flat[:4], 200, 0.5).stop


def test_groups_of_rows_widen_the_interval() -> None:
    """Ten copies of each row say no more than one."""
    labels = np.arange(50, 501, 50)
    copied = np.repeat(scores(labels, 100, 0.1, 3.0, 0.5, 1), 10, 1)
    alone = active.no_longer_pays(labels, copied, 100, 0.01)
    together = active.no_longer_pays(labels, copied, 100, 0.01, np.repeat(np.arange(100), 10))
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 2 * (alone.high - alone.low)
