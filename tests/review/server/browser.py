"""Headless Chromium for tests and pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtune.review import people, store
from tests.review.server.examples import PASSWORD


def binary() -> str | None:
    """Chromium's path: JAXTUNE_CHROMIUM, or what is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("JAXTUNE_CHROMIUM") or next((found for one in names if (found := shutil.which(one))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def sign_in(page: Any, address: str, name: str, password: str = PASSWORD) -> None:
    page.goto(f"{address}/sign-in")
    page.fill("#name", name)
    page.fill("#password", password)
    page.click("main button")
    page.wait_for_url(f"{address}/")


def work(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}/work/{name}")
    page.wait_for_selector("#answers button, .finished")


def saved(page: Any, act: Callable[[], Any]) -> None:
    """Does something that sends an answer, and waits until the page says that it is saved and shows what is next."""
    with page.expect_response("**/api/verdicts") as found:
        act()
    assert found.value.status == 200
    page.wait_for_selector("body:not([data-busy]) #status[data-state='saved']")


def answers(engine: store.Engine, task: str, name: str = "") -> list[Any]:
    who = people.named(engine, name) if name else None
    found = store.read_verdicts(engine, task=task)
    return [one.answer for one in found if who is None or one.person == who.id]
