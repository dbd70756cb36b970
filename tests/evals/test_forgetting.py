"""Measures of a stage matrix, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.evals import forgetting
from jaxtune.types import UserError

NAN = float("nan")
STAGES = np.array([[0.8, 0.3, 0.2], [0.6, 0.9, 0.4], [0.7, 0.5, 0.95]])
START = np.array([0.1, 0.2, 0.25])


def test_the_four_measures_are_those_of_the_papers() -> None:
    assert forgetting.average_accuracy(STAGES) == pytest.approx((0.7 + 0.5 + 0.95) / 3)
    # GEM: R[2,0] - R[0,0] = -0.1, R[2,1] - R[1,1] = -0.4
    assert forgetting.backward_transfer(STAGES) == pytest.approx(-0.25)
    # Chaudhry et al.: max(0.8, 0.6) - 0.7 = 0.1, max(0.3, 0.9) - 0.5 = 0.4
    assert forgetting.forgetting(STAGES) == pytest.approx(0.25)
    # GEM: R[0,1] - b[1] = 0.1, R[1,2] - b[2] = 0.15
    assert forgetting.forward_transfer(STAGES, START) == pytest.approx(0.125)


def test_forgetting_is_from_the_best_that_a_task_ever_was() -> None:
    """A task that became better after its own stage, and then worse: BWT sees its own stage, F the best."""
    stages = np.array([[0.5, 0.1, 0.1], [0.9, 0.6, 0.1], [0.7, 0.6, 0.8]])
    assert forgetting.backward_transfer(stages) == pytest.approx((0.2 + 0.0) / 2)
    assert forgetting.forgetting(stages) == pytest.approx((0.2 + 0.0) / 2)
    np.testing.assert_allclose(forgetting.forgotten(stages), [0.2, 0.0, -0.7])


def test_what_was_not_measured_is_left_out() -> None:
    stages = np.array([[0.8, NAN, NAN], [NAN, 0.9, NAN], [0.7, NAN, 0.95]])
    assert forgetting.average_accuracy(stages) == pytest.approx((0.7 + 0.95) / 2)
    assert forgetting.backward_transfer(stages) == pytest.approx(-0.1)
    assert forgetting.forgetting(stages) == pytest.approx(0.1)
    assert np.isnan(forgetting.forward_transfer(stages, START))
    assert np.isnan(forgetting.forgetting(stages[:1, :1]))  # after one stage nothing is forgotten yet


def test_rows_make_intervals_that_hold_the_value() -> None:
    rng = np.random.default_rng(0)
    rows = {0: (rng.random((3, 200)) < [[0.8], [0.6], [0.5]]).astype(float)}
    stages = STAGES.copy()
    stages[:, 0] = rows[0].mean(1)
    found = forgetting.measure(stages, START, rows, num_samples=200)
    assert found.forgetting.value == forgetting.forgetting(stages)
    assert found.forgetting.low < found.forgetting.value < found.forgetting.high
    assert 0.05 < found.forgetting.high - found.forgetting.low < 0.2  # half of a difference of 200 rows' means
    assert found.forward.low == found.forward.value == found.forward.high  # of tasks whose rows are not known
    alone = forgetting.measure(stages)
    assert np.isnan(alone.forgetting.low)
    assert np.isnan(alone.forward.value)


def test_rows_that_change_alike_leave_no_doubt() -> None:
    """Every row loses the same: resamples of rows are joint over stages, so the interval is a point."""
    first = np.random.default_rng(1).random(50)
    rows = {0: np.stack([first, first - 0.1])}
    stages = np.array([[first.mean(), 0.0], [first.mean() - 0.1, 0.5]])
    found = forgetting.measure(stages, rows=rows, num_samples=50)
    np.testing.assert_allclose(found.backward, [-0.1] * 3)
    assert found.average.high - found.average.low > 0.01


def test_shapes_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(3, 2\); expected stages down"):
        forgetting.measure(STAGES[:, :2])
    with pytest.raises(UserError, match="2 scores before the first stage of 3 tasks"):
        forgetting.forward_transfer(STAGES, START[:2])
    with pytest.raises(UserError, match="rows of task 5"):
        forgetting.measure(STAGES, rows={5: np.ones((3, 4))})
