"""Pages of the owner: people, the round, flags by group, the audit log, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from jaxtune.review import people, queue, store
from jaxtune.review.record import ROLES
from jaxtune.review.server import views
from jaxtune.review.server.access import Caller, Own, Owner, Server
from jaxtune.review.server.desk import title
from jaxtune.review.server.render import page

routes = APIRouter()
_Text = Annotated[str, Form(max_length=1_000)]
_Number = Annotated[int, Query(ge=0, lt=2**63)]
_LINES = 200  # of the audit log on a page
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"


def _people(request: Request, caller: Caller, own: Server, **values: Any) -> Response:
    shown: dict[str, Any] = {
        "people": people.everyone(own.engine),
        "roles": ROLES,
        "link": "",
        "link_for": "",
        "days": "",
    } | values
    return page(request, "people.html", "People", caller, **shown)


def _skills(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _known(own: Server, person: str) -> str:
    if person not in [one.id for one in people.everyone(own.engine)]:
        raise HTTPException(404, "There is no such person.")
    return person


def _invite(request: Request, caller: Caller, own: Server, person_id: str, name: str) -> Response:
    token = people.invite(own.engine, person_id, own.invite_seconds, by=caller.person.id, address=caller.address)
    here = own.address.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}"
    days = f"{own.invite_seconds / 86400:g}"
    return _people(request, caller, own, link=f"{here}/invite/{token}", link_for=name, days=days)


@routes.get("/people")
def everyone(request: Request, caller: Owner, own: Own) -> Response:
    return _people(request, caller, own)


@routes.post("/people")
def add(request: Request, caller: Owner, own: Own, name: _Text = "", role: _Text = "", skills: _Text = "") -> Response:
    made = people.add(own.engine, name, role, _skills(skills), by=caller.person.id, address=caller.address)
    return _invite(request, caller, own, made.id, made.name)


@routes.post("/people/{person}")
def change(caller: Owner, own: Own, person: str, role: _Text = "", skills: _Text = "") -> Response:
    who = _known(own, person)
    people.change(own.engine, who, role=role, skills=_skills(skills), by=caller.person.id, address=caller.address)
    return RedirectResponse("/people", 303)


@routes.post("/people/{person}/invite")
def invite(request: Request, caller: Owner, own: Own, person: str) -> Response:
    found = {one.id: one.name for one in people.everyone(own.engine)}
    return _invite(request, caller, own, _known(own, person), found[person])


@routes.post("/people/{person}/sign-out")
def end_sessions(caller: Owner, own: Own, person: str) -> Response:
    people.end_all(own.engine, _known(own, person), by=caller.person.id, address=caller.address)
    return RedirectResponse("/people", 303)


@routes.post("/people/{person}/close")
def close(caller: Owner, own: Own, person: str) -> Response:
    people.change(own.engine, _known(own, person), active=False, by=caller.person.id, address=caller.address)
    return RedirectResponse("/people", 303)


@routes.post("/people/{person}/open")
def open_again(caller: Owner, own: Own, person: str) -> Response:
    people.change(own.engine, _known(own, person), active=True, by=caller.person.id, address=caller.address)
    return RedirectResponse("/people", 303)


@routes.get("/round")
def round_page(request: Request, caller: Owner, own: Own) -> Response:
    counts = queue.open_items(own.engine, own.tasks, own.round)
    tasks: list[dict[str, Any]] = [
        {
            "title": title(task),
            "kind": task.kind,
            "overlap": task.overlap,
            "there": counts[name][0],
            "of": counts[name][1],
        }
        for name, task in own.tasks.items()
    ]
    experts = []
    for one in people.everyone(own.engine):
        now = queue.progress(own.engine, one, own.tasks, own.round)
        if now.done or one.active:
            experts.append({"name": one.name, **now._asdict()})
    values = {"answers": sum(one["there"] for one in tasks), "wanted": sum(one["of"] for one in tasks)}
    values |= {"flags": len(_flags(own)), "disputed": len(queue.disagreements(own.engine, own.tasks, own.round))}
    values |= {"report": Path(own.report).is_file()}
    return page(request, "round.html", f"Round {own.round}", caller, tasks=tasks, experts=experts, **values)


def _flags(own: Server) -> list[store.Verdict]:
    return [one for one in store.read_verdicts(own.engine, own.round) if one.kind == "flag"]


@routes.get("/flags")
def flags(request: Request, caller: Owner, own: Own) -> Response:
    found, items = _flags(own), {one.id: one for one in store.read_items(own.engine, own.round)}
    names = {one.id: one.name for one in people.everyone(own.engine)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for flag in one.answer["flags"]:
            head = flag["type"].replace("_", " ").capitalize() + (f": {flag['group']}" if flag["group"] else "")
            task = own.tasks.get(items[one.item].task)
            line = {"excerpt": views.excerpt(items[one.item]), "note": flag["note"], "at": one.at}
            line |= {"who": names.get(one.person, one.person), "title": title(task) if task else items[one.item].task}
            groups.setdefault(head, []).append(line)
    ordered = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0]))
    return page(request, "flags.html", "Flags", caller, groups=ordered)


@routes.get("/audit")
def audit(request: Request, caller: Owner, own: Own, before: _Number | None = None) -> Response:
    found = people.audit_log(own.engine, _LINES + 1, before)
    names = {one.id: one.name for one in people.everyone(own.engine)}
    lines = [
        one
        | {"who": names.get(one["person"], one["person"] or "–"), "on": names.get(one["subject"], one["subject"])}
        | {"detail": json.dumps(one["detail"], ensure_ascii=False) if one["detail"] else ""}
        for one in found[:_LINES]
    ]
    last = lines[-1]["number"] if len(found) > _LINES else None
    return page(request, "audit.html", "Audit log", caller, lines=lines, before=last)


@routes.get("/report")
def report(caller: Owner, own: Own) -> Response:
    """The report of agreement that was written last: a page of its own, which may style itself and run nothing."""
    if not Path(own.report).is_file():
        raise HTTPException(404, "The report has not been written yet.")
    return FileResponse(own.report, media_type="text/html", headers={"content-security-policy": _REPORT_POLICY})
