"""Label Studio's JSON: a list of tasks, each with data, predictions and annotations; and the labeling config that shows them.

| task | control | a region's value |
|---|---|---|
| label | Choices | {"choices": ["positive"]} |
| span | Labels | {"start": 3, "end": 9, "text": "lessor", "labels": ["party"]}, a region for each |
| rate | Rating, or Number where the scale has other than whole steps from 0 on | {"rating": 4}, {"number": 0.5} |
| compare | Pairwise of two; Choices for a tie; Ranker of more, a bucket for each rank | {"selected": "left"}, {"ranker": {"1": ["b"], "2": ["a", "c"]}} |
| edit | TextArea | {"text": ["the corrected answer"]} |
| accept | Choices | {"choices": ["accept"]} |

A flag is Choices named NAME-flag, a note or reason TextArea; a skip is an annotation with `was_cancelled`, gold one with `ground_truth`.
What Label Studio has no place for (order shown, guideline, …) stands in `meta.jaxtune` of a task and `jaxtune` of an annotation. Which
model wrote what, and gold answers, are not written: who is to compare blind can read a task's meta.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from jaxtune.review import parcel
from jaxtune.review.label_studio_regions import about_of, answer_of, is_rating, objects, regions_of
from jaxtune.review.parcel import Parcel, Reading, Writing
from jaxtune.review.record import FLAG_TYPES, Item, Verdict
from jaxtune.review.tasks import Task
from jaxtune.types import UserError


def write(
    path: Path, items: Sequence[Item], verdicts: Sequence[Verdict], writing: Writing
) -> Iterator[tuple[Path, str]]:
    """Yields the tasks, one a line, and for each of ours the labeling config that Label Studio needs to show them."""
    of = parcel.by_item(items, verdicts)
    numbers = {person: at for at, person in enumerate(dict.fromkeys(one.person for one in verdicts), 1)}
    shown = {
        name: _shown([one for one in items if one.task == name]) for name in dict.fromkeys(one.task for one in items)
    }
    lines = (_task(at, item, of[item.id], numbers, writing, shown[item.task]) for at, item in enumerate(items, 1))
    yield path, "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in lines) + "\n]\n"
    for name, shows in shown.items():
        yield path.with_name(f"{path.stem}.{name}.xml"), labeling_config(writing.tasks[name], shows)


def read(row: dict[str, Any], reading: Reading) -> Parcel:
    """The item and the verdicts of a task of Label Studio.

    Raises:
      UserError: it is no task, or nothing that is shown here.
    """
    ours = _ours(row.get("meta"))
    task, data = reading.named(ours.get("task")), row.get("data")
    if not isinstance(data, dict):
        raise UserError("there is no object 'data'; expected a task of Label Studio's JSON")
    payload = _payload(task, data, reading) | (ours["payload"] if isinstance(ours.get("payload"), dict) else {})
    origin = ours.get("origin") or {"source": reading.source, "row": reading.line, "label_studio": row.get("id")}
    annotations = objects(row, "annotations") or objects(row, "completions")
    problems: list[str] = []
    bare = parcel.item(reading, task, payload, origin, {"round": ours.get("round")})
    if "prelabel" not in payload and (prelabel := _prelabel(task, bare, row, problems)):
        payload["prelabel"] = prelabel
    gold = None
    for one in annotations:
        if gold is None and one.get("ground_truth") is True:
            gold = answer_of(task, bare, task.kind, objects(one, "result"))
    more = {key: ours.get(key) for key in ("round", "overlap", "skill")} | {"gold": gold}
    item = parcel.item(reading, task, payload, origin, more, ours.get("item", ""))
    verdicts, people = [], []
    for at, one in enumerate(annotations, 1):
        try:
            for given, name in _verdicts(task, item, one, at):
                verdicts.append(parcel.verdict(reading, item, given))
                people.append((given["person"], name))
        except UserError as error:
            problems.append(f"annotation {at}: {error}")
    return Parcel((item,), tuple(verdicts), tuple(people), problems=tuple(problems))


def labeling_config(task: Task, shows: set[str]) -> str:
    """The XML with which a project of Label Studio shows the task; `shows`: keys of its data."""
    name, kind = task.name, task.kind
    tags = [f"<Header value={quoteattr(task.question or task.title or name)}/>"]
    tags += [
        f'<Text name="{key}" value="${key}"/>' for key in ("prompt", "text", "answer", "text1", "text2") if key in shows
    ]
    about = about_of(task, shows)
    if "items" in shows:
        tags += ['<List name="items" value="$items"/>', _tag("Ranker", f"{name}-rank", "items")]
    if kind == "compare":
        tags += [_tag("Pairwise", name, "text1,text2")] if "text1" in shows else []
        tags += [_choices(f"{name}-tie", about, ("tie",), True), _choices(f"{name}-bad", about, ("bad",), True)]
    elif kind == "label":
        tags += [_choices(name, about, task.labels, task.multi)]
    elif kind == "accept":
        tags += [_choices(name, about, ("accept", "reject"), False)]
    elif kind == "span":
        labels = "".join(f"<Label value={quoteattr(one)}/>" for one in task.labels)
        tags += [_tag("Labels", name, about, labels)]
    elif kind == "edit":
        tags += [_tag("TextArea", name, about)]
    elif is_rating(task):
        tags += [_tag("Rating", name, about, more=f' maxRating="{int(task.scale[1])}"')]
    else:
        low, high, step = task.scale
        tags += [_tag("Number", name, about, more=f' min="{low:g}" max="{high:g}" step="{step:g}"')]
    tags += [_choices(f"{name}-flag", about, FLAG_TYPES, True), _tag("TextArea", f"{name}-note", about)]
    tags += [_tag("TextArea", f"{name}-reason", about)]
    return "<View>\n  " + "\n  ".join(tags) + "\n</View>\n"


def _tag(kind: str, name: str, to: str, inside: str = "", more: str = "") -> str:
    start = f"<{kind} name={quoteattr(name)} toName={quoteattr(to)}{more}"
    return f"{start}>{inside}</{kind}>" if inside else f"{start}/>"


def _choices(name: str, to: str, choices: Sequence[str], several: bool) -> str:
    inside = "".join(f"<Choice value={quoteattr(one)}/>" for one in choices)
    return _tag("Choices", name, to, inside, f' choice="{"multiple" if several else "single"}"')


def _shown(items: Sequence[Item]) -> set[str]:
    """The keys of a task's data: the labeling config names them, and Label Studio refuses data that lack one."""
    shown = {key for one in items for key in ("text", "prompt", "answer") if key in one.payload}
    numbers = {len(one.payload.get("candidates", ())) for one in items} - {0}
    return (
        shown | ({"text1", "text2"} if 2 in numbers else set()) | ({"items"} if max(numbers, default=0) > 2 else set())
    )


