"""The simulated experts of benchmarks/guide_round.py: they say what their rating says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROUND = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "guide_round.py"), run_name="benchmark")


@pytest.mark.parametrize(("rating", "label"), [(-4, "negative"), (-0.6, "negative"), (0, "neutral"), (0.5, "positive")])
def test_a_rating_is_a_label(rating: float, label: str) -> None:
    assert ROUND["word"](rating) == label
    assert ROUND["answer"]({"answer": "?"}, label) == {"text": label}


def test_the_nearer_label_is_better_and_none_is_bad() -> None:
    def compared(first: str, second: str, own: str) -> dict:
        return ROUND["answer"]({"candidates": [{"id": "a", "text": first}, {"id": "b", "text": second}]}, own)

    assert compared("It is Positive.", "negative", "negative") == {"order": [["b"], ["a"]], "bad": False}
    assert compared("neutral", "positive", "negative")["order"] == [["a"], ["b"]]
    assert compared("positive", "Positive!", "negative") == {"order": [["a", "b"]], "bad": False}
    assert compared("positive or negative", "the camera", "negative") == {"order": [["a", "b"]], "bad": True}
    assert compared("I think so", "positive", "negative")["order"] == [["b"], ["a"]]


@pytest.mark.samples
def test_every_sentence_has_its_twenty_ratings() -> None:
    """The two files of the archive belong together: each sentence's mean is that of its ratings."""
    from jaxtune import fetch

    found = ROUND["ratings"]()
    text = fetch.local(ROUND["ARCHIVE"] + "amazonReviewSnippets_GroundTruth.txt").read_text(
        "utf-8-sig", errors="replace"
    )
    means = [float(line.split("\t")[1]) for line in text.splitlines() if line.strip()]
    assert len(found) == len(means) == 3708
    assert all(len(ratings) == 20 for ratings in found.values())
    assert max(abs(sum(found[str(n)]) / 20 - mean) for n, mean in enumerate(means, 1)) < 0.051
