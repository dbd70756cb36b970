"""The queue: who is asked what next, whose answer is taken, and what may be taken back.

An item has as many places as its `overlap`. A place is taken by a lease, which ends by itself, and filled by an answer: of a
task's kind, not retracted, not corrected, not a senior's settlement. Each step is one transaction, and an item has one at a
time, so that no place is given twice, whoever asks at once and from whichever process.

A skip fills no place: the item waits for others. A flag is beside an answer: the lease goes on. Gold items have no places:
each person may be asked each of them, once.
"""

from __future__ import annotations

import math
import statistics
import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa

from jaxtune.review import places, settling, store
from jaxtune.review.places import ANSWERS
from jaxtune.review.record import TASK_KINDS, Item, Person, Verdict
from jaxtune.review.store import Engine, items, leases, verdicts
from jaxtune.review.tasks import Task, checked
from jaxtune.types import UserError

LEASE_SECONDS = 600.0
SENIORS = ("senior", "owner")
_AT_ONCE = 64  # items looked at for a free one; more than are taken between looking and taking

Tasks = Mapping[str, Task]


class Assignment(NamedTuple):
    """An item before a person. Its `item` is what may leave the server: no gold, no origin, no suggestion that is hidden.

    shown: {"order": candidates' ids as they are to stand, "prelabel": whether the suggestion is shown}, drawn by a hash of item
    and person: the same if asked again. expires: seconds since 1970. guideline: number of the version in force (0: none).
    adjudicates: a senior is to settle it; `earlier` is what the others answered.
    """

    item: Item
    shown: dict[str, Any]
    expires: float
    guideline: int
    adjudicates: bool
    earlier: list[Verdict]


class Progress(NamedTuple):
    """Answers of a person, items that they may still be asked, and the gold items among the answers that were right.

    `left` is as if nobody else answered; seconds_each is the median.
    """

    done: int
    left: int
    seconds_each: float
    seconds_left: float
    gold_right: int
    gold_of: int


