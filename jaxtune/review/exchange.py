"""Files of items and verdicts, in and out: jaxtune's own JSONL, Label Studio's JSON, Argilla's records.

A broken record costs itself alone: it is listed with its line and the reason, and the rest is imported. What is there
already (items and verdicts are known by their ids) is not imported twice, so the same file can be read again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from jaxtune.review import argilla, json_scan, jsonl, label_studio, parcel, people, store
from jaxtune.review.parcel import Parcel, Reading, Writing
from jaxtune.review.record import MODEL, Item, Verdict
from jaxtune.review.tasks import Task
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

FORMATS: dict[str, Any] = {"jsonl": jsonl, "label_studio": label_studio, "argilla": argilla}
_BATCH = 200  # records of one transaction
_EXCERPT = 300  # characters of a broken record that are listed


class Broken(NamedTuple):
    line: int  # of the file, the first is 1
    reason: str
    record: str  # its beginning


class Imported(NamedTuple):
    """What came of an import; "known": it was there already."""

    items: int
    known_items: int
    verdicts: int
    known_verdicts: int
    people: int
    broken: list[Broken]


def read_file(
    engine: store.Engine, tasks: dict[str, Task], path: Path, format: str = "jsonl", task: str = "", round: int = 1,
    columns: Sequence[tuple[str, str]] = (), private: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Imported:  # fmt: skip
    """Imports a file; the audit log says which.

    Args:
      task: of records that name none; "" = the config's only task.
      round: of records that name none.
      columns: how the file names what a task shows, as ((ours, theirs), …), such as (("text", "review"),).
      private: masks personal data in what is shown, before it is kept.

    Raises:
      UserError: the file cannot be read, or nothing in it is a record of this format; the disk is full.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file to import") from error
    task = task or (next(iter(tasks)) if len(tasks) == 1 else "")
    above: dict[str, Item] = {}  # items of this file
    in_force = {one["task"]: one["text"] for one in _guidelines(engine)}
    known = {parcel.guideline_hash(one["task"], one["text"]): one["number"] for one in _guidelines(engine)}
    reading = Reading(
        tasks,
        task,
        round,
        dict(columns),
        path.name,
        lambda id: above.get(id) or _item(engine, id),
        known,
        private=private,
    )
    counts = dict.fromkeys(Imported._fields[:5], 0)
    broken: list[Broken] = []
    batch: list[tuple[int, Parcel]] = []
    num_records = 0
    for found in json_scan.values(content):
        num_records += 1
        read, problems = _read(FORMATS[format].read, found, reading)
        shown = found.value if isinstance(found.value, str) else json.dumps(found.value, ensure_ascii=False)
        broken += [Broken(found.line, problem, shown[:_EXCERPT]) for problem in problems]
        above |= {one.id: one for one in read.items}
        batch.append((found.line, read))
        if read.guideline:  # verdicts below may name it
            known[parcel.guideline_hash(*read.guideline)] = _keep_guideline(engine, *read.guideline)
        if len(batch) == _BATCH:
            broken += _keep(engine, batch, counts)
            batch = []
    broken += _keep(engine, batch, counts)
    for name, text in in_force.items():  # another database's guidelines are kept for its verdicts; experts go by ours
        store.set_guideline(engine, name, text)
    if not any(counts.values()) and (broken or not num_records):
        why = f"line {broken[0].line}: {broken[0].reason}" if broken else "it is empty"
        raise UserError(f"nothing in {path} could be imported as {format} ({why})")
    with store.writing(engine) as connection:
        told = {"sha256": hashlib.sha256(content).hexdigest(), "format": format, "broken": len(broken)}
        store.note(connection, "import", str(path), None, "", **counts, **told)
    return Imported(**counts, broken=sorted(broken))


def write_broken(path: Path, broken: Sequence[Broken]) -> None:
    """Writes the records that were left out, a line each: line, reason, and how the record begins."""
    lines = (json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in broken)
    write_whole(path, "".join(lines).encode("utf-8", "replace").decode())


