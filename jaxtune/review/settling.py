"""What is drawn for a person, what answers differ, and which answers to gold items are right: pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from jaxtune.review.record import Item, Verdict, stable
from jaxtune.review.tasks import Task

RATING_SPREAD = 0.25  # of the scale: ratings that lie further apart differ


def drawn(*parts: Any) -> int:
    """A number that follows from the parts alone, evenly spread over 0 … 2⁶⁴ − 1."""
    return int.from_bytes(hashlib.sha256(stable(parts).encode()).digest()[:8], "big")


def shown(task: Task, item: Item, person: str) -> dict[str, Any]:
    """How an item stands on a person's page: {"order": candidates' ids, "prelabel": whether the suggestion is shown}.

    Drawn by a hash of item and person. So with prelabels="half" each item is shown with its suggestion to about half of its
    experts and each expert sees it at about half of the items: the difference of the two is the bias of showing.
    """
    ids = [str(one["id"]) for one in item.payload.get("candidates", ())]
    order = sorted(ids, key=lambda one: (drawn("order", item.id, person, one), one))
    half = drawn("prelabel", item.id, person) % 2 == 0
    there = "prelabel" in item.payload
    return {"order": order, "prelabel": there and {"show": True, "hide": False, "half": half}[task.prelabels]}


def gold_is_due(task: Task, round: int, person: str, answered: int) -> bool:
    """Whether a person's next item is to be a gold one, after so many answers: about one in `gold_every`, at no fixed distance."""
    return task.gold_every > 0 and drawn("gold", round, task.name, person, answered) % task.gold_every == 0


def differ(task: Task, answers: Sequence[dict[str, Any]]) -> bool:
    """Whether answers to one item disagree.

    Ratings do where they lie more than a quarter of the scale apart; edited texts where they are not the same but for white
    space; all others where they are not equal. Reasons are not compared.
    """
    if task.kind == "rate":
        ratings = [float(one["rating"]) for one in answers]
        return max(ratings) - min(ratings) > RATING_SPREAD * (task.scale[1] - task.scale[0]) + 1e-9
    return len({_core(task.kind, one) for one in answers}) > 1


def disagree(task: Task, given: Sequence[Verdict]) -> bool:
    """Whether there are two answers or more, and they differ."""
    return len(given) > 1 and differ(task, [one.answer for one in given])


def right(task: Task, item: Item, answer: dict[str, Any]) -> bool:
    """Whether an answer to a gold item is right: it does not `differ` from the item's gold answer."""
    assert item.gold is not None
    return not differ(task, [item.gold, answer])


def _core(kind: str, answer: dict[str, Any]) -> str:
    """What of an answer is compared, in one form."""
    if kind == "edit":
        return " ".join(str(answer["text"]).split())
    if kind == "compare":
        return stable([[sorted(map(str, group)) for group in answer["order"]], bool(answer.get("bad", False))])
    if kind == "label":
        return stable(sorted(answer["labels"]))
    if kind == "span":
        return stable(sorted((one["start"], one["end"], one["label"]) for one in answer["spans"]))
    return stable(answer["accept"])
