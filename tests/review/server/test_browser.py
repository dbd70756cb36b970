"""The page in a headless Chromium: two experts at once and a senior, every kind of task, by mouse and by keys alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'jaxtune[review]'")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from jaxtune.review import store
from jaxtune.review.record import make_item
from tests.review.server import examples
from tests.review.server.browser import answers, saved, work

Open = Callable[..., Any]


def test_two_experts_at_once_and_a_senior_who_settles(opened: Open, address: str, engine: store.Engine) -> None:
    ben, ada = opened("Ben"), opened("Ada")
    for page in (ben, ada):
        page.click("text=What is the letter about?")
        page.click("a:has-text('Start: What is the letter about?')")
        page.wait_for_selector("#answers button")
    first = ben.inner_text("#stage .text")
    assert first == ada.inner_text("#stage .text")  # two are asked
    assert ben.locator(".choice:has-text('suggested')").count() == 1
    saved(ben, lambda: ben.click(".choice:has-text('complaint')"))
    assert "1 of 6 done" in ben.inner_text("#progress-text")
    assert ben.inner_text("#stage .text") != first
    saved(ada, lambda: ada.click(".choice:has-text('praise')"))
    ada.click("#undo")
    ada.wait_for_selector("#status:has-text('Taken back')")
    assert ada.inner_text("#stage .text") == first
    assert ada.get_attribute(".choice:has-text('praise')", "aria-pressed") == "true"
    saved(ada, lambda: ada.click(".choice:has-text('request')"))
    ada.click("#flag")
    ada.check("text=Bias")
    ada.fill("#flag-note", "It speaks of mothers only.")
    saved(ada, lambda: ada.click("text=Save the flag"))
    assert "You can still answer" in ada.inner_text("#status")
    ada.click("#skip")
    saved(ada, lambda: ada.click("dialog[open] button:has-text('Skip')"))
    assert [one["labels"] for one in answers(engine, "letters") if "labels" in one] == [["complaint"], ["request"]]
    assert {"flags": [{"type": "bias", "group": "", "note": "It speaks of mothers only."}]} in answers(engine, "letters", "Ada")  # fmt: skip
    selma = opened("Selma")
    selma.goto(f"{address}/adjudicate")
    assert "complaint" in selma.inner_text("main")
    assert "Ben" not in selma.inner_text("main")
    selma.click("text=Settle: What is the letter about?")
    selma.wait_for_selector("text=You settle it")
    assert "Expert 2: request" in selma.inner_text("#stage")
    saved(selma, lambda: selma.keyboard.press("2"))
    settled = [one for one in store.read_verdicts(engine, task="letters") if one.adjudicates]
    assert [one.answer for one in settled] == [{"labels": ["request"]}]
    ben.goto(f"{address}/history")
    ben.click("a:has-text('Change')")
    ben.wait_for_selector(".choice[aria-pressed='true']:has-text('complaint')")
    ben.click(".choice:has-text('other')")
    ben.wait_for_selector("text=The change is saved")
    assert answers(engine, "letters", "Ben") == [{"labels": ["other"]}]


def test_every_kind_by_mouse(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben")
    work(page, address, "topics")
    page.click(".choice:has-text('delivery')")
    page.click(".choice:has-text('price')")
    saved(page, lambda: page.click("text=Send"))
    work(page, address, "names")
    page.dblclick("text=Amara", position=_at(page, "Boateng"))
    page.click(".choice:has-text('person')")
    assert page.inner_text("mark") == "Boateng"
    _drag(page, "Both", "Hull")
    page.click(".choice:has-text('organisation')")
    page.click("button[aria-label='Remove person: Boateng']")
    saved(page, lambda: page.click(".dock >> text=Send"))
    text = examples._NAMES[0]
    (span,) = answers(engine, "names")[0]["spans"]
    assert text[span["start"] : span["end"]] == "Both live in Hull"  # counted in characters, behind an emoji
    work(page, address, "clear")
    saved(page, lambda: page.click(".scale .choice >> nth=3"))
    work(page, address, "better")
    best = page.inner_text(".side >> nth=1").split("\n", 1)[1].strip()
    saved(page, lambda: page.click("text=Answer 2 is better"))
    saved(page, lambda: page.click("text=Both are bad"))
    first, second = answers(engine, "better")
    texts = {one["id"]: one["text"] for one in store.read_items(engine, task="better")[0].payload["candidates"]}
    assert texts[first["order"][0][0]] == best
    assert second["bad"]
    work(page, address, "ranking")
    for at in (2, 0):
        page.click(f".side .choice >> nth={at}")
    saved(page, lambda: page.click(".dock >> text=Send"))
    assert [len(group) for group in answers(engine, "ranking")[0]["order"]] == [1, 1, 1]
    work(page, address, "mend")
    page.fill("#editor", page.input_value("#editor").replace("25 percent", "half"))
    page.wait_for_selector(".diff ins:has-text('half')")
    assert page.inner_text(".diff del") == "25 percent"
    saved(page, lambda: page.click(".dock >> text=Send"))
    saved(page, lambda: page.click("text=Fine as it is"))
    assert answers(engine, "mend")[0]["text"].startswith("You can get half back")
    work(page, address, "keep")
    saved(page, lambda: page.click(".choice:has-text('Accept')"))
    page.click(".choice:has-text('Reject')")
    page.fill("#reason", "It says nothing.")
    saved(page, lambda: page.click("text=Send the rejection"))
    assert answers(engine, "keep")[1] == {"accept": False, "reason": "It says nothing."}
    assert "All done" in page.inner_text("#stage")
    page.click("#undo")
    page.wait_for_selector("#reason")
    assert page.input_value("#reason") == "It says nothing."


def _box(page: Any, word: str) -> dict[str, float]:
    return page.evaluate(
        """word => { const walk = document.createTreeWalker(document.querySelector('#span-text'), NodeFilter.SHOW_TEXT);
        for (let node = walk.nextNode(); node; node = walk.nextNode()) { const at = node.data.indexOf(word); if (at < 0) continue;
        const range = document.createRange(); range.setStart(node, at); range.setEnd(node, at + word.length);
        const box = range.getBoundingClientRect(); return {left: box.left, right: box.right, y: (box.top + box.bottom) / 2}; } }""",
        word,
    )


def _at(page: Any, word: str) -> dict[str, float]:
    box, whole = _box(page, word), page.locator("#span-text").bounding_box()
    return {"x": (box["left"] + box["right"]) / 2 - whole["x"], "y": box["y"] - whole["y"]}


def _drag(page: Any, first: str, last: str) -> None:
    start, end = _box(page, first), _box(page, last)
    page.mouse.move(start["left"] + 1, start["y"])
    page.mouse.down()
    page.mouse.move(end["right"] - 1, end["y"], steps=5)
    page.mouse.up()


def test_keys_alone_do_it(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened()
    press, type_ = page.keyboard.press, page.keyboard.type
    page.goto(f"{address}/sign-in")
    _tab_to(page, "#name")
    type_("Ben")
    press("Tab")
    type_(examples.PASSWORD)
    press("Enter")
    page.wait_for_url(f"{address}/")
    _tab_to(page, "a[href='/work/letters']")
    press("Enter")
    page.wait_for_selector("#answers button")
    saved(page, lambda: press("3"))
    press("u")
    page.wait_for_selector("#status:has-text('Taken back')")
    saved(page, lambda: press("1"))
    press("?")
    page.wait_for_selector("#keys-dialog[open]")
    press("Escape")
    press("f")
    press("2")
    _tab_to(page, "#flag-note")
    type_("1 it names her")
    saved(page, lambda: press("Control+Enter"))
    press("s")
    page.wait_for_selector("#skip-dialog[open]")
    saved(page, lambda: press("Enter"))
    press("g")
    assert not page.evaluate("document.querySelector('#guide').open")
    _go(page, "topics")
    press("2")
    press("4")
    press("2")
    saved(page, lambda: press("Enter"))
    _go(page, "names")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight", "3", "ArrowRight", "ArrowRight", "Shift+ArrowRight", "1"):  # fmt: skip
        press(key)
    assert page.locator("mark").all_inner_texts() == ["3 March 2024", "Amara Boateng"]
    press("Delete")
    assert page.locator("mark").all_inner_texts() == ["3 March 2024"]
    saved(page, lambda: press("Enter"))
    _go(page, "clear")
    saved(page, lambda: press("4"))
    _go(page, "better")
    saved(page, lambda: press("t"))
    saved(page, lambda: press("1"))
    _go(page, "ranking")
    for key in ("2", "Backspace", "3", "=", "1"):
        press(key)
    saved(page, lambda: press("Enter"))
    _go(page, "mend")
    press("o")
    page.wait_for_selector("#original:not([hidden])")
    press("e")
    press("Control+End")
    type_(" Keep a copy. fsu?")
    saved(page, lambda: press("Control+Enter"))
    saved(page, lambda: press("k"))
    _go(page, "keep")
    saved(page, lambda: press("a"))
    press("r")
    type_("Says nothing")
    saved(page, lambda: press("Control+Enter"))
    _go(page, "letters")
    _tab_to(page, "#sign-out button", most=60)
    press("Enter")
    page.wait_for_url(f"{address}/sign-in")
    assert answers(engine, "letters")[0] == {"labels": ["complaint"]}
    assert answers(engine, "topics") == [{"labels": ["staff"]}]
    assert answers(engine, "names")[0]["spans"] == [{"start": 3, "end": 15, "label": "date"}]
    assert answers(engine, "clear") == [{"rating": 4.0}]
    assert [len(one["order"]) for one in answers(engine, "better")] == [1, 2]
    assert [len(group) for group in answers(engine, "ranking")[0]["order"]] == [2, 1]
    assert answers(engine, "mend")[0]["text"].endswith("28 days. Keep a copy. fsu?")
    assert [one["accept"] for one in answers(engine, "keep")] == [True, False]


def _tab_to(page: Any, selector: str, most: int = 40) -> None:
    for _ in range(most):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached by Tab")


def _go(page: Any, name: str) -> None:
    """To another task, by links and keys."""
    _tab_to(page, ".brand", most=60)
    page.keyboard.press("Enter")
    page.wait_for_selector(".tasks")
    _tab_to(page, f"a[href='/work/{name}']", most=60)
    page.keyboard.press("Enter")
    page.wait_for_selector("#answers button")


def test_letters_do_nothing_where_keys_are_switched_off(opened: Open, address: str, engine: store.Engine) -> None:
    page = opened("Ben")
    work(page, address, "letters")
    page.keyboard.press("?")
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.keyboard.press("s")
    assert page.locator("dialog[open]").count() == 0
    page.reload()
    page.wait_for_selector("#answers button")
    page.keyboard.press("1")
    assert answers(engine, "letters") == []


def test_the_next_item_comes_with_the_acknowledgement(opened: Open, address: str, engine: store.Engine) -> None:
    """One request from the key to the next item on the page; prints how long that takes."""
    store.add_items(engine, [make_item(1, "letters", {"text": f"Letter {at}"}, {}, overlap=2) for at in range(300)])
    page = opened("Ben")
    work(page, address, "letters")
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    took = sorted(
        page.evaluate(
            """() => new Promise(done => { const start = performance.now(), stage = document.querySelector('#stage');
            new MutationObserver((_, seen) => { if (stage.querySelector('.text')) { seen.disconnect(); done(performance.now() - start); } })
            .observe(stage, {childList: true}); document.querySelector('.choice').click(); })"""
        )
        for _ in range(15)
    )
    print(f"next item: median {took[7]:.0f} ms, slowest {took[-1]:.0f} ms")
    assert asked == [f"{address}/api/verdicts"] * 15
