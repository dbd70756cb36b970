"""Tags to entities, strictly; rows of labels, tags and numbers to metrics, comparisons and lines of predictions."""

import json

import numpy as np
import pytest

from jaxtune.evals import heads, spans, tasks

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OPTIONS = {"num_samples": 100}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("I-PER I-PER O", set()),  # begins nowhere
        ("B-PER I-LOC I-LOC", {("PER", 0, 1)}),
        ("O B-LOC", {("LOC", 1, 2)}),
        ("O O", set()),
    ],
)
def test_entities_are_strict(tags, found):
    assert spans.entities(tags.split()) == found


def test_a_word_that_was_cut_ends_an_entity():
    assert spans.entities(["B-PER", None, "I-PER"]) == {("PER", 0, 1)}


def test_which_tags_make_entities():
    assert spans.are_iob2(TAGS)
    assert not spans.are_iob2(("NOUN", "VERB"))
    assert not spans.are_iob2(("O", "I-PER"))
    assert spans.kinds(TAGS) == ["LOC", "PER"]


def _one_hot(tags):
    return np.eye(len(TAGS))[[TAGS.index(tag) for tag in tags]]


def test_tagged_rows_by_hand():
    answers = ["B-PER I-PER O".split(), "B-LOC O".split()]
    asked = [{"row_id": f"r{i}", "answer": answer, "at": [1, 2, 3][: len(answer)]} for i, answer in enumerate(answers)]
    asked[1]["at"][1] = -1  # cut off
    result = heads._tags(asked, TAGS, [_one_hot("B-PER O O".split()), _one_hot(["B-LOC", "O"])], OPTIONS)
    assert result.rows[1]["prediction"] == ["B-LOC", None]
    assert result.metrics["tag_accuracy"].value == pytest.approx(3 / 5)
    assert result.metrics["entity_micro_f1"].value == pytest.approx(2 * 1 / (2 + 2))
    assert result.metrics["entity_macro_f1"].value == pytest.approx((1 + 0) / 2)
    plain = heads._tags(
        [{"row_id": "r", "answer": ["NOUN"], "at": [1]}], ("NOUN", "VERB"), [np.array([[0.0, 1.0]])], OPTIONS
    )
    assert set(plain.metrics) == {"tag_accuracy"}


def test_rows_of_several_labels_by_hand():
    asked = [{"row_id": f"r{i}", "answer": answer} for i, answer in enumerate([["a"], ["a", "b"], []])]
    result = heads._several(asked, ("a", "b"), np.array([[2.0, -1.0], [3.0, -0.1], [-1.0, 0.2]]), OPTIONS)
    assert [row["prediction"] for row in result.rows] == [["a"], ["a"], ["b"]]
    assert result.metrics["subset_accuracy"].value == pytest.approx(1 / 3)
    assert result.metrics["label_macro_f1"].value == pytest.approx((1 + 0) / 2)
    assert result.metrics["label_micro_f1"].value == pytest.approx(2 * 2 / (3 + 3))
    assert result.rows[0]["probabilities"]["a"] == pytest.approx(1 / (1 + np.exp(-2)))


def test_every_head_is_compared_and_kept():
    rng, num = np.random.default_rng(0), 40
    numbers = [{"row_id": f"r{i}", "answer": float(i)} for i in range(num)]
    several = [{"row_id": f"r{i}", "answer": ["a"] if i % 2 else ["b"]} for i in range(num)]
    right = np.array([[9.0, -9.0] if i % 2 else [-9.0, 9.0] for i in range(num)])
    tagged = [{"row_id": f"r{i}", "answer": ["B-PER", "O"], "at": [0, 1]} for i in range(num)]
    sides = {
        "numbers": [heads._numbers(numbers, rng.normal(size=num), OPTIONS), heads._numbers(numbers, np.arange(num) + 0.1, OPTIONS)],
        "several": [heads._several(several, ("a", "b"), s, OPTIONS) for s in (rng.normal(size=(num, 2)), right)],
        "tags": [heads._tags(tagged, TAGS, [_one_hot(t)] * num, OPTIONS) for t in (["O", "O"], ["B-PER", "O"])],
        "masked": [tasks.masked_words(np.full(num, nll), np.full(num, right), np.full(num, 4), [f"r{i}" for i in range(num)]) for nll, right in ((8.0, 1), (4.0, 3))],
    }  # fmt: skip
    tests = {"subset_accuracy": "exact McNemar"}
    for before, after in sides.values():
        for name, verdict in tasks.compare(before, after, num_samples=100).items():
            assert verdict["test"] == tests.get(name, "paired permutation")
            assert (verdict["value"] > 0) == verdict["higher_is_better"], name
            assert verdict["p"] < 0.01, name
        again = tasks.from_json(tasks.to_json(after, "x"), "x")
        assert again is not None
        assert tasks.compare(before, again, num_samples=100) == tasks.compare(before, after, num_samples=100)
        json.dumps(after.rows, allow_nan=False)
    assert sides["masked"][0].metrics["masked_perplexity"].value == pytest.approx(np.exp(2))
    assert sides["masked"][0].metrics["masked_accuracy"].value == pytest.approx(0.25)
