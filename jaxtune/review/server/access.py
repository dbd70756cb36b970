"""Who asks, and may they: the session behind a cookie, the token against forged requests, the role."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, HTTPException, Request, Response

from jaxtune.review import people
from jaxtune.review.record import Person
from jaxtune.review.server.guard import Limiter
from jaxtune.review.server.guidelines import Watcher
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task

FORM_COOKIE = "jaxtune_form"  # before there is a session: a form's token must equal this cookie
_SAFE = ("GET", "HEAD", "OPTIONS")


class Server(NamedTuple):
    """What routes work with: the same for all requests."""

    engine: Engine
    tasks: dict[str, Task]
    round: int
    secure: bool
    passwords: bool
    session_seconds: float
    lease_seconds: float
    report: str  # path of the report of agreement, where one may be
    watcher: Watcher
    by_person: Limiter
    sign_ins: Limiter  # failed ones, by address and by name

    @property
    def cookie(self) -> str:
        return "__Host-jaxtune" if self.secure else "jaxtune"


class Caller(NamedTuple):
    """Someone signed in."""

    person: Person
    csrf: str
    address: str
    token: str


class NotSignedIn(Exception):
    """There is no session: pages send to the sign-in, the API says 401."""


def server(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


def address(request: Request) -> str:
    return request.client.host[:64] if request.client else ""


async def _token(request: Request) -> str:
    """The token that came with a request that changes something; "" where none did."""
    if request.method in _SAFE:
        return ""
    if "x-csrf-token" in request.headers:
        return request.headers["x-csrf-token"]
    if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        value = (await request.form()).get("csrf", "")
        return value if isinstance(value, str) else ""
    return ""


Token = Annotated[str, Depends(_token)]


def same(one: str, other: str) -> bool:
    return bool(other) and hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def who(request: Request) -> Caller | None:
    """Who is signed in, if anyone; nothing is checked but the session."""
    own = server(request)
    token = request.cookies.get(own.cookie, "")
    if not token or len(token) > 200:
        return None
    idle = people.IDLE_SECONDS if own.passwords else own.session_seconds
    found = people.session(own.engine, token, idle_seconds=idle)
    return None if found is None else Caller(found[0], found[1], address(request), token)


def _signed_in(role: str) -> Callable[..., Caller]:
    def check(request: Request, token: Token) -> Caller:
        caller = who(request)
        if caller is None:
            raise NotSignedIn
        wait = server(request).by_person.take(caller.person.id)
        if wait:
            raise HTTPException(429, f"Too many requests came at once. Try again in {max(1, round(wait))} s.")
        if request.method not in _SAFE and not same(token, caller.csrf):
            raise HTTPException(403, "This page is from an earlier sign-in. Load it again and repeat what you did.")
        if not people.may(caller.person, role):
            raise HTTPException(403, f"This is for people with the role of {role}. Yours is {caller.person.role}.")
        request.state.caller = caller
        return caller

    return check


Expert = Annotated[Caller, Depends(_signed_in("expert"))]
Senior = Annotated[Caller, Depends(_signed_in("senior"))]
Owner = Annotated[Caller, Depends(_signed_in("owner"))]
Own = Annotated[Server, Depends(server)]


def form_token(request: Request) -> str:
    """The token of a form that is shown before anyone is signed in."""
    found = request.cookies.get(FORM_COOKIE, "")
    return found if len(found) == 43 else secrets.token_urlsafe(32)


def set_form_token(request: Request, response: Response, token: str) -> None:
    response.set_cookie(FORM_COOKIE, token, httponly=True, samesite="strict", secure=server(request).secure, path="/")


def check_form(request: Request, token: Token) -> None:
    """Refuses a form whose token is not that of this browser."""
    if not same(token, request.cookies.get(FORM_COOKIE, "")):
        raise HTTPException(403, "This form was open for too long. Go back, load the page again and repeat it.")


FormChecked = Depends(check_form)


def start_session(request: Request, response: Response, person: Person) -> None:
    """Signs someone in: a new session, whatever cookie came."""
    own = server(request)
    old = request.cookies.get(own.cookie, "")
    if old:
        people.end_session(own.engine, old, address=address(request))
    token, _ = people.start_session(own.engine, person, own.session_seconds, address=address(request))
    flags: dict[str, Any] = {"httponly": True, "samesite": "strict", "secure": own.secure, "path": "/"}
    response.set_cookie(own.cookie, token, max_age=int(own.session_seconds), **flags)
    response.delete_cookie(FORM_COOKIE, path="/", httponly=True, samesite="strict", secure=own.secure)
