"""What the queue asks of the database: which verdicts count, which items have a place, who has what before them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from jaxtune.review import settling
from jaxtune.review.record import MODEL, TASK_KINDS, Item, Person, Verdict
from jaxtune.review.store import guidelines, items, leases, priorities, verdicts
from jaxtune.review.tasks import Task

ANSWERS = (*TASK_KINDS, "skip")  # after one of them the person is done with the item
_Found = Mapping[Any, Any]
_given, _later = verdicts.alias("given"), verdicts.alias("later")  # made once: making them is slow
_taken = leases.alias("taken")


def wait_for(connection: sa.Connection, what: str, key: str) -> None:
    """Waits until no other transaction works on this "person" or "item", and keeps others waiting until it ends.

    Who holds an item waits for nothing more, so that no two can wait for each other. On SQLite there is one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:what, hashtext(:key))"), _lock(what, key))


def is_mine(connection: sa.Connection, what: str, key: str) -> bool:
    """`wait_for` without waiting: False where another transaction works on it."""
    if connection.dialect.name != "postgresql":
        return True
    text = sa.text("SELECT pg_try_advisory_xact_lock(:what, hashtext(:key))")
    return bool(connection.scalar(text, _lock(what, key)))


def _lock(what: str, key: str) -> dict[str, Any]:
    return {"what": {"person": 7423, "item": 7424}[what], "key": key}


def read_items(connection: sa.Connection, query: sa.Select[Any]) -> list[Item]:
    """The items that a query of the table `items` finds."""
    found = query.with_only_columns(*(items.c[name] for name in Item._fields))
    return [Item(**row) for row in connection.execute(found).mappings()]


def read_item(connection: sa.Connection, item_id: str) -> Item | None:
    """The item of an id."""
    return next(iter(read_items(connection, sa.select(items).where(items.c.id == item_id))), None)


def verdict_of(row: _Found) -> Verdict:
    """The verdict in a row of the table."""
    return Verdict(**{name: row[name] for name in Verdict._fields})


def _counts(table: Any) -> Any:
    """Whether a verdict counts: a person gave it, it is no retraction, and nothing corrects or retracts it."""
    by_person = ~table.c.person.startswith(MODEL) & (table.c.kind != "retract")
    return by_person & ~sa.exists().where(_later.c.supersedes == table.c.id).correlate(table)


def counting(*conditions: Any) -> sa.Select[Any]:
    """The verdicts that count, beside their items."""
    return sa.select(verdicts).join(items, items.c.id == verdicts.c.item).where(_counts(verdicts), *conditions)


_OF_ITEM = (_given.c.item == items.c.id) & _counts(_given)
_IS_ANSWER = _given.c.kind.in_(TASK_KINDS)
_FILLS = _OF_ITEM & _IS_ANSWER & ~_given.c.adjudicates
_TEXT = sa.cast(_given.c.answer, sa.Text)
_PEOPLE = sa.func.count(_given.c.person.distinct())  # somebody may be in a file twice, and fills one place
NUM_ANSWERS = sa.select(_PEOPLE).select_from(_given).where(_FILLS).correlate(items).scalar_subquery()
_SETTLED = sa.exists().where(_OF_ITEM & _IS_ANSWER & _given.c.adjudicates).correlate(items)
_NOT_ALIKE = (  # answers of one text are alike; the others are compared when they are read
    sa.select(sa.func.min(_TEXT) != sa.func.max(_TEXT)).where(_FILLS).correlate(items).scalar_subquery()
)


def _num_leases(person: Person, adjudicates: bool) -> Any:
    """How many others have an item before them."""
    held = [_taken.c.item == items.c.id, _taken.c.person != person.id, _taken.c.expires > time.time()]
    held.append(_taken.c.adjudicates == adjudicates)
    return sa.select(sa.func.count()).select_from(_taken).where(*held).correlate(items).scalar_subquery()


def _mine(person: Person) -> Any:
    """Whether the person has answered or skipped an item."""
    return sa.exists().where(_OF_ITEM & (_given.c.person == person.id) & _given.c.kind.in_(ANSWERS)).correlate(items)


def _skilled(person: Person, task: Task) -> Any:
    """Whether the person may be asked an item: its own group holds, else its task's."""
    groups = [one for one in person.skills if one]
    return items.c.skill.in_([*groups, ""] if task.skill in ("", *groups) else groups)


def may(person: Person, task: Task, item: Item) -> bool:
    """Whether the person may be asked the item."""
    return (item.skill or task.skill) in ("", *person.skills)


def free(person: Person, task: Task, round: int) -> sa.Select[Any]:
    """The items of a task with a place for this person, who has not answered them. Gold ones are not among them."""
    place = NUM_ANSWERS + _num_leases(person, False) < items.c.overlap
    of_task = [items.c.round == round, items.c.task == task.name, items.c.gold.is_(None), _skilled(person, task)]
    return sa.select(items).where(*of_task, ~_mine(person), place)


def ordered(query: sa.Select[Any], task: Task) -> sa.Select[Any]:
    """The query in the order of the task's queue."""
    if task.order == "random":
        return query.order_by(items.c.id)  # a hash
    if task.order == "priority":
        last = sa.select(priorities.c.score).where(priorities.c.item == items.c.id).correlate(items)
        score = last.order_by(priorities.c.number.desc()).limit(1).scalar_subquery()
        return query.order_by(sa.func.coalesce(score, -1e308).desc(), items.c.number)
    return query.order_by(items.c.number)


