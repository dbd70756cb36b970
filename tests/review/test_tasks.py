"""Tasks as configs give them, wrong ones too; and answers that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxtune.review import tasks
from jaxtune.review.record import make_item
from jaxtune.types import UserError

LABEL = (("kind", "label"), ("labels", ("yes", "no")))


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("tone", (("kind", "label"), ("labels", "bad")), "comma after a lone one"),  # not the labels b, a and d
        ("tone", (*LABEL, ("groups", "women")), "groups='women'"),
        ("tone", (("kind", "label"), ("labels", (1, 2))), "tuple of texts"),
        ("tone", (("kind", "label"), ("labels", (["yes"], "no"))), "tuple of texts"),
        ("tone", (("kind", "label"), ("labels", ("yes", ""))), "none of them empty"),
        ("tone", (*LABEL, ("multi", "no")), "expected True or False"),
        ("tone", (*LABEL, ("overlap", True)), "a whole number"),
        ("tone", (*LABEL, ("skill", ("legal",))), "a text"),
        ("stars", (("kind", "rate"), ("scale", (1, 5))), "3 numbers"),
        ("stars", (("kind", "rate"), ("scale", ("1", "5", "1"))), "3 numbers"),
        ("stars", (("kind", "rate"), ("scale", 5)), "3 numbers"),
        ("stars", (("kind", "rate"), ("scale_ends", "lo")), "2 texts"),
        ("tone", ("kind", "label"), r"expected \(\(key, value\), …\)"),
        ("tone", "label", r"expected \(\(key, value\), …\)"),
        ("a/b", LABEL, "has the name 'a/b'"),  # it stands in addresses and names of files
        ("good?", LABEL, "has the name"),
        ("", LABEL, "1 to 100 characters"),
        ("x" * 101, LABEL, "1 to 100 characters"),
    ],
)
def test_wrong_values_are_told(name: str, keys: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tasks.read(((name, keys),))


def test_answers_that_are_none() -> None:
    known = tasks.read((("fix", (("kind", "edit"),)), ("stars", (("kind", "rate"),))))
    item = make_item(1, "fix", {"prompt": "p", "answer": "a"}, {})
    for text in ("\x00", " \x00\n"):
        with pytest.raises(UserError, match="1 to 100000 characters"):
            tasks.checked(known["fix"], item, "edit", {"text": text})
    assert tasks.checked(known["fix"], item, "edit", {"text": "a\x00b"}) == {"text": "ab"}
    for rating in (10**400, float("nan"), float("inf"), True, "3"):
        with pytest.raises(UserError, match="expected a number"):
            tasks.checked(known["stars"], item, "rate", {"rating": rating})


def test_guidelines_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "rules.md"
    task = tasks.read((("tone", (*LABEL, ("guideline", str(path)))),))["tone"]
    path.write_bytes(b"\xef\xbb\xbf# Rules\n")
    assert tasks.guideline(task) == "# Rules\n"  # with the mark before it, it were no heading
    path.write_bytes(b"Rules\x00")
    with pytest.raises(UserError, match="a character 0"):
        tasks.guideline(task)
