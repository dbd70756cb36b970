"""Who may do what: every route, as the app knows it, without a session, with another's, with a lesser role, without the token."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import APIRoute

from jaxtune.review import people, store
from tests.review.server.conftest import Visitor

PUBLIC = {"GET /sign-in", "POST /sign-in", "GET /invite/{token}", "POST /invite/{token}"}
EXPERT = {
    "GET /", "POST /sign-out", "POST /sign-out/everywhere", "GET /work/{name}", "GET /history", "GET /history/{verdict}", "POST /api/next", "POST /api/verdicts",
    "POST /api/undo", "POST /api/renew", "POST /api/release", "GET /api/guidelines/{number}",
}  # fmt: skip
SENIOR = {"GET /adjudicate"}
OWNER = {
    "GET /people", "POST /people", "POST /people/{person}", "POST /people/{person}/invite", "POST /people/{person}/sign-out",
    "POST /people/{person}/close", "POST /people/{person}/open", "GET /round", "GET /flags", "GET /audit", "GET /report",
}  # fmt: skip
BODIES = {
    "/api/next": {"task": "letters"}, "/api/undo": {"task": "letters"}, "/api/renew": {"item": "x"}, "/api/release": {"item": "x"},
    "/api/verdicts": {"id": str(uuid.uuid4()), "item": "x", "task": "letters", "kind": "skip", "answer": {}},
}  # fmt: skip


def routes(made: FastAPI) -> list[str]:
    found: list[APIRoute] = []
    todo: list[Any] = list(made.routes)
    while todo:
        one = todo.pop()
        if isinstance(one, APIRoute):
            found.append(one)
        elif hasattr(one, "original_router"):  # newer FastAPI keeps an included router whole
            todo += one.original_router.routes
    return [f"{method} {one.path}" for one in found for method in sorted(one.methods)]


def ask(visitor: Visitor, route: str, engine: store.Engine, csrf: str | None = None) -> Any:
    """Carries out a route with values that are there."""
    method, path = route.split(" ")
    ben = people.named(engine, "Ben")
    assert ben is not None
    values = {"name": "letters", "verdict": "nothing", "number": "1", "person": ben.id, "token": "t" * 43}
    address = path.format(**values)
    if method == "GET":
        return visitor.get(address)
    token = visitor.csrf if csrf is None else csrf
    if path.startswith("/api/"):
        return visitor.client.post(address, json=BODIES[path], headers={"x-csrf-token": token} if token else {})
    return visitor.client.post(
        address, data={"csrf": token, "name": "New", "role": "expert"} if token else {"name": "New"}
    )


def rows(engine: store.Engine) -> dict[str, Any]:
    """All that a request could have changed, but for when a session was last seen."""
    found = {}
    with engine.connect() as connection:
        for table in (store.people, store.invites, store.verdicts, store.leases, store.audit):
            found[table.name] = connection.execute(sa.select(table)).all()
        found["sessions"] = connection.execute(
            sa.select(store.sessions.c.token_sha256, store.sessions.c.ended_at)
        ).all()
    return found


def test_every_route_is_in_one_of_these_lists(made: FastAPI) -> None:
    assert sorted(routes(made)) == sorted(PUBLIC | EXPERT | SENIOR | OWNER)


def refused(answer: Any) -> bool:
    return answer.status_code == 401 or (
        answer.status_code == 303 and answer.headers["location"].startswith("/sign-in")
    )


def test_nothing_is_done_without_a_session(visit: Callable[..., Visitor], engine: store.Engine) -> None:
    nobody, before = visit(), rows(engine)
    for route in sorted(EXPERT | SENIOR | OWNER):
        assert refused(ask(nobody, route, engine)), route
    assert rows(engine) == before


@pytest.mark.parametrize("how", ["forged", "ended", "expired", "idle", "closed", "huge", "broken"])
def test_a_wrong_session_is_none(visit: Callable[..., Visitor], engine: store.Engine, how: str) -> None:
    someone = visit("Olive") if how != "closed" else visit("Ben")
    token = someone.client.cookies["jaxtune"]
    ben = people.named(engine, "Ben")
    assert ben is not None
    if how == "ended":
        people.end_session(engine, token)
    elif how == "closed":
        people.change(engine, ben.id, active=False)
    elif how in ("expired", "idle"):
        key = {"expired": "expires", "idle": "seen"}[how]
        with store.writing(engine) as connection:
            connection.execute(store.sessions.update().values({key: time.time() - 86400}))
    else:
        other = {"forged": token[:-1] + ("A" if token[-1] != "A" else "B"), "huge": "x" * 3000, "broken": "%00%ff"}[how]
        someone.client.cookies.clear()
        someone.client.cookies.set("jaxtune", other)
    before = rows(engine)
    for route in sorted(EXPERT | SENIOR | OWNER):
        assert refused(ask(someone, route, engine)), route
    assert rows(engine) == before


@pytest.mark.parametrize(("name", "beyond"), [("Ben", SENIOR | OWNER), ("Selma", OWNER)])
def test_a_lesser_role_is_refused(
    visit: Callable[..., Visitor], engine: store.Engine, name: str, beyond: set[str]
) -> None:
    someone = visit(name)
    before = rows(engine)
    for route in sorted(beyond):
        assert ask(someone, route, engine).status_code == 403, route
    assert rows(engine) == before
    assert not any(f'href="{one.split()[1]}"' in someone.get("/").text for one in beyond)


@pytest.mark.parametrize("token", ["", "another", "wrong"])
def test_every_change_needs_the_sessions_own_token(
    visit: Callable[..., Visitor], engine: store.Engine, token: str
) -> None:
    olive, ben = visit("Olive"), visit("Ben")
    sent = {"": "", "another": ben.csrf, "wrong": "0" * 64}[token]
    before = rows(engine)
    for route in sorted(EXPERT | SENIOR | OWNER):
        if route.startswith("POST"):
            assert ask(olive, route, engine, sent).status_code == 403, route
    assert rows(engine) == before


@pytest.mark.parametrize("token", ["", "wrong"])
def test_forms_before_the_sign_in_need_their_token_too(
    visit: Callable[..., Visitor], engine: store.Engine, token: str
) -> None:
    nobody, before = visit(), rows(engine)
    for route in sorted(PUBLIC):
        if route.startswith("POST"):
            assert ask(nobody, route, engine, token).status_code == 403, route
    assert rows(engine) == before


def test_another_sites_request_is_refused(visit: Callable[..., Visitor], engine: store.Engine) -> None:
    olive = visit("Olive")
    answer = olive.client.post("/people", data={"csrf": olive.csrf, "name": "New", "role": "owner"}, headers={"sec-fetch-site": "cross-site"})  # fmt: skip
    assert answer.status_code == 403
    assert people.named(engine, "New") is None


def give(visitor: Visitor, item: dict[str, Any], kind: str, answer: dict[str, Any], **more: Any) -> Any:
    body = {
        "id": str(uuid.uuid4()),
        "item": item["item"],
        "task": item["task"],
        "kind": kind,
        "answer": answer,
        "seconds": 1.5,
    }
    return visitor.api("verdicts", **(body | more))


def test_what_is_anothers_is_not_there(visit: Callable[..., Visitor], engine: store.Engine) -> None:
    ben, ada = visit("Ben"), visit("Ada")
    item = ben.next("clear")
    assert give(ada, item, "rate", {"rating": 1.0}).status_code == 404  # it was never given to Ada
    assert not ada.api("renew", item=item["item"]).json()["held"]
    ada.api("release", item=item["item"])
    assert ben.api("renew", item=item["item"]).json()["held"]
    assert give(ben, item, "rate", {"rating": 4.0}).status_code == 200
    (verdict,) = store.read_verdicts(engine)
    assert ben.get(f"/history/{verdict.id}").status_code == 200
    assert ada.get(f"/history/{verdict.id}").status_code == 404
    other = ada.next("clear")
    assert other["item"] != item["item"]
    assert give(ada, other, "rate", {"rating": 1.0}, supersedes=verdict.id).status_code == 404
    assert ada.api("undo", task="clear").json() == {"undone": False}
    assert [one.answer for one in store.read_verdicts(engine)] == [{"rating": 4.0}]
    assert "4" in ben.get("/history").text
    assert "You have not answered" in ada.get("/history").text


def test_tasks_of_a_group_are_for_it_alone(visit: Callable[..., Visitor], engine: store.Engine, made: FastAPI) -> None:
    known = made.state.server.tasks
    known["keep"] = known["keep"]._replace(skill="legal")
    ben = visit("Ben")
    assert "Fit for training?" not in ben.get("/").text
    assert ben.get("/work/keep").status_code == 404
    assert ben.next("keep") is None
    person = people.named(engine, "Ben")
    assert person is not None
    people.change(engine, person.id, skills=["legal"])
    assert ben.get("/work/keep").status_code == 200
    assert ben.next("keep") is not None


def test_a_person_whose_role_was_taken_loses_it_at_once(visit: Callable[..., Visitor], engine: store.Engine) -> None:
    selma = visit("Selma")
    assert selma.get("/adjudicate").status_code == 200
    person = people.named(engine, "Selma")
    assert person is not None
    people.change(engine, person.id, role="expert")
    assert selma.get("/adjudicate").status_code == 403
