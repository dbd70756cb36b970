"""Routes of coming in and going out: sign in, invite, sign out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from jaxtune.review import people, places, queue
from jaxtune.review.server import access
from jaxtune.review.server.access import Expert, FormChecked, Own
from jaxtune.review.server.render import page
from jaxtune.types import UserError

routes = APIRouter()
_WRONG = "Name and password do not fit together."
_Text = Annotated[str, Form(max_length=4_000)]


def _inside(to: str) -> str:
    """An address of these pages; the first page for anything else."""
    fine = to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() and len(to) < 300
    return to if fine else "/"


def _form(request: Request, template: str, title: str, status: int = 200, **values: object) -> HTMLResponse:
    token = access.form_token(request)
    made = page(request, template, title, status=status, csrf=token, **values)
    access.set_form_token(request, made, token)
    return made


def _too_often(own: access.Server, keys: list[str]) -> float:
    """Takes a try of each key; where one has none left the others get theirs back. Returns the seconds to wait."""
    for at, key in enumerate(keys):
        wait = own.sign_ins.take(key)
        if wait:
            for other in keys[:at]:
                own.sign_ins.give_back(other)
            return wait
    return 0.0


@routes.get("/sign-in")
def sign_in_page(request: Request, to: str = "/") -> Response:
    if access.who(request) is not None:
        return RedirectResponse(_inside(to), 303)
    return _form(request, "sign_in.html", "Sign in", to=_inside(to), name="")


@routes.post("/sign-in", dependencies=[FormChecked])
def sign_in(request: Request, own: Own, name: _Text = "", password: _Text = "", to: _Text = "/") -> Response:
    keys = [f"address {access.address(request)}", f"name {name.casefold()[:400]}"]
    wait = _too_often(own, keys)
    if wait:
        told = f"Too many tries. Wait {max(1, round(wait))} s and try again."
        return _form(request, "sign_in.html", "Sign in", 429, to=_inside(to), name=name, problem=told)
    person = people.check_password(own.engine, name, password, address=access.address(request))
    if person is None:
        return _form(request, "sign_in.html", "Sign in", 401, to=_inside(to), name=name, problem=_WRONG)
    for key in keys:
        own.sign_ins.give_back(key)
    answer = RedirectResponse(_inside(to), 303)
    access.start_session(request, answer, person)
    return answer


def _invite_page(request: Request, own: access.Server, token: str, problem: str = "", status: int = 200) -> Response:
    person = people.invited(own.engine, token)
    values = {"who": person.name, "token": token, "passwords": own.passwords, "shortest": people.MIN_PASSWORD}
    hours = f"{own.session_seconds / 3600:g}"
    return _form(request, "invite.html", "Welcome", status, problem=problem, hours=hours, **values)


@routes.get("/invite/{token}")
def invite_page(request: Request, own: Own, token: str) -> Response:
    key = f"invite {access.address(request)}"
    if own.sign_ins.take(key):
        raise HTTPException(429, "Too many invite links were tried. Wait a minute and try again.")
    made = _invite_page(request, own, token)
    own.sign_ins.give_back(key)
    return made


@routes.post("/invite/{token}", dependencies=[FormChecked])
def accept_invite(request: Request, own: Own, token: str, password: _Text = "", again: _Text = "") -> Response:
    key = f"invite {access.address(request)}"
    if own.sign_ins.take(key):
        raise HTTPException(429, "Too many invite links were tried. Wait a minute and try again.")
    people.invited(own.engine, token)
    own.sign_ins.give_back(key)
    if own.passwords and password != again:
        return _invite_page(request, own, token, "The two passwords differ. Type them once more.", 400)
    try:
        wanted = password if own.passwords else None
        person = people.accept_invite(own.engine, token, wanted, address=access.address(request))
    except UserError as error:
        return _invite_page(request, own, token, _sentence(error), 400)  # a weak password: the invite is still there
    answer = RedirectResponse("/", 303)
    access.start_session(request, answer, person)
    return answer


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


@routes.post("/sign-out")
def sign_out(request: Request, caller: Expert, own: Own) -> Response:
    with own.engine.connect() as connection:
        held = places.held(connection, caller.person, own.tasks, own.round) if own.tasks else None
    if held is not None:  # others may be asked at once
        queue.release(own.engine, caller.person, held["item"])
    people.end_session(own.engine, caller.token, address=caller.address)
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(own.cookie, path="/", httponly=True, samesite="strict", secure=own.secure)
    return answer
