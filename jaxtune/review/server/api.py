"""What the work page's script asks: the next item, an answer saved, the last one taken back, an item kept or given back."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from jaxtune.review import places, queue, store
from jaxtune.review.record import Item, Person, Verdict
from jaxtune.review.server import guidelines, views
from jaxtune.review.server.access import Expert, Own, Server
from jaxtune.review.server.render import markdown

routes = APIRouter(prefix="/api")
_log = logging.getLogger(__name__)
_Name = Annotated[str, Field(max_length=100)]
_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
_Uuid = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ForTask(_Body):
    task: _Name


class ForItem(_Body):
    item: _Id


class Given(_Body):
    """An answer, under an id that the page chose."""

    id: _Uuid
    item: _Id
    task: _Name
    kind: _Name
    answer: dict[str, Any]
    seconds: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)] = 0.0
    supersedes: Annotated[str, Field(pattern=r"^[ -~]{0,64}$")] = ""


def _next(own: Server, person: Person, task: str, counted: bool = True) -> dict[str, Any]:
    """The item that someone has before them, and, with `counted` or where that is due, how far they are."""
    if task not in own.tasks:
        raise HTTPException(404, "There is no such task.")
    own.watcher.look()
    found = queue.assign(own.engine, person, own.tasks, own.round, task, own.lease_seconds)
    told: dict[str, Any] = {"next": None if found is None else _shown(own, found)}
    if own.counts.take(f"{person.id} {task}") == 0.0 or counted or found is None:
        now = queue.progress(own.engine, person, {task: own.tasks[task]}, own.round)
        told["progress"] = {"done": now.done, "left": now.left, "seconds_left": now.seconds_left}
    return told


def _shown(own: Server, found: queue.Assignment) -> dict[str, Any]:
    item, shown = found.item, found.shown
    told = views.for_page(item, shown, own.tasks[item.task])
    earlier = [{"answer": views.answer_for_page(one.kind, one.answer, item, shown)} for one in found.earlier]
    return told | {"guideline": found.guideline, "adjudicates": found.adjudicates, "earlier": earlier}


@routes.post("/next")
def next_item(caller: Expert, own: Own, body: ForTask) -> dict[str, Any]:
    return _next(own, caller.person, body.task)


def _given_as(own: Server, person: Person, item_id: str) -> tuple[Item, dict[str, Any]]:
    """The item of an answer, and how it was shown. It may be of an earlier round: the answer waited in a browser meanwhile."""
    with own.engine.connect() as connection:
        item = places.read_item(connection, item_id)
        lease = None if item is None else places.lease_of(connection, person, item)
    if item is None or lease is None or item.task not in own.tasks:
        raise HTTPException(404, "This question is not yours, or is asked no longer.")
    return item, dict(lease["shown"])


@routes.post("/verdicts")
def save(caller: Expert, own: Own, body: Given) -> dict[str, Any]:
    """Saves an answer; what this acknowledges is on the disk. Sent again, it changes nothing."""
    person = caller.person
    item, shown = _given_as(own, person, body.item)
    answer = views.answer_from_page(body.kind, views.clean(body.answer), item, shown)
    verdict = Verdict(
        body.id.lower(), item.id, person.id, body.kind, answer, shown, 0, body.seconds, supersedes=body.supersedes
    )
    new = queue.submit(own.engine, person, own.tasks, verdict)
    told: dict[str, Any] = {"saved": True, "new": new}
    if body.kind == "flag" or body.supersedes:
        return told
    try:
        return told | _next(own, person, item.task, counted=False)
    except Exception:  # the answer is saved, and that must be said: the page asks for the next one by itself
        _log.exception("an answer was saved; the next item could not be given")
        return told


@routes.post("/undo")
def undo(caller: Expert, own: Own, body: ForTask) -> dict[str, Any]:
    retracted = queue.undo(own.engine, caller.person, own.round, own.tasks, own.lease_seconds)
    if retracted is None:
        return {"undone": False}
    with own.engine.connect() as connection:
        query = sa.select(store.verdicts).where(store.verdicts.c.id == retracted.supersedes)
        before = places.verdict_of(connection.execute(query).mappings().one())
        item = places.read_item(connection, retracted.item)
    assert item is not None
    found = _next(own, caller.person, body.task if before.kind == "flag" else item.task)
    shown = found["next"]
    if shown and shown["item"] == item.id and before.kind == own.tasks[item.task].kind:
        shown["former"] = views.answer_for_page(before.kind, before.answer, item, before.shown)
    return found | {"undone": True, "kind": before.kind}


@routes.post("/renew")
def renew(caller: Expert, own: Own, body: ForItem) -> dict[str, bool]:
    return {"held": queue.renew(own.engine, caller.person, body.item, own.lease_seconds)}


@routes.post("/release")
def release(caller: Expert, own: Own, body: ForItem) -> dict[str, bool]:
    queue.release(own.engine, caller.person, body.item)
    return {"released": True}


@routes.get("/guidelines/{number}")
def guideline(caller: Expert, own: Own, number: int) -> dict[str, Any]:
    found = guidelines.numbered(own.engine, number) if 0 < number < 2**31 else None
    if found is None:
        raise HTTPException(404, "There is no such guideline.")
    return {"version": found.version, "html": str(markdown(found.text))}
