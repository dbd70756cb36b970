"""Pages from templates: text is escaped unless a template's own; Markdown is rendered with HTML off."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from jaxtune.review import people
from jaxtune.review.server.access import Caller

FOLDER = Path(__file__).parent
_LINKS = (
    ("expert", "/", "My tasks"), ("expert", "/history", "My answers"), ("senior", "/adjudicate", "Disagreements"),
    ("owner", "/round", "Round"), ("owner", "/people", "People"), ("owner", "/flags", "Flags"), ("owner", "/audit", "Audit log"),
)  # fmt: skip


@cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def markdown(text: str) -> Markup:
    """HTML of a guideline: its own markup stays text, links of scripts stay text, pictures are left out."""
    return Markup(_markdown().render(text))


def moment(at: float) -> Markup:
    """A time, which the page's script turns into the reader's own."""
    exact = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    return Markup('<time datetime="{}">{} UTC</time>').format(exact, exact[:16].replace("T", " "))


def span_of_time(seconds: float) -> str:
    if seconds < 90:
        return "about a minute left"
    return f"about {round(seconds / 60)} minutes left" if seconds < 5400 else f"about {seconds / 3600:.1f} hours left"


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(FOLDER / "templates")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters |= {"markdown": markdown, "moment": moment, "span_of_time": span_of_time}
    return made


def page(
    request: Request, template: str, title: str, caller: Caller | None = None, status: int = 200, **values: Any
) -> HTMLResponse:
    """A page, with the head and the links that its reader may follow."""
    own: dict[str, Any] = {
        "title": title,
        "person": None,
        "csrf": "",
        "links": (),
        "here": request.url.path,
        "problem": "",
        "told": "",
    }
    if caller is not None:
        links = [(to, name) for role, to, name in _LINKS if people.may(caller.person, role)]
        own |= {"person": caller.person, "csrf": caller.csrf, "links": links}
    return HTMLResponse(_templates().get_template(template).render(own | values), status)