def _task(
    number: int, item: Item, verdicts: Sequence[Verdict], numbers: dict[str, int], writing: Writing, shows: set[str]
) -> dict[str, Any]:
    task, payload = writing.tasks[item.task], item.payload
    prelabel, candidates = payload.get("prelabel"), payload.get("candidates", [])
    data: dict[str, Any] = {key: payload[key] for key in ("text", "answer") if key in payload}
    if "prompt" in payload:
        data["prompt"] = parcel.as_text(payload["prompt"])
    if len(candidates) == 2:
        data |= {"text1": candidates[0]["text"], "text2": candidates[1]["text"]}
    elif candidates:
        data["items"] = [{"id": one["id"], "title": one["id"], "body": one["text"]} for one in candidates]
    data |= {key: [] if key == "items" else "" for key in sorted(shows - set(data))}
    again = _data(data, {})
    rest = {key: value for key, value in payload.items() if again.get(key) != value}
    ours = {
        "item": item.id,
        "round": item.round,
        "task": item.task,
        "payload": rest,
        "origin": parcel.origin_told(item),
    }
    ours |= {"overlap": item.overlap, "skill": item.skill}
    made: dict[str, Any] = {"id": number, "data": data, "meta": {"jaxtune": ours}, "predictions": [], "annotations": []}
    if prelabel is not None:
        result = regions_of(task, item, task.kind, prelabel, "prelabel", shows)
        version = str(item.origin.get("prelabel_model", ""))
        made["predictions"] = [{"model_version": version, "score": prelabel.get("score"), "result": result}]
    for verdict in verdicts:
        result = regions_of(task, item, verdict.kind, verdict.answer, verdict.id[:8], shows)
        extra = parcel.told(verdict, writing)
        extra |= {"name": writing.names[verdict.person]} if verdict.person in writing.names else {}
        extra |= {"flags": verdict.answer["flags"]} if verdict.kind == "flag" else {}
        made["annotations"].append(
            {"completed_by": numbers[verdict.person], "result": result, "was_cancelled": verdict.kind == "skip"}
            | {
                "ground_truth": False,
                "created_at": parcel.iso(verdict.at),
                "lead_time": verdict.seconds,
                "jaxtune": extra,
            }
        )
    return made


