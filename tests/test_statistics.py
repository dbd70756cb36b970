"""Intervals cover what they claim; p-values are those of the textbooks."""

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, permutation_test, spearmanr

from jaxtune import statistics
from jaxtune.types import UserError


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_claims():
    rng = np.random.default_rng(0)
    rows = [rng.exponential(2.0, 200) for _ in range(300)]
    trials = [statistics.bootstrap(statistics.mean, x_M, seed=i, confidence=0.9) for i, x_M in enumerate(rows)]
    covered = np.mean([low <= 2.0 <= high for _, low, high in trials])
    assert 0.85 < covered < 0.94  # 0.9 ± 3 standard errors of 300 trials; percentile intervals fall a little short


def test_bootstrap_is_the_same_in_one_block_or_many(monkeypatch):
    correct_M = np.random.default_rng(0).random(37) < 0.7
    whole = statistics.bootstrap(statistics.mean, correct_M, num_samples=101)
    monkeypatch.setattr(statistics, "_BLOCK_CELLS", 100)
    assert statistics.bootstrap(statistics.mean, correct_M, num_samples=101) == whole


def test_bootstrap_resamples_columns_jointly():
    x_M = np.random.default_rng(0).normal(size=50)
    value, low, high = statistics.bootstrap(lambda a, b: (a - b).mean(-1), x_M, x_M)
    assert value == low == high == 0


def test_no_rows_is_the_users_error():
    with pytest.raises(UserError, match="no rows"):
        statistics.bootstrap(statistics.mean, np.zeros(0))


def test_macro_f1_by_hand_counts_a_label_that_never_occurs_as_zero():
    answers_M, predicted_M = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    # label 0: TP 2, FP 1, FN 1 -> 2/3; label 1: TP 1, FP 1, FN 1 -> 1/2
    assert statistics.macro_f1(predicted_M, answers_M, [0, 1]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert statistics.macro_f1(predicted_M, answers_M, [0, 1, 2]) == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_macro_f1_and_accuracy_reduce_the_last_dim_only():
    rng = np.random.default_rng(0)
    predicted_SM, answers_SM = rng.integers(3, size=(2, 4, 30))
    for statistic in (statistics.accuracy, lambda p, a: statistics.macro_f1(p, a, range(3))):
        rows = [statistic(p, a) for p, a in zip(predicted_SM, answers_SM, strict=True)]
        np.testing.assert_allclose(statistic(predicted_SM, answers_SM), rows)


def test_confusion_matrix_has_answers_down_and_predictions_across():
    counts = statistics.confusion_matrix(np.array(["b", "b", "a"]), np.array(["a", "a", "a"]), ["a", "b", "c"])
    np.testing.assert_array_equal(counts, [[1, 2, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(("gained", "lost", "both"), [(9, 2, 30), (0, 0, 5), (4, 4, 0), (60, 25, 400), (3000, 1, 0)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_rows(gained, lost, both):
    before_M = np.repeat([False, True, True], [gained, lost, both])
    after_M = np.repeat([True, False, True], [gained, lost, both])
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(before_M, after_M) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_permutation_of_few_rows_is_exact():
    before_M, after_M = np.random.default_rng(1).normal(size=(2, 9))
    expected = permutation_test(
        (after_M, before_M), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert statistics.paired_permutation(before_M, after_M) == pytest.approx(expected)


def test_permutation_p_is_uniform_when_nothing_differs_and_small_when_all_rows_gain():
    rng = np.random.default_rng(2)
    null = [statistics.paired_permutation(*rng.normal(size=(2, 40)), num_samples=400) for _ in range(200)]
    assert 0.01 < np.mean(np.array(null) <= 0.05) < 0.1
    before_M = rng.normal(size=40)
    assert statistics.paired_permutation(before_M, before_M + 1, num_samples=999) == pytest.approx(1 / 1000)


def test_permutation_of_any_statistic_keeps_shared_columns_in_place():
    answers_M = np.tile([0, 1], 20)
    p = statistics.paired_permutation(
        np.zeros(40, int), answers_M, answers_M, statistic=lambda p, a: statistics.macro_f1(p, a, [0, 1])
    )
    assert p < 0.001


def test_paired_difference_is_narrower_than_the_gap_of_unpaired_intervals():
    rng = np.random.default_rng(3)
    hard_M = rng.normal(size=300)
    before_M, after_M = hard_M + rng.normal(0, 0.1, 300), hard_M + 0.1 + rng.normal(0, 0.1, 300)
    value, low, high = statistics.difference(statistics.mean, before_M, after_M)
    assert low < value < high
    assert low > 0.07
    assert high < 0.13
    alone = statistics.bootstrap(statistics.mean, before_M)
    assert alone.high - alone.low > 5 * (high - low)


def test_correlations_are_the_textbooks_ties_and_all():
    rng = np.random.default_rng(0)
    for predicted_M, answers_M in ((rng.normal(size=40), rng.normal(size=40)), rng.integers(4, size=(2, 40))):
        assert statistics.pearson(predicted_M, answers_M) == pytest.approx(pearsonr(predicted_M, answers_M).statistic)
        assert statistics.spearman(predicted_M, answers_M) == pytest.approx(spearmanr(predicted_M, answers_M).statistic)
    assert statistics.pearson(np.ones(5), np.arange(5)) == statistics.spearman(np.ones(5), np.arange(5)) == 0
    assert statistics.rmse(np.array([1.0, 2.0]), np.array([1.0, 5.0])) == pytest.approx(np.sqrt(4.5))
    predicted_SM, answers_SM = rng.integers(5, size=(2, 3, 20))
    for statistic in (statistics.pearson, statistics.spearman, statistics.rmse):
        rows = [statistic(p, a) for p, a in zip(predicted_SM, answers_SM, strict=True)]
        np.testing.assert_allclose(statistic(predicted_SM, answers_SM), rows)


def test_f1_of_kinds_by_hand():
    # two rows, two kinds: (right, predicted) and wanted
    counts_MK2, wanted_MK = np.array([[[1, 2], [0, 0]], [[1, 1], [0, 1]]]), np.array([[1, 1], [2, 0]])
    assert statistics.kinds_macro_f1(counts_MK2, wanted_MK) == pytest.approx((2 * 2 / (3 + 3) + 0) / 2)
    assert statistics.micro_f1(counts_MK2, wanted_MK) == pytest.approx(2 * 2 / (4 + 4))
    twice = statistics.micro_f1(np.stack([counts_MK2] * 2), np.stack([wanted_MK] * 2))
    np.testing.assert_allclose(twice, [0.5, 0.5])


def test_rows_of_counts_are_resampled_and_swapped_whole():
    rng = np.random.default_rng(0)
    wanted_MK = rng.integers(0, 3, size=(60, 2))
    perfect = np.stack([wanted_MK, wanted_MK], -1)
    poor = np.stack([wanted_MK // 2, wanted_MK], -1)
    gap = statistics.difference(statistics.micro_f1, poor, perfect, wanted_MK, num_samples=200)
    assert 0 < gap.low <= gap.value <= gap.high < 1
    assert (
        statistics.paired_permutation(poor, perfect, wanted_MK, statistic=statistics.micro_f1, num_samples=999) == 0.001
    )
    assert statistics.paired_permutation(poor, poor, wanted_MK, statistic=statistics.micro_f1, num_samples=99) == 1
