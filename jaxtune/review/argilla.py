"""Argilla's records, as its `to_json` writes them: a list of objects with fields, metadata, suggestions and responses.

A task is a question of its name. Values: a label's name, or a list of names where there may be several; a number; a text; spans as
[{"start": 3, "end": 9, "label": "party"}]; a comparison as ids, the best first, or with their ranks where some tie; accept and
reject as labels. Flags are the question NAME-flag, notes and reasons NAME-note and NAME-reason, "both bad" NAME-bad; a skip is
a response with the status "discarded". What Argilla has no place for stands in the metadata, as JSON under "jaxtune"; which
model wrote what, and gold answers, are not written.
Lists of suggestions and responses, as Argilla 1 wrote them, are read too.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtune.review import parcel
from jaxtune.review.parcel import Parcel, Reading, Writing
from jaxtune.review.record import Item, Verdict
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

Answers = dict[str, dict[str, Any]]  # question → {"value": …}


def write(
    path: Path, items: Sequence[Item], verdicts: Sequence[Verdict], writing: Writing
) -> Iterator[tuple[Path, str]]:
    """Yields the one file, a record a line."""
    of = parcel.by_item(items, verdicts)
    lines = (json.dumps(_record(item, of[item.id], writing), ensure_ascii=False) for item in items)
    yield path, "[\n" + ",\n".join(lines) + "\n]\n"


def read(row: dict[str, Any], reading: Reading) -> Parcel:
    """The item and the verdicts of a record.

    Raises:
      UserError: it is no record, or nothing that is shown here.
    """
    ours, fields = _ours(row), row.get("fields")
    if not isinstance(fields, dict):
        raise UserError("there is no object 'fields'; expected a record of Argilla")
    task = reading.named(ours.get("task"))
    payload = _payload(task, fields, ours, reading.columns)
    payload |= ours["payload"] if isinstance(ours.get("payload"), dict) else {}
    problems: list[str] = []
    bare = parcel.item(reading, task, payload, {}, {"round": ours.get("round")})
    suggestion = _suggestions(row).get(task.name)
    if (
        "prelabel" not in payload
        and suggestion is not None
        and (answer := _answer(task, bare, task.kind, {task.name: suggestion}))
    ):
        score = suggestion.get("score")
        payload["prelabel"] = answer | ({"score": score} if isinstance(score, int | float) else {})
    origin = ours.get("origin") or {"source": reading.source, "row": reading.line, "argilla": row.get("id")}
    more = {key: ours.get(key) for key in ("round", "overlap", "skill")}
    item = parcel.item(reading, task, payload, origin, more, ours.get("item", ""))
    verdicts, people = [], []
    for at, (user, status, answers) in enumerate(_responses(row), 1):
        try:
            for given, name in _verdicts(task, item, ours, user or f"unknown-{at}", status, answers):
                verdicts.append(parcel.verdict(reading, item, given))
                people.append((given["person"], name))
        except UserError as error:
            problems.append(f"response {at}: {error}")
    return Parcel((item,), tuple(verdicts), tuple(people), problems=tuple(problems))


def _payload(task: Task, fields: dict[str, Any], ours: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The payload that follows from a record's fields."""
    payload = {key: fields.get(columns.get(key, key)) for key in ("text", "prompt", "answer")}
    if task.kind == "compare":
        known = ours.get("candidates")
        ids = known if isinstance(known, list) and all(isinstance(one, str) for one in known) else ("a", "b", "c", "d")
        names = {id: columns.get(id, id) for id in ids}
        found = [{"id": id, "text": fields[name]} for id, name in names.items() if name in fields]
        payload |= {"candidates": found or None, "text": None, "answer": None}
    return payload


def _record(item: Item, verdicts: Sequence[Verdict], writing: Writing) -> dict[str, Any]:
    task, payload = writing.tasks[item.task], item.payload
    candidates = payload.get("candidates", ())
    fields: dict[str, Any] = {one["id"]: one["text"] for one in candidates}
    fields |= {key: payload[key] for key in ("text", "prompt", "answer") if key in payload}
    ours: dict[str, Any] = {"item": item.id, "round": item.round, "task": item.task, "origin": parcel.origin_told(item)}
    ours |= {"overlap": item.overlap, "skill": item.skill, "verdicts": []}
    if candidates:
        ours["candidates"] = [one["id"] for one in candidates]
    again = _payload(task, fields, ours, {})
    ours["payload"] = {key: value for key, value in payload.items() if again.get(key) != value}
    responses: dict[str, list[dict[str, Any]]] = {}
    for verdict in verdicts:
        user = str(uuid.uuid5(uuid.NAMESPACE_URL, f"jaxtune:{verdict.person}"))
        extra = parcel.told(verdict, writing) | {"user_id": user}
        extra |= {"name": writing.names[verdict.person]} if verdict.person in writing.names else {}
        extra |= {"flags": verdict.answer["flags"]} if verdict.kind == "flag" else {}
        ours["verdicts"].append(extra)
        status = "discarded" if verdict.kind == "skip" else "submitted"
        for question, value in _values(task, verdict.kind, verdict.answer).items():
            responses.setdefault(question, []).append({"value": value, "user_id": user, "status": status})
    suggestions = {}
    if "prelabel" in payload:
        value = _values(task, task.kind, payload["prelabel"])[task.name]
        agent = str(item.origin.get("prelabel_model", "")) or None
        suggestions[task.name] = {"value": value, "score": payload["prelabel"].get("score"), "agent": agent}
    metadata = {"jaxtune": json.dumps(ours, ensure_ascii=False)}
    made = {"id": item.id, "fields": fields, "metadata": metadata, "suggestions": suggestions, "responses": responses}
    return made | {"vectors": {}, "_server_id": None}


