"""Agreement: the figures of published examples, of scikit-learn, and of real raters; what intervals cover."""

from __future__ import annotations

import json
import math
import time
from functools import partial

import numpy as np
import pytest

from jaxtune import fetch
from jaxtune.review import agreement
from jaxtune.types import UserError

NAN = math.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011: the data of section C, four observers and twelve units.
KRIPPENDORFF_RU = np.asarray([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
])  # fmt: skip
# Fleiss's method on ten subjects that fourteen raters put into five categories: the worked example of the literature, 0.210.
FLEISS_UV = np.asarray([
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
])  # fmt: skip
RATINGS = (
    "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014/{}_anonDataRatings.txt"
)


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_alpha_is_krippendorffs_own(level: str, alpha: float) -> None:
    assert round(agreement.krippendorff_alpha(KRIPPENDORFF_RU, level), 3) == alpha


def test_alpha_by_hand() -> None:
    """Two raters, four units, one disagreement: coincidences 4, 1, 1, 2; n = 8; alpha = 1 - 7 * 2 / (2 * 5 * 3)."""
    ratings = np.asarray([[0, 0, 1, 0.0], [0, 0, 1, 1]])
    assert agreement.krippendorff_alpha(ratings, "nominal") == pytest.approx(1 - 7 * 2 / 30)
    assert agreement.krippendorff_alpha(ratings, "interval") == pytest.approx(
        1 - 7 * 2 / 30
    )  # two values: all levels alike
    assert agreement.krippendorff_alpha(ratings * 10 - 3, "interval") == pytest.approx(1 - 7 * 2 / 30)


def test_alpha_where_it_says_nothing() -> None:
    for ratings in ([[1, NAN], [NAN, 2.0]], [[1, 1], [1, 1.0]], [[], []], [[1.0, 2.0]]):
        assert math.isnan(agreement.krippendorff_alpha(np.asarray(ratings)))
        assert math.isnan(agreement.alpha_interval(np.asarray(ratings)).low)
    with pytest.raises(UserError, match="expected one of nominal"):
        agreement.krippendorff_alpha(KRIPPENDORFF_RU, "cardinal")
    with pytest.raises(UserError, match="0 or more"):
        agreement.krippendorff_alpha(-KRIPPENDORFF_RU, "ratio")


@pytest.mark.samples
@pytest.mark.parametrize(("name", "alpha"), [("amazonReviewSnippets", 0.820), ("tweets", 0.783)])
def test_alpha_of_real_raters(name: str, alpha: float) -> None:
    """Twenty and more people's ratings of 3,708 review sentences and 4,200 tweets (Hutto & Gilbert 2014): quickly, too."""
    lines = fetch.local(RATINGS.format(name)).read_text("latin-1").splitlines()
    rows = [json.loads(line.split("\t")[3]) for line in lines]
    ratings_RU = np.full((max(map(len, rows)), len(rows)), NAN)
    for unit, row in enumerate(rows):
        ratings_RU[: len(row), unit] = row
    began = time.perf_counter()
    found = agreement.alpha_interval(ratings_RU, num_samples=200)
    assert time.perf_counter() - began < 10
    assert f"{found.value:.3f}" == f"{alpha:.3f}"
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.03


def test_names() -> None:
    ratings, names = agreement.encode([["bad", "good", None], ["bad", "bad", "good"]])
    assert names == ("bad", "good")
    np.testing.assert_array_equal(ratings, [[0, 1, NAN], [0, 0, 1]])
    assert agreement.encode([["bad"]], ("good", "bad"))[0][0, 0] == 1
    with pytest.raises(UserError, match="'ugly' came"):
        agreement.encode([["ugly"]], ("good", "bad"))


def test_fleiss_kappa_of_the_worked_example() -> None:
    ratings_RU = np.stack([np.repeat(np.arange(5), row) for row in FLEISS_UV], 1).astype(float)
    assert round(agreement.fleiss_kappa(ratings_RU), 3) == 0.210
    missing = np.vstack([ratings_RU, np.full((1, 10), NAN)])  # a rater who rated nothing changes nothing
    assert agreement.fleiss_kappa(missing) == pytest.approx(agreement.fleiss_kappa(ratings_RU))


@pytest.mark.oracle
@pytest.mark.parametrize("weights", ["", "linear", "quadratic"])
def test_cohens_kappa_is_scikit_learns(weights: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = rng.integers(0, 5, 60)
        second = np.where(rng.random(60) < 0.6, first, rng.integers(0, 5, 60))
        expected = metrics.cohen_kappa_score(first, second, weights=weights or None)
        assert agreement.cohen_kappa(first, second, weights) == pytest.approx(expected, abs=1e-12)


def test_cohens_kappa_by_hand() -> None:
    """Of 50 grant proposals two readers accept 20 both, 15 neither, 5 and 10 one alone: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15]).astype(float)
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15]).astype(float)
    assert agreement.cohen_kappa(first, second) == pytest.approx(0.4)
    more = np.append(first, [NAN, 1]), np.append(second, [1, NAN])
    assert agreement.cohen_kappa(*more) == pytest.approx(0.4)


def test_intervals_cover() -> None:
    """Of 95% intervals about 95 of 100 hold the true alpha: raters who guess a quarter of the time, 80 units."""

    def drawn(rng: np.random.Generator, units: int) -> np.ndarray:
        truth = rng.integers(0, 2, units)
        return np.where(rng.random((3, units)) < 0.75, truth, rng.integers(0, 2, (3, units))).astype(float)

    rng = np.random.default_rng(0)
    true = agreement.krippendorff_alpha(drawn(rng, 200_000), "nominal")
    assert true == pytest.approx(0.75**2, abs=0.005)
    found = [agreement.alpha_interval(drawn(rng, 80), "nominal", num_samples=200, seed=s) for s in range(150)]
    assert 0.89 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.99


def test_one_way_to_an_interval() -> None:
    own = partial(agreement.krippendorff_alpha, level="nominal")
    fast = agreement.interval(own, KRIPPENDORFF_RU, num_samples=300)
    slow = agreement.interval(lambda ratings: own(ratings), KRIPPENDORFF_RU, num_samples=300)
    np.testing.assert_allclose(fast, slow)  # the same units are drawn
    copied = np.repeat(KRIPPENDORFF_RU, 5, axis=1)
    grouped = agreement.alpha_interval(copied, "nominal", np.repeat(np.arange(12), 5), num_samples=300)
    alone = agreement.alpha_interval(copied, "nominal", num_samples=300)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)  # copies are no evidence


def test_confusion() -> None:
    ratings = np.asarray([[0, 1, 2, 1, NAN], [0, 1, 1, 1, 2], [0, 1, 1, 0, 2]])
    pairs = agreement.pairwise(ratings, 3)
    assert [(one.first, one.second, int(one.counts_VV.sum())) for one in pairs] == [(1, 2, 5), (0, 1, 4), (0, 2, 4)]
    assert pairs[1].counts_VV[2, 1] == 1  # what the first calls 2 is 1 to the second
    assert pairs[1].agreement == 0.75
    first, second, third = agreement.against_others(ratings, 3)
    assert first.counts_VV.sum() == 3  # the others are tied on the fourth
    assert first.counts_VV[2, 1] == 1
    assert second.agreement == 1.0
    assert third.counts_VV[0, 1] == 1
