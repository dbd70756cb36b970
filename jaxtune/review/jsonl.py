"""jaxtune's own file: a line for each guideline, person, item and verdict, whole; and plain rows, which become items.

{"record": "export", "version": 1, …}
{"record": "guideline", "task": "tone", "version": 1, "text": "…"}
{"record": "person", "id": "5f…", "name": "Anna"}
{"record": "item", "id": "0a…", "round": 1, "task": "tone", "payload": {"text": "…"}, "origin": {…}, "gold": null, "overlap": 2, "skill": ""}
{"record": "verdict", "id": "c4…", "item": "0a…", "person": "5f…", "kind": "label", "answer": {"labels": ["good"]}, …}
{"text": "a row without \\"record\\": an item of review.task", "gold": {"labels": ["good"]}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtune.review import parcel
from jaxtune.review.parcel import Parcel, Reading, Writing
from jaxtune.review.record import Item, Verdict, stable
from jaxtune.types import UserError

VERSION = 1


def write(
    path: Path, items: Sequence[Item], verdicts: Sequence[Verdict], writing: Writing
) -> Iterator[tuple[Path, str]]:
    """Yields the one file."""
    head = {"record": "export", "version": VERSION, "items": len(items), "verdicts": len(verdicts)}
    lines: list[dict[str, Any]] = [head | {"pseudonyms": writing.pseudonyms}]
    for one in writing.guidelines.values():
        lines.append({"record": "guideline", "task": one["task"], "version": one["version"], "text": one["text"]})
    lines += [{"record": "person", "id": id, "name": name} for id, name in sorted(writing.names.items())]
    lines += [{"record": "item"} | one._asdict() for one in items]
    for verdict in verdicts:
        guideline = writing.guideline(verdict.guideline)
        lines.append({"record": "verdict"} | verdict._asdict() | {"guideline": guideline})
    yield path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)


def read(row: dict[str, Any], reading: Reading) -> Parcel:
    """What a line brings.

    Raises:
      UserError: it is of no kind that is known here, or not in order.
    """
    kind = row.get("record")
    if kind is None:
        return Parcel(items=(_plain(row, reading),))
    if kind == "export":
        if row.get("version") != VERSION:
            raise UserError(f"the file is of version {row.get('version')!r:.20}; this jaxtune knows {VERSION}")
        return Parcel()
    if kind == "guideline":
        task, text = reading.named(_text(row, "task")), row.get("text")
        if not isinstance(text, str):  # an empty file is a version, too
            raise UserError(f"text={text!r:.60} came; expected a text")
        return Parcel(guideline=(task.name, text))
    if kind == "person":
        return Parcel(people=((parcel.short(row, "id"), _text(row, "name")),))
    if kind == "item":
        task, origin = reading.named(_text(row, "task")), row.get("origin")
        if not isinstance(row.get("payload"), dict) or not isinstance(origin, dict):
            raise UserError("an item without payload or origin came; expected objects")
        return Parcel(items=(parcel.item(reading, task, row["payload"], origin, row, _text(row, "id")),))
    if kind == "verdict":
        item = reading.item(_text(row, "item"))
        if item is None:
            raise UserError(
                f"the verdict is about the item {row['item']!r:.80}, which is neither here nor above in the file"
            )
        given = {name: row.get(name) for name in Verdict._fields}
        return Parcel(verdicts=(parcel.verdict(reading, item, given),))
    raise UserError(f"record={kind!r:.40} came; expected export, guideline, person, item or verdict")


def _plain(row: dict[str, Any], reading: Reading) -> Item:
    """The item of a row of data."""
    task = reading.named(row.get("task") if isinstance(row.get("task"), str) and row["task"] in reading.tasks else None)
    names = ("text", "prompt", "answer", "candidates", "prelabel")
    payload = {name: row.get(reading.columns.get(name, name)) for name in names}
    messages = row.get("messages")
    if (
        payload["prompt"] is None
        and isinstance(messages, list)
        and len(messages) > 1
        and isinstance(messages[-1], dict)
    ):
        payload["prompt"], payload["answer"] = messages[:-1], messages[-1].get("content")
    if task.kind == "compare" and payload["candidates"] is None:
        two = [row.get(reading.columns.get(name, name)) for name in ("a", "b")]
        payload["candidates"] = two if None not in two else None
    origin = {"source": reading.source, "row": reading.line, "row_sha256": parcel.sha256(stable(row))}
    more = {name: row.get(name) for name in ("gold", "overlap", "skill", "round")}
    return parcel.item(reading, task, payload, origin, more)


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise UserError(f"{key}={row.get(key)!r:.60} came; expected a text")
    return str(row[key])
