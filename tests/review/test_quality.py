"""Quality: who guesses is found out, with a model's help and without; a model that knows more than a majority is heard."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.review import quality
from jaxtune.types import UserError

SKILLS = (0.95, 0.85, 0.8, 0.34)  # of four annotators; the last guesses


def labelled(units: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(truth, ratings, a model's probabilities): three labels, two of four annotators for each unit."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, units)
    right = rng.random((4, units)) < np.asarray(SKILLS)[:, None]
    ratings = np.where(right, truth, (truth + rng.integers(1, 3, (4, units))) % 3).astype(float)
    ratings[rng.random((4, units)).argsort(0) < 2] = np.nan
    guess = np.where(rng.random(units) < 0.85, truth, rng.integers(0, 3, units))
    probs = np.where(np.arange(3) == guess[:, None], 0.8, 0.1)
    return truth, ratings, probs


def test_majority() -> None:
    truth, ratings, _ = labelled()
    found = quality.consensus(ratings, 3)
    assert found.method == "majority"
    assert found.quality_R.argmin() == 3
    assert found.quality_R.argmax() == 0
    right = found.label_U == truth
    assert found.quality_U[right].mean() > found.quality_U[~right].mean() + 0.1


def test_crowdlab_hears_the_model() -> None:
    pytest.importorskip("cleanlab")
    truth, ratings, probs = labelled()
    found, plain = quality.consensus(ratings, 3, probs), quality.consensus(ratings, 3)
    assert found.method == "crowdlab"
    assert found.quality_R.argmin() == 3
    assert (found.label_U == truth).mean() > (plain.label_U == truth).mean() + 0.02
    some = probs.copy()
    some[::4] = np.nan  # where the model said nothing the majority decides
    mixed = quality.consensus(ratings, 3, some)
    np.testing.assert_array_equal(mixed.label_U[::4], plain.label_U[::4])


def test_edges() -> None:
    empty = np.full((2, 3), np.nan)
    found = quality.consensus(empty, 2)
    assert found.label_U.tolist() == [-1, -1, -1]
    assert np.isnan(found.quality_R).all()
    alone = quality.consensus(np.asarray([[0.0, 1, 1]]), 2)
    assert alone.label_U.tolist() == [0, 1, 1]
    assert np.isnan(alone.quality_R).all()  # nobody to compare with
    tied = quality.consensus(np.asarray([[0.0, 1, 1], [1, 1, 1]]), 2)
    assert tied.label_U.tolist() == [1, 1, 1]  # a tie goes to the commoner label
    with pytest.raises(UserError, match="do not add up"):
        quality.consensus(np.zeros((2, 20)), 2, np.full((20, 2), 0.9))
