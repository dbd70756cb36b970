"""Answers as regions of Label Studio's results, and back. See `label_studio` for the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtune.review.record import Item
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

_SPANS = ("labels", "hypertextlabels", "paragraphlabels")
_EXTRA = ("-flag", "-tie", "-bad", "-reason", "-note", "-rank")  # ends of the names of controls beside the main one


def is_rating(task: Task) -> bool:
    return all(float(one).is_integer() for one in task.scale) and task.scale[0] >= 0


def about_of(task: Task, shows: set[str]) -> str:
    """The object that a task's controls are bound to."""
    order = ("text1", "prompt", "items") if task.kind == "compare" else ("answer", "text", "prompt")
    return next((key for key in order if key in shows), "text")


def regions_of(
    task: Task, item: Item, kind: str, answer: dict[str, Any], id: str, shows: set[str]
) -> list[dict[str, Any]]:
    """The result that stands for an answer."""
    payload, name, about = item.payload, task.name, about_of(task, shows)
    found: list[dict[str, Any]] = []

    def add(type: str, value: dict[str, Any], control: str = name, to: str = about) -> None:
        found.append({"id": f"{id}-{len(found)}", "from_name": control, "to_name": to, "type": type, "value": value})

    if kind == "label":
        add("choices", {"choices": answer["labels"]})
    elif kind == "span":
        text = payload["text"]
        for one in answer["spans"]:
            where = {"start": one["start"], "end": one["end"], "text": text[one["start"] : one["end"]]}
            add("labels", where | {"labels": [one["label"]]})
    elif kind == "rate":
        add(
            *(
                ("rating", {"rating": int(answer["rating"])})
                if is_rating(task)
                else ("number", {"number": answer["rating"]})
            )
        )
    elif kind == "compare":
        ids, order = [one["id"] for one in payload["candidates"]], answer["order"]
        if len(ids) > 2:
            add("ranker", {"ranker": {str(at): group for at, group in enumerate(order, 1)}}, f"{name}-rank", "items")
        elif len(order) == 1:
            add("choices", {"choices": ["tie"]}, f"{name}-tie")
        else:
            add("pairwise", {"selected": "left" if order[0] == ids[:1] else "right"}, to=name)
        if answer["bad"]:
            add("choices", {"choices": ["bad"]}, f"{name}-bad")
    elif kind == "edit":
        add("textarea", {"text": [answer["text"]]})
    elif kind == "accept":
        add("choices", {"choices": ["accept" if answer["accept"] else "reject"]})
    elif kind == "flag":
        add("choices", {"choices": list(dict.fromkeys(one["type"] for one in answer["flags"]))}, f"{name}-flag")
        if notes := [": ".join(filter(None, (one["group"], one["note"]))) for one in answer["flags"]]:
            add("textarea", {"text": notes}, f"{name}-note")
    if answer.get("reason"):
        add("textarea", {"text": [answer["reason"]]}, f"{name}-reason")
    return found


def answer_of(task: Task, item: Item, kind: str, result: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The answer of a kind that a result holds; None where it holds none."""
    chosen = [str(one) for region in _main(task, result, "choices") for one in _list(region, "choices")]
    reason = "\n".join(_texts(result, f"{task.name}-reason"))
    if kind == "skip":
        return {"reason": reason}
    if kind == "flag":
        types = [
            str(one)
            for region in result
            if region.get("from_name") == f"{task.name}-flag"
            for one in _list(region, "choices")
        ]
        note = "\n".join(_texts(result, f"{task.name}-note"))
        return {"flags": [{"type": one, "note": note} for one in types]} if types else None
    if kind == "label":
        return {"labels": chosen} if chosen else None
    if kind == "accept":
        words = {"accept": True, "accepted": True, "reject": False, "rejected": False}
        return {"accept": words.get(chosen[0].lower(), chosen[0]), "reason": reason} if chosen else None
    if kind == "edit":
        texts = [text for region in _main(task, result, "textarea") for text in _list(region, "text")]
        return {"text": "\n".join(map(str, texts))} if texts else None
    if kind == "rate":
        values = [region["value"].get(type) for type in ("rating", "number") for region in _main(task, result, type)]
        return {"rating": values[0]} if values else None
    if kind == "span":
        regions = [region for region in result if region.get("type") in _SPANS]
        return {"spans": [_span(item, region) for region in regions]} if regions else None
    return _order(task, item, result)


def _order(task: Task, item: Item, result: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    ids = [one["id"] for one in item.payload["candidates"]]
    words = {str(one) for region in result if region.get("type") == "choices" for one in _list(region, "choices")}
    bad = "bad" in words
    for region in result:
        if region.get("type") == "pairwise" and len(ids) == 2:
            sides = {"left": [ids[:1], ids[1:]], "right": [ids[1:], ids[:1]]}
            return {"order": sides.get(str(region["value"].get("selected")), region["value"]), "bad": bad}
        ranks = region["value"].get("ranker") if region.get("type") == "ranker" else None
        if isinstance(ranks, list):
            return {"order": [[one] for one in ranks], "bad": bad}
        if isinstance(ranks, dict):
            first = next(iter(ranks.values()), None)
            if list(ranks) == [region.get("from_name")] and isinstance(first, list):  # one list, the best first
                return {"order": [[one] for one in first], "bad": bad}
            return {"order": [group for group in ranks.values() if group], "bad": bad}
    return {"order": [ids], "bad": bad} if bad or "tie" in words else None


def _span(item: Item, region: dict[str, Any]) -> dict[str, Any]:
    """A span in characters. Where its text says that the offsets are units of UTF-16, as a browser counts, they are counted anew."""
    value, text = region["value"], str(item.payload.get("text", ""))
    place = value.get("globalOffsets") if isinstance(value.get("globalOffsets"), dict) else value
    label = next((one for type in _SPANS for one in _list(region, type)), None)
    start, end = place.get("start"), place.get("end")
    start, end = (int(one) if isinstance(one, str) and one.isdigit() else one for one in (start, end))
    said = value.get("text")
    if isinstance(said, str) and isinstance(start, int) and isinstance(end, int) and text[start:end] != said:
        units = text.encode("utf-16-le")
        inside = units[2 * start : 2 * end].decode("utf-16-le", "replace")
        if inside != said:
            raise UserError(f"the span {start} to {end} is {text[start:end]!r:.60} here, and {said!r:.60} in the file")
        start = len(units[: 2 * start].decode("utf-16-le", "replace"))
        end = start + len(inside)
    return {"start": start, "end": end, "label": label}


def _main(task: Task, result: Sequence[dict[str, Any]], type: str) -> list[dict[str, Any]]:
    """The regions of the task's own control; where the file names it otherwise, those of the first of its type."""
    found = [one for one in result if one.get("type") == type and not str(one.get("from_name")).endswith(_EXTRA)]
    named = (
        task.name
        if any(one.get("from_name") == task.name for one in found)
        else found[0].get("from_name")
        if found
        else ""
    )
    return [one for one in found if one.get("from_name") == named]


def _texts(result: Sequence[dict[str, Any]], control: str) -> list[str]:
    return [str(text) for one in result if one.get("from_name") == control for text in _list(one, "text")]


def _list(region: dict[str, Any], key: str) -> list[Any]:
    value = region["value"].get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list; of a result, those that have a value."""
    found = row.get(key)
    objects = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one for one in objects if isinstance(one.get("value"), dict)] if key == "result" else objects
