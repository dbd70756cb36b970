"""Routes of coming in and going out: sign in, invite, sign out."""

from __future__ import annotations

import threading
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from jaxtune.review import people, places, queue
from jaxtune.review.server import access
from jaxtune.review.server.access import Expert, FormChecked, Own, Server
from jaxtune.review.server.render import page
from jaxtune.types import UserError

routes = APIRouter()
_WRONG = "Name and password do not fit together."
_HASHING = threading.BoundedSemaphore(4)  # a password's hash takes 64 MiB while it is made
_Text = Annotated[str, Form(max_length=4_000)]


def _inside(to: str) -> str:
    """An address of these pages; the first page for anything else."""
    fine = to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() and len(to) < 300
    return to if fine else "/"


def _form(request: Request, template: str, title: str, status: int = 200, **values: Any) -> HTMLResponse:
    token = access.form_token(request)
    made = page(request, template, title, status=status, csrf=token, **values)
    access.set_form_token(request, made, token)
    return made


def _try_of(own: Server, name: str, address: str) -> float:
    """Takes a try of a name and of an address, which a right password gives back. Returns the seconds to wait if there is none."""
    wait = own.by_address.take(address)
    if not wait and (wait := own.by_name.take(name)):
        own.by_address.give_back(address)
    return wait


@routes.get("/sign-in")
def sign_in_page(request: Request, to: str = "/") -> Response:
    if access.who(request) is not None:
        return RedirectResponse(_inside(to), 303)
    return _form(request, "sign_in.html", "Sign in", to=_inside(to), name="")


@routes.post("/sign-in", dependencies=[FormChecked])
def sign_in(request: Request, own: Own, name: _Text = "", password: _Text = "", to: _Text = "/") -> Response:
    address, key = access.address(request), name.casefold()[:400]
    wait = _try_of(own, key, address)
    if wait:
        told = f"Too many tries. Wait {max(1, round(wait))} s and try again."
        return _form(request, "sign_in.html", "Sign in", 429, to=_inside(to), name=name, problem=told)
    with _HASHING:
        person = people.check_password(own.engine, name, password, address=address)
    if person is None:
        return _form(request, "sign_in.html", "Sign in", 401, to=_inside(to), name=name, problem=_WRONG)
    own.by_address.give_back(address)
    own.by_name.give_back(key)
    answer = RedirectResponse(_inside(to), 303)
    access.start_session(request, answer, person)
    return answer


def _invite_page(request: Request, own: Server, token: str, problem: str = "", status: int = 200) -> Response:
    person = people.invited(own.engine, token)
    values: dict[str, Any] = {
        "who": person.name,
        "token": token,
        "passwords": own.passwords,
        "shortest": people.MIN_PASSWORD,
    }
    hours = f"{own.session_seconds / 3600:g}"
    return _form(request, "invite.html", "Welcome", status, problem=problem, hours=hours, **values)


@routes.get("/invite/{token}")
def invite_page(request: Request, own: Own, token: str) -> Response:
    if own.by_address.take(access.address(request)):
        raise HTTPException(429, "Too many invite links were tried. Wait a minute and try again.")
    made = _invite_page(request, own, token)
    own.by_address.give_back(access.address(request))
    return made


@routes.post("/invite/{token}", dependencies=[FormChecked])
def accept_invite(request: Request, own: Own, token: str, password: _Text = "", again: _Text = "") -> Response:
    if own.by_address.take(access.address(request)):
        raise HTTPException(429, "Too many invite links were tried. Wait a minute and try again.")
    people.invited(own.engine, token)
    own.by_address.give_back(access.address(request))
    if own.passwords and password != again:
        return _invite_page(request, own, token, "The two passwords differ. Type them once more.", 400)
    try:
        wanted = password if own.passwords else None
        with _HASHING:
            person = people.accept_invite(own.engine, token, wanted, address=access.address(request))
    except UserError as error:
        return _invite_page(request, own, token, _sentence(error), 400)  # a weak password: the invite is still there
    answer = RedirectResponse("/", 303)
    access.start_session(request, answer, person)
    return answer


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


@routes.post("/sign-out/everywhere")
def sign_out_everywhere(caller: Expert, own: Own) -> Response:
    """Ends all sessions of who asks: for those who left one open, or fear that somebody took it."""
    people.end_all(own.engine, caller.person.id, by=caller.person.id, address=caller.address)
    return RedirectResponse("/sign-in", 303)


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
