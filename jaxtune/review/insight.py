"""All figures of a round: who agreed with whom, who answered how well and how fast, which model won, and what the page itself did.

    figures(engine, tasks, round)         a dictionary of plain values, None where a figure is not defined
    write(engine, tasks, round, folder)   the same as report.json, and report.html for people

Verdicts of model judges are in none of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from jaxtune import statistics
from jaxtune.review import agreement, quality, ranking, settling, store
from jaxtune.review.answers import Game, Ratings, games, given, outcomes, ratings
from jaxtune.review.record import Item, Verdict
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task
from jaxtune.statistics import Estimate

Answers = Sequence[tuple[Item, Verdict]]
_MOST_VALUES = 12  # of a confusion that can be read


def figures(engine: Engine, tasks: Mapping[str, Task], round: int) -> dict[str, Any]:
    """Returns the figures of a round, by task."""
    items, verdicts = store.read_items(engine, round), store.read_verdicts(engine, round)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(store.people.c.id, store.people.c.name))
        names = {str(person): str(name) for person, name in rows}
    found = {name: _of_task(task, items, verdicts, names) for name, task in tasks.items()}
    return plain({"round": round, "people": len({v.person for v in verdicts}), "tasks": found})


def write(engine: Engine, tasks: Mapping[str, Task], round: int, folder: Path) -> dict[str, Any]:
    """Writes report.json and report.html into the folder; returns the figures."""
    from jaxtune import report
    from jaxtune.review import insight_page

    found = figures(engine, tasks, round)
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, insight_page.facts(found))
    return found


def _of_task(
    task: Task, items: Sequence[Item], verdicts: Sequence[Verdict], names: Mapping[str, str]
) -> dict[str, Any]:
    own = [one for one in items if one.task == task.name]
    ids = {one.id for one in own}
    said = [one for one in verdicts if one.item in ids]
    every = given(task, own, said)
    answers = [(item, verdict) for item, verdict in every if item.gold is None]
    rated = ratings(task, answers)
    seconds = [v.seconds for _, v in every]
    found: dict[str, Any] = {
        "kind": task.kind,
        "items": len(own),
        "gold_items": sum(one.gold is not None for one in own),
        "answered": len({item.id for item, _ in every}),
        "answers": len(every),
        "adjudicated": len({item.id for item, v in every if v.adjudicates}),
        "skips": sum(v.kind == "skip" for v in said),
        "flags": _flags(said),
        "seconds": _seconds(seconds),
        "people": _people(task, every, said, rated, names),
        "agreement": _agreement(task, rated),
        "confusion": _confusion(rated, names),
        "quality": _quality(task, own, rated),
        "prelabels": _prelabels(task, answers),
    }
    if task.kind == "compare":
        played = games(answers)
        found["position"] = _position(played, names)
        found["models"] = _models(played)
        found["both_bad"] = _share([float(v.answer.get("bad", False)) for _, v in answers])
    if task.kind == "accept":
        found["accepted"] = _share([float(v.answer["accept"]) for _, v in answers])
    if task.kind == "edit":
        found["changed"] = _share([float(v.answer["text"] != item.payload.get("answer")) for item, v in answers])
    return found


def _share(values: Sequence[float]) -> Estimate:
    return statistics.wilson(sum(values) / len(values) if values else math.nan, len(values))


def _seconds(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {"median": math.nan, "p90": math.nan, "sum": 0.0}
    return {
        "median": float(np.median(seconds)),
        "p90": float(np.quantile(seconds, 0.9)),
        "sum": float(np.sum(seconds)),
    }


def _flags(said: Iterable[Verdict]) -> list[dict[str, Any]]:
    flagged: dict[tuple[str, str], set[str]] = defaultdict(set)
    counts: Counter[tuple[str, str]] = Counter()
    for verdict in said:
        for one in verdict.answer.get("flags", ()) if verdict.kind == "flag" else ():
            key = one["type"], one.get("group", "")
            counts[key] += 1
            flagged[key].add(verdict.item)
    return [
        {"type": kind, "group": group, "flags": count, "items": len(flagged[kind, group])}
        for (kind, group), count in counts.most_common()
    ]


def _people(
    task: Task, every: Answers, said: Sequence[Verdict], rated: Ratings | None, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Of each person: how much, how fast, right on gold, and how far from the others."""
    others = _others(rated)
    found = []
    for person in dict.fromkeys(v.person for v in said):
        own = [(item, v) for item, v in every if v.person == person]
        gold = [float(settling.right(task, item, v.answer)) for item, v in own if item.gold is not None]
        found.append({
            "person": person, "name": names.get(person, person), "answers": len(own),
            "skips": sum(v.kind == "skip" for v in said if v.person == person),
            "seconds": _seconds([v.seconds for _, v in own]), "gold_of": len(gold), "gold": _share(gold),
            **others.get(person, {}),
        })  # fmt: skip
    return found


