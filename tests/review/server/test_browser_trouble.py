"""The page in a headless Chromium when things go wrong, on small screens, and as assistive technology reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'jaxtune[review]'")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from jaxtune.review import people, store
from jaxtune.review.record import make_item
from tests.review.server import examples
from tests.review.server.browser import answers, saved, work

Open = Callable[..., Any]
WORK = [name for name, _ in examples.TASKS]


def test_answers_given_without_a_network_are_sent_later(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben", loud=False)
    work(page, address, "letters")
    page.context.set_offline(True)
    page.keyboard.press("2")
    page.wait_for_selector("#status[data-state='waiting']:has-text('Waiting to send')")
    assert "kept in this browser" in page.inner_text("#status")
    assert answers(engine, "letters") == []
    page.context.set_offline(False)  # the page hears of it, and does not wait for its next try
    page.wait_for_selector("#status[data-state='saved']")
    assert answers(engine, "letters") == [{"labels": ["request"]}]
    page.context.set_offline(True)
    page.keyboard.press("3")
    page.wait_for_selector("#status[data-state='waiting']")
    page.close()  # and another day
    page.context.set_offline(False)
    page = page.context.new_page()
    page.goto(f"{address}/work/letters")
    page.wait_for_selector("#progress-text:has-text('2 of')")
    assert answers(engine, "letters") == [{"labels": ["request"]}, {"labels": ["praise"]}]


def test_a_lost_acknowledgement_saves_nothing_twice(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben", loud=False)
    work(page, address, "letters")
    seen: list[str] = []

    def lose(route: Any) -> None:
        seen.append(json.loads(route.request.post_data)["id"])
        if len(seen) == 1:
            route.fetch()  # the server has it, the page never hears so
            route.abort()
        else:
            route.continue_()

    page.route("**/api/verdicts", lose)
    page.keyboard.press("1")
    page.wait_for_selector("#status[data-state='saved']")
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert answers(engine, "letters") == [{"labels": ["complaint"]}]


def test_refusals_are_told(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben", loud=False)
    work(page, address, "keep")
    said = {"error": "This was not saved: the disk of the server is full.", "reason": ""}
    page.route("**/api/verdicts", lambda route: route.fulfill(status=507, json=said))
    page.keyboard.press("a")
    page.wait_for_selector("#status[data-state='waiting']:has-text('disk is full')")
    page.unroute("**/api/verdicts")
    page.wait_for_selector("#status[data-state='saved']")
    work(page, address, "letters")
    first = page.inner_text("#stage .text")
    for name in ("Ada", "Selma"):  # two others answer it while it is open here for too long
        with store.writing(engine) as connection:
            connection.execute(store.leases.update().values(expires=0.0))
        other = opened(name)
        work(other, address, "letters")
        assert other.inner_text("#stage .text") == first
        saved(other, lambda other=other: other.keyboard.press("1"))
    page.keyboard.press("2")
    page.wait_for_selector("#status:has-text('Others have answered')")
    assert page.inner_text("#stage .text") != first
    people.end_all(engine, people.named(engine, "Ben").id)  # type: ignore[union-attr]
    page.keyboard.press("3")
    page.wait_for_selector("#status a:has-text('Sign in again')")
    page.click("#status a")
    page.fill("#name", "Ben")
    page.fill("#password", examples.PASSWORD)
    page.click("main button")
    page.wait_for_url(f"{address}/work/letters")
    page.wait_for_selector("#status:has-text('saved')")
    assert answers(engine, "letters", "Ben") == [{"labels": ["praise"]}]


def test_drafts_survive_the_browser_and_are_gone_after_the_sign_out(opened: Open, address: str) -> None:
    page = opened("Ben")
    work(page, address, "mend")
    page.fill("#editor", "half a thought")
    page.wait_for_timeout(400)
    page.close()
    page = page.context.new_page()
    work(page, address, "mend")
    assert page.input_value("#editor") == "half a thought"
    page.click("text=Sign out")
    page.wait_for_url(f"{address}/sign-in")
    kept = page.evaluate("Object.keys(localStorage)")
    assert [one for one in kept if one != "jaxtune:theme"] == []


def test_a_flag_that_is_sent_late_leaves_the_draft(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben", loud=False)
    work(page, address, "mend")
    page.fill("#editor", "half a thought")
    page.wait_for_timeout(400)
    page.context.set_offline(True)
    page.keyboard.press("Escape")
    page.keyboard.press("f")
    page.keyboard.press("2")
    page.click("#flag-dialog button.primary")
    page.wait_for_selector("#status[data-state='waiting']")
    page.close()
    page.context.set_offline(False)
    page = page.context.new_page()
    work(page, address, "mend")
    assert [one["flags"][0]["type"] for one in answers(engine, "mend")] == ["privacy"]
    assert page.input_value("#editor") == "half a thought"


def test_none_is_good_is_no_tie_when_it_is_changed(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben")
    work(page, address, "ranking")
    saved(page, lambda: page.keyboard.press("b"))
    page.goto(f"{address}/history")
    page.click("a:has-text('Change')")
    page.wait_for_selector("#answers button:has-text('None is good')[aria-pressed='true']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('Place 2 more')")
    assert answers(engine, "ranking")[0]["bad"]


def test_words_are_whole_in_any_script(opened: Open, address: str, engine: store.Engine) -> None:
    """Vowel signs and accents that are characters of their own belong to the word, and emoji count once."""
    text = "😀 नमस्ते cafe\u0301 مُحَمَّد"
    with store.writing(engine) as connection:  # nothing else is asked
        store.insert_new(connection, store.items, [make_item(1, "names", {"text": text}, {})._asdict() | {"at": 0.0}])
    page = opened("Ben")
    work(page, address, "names")
    while not page.inner_text("#span-text").startswith("😀"):
        saved(page, lambda: page.keyboard.press("Enter"))
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("1")
    saved(page, lambda: page.keyboard.press("Enter"))
    marked = [text[one["start"] : one["end"]] for one in answers(engine, "names")[-1]["spans"]]
    assert marked == text.split()[1:]


def test_scripts_in_texts_do_not_run(opened: Open, address: str, engine: store.Engine) -> None:
    evil = examples.SCRIPT
    candidates = [{"id": "a", "text": evil}, {"id": "b", "text": evil}]
    prompt = [{"role": evil, "content": evil}]
    store.add_items(engine, [
        make_item(1, "better", {"prompt": prompt, "candidates": candidates}, {}),
        make_item(1, "mend", {"prompt": evil, "answer": evil}, {}),
        make_item(1, "names", {"text": evil, "prelabel": {"spans": [{"start": 0, "end": 8, "label": "person"}]}}, {}),
    ])  # fmt: skip
    with store.writing(engine) as connection:  # only these are left
        old = connection.execute(store.items.select()).mappings().all()[:-3]
        olive = people.named(engine, "Olive")
        assert olive is not None
        for number, one in enumerate(old):
            row = {"id": f"{number}", "item": one["id"], "person": olive.id, "kind": "skip", "answer": {"reason": evil}}
            row |= {"shown": {}, "guideline": 0, "seconds": 1.0, "at": 1.0, "supersedes": "", "adjudicates": False}
            connection.execute(store.verdicts.insert().values(row))
    page = opened("Olive")
    for name in ("better", "mend", "names"):
        work(page, address, name)
        assert evil[:20] in page.inner_text("#stage")
    page.goto(f"{address}/work/letters")
    page.wait_for_selector(".finished")
    assert "<script>" in page.inner_text("#guide-text")
    page.goto(f"{address}/history")
    assert evil[:20] in page.inner_text("main")
    assert page.title() == "My answers · jaxtune review"


@contextmanager
def _sized(page: Any, width: int) -> Iterator[None]:
    before = page.viewport_size
    page.set_viewport_size({"width": width, "height": 640})
    yield
    page.set_viewport_size(before)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_are_accessible_and_fit_a_small_phone(opened: Open, address: str, engine: store.Engine, theme: str) -> None:  # fmt: skip
    from axe_playwright_python.sync_playwright import Axe

    axe, wrong = Axe(), []
    options = {"runOnly": ["color-contrast"]} if theme == "dark" else {}  # all else is the same in both
    page = opened("Olive", theme=theme)

    def check(name: str) -> None:
        for one in axe.run(page, options=options).response["violations"]:
            wrong.append(f"{name}: {one['id']} {[node['html'][:120] for node in one['nodes']][:3]}")
        with _sized(page, 320):
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > 320:
                wrong.append(f"{name}: {wide} pixels wide on a screen of 320")

    for name in WORK:
        work(page, address, name)
        if name == "mend":
            page.fill("#editor", "Something quite different.")
            page.wait_for_selector(".diff ins")
        if name == "names":
            page.keyboard.press("ArrowRight")
            page.keyboard.press("1")
        check(name)
    page.keyboard.press("r")
    check("rejection")
    page.keyboard.press("Escape")
    saved(page, lambda: page.keyboard.press("a"))
    check("saved")
    for key, dialog in (("f", "#flag-dialog"), ("s", "#skip-dialog"), ("?", "#keys-dialog")):
        page.keyboard.press(key)
        page.wait_for_selector(f"{dialog}[open]")
        check(dialog)
        page.keyboard.press("Escape")
    for path in ("", "history", "adjudicate", "round", "people", "flags", "audit"):
        page.goto(f"{address}/{path}")
        check(path or "home")
    page.goto(f"{address}/people")
    page.fill("#name", "Noor")
    page.click("text=Make an invite link")
    page.wait_for_selector("#link")
    check("invite link")
    link = page.input_value("#link")
    page.click("text=Sign out")
    check("sign in")
    page.goto(link)
    check("invite")
    assert wrong == []


def test_a_phone_and_the_switch_of_the_theme(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ada", width=360, height=700)
    work(page, address, "better")
    dock = page.locator(".dock").bounding_box()
    assert dock["y"] + dock["height"] <= 701  # the answers are in reach without scrolling
    assert dock["height"] < 350
    saved(page, lambda: page.click("text=Equally good"))
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
