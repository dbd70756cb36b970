"""Verdicts as numbers: ratings of people by units, games between models, outcomes of items."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.review import agreement
from jaxtune.review.record import Item, Verdict
from jaxtune.review.tasks import Task

LEVELS = {"label": "nominal", "span": "nominal", "rate": "interval", "accept": "nominal", "compare": "ordinal"}
_NOTHING = "(none)"  # no label was chosen; a task may have a label "none"
SIDES = ("worse", "tie", "better")  # of the first of two candidates


class Ratings(NamedTuple):
    """ratings_RU of `people` (ids) by units; `items` names each unit's item: units of one item go together. names: of the values, ()
    where these are numbers of their own."""

    people: tuple[str, ...]
    items: tuple[str, ...]
    ratings_RU: np.ndarray
    names: tuple[str, ...]
    level: str


class Game(NamedTuple):
    """One comparison of two candidates, `first` the one that stood first on the page: score 1 it was better, 0.5 a tie, 0 worse."""

    item: str
    person: str
    first: str
    second: str
    score: float
    first_model: str
    second_model: str
    adjudicates: bool
    alone: bool  # the page showed just these two
    shown: bool  # the page's order is known


def given(task: Task, items: Iterable[Item], verdicts: Iterable[Verdict]) -> list[tuple[Item, Verdict]]:
    """The task's answers with their items; of several by one person on one item the last."""
    by_id = {one.id: one for one in items if one.task == task.name}
    last = {(v.item, v.person): v for v in verdicts if v.kind == task.kind and v.item in by_id}
    return [(by_id[v.item], v) for v in last.values()]


def ratings(task: Task, answers: Sequence[tuple[Item, Verdict]]) -> Ratings | None:
    """The ratings of independent answers, without those that settle what others disagreed about; None where a task has none to compare.

    A unit is an item; of a span task a character, of a comparison a pair of candidates.
    """
    if task.kind not in LEVELS:
        return None
    people = tuple(dict.fromkeys(v.person for _, v in answers if not v.adjudicates))
    cells: dict[Any, dict[str, Any]] = defaultdict(dict)
    for item, verdict in answers:
        if not verdict.adjudicates:
            for unit, value in _values(task, item, verdict.answer):
                cells[item.id, unit][verdict.person] = value
    rows = [[cells[unit].get(person) for unit in cells] for person in people]
    items = tuple(item for item, _ in cells)
    if task.kind == "rate":
        numbers = np.asarray([[np.nan if x is None else x for x in row] for row in rows], np.float64)
        return Ratings(people, items, numbers.reshape(len(people), len(items)), (), LEVELS[task.kind])
    order = _names(task)
    order += tuple(sorted({one for row in rows for one in row if one is not None} - set(order))) if order else ()
    numbers, names = agreement.encode(rows, order)  # a label may have been in the config once, and not be there now
    return Ratings(people, items, numbers.reshape(len(people), len(items)), names, LEVELS[task.kind])


def _names(task: Task) -> tuple[str, ...]:
    known = {"compare": SIDES, "accept": ("reject", "accept"), "span": ("", *task.labels), "label": task.labels}
    return () if task.multi or task.kind == "span" else known[task.kind]


def _values(task: Task, item: Item, answer: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    if task.kind == "rate":
        return [("", float(answer["rating"]))]
    if task.kind == "accept":
        return [("", "accept" if answer["accept"] else "reject")]
    if task.kind == "label":
        return [("", " + ".join(answer["labels"]) or _NOTHING)]
    if task.kind == "span":
        at: list[list[str]] = [[] for _ in str(item.payload.get("text", ""))]
        for one in answer["spans"]:
            for character in range(one["start"], min(one["end"], len(at))):
                at[character].append(one["label"])
        return [(number, " + ".join(sorted(labels)) or _NOTHING) for number, labels in enumerate(at)]
    pairs = itertools.combinations(sorted(_ranks(answer), key=lambda one: (model_of(item, one), one)), 2)
    return [((a, b), SIDES[int(2 * _score(answer, a, b))]) for a, b in pairs]


def _ranks(answer: Mapping[str, Any]) -> dict[str, int]:
    return {str(one): rank for rank, group in enumerate(answer["order"]) for one in group}


def _score(answer: Mapping[str, Any], first: str, second: str) -> float:
    ranks = _ranks(answer)
    return 0.5 if ranks[first] == ranks[second] else float(ranks[first] < ranks[second])


def model_of(item: Item, candidate: str) -> str:
    """The name of the model that wrote a candidate; "" where its origin does not say."""
    told = item.origin.get("models", {}).get(candidate, "")
    return str(told.get("model", "")) if isinstance(told, Mapping) else str(told)


def games(answers: Iterable[tuple[Item, Verdict]]) -> list[Game]:
    """The comparisons of each two candidates, in the order in which the page showed them."""
    found = []
    for item, verdict in answers:
        ids = list(_ranks(verdict.answer))
        shown = [str(one) for one in verdict.shown.get("order", ())]
        is_known = sorted(shown) == sorted(ids)
        for first, second in itertools.combinations(shown if is_known else sorted(ids), 2):
            models = (model_of(item, first), model_of(item, second))
            score = _score(verdict.answer, first, second)
            more = (verdict.adjudicates, len(ids) == 2, is_known)
            found.append(Game(item.id, verdict.person, first, second, score, *models, *more))
    return found


def outcomes(played: Iterable[Game], model: str, other: str) -> dict[str, float]:
    """Of each item that compares the two models: the mean score of `model`, or what settled a disagreement."""
    scores: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for game in played:
        if {game.first_model, game.second_model} == {model, other}:
            scores[game.item].append((game.adjudicates, game.score if game.first_model == model else 1 - game.score))
    settled = {item: [score for decides, score in all_of_it if decides] for item, all_of_it in scores.items()}
    return {
        item: settled[item][-1] if settled[item] else sum(score for _, score in all_of_it) / len(all_of_it)
        for item, all_of_it in scores.items()
    }


def complete(items: Iterable[Item], answers: Sequence[tuple[Item, Verdict]]) -> list[str]:
    """Ids of the items that need no more answers, in the order in which they came to need none."""
    wanted, seen, done = {one.id: one.overlap for one in items}, defaultdict(int), {}  # type: ignore[var-annotated]
    for item, verdict in answers:
        seen[item.id] += 1
        if verdict.adjudicates or seen[item.id] >= wanted[item.id]:
            done.setdefault(item.id, None)
    return list(done)