class Refused(UserError):
    """An answer that is not taken. reason: "lost" (the lease ended, and others have the places), "answered", or "unknown"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def assign(
    engine: Engine, person: Person, tasks: Tasks, round: int, task: str = "", lease_seconds: float = LEASE_SECONDS
) -> Assignment | None:
    """Returns the item that the person has before them, else the next one, theirs until the lease ends; None: nothing is left.

    Never an item that they answered or skipped. What others disagree about goes before new items, for a senior.

    Args:
      task: only of this task; "" = of all, in the order of `tasks`.
    """
    wanted = {name: one for name, one in tasks.items() if task in ("", name)}
    if not person.active or not wanted:
        return None
    while True:
        with engine.connect() as connection:  # looked for while others write: it is the longest part
            seen = _look(connection, person, wanted, round)
        if seen is None:
            return None
        with store.writing(engine) as connection:
            places.wait_for(connection, "person", person.id)
            found = _take(connection, person, wanted, round, *seen)
            if found is not None:
                expires = time.time() + lease_seconds
                return _assignment(connection, found[0], places.lease(connection, person, tasks, *found, expires))


def _look(
    connection: sa.Connection, person: Person, tasks: Tasks, round: int
) -> tuple[str, list[str], list[str]] | None:
    """The task that is next, and ids of its items that are free: to be settled, and to be answered. None: nothing is left."""
    held = places.held(connection, person, tasks, round)
    if held is not None:
        return "", [], []
    for task in tasks.values():
        disputed = [one.id for one in _disputed(connection, person, task, round)]
        query = places.ordered(places.free(person, task, round), task).with_only_columns(items.c.id)
        free = list(connection.scalars(query.limit(_AT_ONCE)))
        if disputed or free:
            return task.name, disputed[:_AT_ONCE], free
    return None


def _take(
    connection: sa.Connection, person: Person, tasks: Tasks, round: int, name: str, disputed: list[str], free: list[str]
) -> tuple[Item, bool] | None:
    """What the person has already, else of what was free when looked at the first that still is, or a gold item in its place.

    Returns:
      the item, and whether it is to be settled; None: all of it was taken meanwhile.
    """
    held = places.held(connection, person, tasks, round)
    if held is not None:
        places.wait_for(connection, "item", held["item"])
        if places.held(connection, person, tasks, round) != held:
            return None  # it ended while this waited
        return places.read_items(connection, sa.select(items).where(items.c.id == held["item"]))[0], held["adjudicates"]
    for one in disputed:
        if places.is_mine(connection, "item", one):
            for item in places.disputed(connection, person, tasks[name], round, [one]):
                return item, True
    for one in free:
        if places.is_mine(connection, "item", one):
            query = places.free(person, tasks[name], round).where(items.c.id == one)
            for item in places.read_items(connection, query):
                return _gold(connection, person, tasks[name], round) or item, False
    return None


def _gold(connection: sa.Connection, person: Person, task: Task, round: int) -> Item | None:
    """A gold item, if one is due and there is one that the person has not answered."""
    answered = places.num_given(connection, person, task, round) if task.gold_every else 0
    if not settling.gold_is_due(task, round, person.id, answered):
        return None
    left = places.read_items(connection, places.gold_left(person, task, round))
    return min(left, key=lambda one: settling.drawn("which gold", one.id, person.id), default=None)


def _disputed(connection: sa.Connection, person: Person, task: Task, round: int) -> list[Item]:
    settles = task.adjudicate and person.role in SENIORS
    return places.disputed(connection, person, task, round) if settles else []


def _assignment(connection: sa.Connection, item: Item, lease: Mapping[Any, Any]) -> Assignment:
    earlier: list[Verdict] = []
    if lease["adjudicates"]:
        filled = [verdicts.c.item == item.id, verdicts.c.kind.in_(TASK_KINDS), ~verdicts.c.adjudicates]
        query = places.counting(*filled).order_by(verdicts.c.number)
        earlier = [places.verdict_of(row) for row in connection.execute(query).mappings()]
    outside, shown = _outside(item, lease["shown"]), dict(lease["shown"])
    return Assignment(outside, shown, lease["expires"], lease["guideline"], lease["adjudicates"], earlier)


def _outside(item: Item, shown: dict[str, Any]) -> Item:
    """What of an item may leave the server."""
    payload = {key: value for key, value in item.payload.items() if key != "prelabel" or shown.get("prelabel")}
    return item._replace(payload=payload, origin={}, gold=None)


def renew(engine: Engine, person: Person, item_id: str, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Keeps an item for longer; False: it is no longer theirs. A lease that ended comes back where there is a place."""
    item = _item(engine, item_id)
    if item is None:
        return False
    with store.writing(engine) as connection:
        places.wait_for(connection, "item", item.id)
        lease = places.lease_of(connection, person, item)
        if lease is None or places.own(connection, person, item, ANSWERS) is not None:
            return False
        if lease["expires"] <= time.time() and not places.has_place(connection, person, item, lease["adjudicates"]):
            return False
        places.set_lease(connection, person, item, expires=time.time() + lease_seconds)
        return True


def _item(engine: Engine, item_id: str) -> Item | None:
    with engine.connect() as connection:
        return places.read_item(connection, item_id)


def release(engine: Engine, person: Person, item_id: str) -> None:
    """Gives an item back: the page was left. An answer that comes all the same is taken as one whose lease ended."""
    with store.writing(engine) as connection:
        mine = (leases.c.item == item_id) & (leases.c.person == person.id) & (leases.c.expires > time.time())
        connection.execute(leases.update().where(mine).values(expires=time.time()))


