"""Headless Chromium for tests and pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
