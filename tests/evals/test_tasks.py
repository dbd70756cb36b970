"""Rows to metrics and back: what is counted, what is compared, what is written."""

import json

import numpy as np
import pytest

from jaxtune.evals import tasks
from jaxtune.types import UserError

LABELS = ["neg", "neutral", "pos"]


def _rows(answers):
    return [
        {"row_id": f"r{i}", "prompt_ids": [i], "candidate_ids": [[1], [2, 3], [4]], "answer": answer}
        for i, answer in enumerate(answers)
    ]


def _scorer(scores_MC):
    def score(prompts, candidates):
        assert prompts == [[i] for i in range(len(prompts))]
        assert candidates[0] == [[1], [2, 3], [4]]
        return np.asarray(scores_MC)

    return score


def test_score_labels_by_hand():
    scores_MC = [[-1.0, -2.0, -9.0], [-5.0, -3.0, -4.0], [-700.0, -700.0, -701.0]]
    result = tasks.score_labels(_rows(["neg", "pos", "neg"]), LABELS, _scorer(scores_MC))
    assert [row["prediction"] for row in result.rows] == ["neg", "neutral", "neg"]
    assert result.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert result.metrics["macro_f1"].value == pytest.approx(1 / 3)  # neg 1, neutral 0, pos 0
    shares = [np.exp(s) / np.sum(np.exp(s)) for s in (scores_MC[0], scores_MC[1], [0.0, 0.0, -1.0])]
    expected = -np.mean(np.log([shares[0][0], shares[1][2], shares[2][0]]))
    assert result.metrics["label_nll"].value == pytest.approx(expected)
    np.testing.assert_array_equal(result.confusion, [[2, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert result.rows[0]["scores"] == {"neg": -1.0, "neutral": -2.0, "pos": -9.0}
    json.dumps(result.rows, allow_nan=False)


def test_score_labels_refuses_an_unknown_answer_and_a_score_that_is_no_number():
    with pytest.raises(UserError, match=r"row r1 has answer 'meh'.*'neg', 'neutral', 'pos'"):
        tasks.score_labels(_rows(["neg", "meh"]), LABELS, _scorer(np.zeros((2, 3))))
    with pytest.raises(UserError, match="row r1 .*NaN"):
        tasks.score_labels(_rows(["neg", "neg"]), LABELS, _scorer([[0, 0, 0], [0, np.nan, 0]]))


@pytest.mark.parametrize("text", ["Paris", " paris. ", "PARIS!?", "Paris .\n"])
def test_exact_match_ignores_case_space_and_trailing_punctuation(text):
    result = tasks.exact_match(_rows(["Paris"]), lambda prompts: [text])
    assert result.metrics["exact_match"].value == 1
    assert result.rows[0]["prediction"] == text  # kept as generated


def test_exact_match_keeps_inner_punctuation_and_words():
    assert tasks.normalise("3.5  m") == "3.5 m" != tasks.normalise("35 m")
    assert tasks.exact_match(_rows(["Paris"]), lambda prompts: ["in Paris"]).metrics["exact_match"].value == 0


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    num_tokens_M = np.array([3, 5, 9])
    result = tasks.perplexity(num_tokens_M * np.log(256), num_tokens_M, num_tokens_M * np.log(256), num_tokens_M)
    assert tuple(result.metrics["perplexity"]) == pytest.approx((256, 256, 256))
    assert result.metrics["bits_per_byte"].value == pytest.approx(8)  # a byte a token


def test_compare_names_the_test_of_each_metric():
    answers = LABELS * 20
    right_MC = -5.0 * (1 - np.eye(3)[np.tile([0, 1, 2], 20)])
    before = tasks.score_labels(_rows(answers), LABELS, _scorer(np.random.default_rng(0).normal(size=(60, 3))))
    after = tasks.score_labels(_rows(answers), LABELS, _scorer(right_MC))
    verdict = tasks.compare(before, after)
    assert {name: v["test"] for name, v in verdict.items()} == {
        "accuracy": "exact McNemar", "macro_f1": "paired permutation", "label_nll": "paired permutation",
    }  # fmt: skip
    assert verdict["accuracy"]["value"] == pytest.approx(1 - before.metrics["accuracy"].value)
    assert verdict["label_nll"]["high"] < 0
    assert not verdict["label_nll"]["higher_is_better"]
    assert all(v["p"] < 0.001 for v in verdict.values())
    assert all(v["p"] == 1 and v["low"] == v["high"] == 0 for v in tasks.compare(before, before).values())


def test_compare_perplexities():
    tokens_M = np.random.default_rng(0).integers(20, 60, size=80)
    before, after = (tasks.perplexity(tokens_M * nll, tokens_M, tokens_M * nll, 4 * tokens_M) for nll in (2.0, 1.5))
    verdict = tasks.compare(before, after)["perplexity"]
    assert verdict["value"] == pytest.approx(np.exp(1.5) - np.exp(2.0))
    assert verdict["p"] < 0.001


def test_compare_refuses_other_rows():
    before, after = (tasks.exact_match(_rows(["a"] * n), lambda prompts: ["a"] * len(prompts)) for n in (2, 3))
    with pytest.raises(UserError, match="before has 2 rows and after 3"):
        tasks.compare(before, after)


def test_predictions_put_both_sides_on_one_line(tmp_path):
    before, after = (tasks.exact_match(_rows(["é", "b"]), lambda prompts, t=t: [t, t]) for t in ("x", "b"))
    path = tmp_path / "new" / "predictions.jsonl"
    tasks.write_predictions(path, before, after)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[1] == {
        "row_id": "r1",
        "answer": "b",
        "before": {"prediction": "x", "correct": False},
        "after": {"prediction": "b", "correct": True},
    }
    tasks.write_predictions(path, None, after)
    assert set(json.loads(path.read_text(encoding="utf-8").splitlines()[0])) == {"row_id", "answer", "after"}
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]
