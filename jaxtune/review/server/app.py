"""The experts' web page: pages from templates, an API for their scripts, all state in the database.

    with store.opened("runs/guide/review.db") as engine:
        serve(config, engine, tasks.read(config.review.tasks))

Nothing is kept in the process but rate limits: a server that is killed and started again goes on where it was.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxtune.types import UserError

try:
    import fastapi  # noqa: F401
    import uvicorn
except ImportError as _error:
    raise UserError("the experts' page needs fastapi and uvicorn: pip install 'jaxtune[review]'") from _error

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from ml_collections import ConfigDict
from sqlalchemy import exc
from starlette.exceptions import HTTPException as AnyHTTPException

from jaxtune.review import queue
from jaxtune.review.server import access, api, desk, doors, guidelines, office
from jaxtune.review.server.guard import HEADERS, Guard, Limiter
from jaxtune.review.server.render import FOLDER, page
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task

REPORT = "review_report.html"  # in the workdir: what `review --config.review.action=report` writes
THREADS = 12
_log = logging.getLogger(__name__)
_REFUSED = {
    "lost": (
        409,
        "Others have answered this one while it was open here, so your answer was not needed. Here is the next.",
    ),
    "answered": (409, "You have answered this one already. Here is the next; My answers lists what you said."),
    "unknown": (404, "This question is not yours, or your answer to it was changed meanwhile."),
}
_TITLES = {
    400: "That did not work", 401: "Signed out", 403: "Not allowed", 404: "Not found", 405: "Not found", 409: "Taken",
    413: "Too large", 422: "That did not work", 429: "A little slower, please", 503: "One moment", 507: "Not saved",
}  # fmt: skip


def make(engine: Engine, tasks: dict[str, Task], config: ConfigDict, workdir: str | None = None) -> FastAPI:
    """Returns the app of a config's section `review`, with guidelines read from their files.

    Raises:
      UserError: a guideline cannot be read, or a task's answers are of another kind.
    """
    c = config.review
    secure = bool(c.tls_cert) or c.behind_proxy
    queue.check_kinds(engine, tasks, c.round)
    guidelines.load(engine, tasks)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_few_threads)
    app.state.server = access.Server(
        engine=engine, tasks=tasks, round=c.round, secure=secure, passwords=c.passwords,
        session_seconds=c.session_hours * 3600.0, lease_seconds=c.lease_seconds,
        report=str(Path(workdir) / REPORT) if workdir else "", watcher=guidelines.Watcher(engine, tasks),
        by_person=Limiter(c.requests_per_second, 5 * c.requests_per_second),
        counts=Limiter(1 / 10, 1), address=c.address, invite_seconds=c.invite_days * 86400.0,
        by_name=Limiter(1 / 15, 10), by_address=Limiter(1 / 5, 60),
    )  # fmt: skip
    for routes in (doors.routes, desk.routes, api.routes, office.routes):
        app.include_router(routes)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), "static")
    _handle_errors(app)
    app.add_middleware(Guard, limiter=Limiter(10 * c.requests_per_second, 50 * c.requests_per_second), secure=secure)
    return app


@asynccontextmanager
async def _few_threads(_: FastAPI) -> AsyncIterator[None]:
    """Requests are answered by as many threads as find work: more of them wait for the database's one writer, and for each other."""
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _handle_errors(app: FastAPI) -> None:
    handlers: dict[Any, Any] = {
        access.NotSignedIn: _signed_out,
        AnyHTTPException: lambda request, error: _told(request, error.status_code, error.detail),
        RequestValidationError: lambda request, error: _told(
            request, 422, "The server did not understand this request."
        ),
        queue.Refused: lambda request, error: _told(
            request, *_REFUSED.get(error.reason, (409, str(error))), error.reason
        ),
        UserError: _mistaken,
        exc.DBAPIError: _database,
        exc.TimeoutError: _database,
        Exception: _broken,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _signed_out(request: Request, error: Exception) -> Response:
    if request.url.path.startswith("/api/") or request.method not in ("GET", "HEAD"):
        return _told(request, 401, "You are signed out. Sign in again.")
    to = request.url.path if request.url.path != "/" else ""
    return RedirectResponse("/sign-in" + (f"?to={quote(to)}" if to else ""), 303)


def _mistaken(request: Request, error: UserError) -> Response:
    if "full" in str(error) and "disk" in str(error):
        return _told(request, 507, "This was not saved: the disk of the server is full. Tell the person who runs it.")
    text = str(error)
    return _told(request, 400, text[:1].upper() + text[1:] + ".")


def _database(request: Request, error: Exception) -> Response:
    _log.error("the database did not answer: %s", error)
    return _told(request, 503, "The server's database does not answer just now. Try again in a moment.")


def _broken(request: Request, error: Exception) -> Response:
    made = _told(request, 500, "Something went wrong on the server. It is not your fault; try again in a moment.")
    made.headers.update(HEADERS)  # this answer is made outside of the guard
    return made


def _told(request: Request, status: int, text: Any, reason: str = "") -> Response:
    """An error as a page, or as JSON where a script asks."""
    text = text if isinstance(text, str) else "That did not work."
    if status == 404 and text == "Not Found":
        text = "There is no such page."
    if request.url.path.startswith("/api/"):
        csrf = status == 403 and "earlier sign-in" in text
        return JSONResponse({"error": text, "reason": reason or ("csrf" if csrf else "")}, status)
    caller = getattr(request.state, "caller", None)
    return page(request, "error.html", _TITLES.get(status, "Something went wrong"), caller, status, text=text)


def serve(config: ConfigDict, engine: Engine, tasks: dict[str, Task], workdir: str | None = None) -> None:
    """Serves until it is told to stop (SIGINT, SIGTERM); requests under way are finished first."""
    c = config.review
    made = make(engine, tasks, config, workdir)
    scheme = "https" if c.tls_cert else "http"
    host = f"[{c.host}]" if ":" in c.host else c.host
    settings = uvicorn.Config(
        made, host=c.host, port=c.port, log_level="warning", access_log=False, server_header=False,
        ssl_certfile=c.tls_cert or None, ssl_keyfile=c.tls_key or None,
        proxy_headers=c.behind_proxy, forwarded_allow_ips="127.0.0.1" if c.behind_proxy else None,
        limit_concurrency=500, backlog=512, timeout_keep_alive=30, timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=64 * 1024, http="h11", ws="none",
    )  # fmt: skip
    try:
        settings.load()
    except OSError as error:
        raise UserError(
            f"review.tls_cert={c.tls_cert!r} and its key cannot be read: {error.strerror or error}"
        ) from error
    try:
        family = socket.AF_INET6 if ":" in c.host else socket.AF_INET
        listening = socket.create_server((c.host, c.port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"{c.host}:{c.port} cannot be listened on: {error.strerror or error}") from error
    print(f"experts' page: {scheme}://{host}:{c.port}/  (Ctrl + C stops it)", flush=True)
    with listening:
        uvicorn.Server(settings).run(sockets=[listening])
