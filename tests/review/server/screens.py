"""The guide's pictures: every page, at desktop and phone size, light and dark.

    python -m tests.review.server.screens docs/screens      # from the repository's root; needs Chromium
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxtune.review import store
from jaxtune.review.server import app
from tests.review.server import examples
from tests.review.server.browser import chromium, sign_in

SIZES = {"desktop": (1280, 860), "phone": (390, 780)}


def _shots(page: Any, address: str, save: Any) -> None:
    page.goto(f"{address}/sign-in")
    save("sign_in")
    sign_in(page, address, "Selma")
    save("tasks")
    for name in ("letters", "topics", "names", "clear", "better", "ranking", "mend", "keep"):
        page.goto(f"{address}/work/{name}")
        page.wait_for_selector("#answers button")
        if name == "names":
            page.wait_for_selector("#span-text")
            _mark(page)
        if name == "mend":
            page.fill("#editor", "You can get half back, that is 42 pounds. Send us the ticket within 28 days.")
            page.wait_for_timeout(300)
            page.keyboard.press("Escape")
        if name == "ranking":
            page.keyboard.press("1")
            page.keyboard.press("3")
        save(name)
    page.goto(f"{address}/work/better")
    page.wait_for_selector(".side")
    page.keyboard.press("f")
    page.wait_for_selector("#flag-dialog[open]")
    save("flag")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#keys-dialog[open]")
    save("keys")


def _mark(page: Any) -> None:
    for presses, label in (((1, 2), "3"), ((3, 0), "1")):
        for _ in range(presses[0]):
            page.keyboard.press("ArrowRight")
        for _ in range(presses[1]):
            page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press(label)


def _owners(page: Any, address: str, save: Any) -> None:
    sign_in(page, address, "Olive")
    for name in ("round", "people", "flags", "audit", "adjudicate", "history"):
        page.goto(f"{address}/{name}")
        save(name)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, store.opened(f"{temporary}/review.db") as engine:
        examples.fill(engine)
        known = examples.known(Path(temporary) / "letters.md")
        with examples.served(app.make(engine, known, examples.config())) as address, chromium() as browser:
            for size, (width, height) in SIZES.items():
                for theme in ("light", "dark"):
                    with browser.new_context(
                        viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
                    ) as context:
                        page = context.new_page()

                        def save(name: str, page: Any = page, size: str = size, theme: str = theme) -> None:
                            page.screenshot(path=folder / f"{name}_{size}_{theme}.png")

                        _shots(page, address, save)
                        page.goto(f"{address}/")
                        page.click("text=Sign out")
                        _owners(page, address, save)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
