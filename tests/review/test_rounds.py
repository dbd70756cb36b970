"""Verdicts to rows: who wins, what is left out and why, and that jaxtune's own data formats read what comes out."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxtune import config as config_lib
from jaxtune.data.formats import read_examples
from jaxtune.review import rounds, settling, tasks
from jaxtune.review.record import FLAG_TYPES, Item, Verdict, make_item
from jaxtune.review.rounds import Rules
from jaxtune.types import UserError

PROMPT = [{"role": "system", "content": "Label it."}, {"role": "user", "content": "Great phone."}]
TASKS = tasks.read((
    ("mood", (("kind", "label"), ("labels", ("bad", "fine", "good")))),
    ("topics", (("kind", "label"), ("labels", ("price", "quality")), ("multi", True))),
    ("better", (("kind", "compare"),)),
    ("edit", (("kind", "edit"),)),
    ("keep", (("kind", "accept"),)),
    ("score", (("kind", "rate"),)),
    ("spans", (("kind", "span"), ("labels", ("name",)))),
))  # fmt: skip
_NUMBERS = itertools.count()


def item(task: str, payload: dict[str, Any], **more: Any) -> Item:
    return make_item(1, task, payload, more.pop("origin", {"source": "file.csv", "row": 3}), **more)


def said(asked: Item, person: str, answer: dict[str, Any], kind: str = "", **more: Any) -> Verdict:
    number = next(_NUMBERS)
    values: dict[str, Any] = {"shown": {}, "guideline": 1, "seconds": 2.0, "at": float(number)} | more
    return Verdict(f"v{number}", asked.id, person, kind or TASKS[asked.task].kind, answer, **values)


def reasons(made: rounds.Made) -> list[str]:
    return [one["reason"] for one in made.left_out]


def compared(candidates: str = "ab") -> Item:
    texts = [{"id": one, "text": f"answer {one}"} for one in candidates]
    return item("better", {"prompt": PROMPT, "candidates": texts})


def test_most_win_and_a_row_knows_who_agreed() -> None:
    asked = item("mood", {"text": "Great phone."}, origin={"prompt": PROMPT})
    good, bad, again = (
        said(asked, who, {"labels": [label]}) for who, label in (("ann", "good"), ("bo", "bad"), ("cy", "good"))
    )
    [row] = rounds.rows([asked], [good, bad, again], TASKS)["sft"]
    assert row["prompt"] == PROMPT
    assert row["completion"] == [{"role": "assistant", "content": "good"}]
    assert row["verdicts"] == sorted([good.id, again.id])
    assert (row["item"], row["task"], row["round"], row["guideline"]) == (asked.id, "mood", 1, [1])
    assert (row["agreed"], row["asked"]) == (2, 3)


def test_half_is_no_majority_and_a_senior_settles_it() -> None:
    asked = item("mood", {"text": "Great phone."})
    both = [said(asked, "ann", {"labels": ["good"]}), said(asked, "bo", {"labels": ["bad"]})]
    made = rounds.made([asked], both, TASKS)
    assert not made.rows["sft"]
    assert made.counts() == {"mood": {"disagreement": 1}}
    senior = said(asked, "sue", {"labels": ["fine"]}, adjudicates=True, guideline=2)
    [row] = rounds.rows([asked], [*both, senior], TASKS)["sft"]
    assert (row["completion"], row["verdicts"], row["guideline"]) == ("fine", [senior.id], [2])


def test_trust_weighs_and_nought_leaves_out() -> None:
    asked = item("mood", {"text": "Great phone."})
    both = [said(asked, "ann", {"labels": ["good"]}), said(asked, "bo", {"labels": ["bad"]})]
    [row] = rounds.rows([asked], both, TASKS, {"ann": 0.5})["sft"]
    assert row["completion"] == "bad"
    assert reasons(rounds.made([asked], both, TASKS, {"ann": 0.0, "bo": 0.0})) == ["not_trusted"]


def test_what_was_taken_back_does_not_count() -> None:
    asked = item("mood", {"text": "Great phone."})
    first = said(asked, "ann", {"labels": ["bad"]})
    corrected = said(asked, "ann", {"labels": ["good"]}, supersedes=first.id)
    assert rounds.rows([asked], [corrected, first], TASKS)["sft"][0]["completion"] == "good"
    taken_back = said(asked, "ann", {}, "retract", supersedes=corrected.id)
    assert reasons(rounds.made([asked], [first, corrected, taken_back], TASKS)) == ["no_verdict"]


def test_a_comparison_makes_a_pair_and_ties_make_none() -> None:
    asked = compared()
    order = [["b"], ["a"]]
    [row] = rounds.rows([asked], [said(asked, "ann", {"order": order, "bad": False})], TASKS)["pairs"]
    assert (row["chosen"], row["rejected"], row["prompt"]) == ("answer b", "answer a", PROMPT)
    for answer, reason in (
        ({"order": [["a", "b"]], "bad": False}, "tie"),
        ({"order": order, "bad": True}, "none_good"),
    ):
        made = rounds.made([asked], [said(asked, "ann", answer)], TASKS)
        assert (made.rows["pairs"], reasons(made)) == ([], [reason])


def test_many_candidates_give_pairs_of_different_groups() -> None:
    asked = compared("abcd")
    verdict = said(asked, "ann", {"order": [["c"], ["a", "d"], ["b"]], "bad": False})
    found = {(row["chosen"][-1], row["rejected"][-1]) for row in rounds.rows([asked], [verdict], TASKS)["pairs"]}
    assert found == {("c", "a"), ("c", "d"), ("c", "b"), ("a", "b"), ("d", "b")}


def test_each_pair_of_many_is_won_by_itself() -> None:
    asked = compared("abc")
    orders = ([["a"], ["b"], ["c"]], [["a"], ["c"], ["b"]])  # they agree on a alone
    made = rounds.made(
        [asked], [said(asked, who, {"order": o, "bad": False}) for who, o in zip("xy", orders, strict=True)], TASKS
    )
    assert {(row["chosen"][-1], row["rejected"][-1]) for row in made.rows["pairs"]} == {("a", "b"), ("a", "c")}
    assert not made.left_out


def test_an_edit_is_learned_and_preferred_over_what_it_corrects() -> None:
    asked = item("edit", {"prompt": "Capital of France?", "answer": "Lyon"})
    verdicts = [
        said(asked, "ann", {"text": "Paris"}),
        said(asked, "bo", {"text": "Paris "}),
        said(asked, "cy", {"text": "Lyon"}),
    ]
    made = rounds.rows([asked], verdicts, TASKS)
    assert [(row["prompt"], row["completion"]) for row in made["sft"]] == [("Capital of France?", "Paris")]
    assert [(row["chosen"], row["rejected"]) for row in made["pairs"]] == [("Paris", "Lyon")]
    each = rounds.made([asked], verdicts, TASKS, rules=Rules(edits="each")).rows
    assert [row["completion"] for row in each["sft"]] == ["Paris", "Lyon"]
    assert [row["verdicts"] for row in each["sft"]] == [[v.id for v in verdicts[:2]], [verdicts[2].id]]
    assert not rounds.made([asked], verdicts, TASKS, rules=Rules(pairs_from_edits=False)).rows["pairs"]


def test_edits_that_differ_in_white_space_alone_agree() -> None:
    """The queue asks no senior about them, so that nobody would ever settle them."""
    asked = item("edit", {"prompt": "p", "answer": "x"})
    verdicts = [said(asked, who, {"text": text}) for who, text in (("ann", "Well,\n\n it is."), ("bo", "Well, it is."))]
    assert not settling.differ(TASKS["edit"], [one.answer for one in verdicts])
    for rules in (Rules(), Rules(edits="each")):
        made = rounds.made([asked], verdicts, TASKS, rules=rules)
        assert [(row["completion"], row["agreed"]) for row in made.rows["sft"]] == [("Well,\n\n it is.", 2)]
        assert not made.left_out


def test_accepted_and_rejected_answers_are_judged_rows() -> None:
    asked = [item("keep", {"prompt": "2 + 2?", "answer": text}) for text in ("4", "5")]
    verdicts = [
        said(one, "ann", {"accept": right, "reason": ""}) for one, right in zip(asked, (True, False), strict=True)
    ]
    made = rounds.rows(asked, verdicts, TASKS)
    assert [(row["completion"], row["label"]) for row in made["kto"]] == [("4", True), ("5", False)]
    assert [row["completion"] for row in made["sft"]] == ["4"]
    text = item("keep", {"text": "A page of a manual."})
    assert (
        rounds.rows([text], [said(text, "ann", {"accept": True, "reason": ""})], TASKS)["texts"][0]["text"]
        == "A page of a manual."
    )


def test_ratings_of_answers_to_one_prompt_are_a_row() -> None:
    asked = [item("score", {"prompt": "Say hi", "answer": text}) for text in ("hi", "go away", "hello")]
    given = [(0, "ann", 4.0), (0, "bo", 5.0), (1, "ann", 1.0), (2, "bo", 4.0)]
    verdicts = [said(asked[which], who, {"rating": rating}) for which, who, rating in given]
    [row] = rounds.rows(asked, verdicts, TASKS)["rewards"]
    assert (row["completions"], row["scores"]) == (["hi", "go away", "hello"], [4.5, 1.0, 4.0])
    assert row["items"] == [one.id for one in asked]
    assert row["verdicts"] == sorted(v.id for v in verdicts)
    assert reasons(rounds.made(asked[:1], verdicts, TASKS)) == ["one_answer"]
    equal = [said(asked[which], "ann", {"rating": 3.0}) for which in (0, 1)]
    assert reasons(rounds.made(asked[:2], equal, TASKS)) == ["equal_ratings"] * 2


@pytest.mark.parametrize("kind", FLAG_TYPES)
def test_a_flagged_item_trains_nothing_and_is_listed(kind: str) -> None:
    asked = item("mood", {"text": "Great phone."})
    flag = {"type": kind, "group": "women", "note": "see the end"}
    verdicts = [said(asked, "ann", {"labels": ["good"]}), said(asked, "bo", {"flags": [flag]}, "flag")]
    made = rounds.made([asked], verdicts, TASKS)
    assert (made.rows["sft"], reasons(made)) == ([], ["flagged"])
    assert made.flagged == [{"item": asked.id, "task": "mood", "verdict": verdicts[1].id, "person": "bo", **flag}]
    others = tuple(one for one in FLAG_TYPES if one != kind)
    kept = rounds.made([asked], verdicts, TASKS, rules=Rules(flags_out=others))
    assert len(kept.rows["sft"]) == len(kept.flagged) == 1


def test_what_gives_no_row_says_why() -> None:
    skipped, gold, spans, other = (
        item("mood", {"text": "a"}), item("mood", {"text": "b"}, gold={"labels": ["good"]}), item("spans", {"text": "Ann"}),
        item("mood", {"text": "c"})._replace(task="gone"),
    )  # fmt: skip
    verdicts = [
        said(skipped, "ann", {"reason": ""}, "skip"), said(gold, "ann", {"labels": ["good"]}),
        said(spans, "ann", {"spans": []}),
    ]  # fmt: skip
    made = rounds.made([skipped, gold, spans, other], verdicts, TASKS)
    assert reasons(made) == ["skipped", "gold", "spans", "unknown_task"]
    assert set(reasons(made)) <= set(rounds.REASONS)
    assert not any(made.rows.values())


def test_agreement_may_repeat_a_row() -> None:
    asked = item("mood", {"text": "Great phone."})
    verdicts = [said(asked, who, {"labels": ["good"]}) for who in ("ann", "bo")]
    made = rounds.made([asked], verdicts, TASKS, rules=Rules(repeat_agreed=True)).rows["sft"]
    assert len(made) == 2
    assert made[0] == made[1]


@pytest.mark.parametrize("prompt", [PROMPT, "Great phone. Good or bad?"], ids=["messages", "text"])
def test_jaxtunes_own_formats_read_every_kind_unchanged(prompt: Any, tmp_path: Path) -> None:
    texts = [{"id": "a", "text": "good"}, {"id": "b", "text": "bad"}]
    asked = [
        item("mood", {"text": "Great phone."}, origin={"prompt": prompt}), item("topics", {"text": "cheap, solid"}),
        item("edit", {"prompt": prompt, "answer": "so so"}), item("better", {"prompt": prompt, "candidates": texts}),
        item("keep", {"prompt": prompt, "answer": "bad"}), item("score", {"prompt": prompt, "answer": "good"}),
        item("score", {"prompt": prompt, "answer": "bad"}),
    ]  # fmt: skip
    answers: Sequence[dict[str, Any]] = (
        {"labels": ["good"]}, {"labels": ["price", "quality"]}, {"text": "good"}, {"order": [["a"], ["b"]], "bad": False},
        {"accept": False, "reason": ""}, {"rating": 5.0}, {"rating": 2.0},
    )  # fmt: skip
    made = rounds.rows(asked, [said(one, "ann", answer) for one, answer in zip(asked, answers, strict=True)], TASKS)
    read = {}
    for kind in ("sft", "pairs", "kto", "rewards"):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made[kind]))
        read[kind], dropped = read_examples(path, config_lib.base().data)
        assert not dropped
    assert [example.answer for example in read["sft"]] == ["good", "price, quality", "good"]
    assert [[branch.answer for branch in example.branches] for example in read["pairs"]] == [
        ["good", "so so"],
        ["good", "bad"],
    ]
    assert [(example.answer, example.desirable) for example in read["kto"]] == [("bad", False)]
    [rated] = read["rewards"]
    assert [branch.answer for branch in rated.branches] == ["good", "bad"]
    assert rated.margin == 3.0


@pytest.mark.parametrize("seed", range(30))
def test_order_of_arrival_changes_nothing(seed: int) -> None:
    """Every verdict is in a row or its item is left out, and rows do not depend on the order in which verdicts are read."""
    draw, asked = random.Random(seed), item("mood", {"text": "Great phone."})
    verdicts = [
        said(
            asked,
            draw.choice("abcde"),
            {"labels": [draw.choice(["bad", "fine", "good"])]},
            draw.choice(["label", "label", "skip"]),
        )
        for _ in range(draw.randrange(12))
    ]
    made = rounds.made([asked], verdicts, TASKS)
    shuffled = list(verdicts)
    draw.shuffle(shuffled)
    assert rounds.made([asked], shuffled, TASKS) == made
    assert len(made.rows["sft"]) + len(made.left_out) == 1
    for row in made.rows["sft"]:
        assert 2 * row["agreed"] > row["asked"]
        assert len({v.person for v in verdicts if v.id in row["verdicts"]}) == row["agreed"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("better", "compare"), "expected \\(\\(key, value\\)"),
        (5, "expected \\(name"),
        (("mood", (("kind", "label"), ("labels", "bad"))), "labels='bad'; expected a tuple of texts"),
        (("mood", (("kind", "label"), ("labels", (1, 2)))), "expected a tuple of texts"),
        (("score", (("kind", "rate"), ("scale", (1, 5)))), "expected 3 numbers"),
        (("score", (("kind", "rate"), ("scale", "1-5"))), "expected 3 numbers"),
    ],
)
def test_tasks_of_another_shape_are_told(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tasks.read((given,))