def gold_left(person: Person, task: Task, round: int) -> sa.Select[Any]:
    """The gold items of a task that the person has not answered."""
    of_task = [items.c.round == round, items.c.task == task.name, items.c.gold.is_not(None), _skilled(person, task)]
    return sa.select(items).where(*of_task, ~_mine(person))


def num_given(connection: sa.Connection, person: Person, task: Task, round: int) -> int:
    """How many items of the task the person is done with."""
    own = [verdicts.c.person == person.id, verdicts.c.kind.in_(ANSWERS), ~verdicts.c.adjudicates]
    query = counting(*own, items.c.round == round, items.c.task == task.name)
    return int(connection.scalar(sa.select(sa.func.count()).select_from(query.subquery())) or 0)


def differing(connection: sa.Connection, task: Task, round: int, *conditions: Any) -> list[tuple[Item, list[Verdict]]]:
    """Items whose places are filled by answers that differ and that nobody has settled, with the answers."""
    of_task = [items.c.round == round, items.c.task == task.name, items.c.gold.is_(None), items.c.overlap > 1]
    query = sa.select(items).where(*of_task, items.c.overlap <= NUM_ANSWERS, ~_SETTLED, _NOT_ALIKE, *conditions)
    asked = {one.id: one for one in read_items(connection, query.order_by(items.c.number))}
    answers: dict[str, list[Verdict]] = {one: [] for one in asked}
    ids = list(asked)
    for at in range(0, len(ids), 500):
        query = counting(
            verdicts.c.item.in_(ids[at : at + 500]), verdicts.c.kind.in_(TASK_KINDS), ~verdicts.c.adjudicates
        )
        for row in connection.execute(query.order_by(verdicts.c.number)).mappings():
            answers[row["item"]].append(verdict_of(row))
    return [(asked[one], given) for one, given in answers.items() if settling.disagree(task, given)]


def disputed(
    connection: sa.Connection, person: Person, task: Task, round: int, ids: Sequence[str] | None = None
) -> list[Item]:
    """What this senior may settle: items that they have not answered, and that no other senior has before them."""
    conditions = [~_mine(person), _num_leases(person, True) == 0, _skilled(person, task)]
    if ids is not None:
        conditions.append(items.c.id.in_(ids))
    return [item for item, _ in differing(connection, task, round, *conditions)]


def has_place(connection: sa.Connection, person: Person, item: Item, adjudicates: bool) -> bool:
    """Whether an item has a place for this person, whose own lease is not counted."""
    if adjudicates:
        room = ~_SETTLED & (_num_leases(person, True) == 0)
    elif item.gold is not None:
        return True
    else:
        room = NUM_ANSWERS + _num_leases(person, False) < items.c.overlap
    return bool(connection.scalar(sa.select(sa.func.count()).select_from(items).where(items.c.id == item.id, room)))


def own(
    connection: sa.Connection, person: Person, item: Item, kinds: Sequence[str], verdict_id: str = ""
) -> _Found | None:
    """The person's verdict on an item that counts, of these kinds, and of this id if one is given."""
    query = counting(verdicts.c.person == person.id, verdicts.c.item == item.id, verdicts.c.kind.in_(kinds))
    query = query.where(verdicts.c.id == verdict_id) if verdict_id else query
    return connection.execute(query.order_by(verdicts.c.number.desc()).limit(1)).mappings().first()


def lease_of(connection: sa.Connection, person: Person, item: Item) -> _Found | None:
    """The lease of a person on an item, ended or not."""
    query = sa.select(leases).where(leases.c.item == item.id, leases.c.person == person.id)
    return connection.execute(query).mappings().first()


def held(connection: sa.Connection, person: Person, tasks: Mapping[str, Task], round: int) -> _Found | None:
    """The lease of the item that the person has before them: of several the last given."""
    for_them = sa.or_(*((items.c.task == task.name) & _skilled(person, task) for task in tasks.values()))
    query = sa.select(leases).join(items, items.c.id == leases.c.item).where(items.c.round == round, for_them)
    query = query.where(leases.c.person == person.id, leases.c.expires > time.time())
    if person.role == "expert":  # who was a senior sees no more of what the others said
        query = query.where(~leases.c.adjudicates)
    return connection.execute(query.order_by(leases.c.at.desc()).limit(1)).mappings().first()


def lease(
    connection: sa.Connection, person: Person, tasks: Mapping[str, Task], item: Item, adjudicates: bool, expires: float
) -> _Found:
    """Gives an item to a person under the guideline in force, or keeps it theirs as it stood, and returns the lease."""
    before, task, now = lease_of(connection, person, item), tasks[item.task], time.time()
    if before is not None and before["expires"] > now:
        set_lease(connection, person, item, expires=expires)
        return {**before, "expires": expires}
    query = sa.select(guidelines.c.number).where(guidelines.c.task == task.name).order_by(guidelines.c.version.desc())
    new = {"at": now, "expires": expires, "guideline": connection.scalar(query.limit(1)) or 0}
    new |= {"shown": settling.shown(task, item, person.id), "adjudicates": adjudicates}
    if before is None:
        connection.execute(leases.insert().values(item=item.id, person=person.id, **new))
    else:
        set_lease(connection, person, item, **new)
    return new


def set_lease(connection: sa.Connection, person: Person, item: Item, **values: Any) -> None:
    """Changes a lease that is there."""
    mine = (leases.c.item == item.id) & (leases.c.person == person.id)
    connection.execute(leases.update().where(mine).values(**values))