def write_file(
    engine: store.Engine, tasks: dict[str, Task], path: Path, format: str = "jsonl", round: int | None = None,
    task: str | None = None, pseudonyms: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Exports items and verdicts; returns how many of each.

    JSONL holds every verdict, those that were corrected or taken back too; the others hold those that count.

    Args:
      round, task: of which; None = all.
      pseudonyms: for people's ids and names, the same for one person in all exports of this database.

    Raises:
      UserError: an item is of a task that the config does not have (Label Studio and Argilla); the disk is full.
    """
    everything = _all_verdicts(engine, round, task)  # first: whatever is answered has been asked
    items = store.read_items(engine, round, task)
    found = {one.id for one in items}
    everything = [one for one in everything if one.item in found]
    superseded = {one.supersedes for one in everything}
    if format != "jsonl":
        everything = [one for one in everything if one.kind != "retract" and one.id not in superseded]
        if unknown := sorted({one.task for one in items} - set(tasks)):
            raise UserError(f"there are items of the task {unknown[0]!r}, which review.tasks does not have; add it")
    alias = _pseudonym(engine) if pseudonyms else (lambda person: person)
    names = {} if pseudonyms else _names(engine, {one.person for one in everything})
    guidelines = [one for one in _guidelines(engine) if task is None or one["task"] == task]
    verdicts = [one._replace(person=alias(one.person)) for one in everything]
    writing = Writing(tasks, {one["number"]: one for one in guidelines}, names, pseudonyms)
    for where, text in FORMATS[format].write(path, items, verdicts, writing):
        write_whole(where, text)
    with store.writing(engine) as connection:
        told = {"format": format, "items": len(items), "verdicts": len(verdicts), "pseudonyms": pseudonyms}
        store.note(connection, "export", str(path), None, "", round=round, task=task, **told)
    return len(items), len(verdicts)


def clean(value: Any) -> None:
    """Refuses what one of the two databases could not hold.

    Raises:
      UserError: a character 0, half of a surrogate pair, or a number that is none.
    """
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= one <= "\udfff" for one in value):
            raise UserError(f"{value!r:.60} has a character that no text can have (0, or half of a pair)")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"the number {value} came; expected a finite one")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f"the number {value!r:.30} came; expected one of at most 64 bits")
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            clean(one)


def _read(
    read: Callable[[Any, Reading], Parcel], found: json_scan.Found, reading: Reading
) -> tuple[Parcel, Sequence[str]]:
    """What is in a record, and what is wrong with it."""
    if found.problem:
        return Parcel(), (found.problem,)
    try:
        clean(found.value)
        if not isinstance(found.value, dict):
            raise UserError(f"{type(found.value).__name__} came; expected an object")
        parcel = read(found.value, reading._replace(line=found.line))
        return parcel, parcel.problems
    except UserError as error:
        return Parcel(), (str(error),)


def _keep(engine: store.Engine, batch: Sequence[tuple[int, Parcel]], counts: dict[str, int]) -> list[Broken]:
    """Inserts some records in one transaction, and counts them when it is through; returns verdicts that are refused."""
    more, broken = dict.fromkeys(counts, 0), []
    with store.writing(engine) as connection:
        for line, parcel in batch:
            rows = [one._asdict() | {"at": time.time()} for one in parcel.items]
            num_new = store.insert_new(connection, store.items, rows)
            more["items"] += num_new
            more["known_items"] += len(rows) - num_new
            named = {one.person: f"imported {one.person}" for one in parcel.verdicts} | dict(parcel.people)
            more["people"] += sum(_keep_person(connection, id, name) for id, name in named.items())
            for verdict in parcel.verdicts:
                problem, is_known = _misfit(connection, verdict)
                if problem:
                    broken.append(Broken(line, problem, f"verdict {verdict.id}"))
                else:
                    more["known_verdicts" if is_known else "verdicts"] += 1
                    store.insert_verdict(connection, verdict)
    for key, number in more.items():
        counts[key] += number
    return broken


def _misfit(connection: sa.Connection, verdict: Verdict) -> tuple[str, bool]:
    """Why a verdict cannot be kept beside those that are there, "" if it can; and whether it is one of them."""
    table = store.verdicts
    there = connection.execute(sa.select(table).where(table.c.id == verdict.id)).mappings().first()
    if there is not None:
        same = (there["item"], there["kind"], there["answer"]) == (verdict.item, verdict.kind, verdict.answer)
        return ("" if same else f"the verdict {verdict.id!r} is there with another answer; it cannot be changed"), True
    if not verdict.supersedes:
        return ("" if verdict.kind != "retract" else "a retraction came that names no verdict"), False
    earlier = connection.execute(sa.select(table).where(table.c.id == verdict.supersedes)).mappings().first()
    if earlier is None or (earlier["item"], earlier["person"]) != (verdict.item, verdict.person):
        return f"it corrects {verdict.supersedes!r}, which is no earlier verdict of this person on this item", False
    if connection.scalar(sa.select(table.c.id).where(table.c.supersedes == verdict.supersedes).limit(1)) is not None:
        return f"it corrects {verdict.supersedes!r}, which was corrected or taken back already", False
    return "", False


def _keep_person(connection: sa.Connection, id: str, name: str) -> int:
    """An account for someone who is in a file alone: closed, and an expert's, whatever the file says; 1 if it is new."""
    table = store.people
    if connection.scalar(sa.select(table.c.id).where(table.c.id == id)) is not None:
        return 0
    name = " ".join("".join(one if one.isprintable() else " " for one in name).split())[:150] or f"imported {id}"
    if people.is_taken(connection, name):
        name = f"{name} ({id[:40]})"
    row = {"id": id, "name": name, "role": "expert", "skills": [], "active": False, "at": time.time()}
    connection.execute(table.insert().values(row))
    store.note(connection, "person", id, None, "", name=name, imported=True)
    return 1


def _keep_guideline(engine: store.Engine, task: str, text: str) -> int:
    """The number of a guideline of a file: that of its text where it is there, else of a new version."""
    there = (one["number"] for one in _guidelines(engine) if (one["task"], one["text"]) == (task, text))
    return next(there, None) or store.set_guideline(engine, task, text)


def _guidelines(engine: store.Engine) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        query = sa.select(store.guidelines).order_by(store.guidelines.c.number)
        return [dict(row) for row in connection.execute(query).mappings()]


def _item(engine: store.Engine, id: str) -> Item | None:
    query = sa.select(*(store.items.c[name] for name in Item._fields)).where(store.items.c.id == id)
    with engine.connect() as connection:
        row = connection.execute(query).mappings().first()
    return None if row is None else Item(**row)


def _all_verdicts(engine: store.Engine, round: int | None, task: str | None) -> list[Verdict]:
    """People's and models', with those that were corrected or taken back, as they were given."""
    query = sa.select(*(store.verdicts.c[name] for name in Verdict._fields)).order_by(store.verdicts.c.number)
    query = query.join(store.items, store.items.c.id == store.verdicts.c.item)
    query = query if round is None else query.where(store.items.c.round == round)
    query = query if task is None else query.where(store.items.c.task == task)
    with engine.connect() as connection:
        return [Verdict(**row) for row in connection.execute(query).mappings()]


def _names(engine: store.Engine, ids: set[str]) -> dict[str, str]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(store.people.c.id, store.people.c.name)).all()
    return {row.id: row.name for row in rows if row.id in ids}


def _pseudonym(engine: store.Engine) -> Callable[[str], str]:
    """Ids for people's ids: HMAC-SHA256 with a key that never leaves the database. Models keep their names."""
    with store.writing(engine) as connection:
        row = {"key": "pseudonyms", "value": secrets.token_hex(32)}
        store.insert_new(connection, store.about, [row])
        key = connection.scalar(sa.select(store.about.c.value).where(store.about.c.key == "pseudonyms"))
    assert key is not None

    def alias(person: str) -> str:
        if person.startswith(MODEL):
            return person
        return "person-" + hmac.new(bytes.fromhex(key), person.encode(), hashlib.sha256).hexdigest()[:16]

    return alias