def _others(rated: Ratings | None) -> dict[str, dict[str, Any]]:
    """How far each person is from the others: agreement with their majority; of numbers the mean and root mean square difference."""
    if rated is None:
        return {}
    if rated.names:
        confused = agreement.against_others(rated.ratings_RU, len(rated.names))
        return {
            rated.people[one.first]: {
                "with_others": statistics.wilson(one.agreement, int(one.counts_VV.sum())),
                "kappa_with_others": one.kappa,
            }
            for one in confused
        }
    found = {}
    is_there_RU = ~np.isnan(rated.ratings_RU)
    sums_U, num_U = np.nansum(rated.ratings_RU, 0), is_there_RU.sum(0)
    for row, person in enumerate(rated.people):
        at = np.flatnonzero(is_there_RU[row] & (num_U >= 2))
        own = rated.ratings_RU[row, at]
        gaps = own - (sums_U[at] - own) / np.maximum(num_U[at] - 1, 1)
        if len(at):
            found[person] = {"offset": float(gaps.mean()), "rms_from_others": float(np.sqrt((gaps**2).mean()))}
    return found


def _agreement(task: Task, rated: Ratings | None) -> dict[str, Any]:
    if rated is None or not rated.people:
        return {}
    groups_U = np.unique(rated.items, return_inverse=True)[1] if rated.items else np.zeros(0, int)
    alpha = agreement.alpha_interval(rated.ratings_RU, rated.level, groups_U, num_samples=500)
    shared_U = (~np.isnan(rated.ratings_RU)).sum(0) >= 2
    found: dict[str, Any] = {
        "level": rated.level,
        "alpha": alpha,
        "items_shared": len({rated.items[at] for at in np.flatnonzero(shared_U)}),
    }
    if rated.level == "nominal":
        found["fleiss_kappa"] = agreement.fleiss_kappa(rated.ratings_RU)
    if task.multi:
        found["alpha_by_label"] = {
            label: agreement.krippendorff_alpha(_has(rated, label), "nominal") for label in task.labels
        }
    return found


def _has(rated: Ratings, label: str) -> np.ndarray:
    """1 where a rating's labels hold the label, 0 where not."""
    has_V = np.asarray([float(label in name.split(" + ")) for name in rated.names] or [0.0])
    number_RU = np.nan_to_num(rated.ratings_RU).astype(int)
    return np.where(np.isnan(rated.ratings_RU), np.nan, has_V[number_RU])


def _confusion(rated: Ratings | None, names: Mapping[str, str]) -> dict[str, Any]:
    if rated is None:
        return {}
    numbers, labels = rated.ratings_RU, rated.names
    if not labels:
        values = np.unique(numbers[~np.isnan(numbers)])
        labels = tuple(f"{value:g}" for value in values)
        numbers = np.where(np.isnan(numbers), np.nan, np.searchsorted(values, np.nan_to_num(numbers)))
    if not 2 <= len(labels) <= _MOST_VALUES:
        return {}
    by = [names.get(person, person) for person in rated.people]
    weights = "" if rated.level == "nominal" else "quadratic"
    pairs = [_told(one, by) for one in agreement.pairwise(numbers, len(labels), weights)]
    others = [_told(one, by) for one in agreement.against_others(numbers, len(labels))] if rated.names else []
    return {"values": list(labels), "weights": weights, "pairs": pairs, "others": others}


def _told(one: agreement.Confusion, by: Sequence[str]) -> dict[str, Any]:
    second = by[one.second] if one.second >= 0 else "majority of the others"
    return {
        "first": by[one.first], "second": second, "units": int(one.counts_VV.sum()), "agreement": one.agreement,
        "kappa": one.kappa, "counts": one.counts_VV.tolist(),
    }  # fmt: skip


def _quality(task: Task, items: Sequence[Item], rated: Ratings | None) -> dict[str, Any]:
    """Consensus of a task of one label, or of accept and reject, with the least sure items first; by model's probabilities where
    an item's origin has "probabilities" of each label."""
    if rated is None or task.kind not in ("label", "accept") or task.multi or not rated.people:
        return {}
    by_id = {one.id: one for one in items}
    probs = np.asarray([_probabilities(by_id[item], rated.names) for item in rated.items])
    known = probs if np.isfinite(probs).all(1).any() else None
    found = quality.consensus(rated.ratings_RU, len(rated.names), known)
    order = sorted(range(len(rated.items)), key=lambda at: found.quality_U[at])
    return {
        "method": found.method,
        "people": {person: float(score) for person, score in zip(rated.people, found.quality_R, strict=True)},
        "consensus": Counter(rated.names[at] for at in found.label_U if at >= 0),
        "items": [
            {
                "item": rated.items[at],
                "text": _text(by_id[rated.items[at]]),
                "label": rated.names[found.label_U[at]],
                "quality": float(found.quality_U[at]),
            }
            for at in order
        ],
    }