def _data(data: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The payload that follows from a task's data."""
    payload = {key: data.get(columns.get(key, key)) for key in ("text", "prompt", "answer")}
    two = [data.get(columns.get(key, default)) for key, default in (("a", "text1"), ("b", "text2"))]
    if all(isinstance(one, str) and one for one in two):
        payload["candidates"] = [{"id": parcel.name_of(at), "text": one} for at, one in enumerate(two)]
    elif isinstance(several := data.get(columns.get("candidates", "items")), list):
        objects = all(isinstance(one, dict) for one in several)
        texts = (
            [{"id": str(one.get("id")), "text": one.get("body") or one.get("title")} for one in several]
            if objects
            else several
        )
        payload["candidates"] = texts
    return {key: value for key, value in payload.items() if value not in (None, "", [])}


def _payload(task: Task, data: dict[str, Any], reading: Reading) -> dict[str, Any]:
    payload = _data(data, reading.columns)
    if task.kind != "compare":
        payload.pop("candidates", None)
    return payload


def _verdicts(task: Task, item: Item, annotation: dict[str, Any], at: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The verdicts of an annotation, with the person's name: more than one where it both answers and flags."""
    ours, result = _ours(annotation), objects(annotation, "result")
    person, name = _person(annotation.get("completed_by"), at)
    kinds = ["skip"] if annotation.get("was_cancelled") is True else [task.kind, "flag"]
    found = {kind: answer_of(task, item, kind, result) for kind in kinds if ours.get("kind", kind) == kind}
    if found.get("span", ()) is None and not found.get("flag"):
        found["span"] = {"spans": []}  # who looked and marked nothing
    if ours.get("kind") == "label" and found.get("label", ()) is None:
        found["label"] = {"labels": []}
    if found.get("flag") and isinstance(ours.get("flags"), list):
        found["flag"] = {"flags": ours["flags"]}
    seconds = annotation.get("lead_time")
    given: dict[str, Any] = {"at": parcel.seconds_of(annotation.get("created_at"))}
    given["seconds"] = seconds if isinstance(seconds, int | float) and seconds >= 0 else 0.0
    given |= {key: ours[key] for key in ("shown", "guideline", "at", "seconds", "adjudicates") if key in ours}
    number = annotation.get("unique_id") or annotation.get("id") or at
    for kind, answer in found.items():
        if answer is not None:
            id = ours.get("id") or parcel.short_id("label_studio", item.id, number, person, kind)
            known = {"id": id, "person": ours.get("person") or person, "kind": kind, "answer": answer}
            yield given | known, str(ours.get("name", name))
    if not any(found.values()):
        types = ", ".join(sorted({str(one.get("type")) for one in result})) or "nothing"
        raise UserError(f"its result has {types}; expected an answer to the task {task.name!r} ({task.kind})")


def _prelabel(task: Task, item: Item, row: dict[str, Any], problems: list[str]) -> dict[str, Any] | None:
    """The likeliest of the predictions that answer the task."""
    found: list[tuple[float, dict[str, Any]]] = []
    for at, one in enumerate(objects(row, "predictions"), 1):
        score = one.get("score")
        given = {"score": score} if isinstance(score, int | float) and not isinstance(score, bool) else {}
        answer = answer_of(task, item, task.kind, objects(one, "result"))
        if answer is None:
            problems.append(f"prediction {at} holds no answer to the task {task.name!r} ({task.kind})")
            continue
        found.append((float(given.get("score", 0.0)), answer | given))
    return max(found, key=lambda one: one[0])[1] if found else None


def _person(by: Any, at: int) -> tuple[str, str]:
    """Id and name of who annotated; each annotation that does not say is someone else's."""
    if isinstance(by, dict):
        names = (str(by[key]).strip() for key in ("email", "username", "first_name") if by.get(key))
        return f"label_studio:{by.get('id')}"[:64], next(names, f"Label Studio {by.get('id')}")
    if by is None:
        return f"label_studio:unknown-{at}", f"Label Studio, unknown {at}"
    return f"label_studio:{by}"[:64], f"Label Studio {by}"


def _ours(where: Any) -> dict[str, Any]:
    found = where.get("jaxtune") if isinstance(where, dict) else None
    return found if isinstance(found, dict) else {}
