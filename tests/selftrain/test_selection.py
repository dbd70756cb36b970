"""What each method keeps, and why it refuses the rest."""

from __future__ import annotations

import math

import pytest

from jaxtune.selftrain import selection
from jaxtune.selftrain.selection import Sample, choose, path

ONE, TWO = "3 + 4 = 7, so 7", "There are 3+4=7."  # the same calculation in other words
SAMPLES = [
    Sample(0, ONE, True, 1.0),
    Sample(0, "8", True, 0.0),
    Sample(0, TWO, True, 1.0),
    Sample(0, ONE, True, 1.0),
    Sample(0, "4 + 3 = 7", True, 1.0),
    Sample(1, "", True, 1.0),
    Sample(1, "3 + 4", False, 1.0),
    Sample(1, "seven", True, math.nan),
    Sample(1, "It is 7.", True, 1.0, hinted=True),
    Sample(1, "Seven, 7.", True, 1.0, hinted=True),
]
ALWAYS = ["below_threshold", "empty", "cut_off", "reward_failed"]


def reasons(choice: selection.Choice) -> list[str]:
    return [reason for _, reason in choice.refused]


def test_star_keeps_one_rationale_of_each_prompt() -> None:
    choice = choose("star", SAMPLES, 0.5, most=0)
    assert choice.kept == [SAMPLES[0], SAMPLES[8]]
    assert sorted(reasons(choice)) == sorted([*ALWAYS, *["enough_for_prompt"] * 4])


def test_rft_keeps_distinct_paths_and_goes_on_from_earlier_rounds() -> None:
    choice = choose("rft", SAMPLES, 0.5, most=0)
    assert choice.kept == [SAMPLES[0], SAMPLES[4], SAMPLES[8], SAMPLES[9]]
    assert sorted(reasons(choice)) == sorted([*ALWAYS, "same_path", "same_path"])
    again = choose("rft", [Sample(0, "Well, 4+3 = 7", True, 1.0), Sample(0, "5+2=7", True, 1.0)], 0.5, 3, choice.kept)
    assert [sample.completion for sample in again.kept[:3]] == [ONE, "4 + 3 = 7", "5+2=7"]
    assert reasons(again) == ["same_path"]


def test_rest_em_keeps_how_often_each_was_sampled_up_to_the_most() -> None:
    assert choose("rest_em", SAMPLES, 0.5, most=0).kept == [SAMPLES[i] for i in (0, 2, 3, 4, 8, 9)]
    few = choose("rest_em", SAMPLES, 0.5, most=2, earlier=[Sample(0, "old", True, 1.0)])
    assert few.kept == [SAMPLES[i] for i in (0, 2, 8, 9)]
    assert reasons(few).count("enough_for_prompt") == 2


@pytest.mark.parametrize("method", ["star", "rft", "rest_em"])
def test_every_sample_is_kept_or_has_its_reason(method: str) -> None:
    choice = choose(method, SAMPLES, 1.5, most=1)
    assert not choice.kept
    assert len(choice.refused) == len(SAMPLES)


def test_paths() -> None:
    assert path(ONE) == path(TWO) == "3+4=7"
    assert path("4 + 3 = 7") != path(ONE)
    assert path("First 2*3=6, then 6 - 1 = 5") == "2*3=6|6-1=5"
    assert path("  The  answer ") == path("the answer")
