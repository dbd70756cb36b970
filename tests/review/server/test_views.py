"""What a page is told of an item, and what Markdown may become."""

from __future__ import annotations

import pytest

from jaxtune.review.record import make_item
from jaxtune.review.server import views
from jaxtune.review.server.render import markdown
from jaxtune.types import UserError
from tests.review.server import examples


def test_markdown_lets_nothing_but_its_own_marks_through() -> None:
    text = "**bold** <b onclick=x>raw</b> [a](javascript:alert(1)) ![p](http://elsewhere/x.png) [b](data:text/html,x) <http://fine.example>"
    html = str(markdown(text))
    assert "<strong>bold</strong>" in html
    assert "<b onclick" not in html
    assert 'href="javascript' not in html
    assert "<img" not in html
    assert 'href="data' not in html
    assert 'href="http://fine.example"' in html


def test_places_and_ids_of_candidates_are_told_apart() -> None:
    item = make_item(1, "x", {"candidates": [{"id": "b", "text": "B"}, {"id": "a", "text": "A"}]}, {})
    shown = {"order": ["a", "b"]}
    page = views.for_page(item, shown, examples.known()["better"])
    assert page["payload"]["candidates"] == [{"id": "1", "text": "A"}, {"id": "2", "text": "B"}]
    answer = {"order": [["2"], ["1"]], "bad": False}
    kept = views.answer_from_page("compare", answer, item, shown)
    assert kept["order"] == [["b"], ["a"]]
    assert views.answer_for_page("compare", kept, item, shown) == answer
    with pytest.raises(UserError, match="expected 1, 2"):
        views.answer_from_page("compare", {"order": [["a"], ["b"]]}, item, shown)


def test_lone_halves_of_characters_are_replaced() -> None:
    assert views.clean({"a\ud800": ["b\udfff", 1, None, {"c": "🙂"}]}) == {"a?": ["b?", 1, None, {"c": "🙂"}]}