def submit(engine: Engine, person: Person, tasks: Tasks, verdict: Verdict) -> bool:
    """Takes an answer; when this returns it is on the disk. False: the same verdict was there already.

    Person, time, guideline and what was shown are the server's own, whatever came. An answer after the lease's end is taken as
    long as the item has a place. With `supersedes` it corrects the person's own answer to the same item.

    Raises:
      Refused: it is not taken, for its `reason`.
      UserError: it is no answer to this task, or the person may not be asked.
    """
    item = _item(engine, verdict.item)
    if item is None or item.task not in tasks:
        raise Refused("unknown", f"there is no item {verdict.item!r:.70} among the tasks of this round")
    task = tasks[item.task]
    if verdict.kind == "retract":
        raise UserError("a verdict of kind 'retract' came; an answer is taken back by undo")
    answer = checked(task, item, verdict.kind, verdict.answer)
    if not person.active or not places.may(person, task, item):
        raise UserError(f"{person.name} is not in the group {item.skill or task.skill!r}, which this item is for")
    with store.writing(engine) as connection:
        places.wait_for(connection, "item", item.id)
        there = connection.execute(sa.select(verdicts).where(verdicts.c.id == verdict.id)).mappings().first()
        if there is not None:
            if (there["person"], there["item"]) == (person.id, item.id):
                return False
            raise Refused("answered", f"the id {verdict.id!r:.70} is another verdict's; send the answer with a new one")
        lease = places.lease_of(connection, person, item)
        if lease is None:
            raise Refused("unknown", f"the item {item.id} was never given to {person.name}; ask for the next one")
        _check_place(connection, person, item, verdict, lease)
        now = time.time()
        taken = min(verdict.seconds, now - lease["at"]) if math.isfinite(verdict.seconds) else now - lease["at"]
        kept = {"shown": lease["shown"], "guideline": lease["guideline"], "adjudicates": lease["adjudicates"]}
        kept |= {"person": person.id, "answer": answer, "seconds": max(0.0, taken), "at": now}
        store.insert_verdict(connection, verdict._replace(**kept))
        if verdict.kind in ANSWERS:
            places.set_lease(connection, person, item, expires=now)
        return True


def _check_place(connection: sa.Connection, person: Person, item: Item, verdict: Verdict, lease: Any) -> None:
    """Refuses an answer for which there is no place."""
    before = places.own(connection, person, item, ANSWERS)
    if verdict.supersedes:
        corrected = places.own(connection, person, item, (*ANSWERS, "flag"), verdict.supersedes)
        if corrected is None or (verdict.kind == "flag") != (corrected["kind"] == "flag"):
            raise Refused("unknown", f"{verdict.supersedes!r:.70} is no answer of yours to this item that still counts")
        if before is None or verdict.kind == "flag" or before["kind"] != "skip":
            return
    elif verdict.kind == "flag":
        return
    elif before is not None:
        raise Refused("answered", "you have answered this item; undo the answer, or correct it")
    if lease["adjudicates"] and person.role not in SENIORS:
        raise Refused("unknown", "a senior settles this item, and you are none any more; ask for the next one")
    if lease["expires"] <= time.time() and not places.has_place(connection, person, item, lease["adjudicates"]):
        raise Refused("lost", "this item was kept for you until its time was over, and others have answered it since")


def check_kinds(engine: Engine, tasks: Tasks, round: int) -> None:
    """Refuses tasks whose kind was changed after the round's first answers: these could be compared with no later ones.

    Raises:
      UserError: there are answers of another kind.
    """
    query = sa.select(items.c.task, verdicts.c.kind).join(items, items.c.id == verdicts.c.item).distinct()
    query = query.where(items.c.round == round, items.c.task.in_(list(tasks)), verdicts.c.kind.in_(TASK_KINDS))
    with engine.connect() as connection:
        for name, kind in connection.execute(query).all():
            if kind != tasks[name].kind:
                told = f"task {name!r} is of kind {tasks[name].kind!r}, but round {round} has answers of kind {kind!r} to it"
                raise UserError(f"{told}; give the new task a name of its own")


