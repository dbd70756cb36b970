"""The experts' page over a database of invented questions, and people who are signed in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'jaxtune[review]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from jaxtune.review import people, store
from jaxtune.review.server import app
from tests.review.server import examples
from tests.review.server.browser import binary, chromium, sign_in


@pytest.fixture(scope="module", autouse=True)
def quick_hashes() -> Iterator[None]:
    """Argon2 of little work: what is tested here is not how hard a password is to guess."""
    from argon2 import PasswordHasher

    with pytest.MonkeyPatch.context() as patch:
        hasher = PasswordHasher(1, 64, 1)
        patch.setattr(people, "_hasher", lambda: hasher)
        people._nobodys_hash.cache_clear()
        yield
    people._nobodys_hash.cache_clear()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[store.Engine]:
    with store.opened(str(tmp_path / "review.db")) as opened:
        examples.fill(opened)
        yield opened


@pytest.fixture
def made(engine: store.Engine, tmp_path: Path) -> FastAPI:
    known = examples.known(tmp_path / "letters.md", examples.GUIDELINE + examples.SCRIPT)
    return app.make(engine, known, examples.config(), str(tmp_path))


class Visitor:
    """Somebody at the page; `csrf` is the token of their session."""

    def __init__(self, client: TestClient, csrf: str = "") -> None:
        self.client, self.csrf = client, csrf

    def get(self, path: str) -> Any:
        return self.client.get(path)

    def api(self, path: str, **body: Any) -> Any:
        return self.client.post(f"/api/{path}", json=body, headers={"x-csrf-token": self.csrf})

    def form(self, path: str, **fields: str) -> Any:
        return self.client.post(path, data={"csrf": self.csrf, **fields})

    def next(self, task: str) -> dict[str, Any]:
        found = self.api("next", task=task)
        assert found.status_code == 200, found.text
        return found.json()["next"]


def csrf_of(text: str) -> str:
    found = re.search(r'<meta name="csrf" content="([^"]*)">', text)
    assert found
    return found[1]


@pytest.fixture
def visit(made: FastAPI) -> Iterator[Callable[..., Visitor]]:
    """visit("Ben") signs Ben in; visit() is somebody unknown."""
    clients = []

    def visitor(name: str = "", password: str = examples.PASSWORD) -> Visitor:
        client = TestClient(made, base_url="http://localhost", follow_redirects=False, raise_server_exceptions=False)
        clients.append(client)
        one = Visitor(client)
        one.csrf = csrf_of(one.get("/sign-in").text)
        if name:
            answer = one.form("/sign-in", name=name, password=password)
            assert answer.status_code == 303, answer.text
            one.csrf = csrf_of(one.get("/").text)
        return one

    yield visitor
    for client in clients:
        client.close()


@pytest.fixture(scope="module")  # no longer: its event loop is in the way of others
def browser() -> Iterator[Any]:
    if binary() is None:
        pytest.skip("Chromium is not here: install Debian's package chromium")
    with chromium() as started:
        yield started


@pytest.fixture
def address(engine: store.Engine, tmp_path: Path) -> Iterator[str]:
    known = examples.known(tmp_path / "letters.md", examples.GUIDELINE + examples.SCRIPT)
    with examples.served(app.make(engine, known, examples.config(), str(tmp_path))) as found:
        yield found


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """opened("Ben", width=320) is a page of a browser of its own, signed in; what its console says must be nothing."""
    contexts, said = [], []

    def page_of(name: str = "", width: int = 1280, height: int = 800, theme: str = "light", loud: bool = True) -> Any:
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(30_000)  # a busy machine is slow, and not wrong
        page = context.new_page()
        if loud:
            page.on("console", lambda one: said.append(one.text) if one.type in ("error", "warning") else None)
            page.on("pageerror", lambda one: said.append(str(one)))
        if name:
            sign_in(page, address, name)
        return page

    yield page_of
    for context in contexts:
        context.close()
    assert said == []
