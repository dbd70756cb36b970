"""The figures of a round in words: what `report.write` turns into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PAIRS = 12  # confusions between experts that are shown, those with most in common
_LEAST_SURE = 10
Table = dict[str, Any]


def facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for `report.write`; `figures` are in report.json as they are."""
    tables = [_counts(found["tasks"])]
    notices: list[str] = []
    for name, task in found["tasks"].items():
        tables += [table for table in _tables(name, task) if table["rows"]]
        notices += _notices(name, task)
    answers = sum(task["answers"] for task in found["tasks"].values())
    return {
        "name": f"Round {found['round']}: what the experts said",
        "headline": f"{answers:,} answers by {found['people']} people to {sum(t['answered'] for t in found['tasks'].values()):,} items.",
        "about": {"Intervals": "95%; bootstrap over items, Wilson's for shares, exact for sides"},
        "notices": notices,
        "tables": tables,
        "figures": dict(found),
    }


def _counts(tasks: Mapping[str, Any]) -> Table:
    rows = []
    for name, task in tasks.items():
        alpha = task["agreement"].get("alpha")
        rows.append([
            name, task["kind"], f"{task['answered']:,} of {task['items']:,}", f"{task['answers']:,}", task["skips"], task["adjudicated"],
            _number(task["seconds"]["median"], " s"), _estimate(alpha),
        ])  # fmt: skip
    header = ["Task", "Kind", "Items answered", "Answers", "Skips", "Settled by a senior", "Median time", "α"]
    return _table("Tasks", header, rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return {"title": title, "header": list(header), "rows": [list(row) for row in rows], "plots": []}


def _tables(name: str, task: Mapping[str, Any]) -> list[Table]:
    return [
        _people(name, task),
        _confusion(name, task["confusion"]),
        _win_rates(name, task.get("models", {})),
        _strengths(name, task.get("models", {})),
        _position(name, task.get("position")),
        _prelabels(name, task["prelabels"]),
        _least_sure(name, task["quality"] if task["agreement"].get("items_shared") else {}),
        _table(f"{name}: flags", ["Type", "Group", "Flags", "Items"],
               [[f["type"], f["group"], f["flags"], f["items"]] for f in task["flags"]]),
    ]  # fmt: skip


def _people(name: str, task: Mapping[str, Any]) -> Table:
    quality = task["quality"].get("people", {})
    is_number = task["kind"] == "rate"
    header = ["Who", "Answers", "Skips", "Median time", "Gold right"]
    header += ["Above the others by", "RMS from them"] if is_number else ["With the others' majority", "κ"]
    rows = []
    for one in task["people"]:
        gold = f"{_estimate(one['gold'], share=True)} of {one['gold_of']}" if one["gold_of"] else ""
        row = [one["name"], one["answers"], one["skips"], _number(one["seconds"]["median"], " s"), gold]
        if is_number:
            row += [_number(one.get("offset")), _number(one.get("rms_from_others"))]
        else:
            row += [_estimate(one.get("with_others"), share=True), _number(one.get("kappa_with_others"))]
        rows.append([*row, *([_number(quality.get(one["person"]))] if quality else [])])
    header += [f"Quality ({task['quality']['method']})"] if quality else []
    return _table(f"{name}: people", header, rows)


def _confusion(name: str, confusion: Mapping[str, Any]) -> Table:
    rows = []
    for one in [*confusion["others"], *confusion["pairs"][:_PAIRS]] if confusion else []:
        apart = sorted(_apart(one["counts"], confusion["values"]), reverse=True)[:3]
        shown = "; ".join(f"{first} / {second}: {count}" for count, first, second in apart)
        rows.append(
            [one["first"], one["second"], one["units"], f"{one['agreement']:.0%}", _number(one["kappa"]), shown]
        )
    header = ["First", "Second", "In common", "Same", "κ", "Most often apart, first / second"]
    return _table(f"{name}: who says what where others say something else", header, rows)


def _apart(counts: Sequence[Sequence[int]], values: Sequence[str]) -> list[tuple[int, str, str]]:
    return [
        (count, values[at], values[to])
        for at, row in enumerate(counts)
        for to, count in enumerate(row)
        if count and at != to
    ]


def _win_rates(name: str, models: Mapping[str, Any]) -> Table:
    rows = [
        [one["model"], one["other"], one["items"], one["better"], one["ties"], one["worse"], _estimate(one["win_rate"], share=True)]
        for one in models.get("win_rates", ())
    ]  # fmt: skip
    return _table(
        f"{name}: win rates, ties as half", ["Model", "Against", "Items", "Better", "Tie", "Worse", "Win rate"], rows
    )


def _strengths(name: str, models: Mapping[str, Any]) -> Table:
    ordered = sorted(models.get("strengths", {}).items(), key=lambda one: -one[1]["value"])
    rows = [[model, _estimate(estimate, signed=True)] for model, estimate in ordered if len(ordered) > 2]
    return _table(f"{name}: Bradley–Terry strengths", ["Model", "Log-odds against the mean"], rows)


def _position(name: str, position: Mapping[str, Any] | None) -> Table:
    rows = []
    for who, one in [("all", position["all"]), *((p["name"], p) for p in position["people"])] if position else []:
        rows.append([who, one["decided"], one["ties"], _estimate(one["share"], share=True), f"{one['p']:.2g}"])
    return _table(
        f"{name}: did the first side win more often?", ["Who", "Decided", "Ties", "First side won", "p"], rows
    )


def _prelabels(name: str, found: Mapping[str, Any]) -> Table:
    rows = []
    if found:
        for side in ("shown", "hidden"):
            one = found[side]
            rows.append([f"suggestion {side}", one["answers"], _number(one["agreement"]), _number(one["seconds"]["median"], " s")])  # fmt: skip
        gaps = (found["agreement_difference"], found["seconds_difference"])
        rows.append(["difference", "", *(_estimate(gap, signed=True) for gap in gaps)])
    return _table(f"{name}: what showing suggestions does", ["", "Answers", "Agree with it", "Median time"], rows)


def _least_sure(name: str, quality: Mapping[str, Any]) -> Table:
    rows = [[one["text"], one["label"], f"{one['quality']:.2f}"] for one in quality.get("items", ())[:_LEAST_SURE]]
    return _table(f"{name}: consensus least sure", ["Text", "Consensus", "Quality"], rows)


def _notices(name: str, task: Mapping[str, Any]) -> list[str]:
    told = []
    position = task.get("position")
    if position and position["all"]["p"] < 0.01:
        share = position["all"]["share"]["value"]
        told.append(
            f"{name}: the side shown first won {share:.0%} of decided comparisons (p = {position['all']['p']:.2g})."
        )
    gap = task["prelabels"].get("agreement_difference") if task["prelabels"] else None
    if gap and gap["low"] is not None and gap["low"] > 0:
        told.append(
            f"{name}: answers agree more often with a suggestion that is shown ({_estimate(gap, signed=True)}): they lean on it."
        )
    for one in task["people"]:
        if one["gold_of"] >= 5 and one["gold"]["high"] < 0.7:
            told.append(f"{name}: {one['name']} has {one['gold']['value']:.0%} of {one['gold_of']} gold items right.")
    return told


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.3g}{unit}"


def _estimate(one: Mapping[str, Any] | None, share: bool = False, signed: bool = False) -> str:
    if not one or one["value"] is None:
        return ""
    form = "{:.0%}" if share else "{:+.3f}" if signed else "{:.3f}"
    value, low, high = (form.format(one[key]) if one[key] is not None else "?" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]".replace("-", "−")