def undo(
    engine: Engine, person: Person, round: int, tasks: Tasks | None = None, lease_seconds: float = LEASE_SECONDS
) -> Verdict | None:
    """Takes the person's last verdict back by a new row, which is returned; the item is theirs again. None: there is none.

    Args:
      tasks: of which; what is asked no longer could not be answered again. None = all.
    """
    own = [verdicts.c.person == person.id, items.c.round == round]
    own += [] if tasks is None else [items.c.task.in_(list(tasks))]
    with store.writing(engine) as connection:
        places.wait_for(connection, "person", person.id)
        query = places.counting(*own).order_by(verdicts.c.number.desc())
        last = connection.execute(query.limit(1)).mappings().first()
        if last is None:
            return None
        places.wait_for(connection, "item", last["item"])
        item = places.read_items(connection, sa.select(items).where(items.c.id == last["item"]))[0]
        now = time.time()
        retracted = Verdict(
            uuid.uuid4().hex, item.id, person.id, "retract", {}, {}, last["guideline"], 0.0, now, last["id"]
        )
        store.insert_verdict(connection, retracted._replace(adjudicates=last["adjudicates"]))
        if places.own(connection, person, item, ANSWERS) is None:
            places.set_lease(connection, person, item, at=now, expires=now + lease_seconds)
        return retracted


def history(
    engine: Engine, person: Person, round: int, limit: int = 50, verdict_id: str = ""
) -> list[tuple[Item, Verdict]]:
    """The person's verdicts that count, the last first, with what was asked; the one of this id alone, if one is given."""
    query = places.counting(verdicts.c.person == person.id, items.c.round == round).order_by(verdicts.c.number.desc())
    query = query.where(verdicts.c.id == verdict_id) if verdict_id else query
    with engine.connect() as connection:
        found = [places.verdict_of(row) for row in connection.execute(query.limit(limit)).mappings()]
        query = sa.select(items).where(items.c.id.in_({one.item for one in found}))
        asked = {one.id: one for one in places.read_items(connection, query)}
    return [(_outside(asked[one.item], one.shown), one) for one in found]


def progress(engine: Engine, person: Person, tasks: Tasks, round: int) -> Progress:
    """How far a person is, and how many gold items they had right. The gold figures are for the owner: they would tell which was one."""
    own = [verdicts.c.person == person.id, verdicts.c.kind.in_(TASK_KINDS), items.c.task.in_(list(tasks))]
    query = places.counting(*own, items.c.round == round)
    left, gold_right, gold_of = 0, 0, 0
    with engine.connect() as connection:
        mine = [places.verdict_of(row) for row in connection.execute(query).mappings()]
        for task in tasks.values() if person.active else ():
            free = places.free(person, task, round).with_only_columns(items.c.id).subquery()
            left += int(connection.scalar(sa.select(sa.func.count()).select_from(free)) or 0)
            left += len(_disputed(connection, person, task, round))
        query = sa.select(items).where(items.c.round == round, items.c.gold.is_not(None))
        golden = {one.id: one for one in places.read_items(connection, query)}
    for one in mine:
        if one.item in golden and golden[one.item].task in tasks:
            gold_of += 1
            gold_right += settling.right(tasks[golden[one.item].task], golden[one.item], one.answer)
    each = statistics.median(one.seconds for one in mine) if mine else 0.0
    return Progress(len(mine), left, each, left * each, gold_right, gold_of)


def open_items(engine: Engine, tasks: Tasks, round: int) -> dict[str, tuple[int, int]]:
    """By task: answers that are there, and answers wanted. Gold items are not counted."""
    query = sa.select(items.c.task, items.c.overlap, places.NUM_ANSWERS.label("there"))
    query = query.where(items.c.round == round, items.c.gold.is_(None), items.c.task.in_(list(tasks)))
    found = dict.fromkeys(tasks, (0, 0))
    with engine.connect() as connection:
        for name, wanted, there in connection.execute(query):
            found[name] = found[name][0] + min(there, wanted), found[name][1] + wanted
    return found


def disagreements(engine: Engine, tasks: Tasks, round: int) -> list[tuple[Item, list[Verdict]]]:
    """Items whose places are filled by answers that differ (see `settling.differ`), and that no senior has settled; with the answers."""
    with engine.connect() as connection:
        return [pair for task in tasks.values() for pair in places.differing(connection, task, round)]
