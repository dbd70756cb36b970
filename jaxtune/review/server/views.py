"""What of an item and of an answer a page sees, and what an answer from a page means.

Candidates are known to the page by the place where they stand, "1", "2", …: what their ids would tell (a model, a checkpoint)
never leaves the server, nor do origin and gold.
"""

from __future__ import annotations

from typing import Any

from jaxtune.review.record import TASK_KINDS, Item, Verdict
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

_PRELABEL = {
    "label": "labels", "span": "spans", "rate": "rating", "compare": "order", "edit": "text", "accept": "accept",
}  # fmt: skip


def _order(item: Item, shown: dict[str, Any]) -> list[str]:
    """Ids of the candidates as they stand on the page."""
    ids = [str(one["id"]) for one in item.payload.get("candidates", ())]
    order = [str(one) for one in shown.get("order") or ids]
    return order if sorted(order) == sorted(ids) else ids


def for_page(item: Item, shown: dict[str, Any], task: Task) -> dict[str, Any]:
    """What a page shows of an item."""
    payload: dict[str, Any] = {}
    for key in ("text", "answer"):
        if key in item.payload:
            payload[key] = _text(item.payload[key])
    if "prompt" in item.payload:
        payload["prompt"] = _prompt(item.payload["prompt"])
    if "candidates" in item.payload:
        texts = {str(one["id"]): _text(one.get("text", "")) for one in item.payload["candidates"]}
        order = _order(item, shown)
        payload["candidates"] = [{"id": str(at), "text": texts[one]} for at, one in enumerate(order, 1)]
    found = {"item": item.id, "task": item.task, "payload": payload}
    prelabel, key = item.payload.get("prelabel"), _PRELABEL[task.kind]
    if shown.get("prelabel") and isinstance(prelabel, dict) and key in prelabel:
        found["prelabel"] = answer_for_page(task.kind, {key: prelabel[key]}, item, shown)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _prompt(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _text(value)
    turns = [one for one in value if isinstance(one, dict)]
    return [{"role": _text(one.get("role", "")), "content": _text(one.get("content", ""))} for one in turns]


def answer_for_page(kind: str, answer: dict[str, Any], item: Item, shown: dict[str, Any]) -> dict[str, Any]:
    """An answer in the page's words: candidates by their places."""
    if kind != "compare" or not isinstance(answer.get("order"), list):
        return answer
    places = {one: str(at) for at, one in enumerate(_order(item, shown), 1)}
    order = [[places[str(one)] for one in group if str(one) in places] for group in answer["order"]]
    return {**answer, "order": order}


def answer_from_page(kind: str, answer: dict[str, Any], item: Item, shown: dict[str, Any]) -> dict[str, Any]:
    """An answer in the record's words.

    Raises:
      UserError: it names a place at which no candidate stands.
    """
    order = answer.get("order")
    if kind != "compare" or not isinstance(order, list) or not all(isinstance(group, list) for group in order):
        return answer  # `tasks.checked` says what is wrong with it
    ids = {str(at): one for at, one in enumerate(_order(item, shown), 1)}
    if unknown := [one for group in order for one in group if not isinstance(one, str) or one not in ids]:
        raise UserError(f"the answer {unknown[0]!r:.40} was named; expected {', '.join(ids)}")
    return {**answer, "order": [[ids[one] for one in group] for group in order]}


def clean(value: Any) -> Any:
    """The value without what no database's text can hold: lone halves of characters."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [clean(one) for one in value]
    if isinstance(value, dict):
        return {clean(key): clean(one) for key, one in value.items()}
    return value


def excerpt(item: Item, limit: int = 300) -> str:
    """The item in a line or two."""
    payload = item.payload
    prompt = _prompt(payload.get("prompt", ""))
    if isinstance(prompt, list):
        prompt = prompt[-1]["content"] if prompt else ""
    text = " → ".join(one for one in (prompt, _text(payload.get("text", "")), _text(payload.get("answer", ""))) if one)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def in_words(item: Item, verdict: Verdict) -> str:
    """What someone answered, as a line of text."""
    answer = answer_for_page(verdict.kind, verdict.answer, item, verdict.shown)
    if verdict.kind not in TASK_KINDS:
        return _other_in_words(verdict)
    if verdict.kind == "label":
        return ", ".join(answer["labels"]) or "no label"
    if verdict.kind == "span":
        text = _text(item.payload.get("text", ""))
        marks = [f"{one['label']}: “{text[one['start'] : one['end']]}”" for one in answer["spans"]]
        return " · ".join(marks) or "nothing marked"
    if verdict.kind == "rate":
        return f"{answer['rating']:g}"
    if verdict.kind == "edit":
        return str(answer["text"])
    if verdict.kind == "accept":
        return "accepted" if answer["accept"] else "rejected" + (f": {answer['reason']}" if answer["reason"] else "")
    if answer["bad"]:
        return "none is good"
    groups = [" = ".join(f"answer {one}" for one in group) for group in answer["order"]]
    return "equally good" if len(groups) == 1 else f"{groups[0]} is better than {', then '.join(groups[1:])}"


def _other_in_words(verdict: Verdict) -> str:
    if verdict.kind == "skip":
        return f"skipped: {verdict.answer['reason']}" if verdict.answer.get("reason") else "skipped"
    flags = [
        " ".join(one for one in (flag["type"].replace("_", " "), flag["group"] and f"({flag['group']})") if one)
        + (f": {flag['note']}" if flag["note"] else "")
        for flag in verdict.answer.get("flags", ())
    ]
    return "flagged: " + "; ".join(flags)