def _text(item: Item) -> str:
    told = str(item.payload.get("text") or item.payload.get("answer") or item.payload.get("prompt", ""))
    return " ".join(told.split())[:120]


def _probabilities(item: Item, labels: Sequence[str]) -> list[float]:
    told = item.origin.get("probabilities")
    return [float(told.get(label, 0.0)) for label in labels] if isinstance(told, Mapping) else [math.nan] * len(labels)


def _position(played: Sequence[Game], names: Mapping[str, str]) -> dict[str, Any]:
    """Whether the side shown first won more often than the other, over all and for each person."""
    of = [game for game in played if game.alone and game.shown and not game.adjudicates]

    def tested(some: list[Game]) -> dict[str, Any]:
        found = ranking.position_bias(sum(g.score == 1 for g in some), sum(g.score == 0 for g in some))
        return found._asdict() | {"ties": sum(g.score == 0.5 for g in some)}

    people = {person: [g for g in of if g.person == person] for person in dict.fromkeys(g.person for g in of)}
    return {
        "all": tested(of),
        "people": [{"name": names.get(person, person), **tested(own)} for person, own in people.items()],
    }


def _models(played: Sequence[Game]) -> dict[str, Any]:
    """Win rates of each two models, an item once; and the strengths of all, where there are more than two."""
    known = [g for g in played if g.first_model and g.second_model and g.first_model != g.second_model]
    models = sorted({name for g in known for name in (g.first_model, g.second_model)})
    rates = []
    for at, model in enumerate(models):
        for other in models[at + 1 :]:
            scores = list(outcomes(known, model, other).values())
            if scores:
                rates.append({
                    "model": model, "other": other, "items": len(scores), "better": sum(x > 0.5 for x in scores),
                    "ties": sum(x == 0.5 for x in scores), "worse": sum(x < 0.5 for x in scores), "win_rate": _share(scores),
                })  # fmt: skip
    if not known:
        return {"win_rates": [], "strengths": {}}
    number = {model: at for at, model in enumerate(models)}
    first = np.asarray([number[g.first_model] for g in known])
    second = np.asarray([number[g.second_model] for g in known])
    score, groups = np.asarray([g.score for g in known]), np.asarray([g.item for g in known])
    strengths = ranking.bradley_terry_intervals(first, second, score, len(models), groups)
    return {"win_rates": rates, "strengths": dict(zip(models, strengths, strict=True))}


def _prelabels(task: Task, answers: Answers) -> dict[str, Any]:
    """What showing a model's suggestion does: answers that agree with it, and seconds, where it was shown and where hidden."""
    found: dict[
        str, tuple[list[list[float]], list[list[float]]]
    ] = {}  # by item: [agrees, seconds] where hidden, where shown
    for item, v in answers:
        suggested = item.payload.get("prelabel")
        if isinstance(suggested, Mapping) and set(v.answer) & set(suggested) and not v.adjudicates:
            pair = [float(not settling.differ(task, [v.answer, dict(suggested)])), v.seconds]
            found.setdefault(item.id, ([], []))[bool(v.shown.get("prelabel"))].append(pair)
    if not found:
        return {}
    items = list(found.values())
    return {
        "shown": _side([pair for one in items for pair in one[1]]),
        "hidden": _side([pair for one in items for pair in one[0]]),
        "agreement_difference": _difference(items, 0, np.mean),
        "seconds_difference": _difference(items, 1, np.median),
    }


def _side(pairs: list[list[float]]) -> dict[str, Any]:
    agreed = [one[0] for one in pairs]
    share = sum(agreed) / len(agreed) if agreed else math.nan
    return {"answers": len(pairs), "agreement": share, "seconds": _seconds([one[1] for one in pairs])}


def _difference(
    items: Sequence[tuple[list[list[float]], list[list[float]]]], which: int, middle: Callable[[Any], Any]
) -> Estimate:
    """middle where shown - middle where hidden, with its bootstrap interval over items."""

    def gap(drawn: Sequence[Any]) -> float:
        hidden, shown = ([pair[which] for one in drawn for pair in one[side]] for side in (0, 1))
        return float(middle(shown) - middle(hidden)) if shown and hidden else math.nan

    value, rng = gap(items), np.random.default_rng(0)
    if not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan)
    samples = [gap([items[at] for at in rng.integers(len(items), size=len(items))]) for _ in range(500)]
    return Estimate(value, *(float(end) for end in np.nanquantile(samples, [0.025, 0.975])))


def plain(value: Any) -> Any:
    """The value in JSON's types; a number that is not finite is None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
