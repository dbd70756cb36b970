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

GUIDE = {
    "sign_in_desktop_light", "tasks_desktop_light", "letters_desktop_light", "better_desktop_light", "better_phone_dark", "names_desktop_light",
    "mend_desktop_dark", "clear_phone_light", "flag_desktop_light", "ranking_desktop_dark", "history_desktop_light", "settle_desktop_light",
    "round_desktop_light", "people_desktop_light", "flags_desktop_light",
}  # fmt: skip
SIZES = {"desktop": (1280, 860), "phone": (390, 780)}


def _shots(page: Any, address: str, save: Any) -> None:
    page.goto(f"{address}/sign-in")
    save("sign_in")
    sign_in(page, address, "Cleo")
    save("tasks")
    page.goto(f"{address}/history")
    save("history")
    page.goto(f"{address}/work/letters")
    page.wait_for_selector("#answers button")
    save("letters")
    page.click("text=Sign out")
    sign_in(page, address, "Selma")
    page.goto(f"{address}/work/letters")
    page.wait_for_selector("text=You settle it")
    save("settle")
    for name in ("topics", "names", "clear", "better", "ranking", "mend", "keep"):
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
    for name in ("round", "people", "flags", "audit", "adjudicate"):
        page.goto(f"{address}/{name}")
        save(name)


def _shrink(path: Path) -> None:
    """A picture of few colours, a third of the size."""
    try:
        from PIL import Image
    except ImportError:
        return
    Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path, wanted: set[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, store.opened(f"{temporary}/review.db") as engine:
        examples.fill(engine)
        examples.answer(engine, examples.known())
        known = examples.known(Path(temporary) / "letters.md")
        with examples.served(app.make(engine, known, examples.config())) as address, chromium() as browser:
            for size, (width, height) in SIZES.items():
                for theme in ("light", "dark"):
                    if wanted is not None and not any(one.endswith(f"_{size}_{theme}") for one in wanted):
                        continue
                    size_of = {"width": width, "height": height}
                    with browser.new_context(
                        viewport=size_of, color_scheme=theme, reduced_motion="reduce", locale="en-GB", timezone_id="UTC"
                    ) as context:
                        page = context.new_page()

                        def save(name: str, page: Any = page, size: str = size, theme: str = theme) -> None:
                            if wanted is None or f"{name}_{size}_{theme}" in wanted:
                                page.screenshot(path=folder / f"{name}_{size}_{theme}.png")
                                _shrink(folder / f"{name}_{size}_{theme}.png")

                        _shots(page, address, save)
                        page.goto(f"{address}/")
                        page.click("text=Sign out")
                        _owners(page, address, save)


if __name__ == "__main__":
    main(Path(sys.argv[1]), None if "--all" in sys.argv else GUIDE)
