"""Pages of experts and seniors: their tasks, the work page, their answers, disagreements."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from jaxtune.review import places, queue
from jaxtune.review.record import Item, Verdict
from jaxtune.review.server import guidelines, views
from jaxtune.review.server.access import Caller, Expert, Own, Senior, Server
from jaxtune.review.server.render import page
from jaxtune.review.tasks import Task

routes = APIRouter()
_HISTORY = 200  # answers that the page shows


class Part(NamedTuple):
    """A task, and how far someone is in it."""

    task: Task
    done: int
    left: int
    seconds_left: float


def title(task: Task) -> str:
    return task.title or task.name


def part(own: Server, caller: Caller, task: Task) -> Part | None:
    """How far someone is in a task; None where it is for another group, and so is each of its items."""
    now = queue.progress(own.engine, caller.person, {task.name: task}, own.round)
    is_theirs = task.skill in ("", *caller.person.skills) or now.done + now.left
    return Part(task, now.done, now.left, now.seconds_left) if is_theirs else None


def parts(own: Server, caller: Caller) -> list[Part]:
    """Someone's tasks."""
    return [one for task in own.tasks.values() if (one := part(own, caller, task))]


@routes.get("/")
def home(request: Request, caller: Expert, own: Own) -> Response:
    mine = parts(own, caller)
    total = {"left": sum(one.left for one in mine), "seconds_left": sum(one.seconds_left for one in mine)}
    return page(request, "home.html", "My tasks", caller, round=own.round, tasks=mine, total=total)


def _told_task(own: Server, task: Task, **more: Any) -> dict[str, Any]:
    """What the work page's script knows of a task."""
    keys = ("name", "kind", "labels", "multi", "scale", "scale_ends", "groups")
    return {key: getattr(task, key) for key in keys} | {"lease_seconds": own.lease_seconds} | more


@routes.get("/work/{name}")
def work(request: Request, caller: Expert, own: Own, name: str) -> Response:
    if name not in own.tasks or part(own, caller, own.tasks[name]) is None:
        raise HTTPException(404, "There is no such task for you.")
    task = own.tasks[name]
    values: dict[str, Any] = {"task": task, "told_task": _told_task(own, task), "corrects": ""}
    rules = guidelines.in_force(own.engine, name)
    return page(request, "work.html", title(task), caller, guideline=rules, **values)


@routes.get("/history")
def history(request: Request, caller: Expert, own: Own, changed: str = "") -> Response:
    lines = []
    for item, verdict in queue.history(own.engine, caller.person, own.round, _HISTORY):
        task = own.tasks.get(item.task)
        told: dict[str, Any] = {
            "title": title(task) if task else item.task,
            "excerpt": views.excerpt(item),
            "id": verdict.id,
        }
        told |= {"said": views.in_words(item, verdict), "kind": verdict.kind, "at": verdict.at}
        lines.append(told | {"change": task is not None and verdict.kind in places.ANSWERS})
    told_above = "The change is saved." if changed else ""
    return page(request, "history.html", "My answers", caller, round=own.round, lines=lines, told=told_above)


@routes.get("/history/{verdict}")
def correct(request: Request, caller: Expert, own: Own, verdict: str) -> Response:
    for item, one in queue.history(own.engine, caller.person, own.round, verdict_id=verdict):
        if one.kind in places.ANSWERS and item.task in own.tasks:
            return _correction(request, caller, own, item, one)
    raise HTTPException(404, "There is no such answer of yours, or you have changed or taken it back since.")


def _correction(request: Request, caller: Caller, own: Server, item: Item, verdict: Verdict) -> Response:
    task = own.tasks[item.task]
    shown = views.for_page(item, verdict.shown, task) | {"guideline": verdict.guideline, "adjudicates": False}
    if verdict.kind == task.kind:
        shown["former"] = views.answer_for_page(task.kind, verdict.answer, item, verdict.shown)
    told = _told_task(own, task, corrects=verdict.id, item=shown)
    rules = guidelines.numbered(own.engine, verdict.guideline)
    values: dict[str, Any] = {"task": task, "told_task": told, "guideline": rules, "corrects": verdict.id}
    return page(request, "work.html", f"Change: {title(task)}", caller, **values)


@routes.get("/adjudicate")
def adjudicate(request: Request, caller: Senior, own: Own) -> Response:
    lines, names = [], {}
    for item, verdicts in queue.disagreements(own.engine, own.tasks, own.round):
        task = own.tasks[item.task]
        if not places.may(caller.person, task, item):
            continue
        said = [views.in_words(item, one._replace(shown={})) for one in verdicts]
        lines.append({"title": title(task), "excerpt": views.excerpt(item), "said": said})
        if all(one.person != caller.person.id for one in verdicts) and task.adjudicate:
            names[task.name] = title(task)
    return page(request, "adjudicate.html", "Disagreements", caller, lines=lines[:200], names=list(names.items()))