def _values(task: Task, kind: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The values that stand for an answer, by question."""
    name, more = task.name, {}
    if answer.get("reason") and kind != "skip":
        more = {f"{name}-reason": answer["reason"]}
    if kind == "label":
        return {name: answer["labels"] if task.multi else answer["labels"][0]}
    if kind == "span":
        return {name: answer["spans"]}
    if kind == "rate":
        rating = answer["rating"]
        return {name: int(rating) if float(rating).is_integer() else rating}
    if kind == "edit":
        return {name: answer["text"]}
    if kind == "accept":
        return {name: "accept" if answer["accept"] else "reject"} | more
    if kind == "flag":
        notes = (": ".join(filter(None, (one["group"], one["note"]))) for one in answer["flags"])
        types = list(dict.fromkeys(one["type"] for one in answer["flags"]))
        return {f"{name}-flag": types, f"{name}-note": "\n".join(notes)}
    if kind == "compare":
        ranked = [{"rank": rank, "value": id} for rank, group in enumerate(answer["order"], 1) for id in group]
        strict = all(len(group) == 1 for group in answer["order"])
        bad = {f"{name}-bad": "yes"} if answer["bad"] else {}
        return {name: [one["value"] for one in ranked] if strict else ranked} | bad
    return {name: answer.get("reason", "")}  # a skip


def _verdicts(
    task: Task, item: Item, ours: dict[str, Any], user: str, status: str, answers: Answers
) -> Iterator[tuple[dict[str, Any], str]]:
    """The verdicts of a person, with their name."""
    there = ours["verdicts"] if isinstance(ours.get("verdicts"), list) else []
    known = [one for one in there if isinstance(one, dict) and one.get("user_id") == user]
    for kind in ["skip"] if status == "discarded" else [task.kind, "flag"]:
        answer = _answer(task, item, kind, answers)
        if answer is None:
            continue
        extra = next((one for one in known if one.get("kind") == kind), {})
        if kind == "flag" and isinstance(extra.get("flags"), list):
            answer = {"flags": extra["flags"]}
        person = extra.get("person") or f"argilla:{user}"[:64]
        given = {key: extra.get(key) for key in ("shown", "guideline", "at", "seconds", "adjudicates")}
        id = extra.get("id") or parcel.short_id("argilla", item.id, user, kind)
        yield (
            given | {"id": id, "person": person, "kind": kind, "answer": answer},
            str(extra.get("name", f"Argilla {user}")),
        )


def _answer(task: Task, item: Item, kind: str, answers: Answers) -> dict[str, Any] | None:
    """The answer of a kind among a person's responses; None where there is none."""
    name = f"{task.name}-flag" if kind == "flag" else task.name
    reason = str(answers.get(f"{task.name}-reason", {}).get("value", ""))
    if kind == "skip":
        return {"reason": str(answers.get(name, {}).get("value") or "")}
    if name not in answers:
        return None
    value = answers[name].get("value")
    if kind == "flag":
        note = str(answers.get(f"{task.name}-note", {}).get("value", ""))
        types = value if isinstance(value, list) else [value]
        return {"flags": [{"type": one, "note": note} for one in types]}
    if kind == "label":
        return {"labels": value if isinstance(value, list) else [value]}
    if kind == "span":
        keys = ("start", "end", "label")
        return {
            "spans": [{k: one.get(k) for k in keys} if isinstance(one, dict) else one for one in value]
            if isinstance(value, list)
            else value
        }
    if kind == "accept":
        return {"accept": {"accept": True, "reject": False}.get(str(value).lower(), value), "reason": reason}
    if kind == "compare":
        return {"order": _order(value), "bad": f"{task.name}-bad" in answers}
    return {{"rate": "rating", "edit": "text"}[kind]: value}


def _order(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [[one] for one in value]
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("rank"), int) for one in value):
        return parcel.groups_of([(one["rank"], str(one.get("value"))) for one in value])
    return value


def _suggestions(row: dict[str, Any]) -> Answers:
    found = row.get("suggestions")
    if isinstance(found, list):
        found = {
            one["question_name"]: one
            for one in found
            if isinstance(one, dict) and isinstance(one.get("question_name"), str)
        }
    return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _responses(row: dict[str, Any]) -> list[tuple[str, str, Answers]]:
    """Each person's responses: their id, the status, and the answers by question."""
    found, kept = row.get("responses"), {}
    if isinstance(found, list):  # Argilla 1
        for at, one in enumerate(found):
            if isinstance(one, dict) and isinstance(one.get("values"), dict):
                answers = {key: value for key, value in one["values"].items() if isinstance(value, dict)}
                kept[str(one.get("user_id") or ""), str(one.get("status", "submitted")), at] = answers
    elif isinstance(found, dict):
        for question, several in found.items():
            for at, one in enumerate(several if isinstance(several, list) else ()):
                if isinstance(one, dict):
                    user, status = str(one.get("user_id") or ""), str(one.get("status") or "submitted")
                    kept.setdefault((user, status, 0 if user else at), {})[question] = one
    return [(user, status, answers) for (user, status, _), answers in kept.items() if status != "draft"]


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    """What jaxtune wrote into the metadata."""
    metadata = row.get("metadata")
    text = metadata.get("jaxtune") if isinstance(metadata, dict) else None
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
