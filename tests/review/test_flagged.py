"""Flags by group, and the preferences that follow from flags of bias."""

from __future__ import annotations

from typing import Any

from jaxtune.review import flagged
from jaxtune.review.record import Verdict, make_item

EDIT = make_item(1, "mend", {"prompt": "who cooks?", "answer": "A woman."}, {})
COMPARE = make_item(
    1,
    "better",
    {
        "prompt": "who leads?",
        "candidates": [{"id": "a", "text": "A man."}, {"id": "b", "text": "Anyone."}, {"id": "c", "text": "He."}],
    },
    {},
)
ALONE = make_item(1, "mend", {"prompt": "who drives?", "answer": "A man."}, {})
ITEMS = [EDIT, COMPARE, ALONE]


def verdict(name: str, item: str, kind: str, answer: dict[str, Any], **more: Any) -> Verdict:
    return Verdict(name, item, more.pop("person", "p1"), kind, answer, {}, 0, 1.0, **more)


def flag(name: str, item: str, group: str, kind: str = "bias", person: str = "p1") -> Verdict:
    return verdict(name, item, "flag", {"flags": [{"type": kind, "group": group, "note": ""}]}, person=person)


VERDICTS = [
    flag("f1", EDIT.id, "Women"),
    flag("f2", EDIT.id, "women ", person="p2"),
    flag("f3", COMPARE.id, "women"),
    flag("f4", ALONE.id, "men"),
    flag("f5", ALONE.id, "", kind="wrong"),
    verdict("e1", EDIT.id, "edit", {"text": "Whoever likes to."}, at=2.0),
    verdict("e2", EDIT.id, "edit", {"text": "Anyone can."}, at=1.0, adjudicates=True),
    verdict("c1", COMPARE.id, "compare", {"order": [["b"], ["a", "c"]], "bad": False}),
]


def test_flags_are_counted_by_type_and_group() -> None:
    found = flagged.gathered(ITEMS, VERDICTS)
    assert found["groups"] == [
        {"type": "bias", "group": "women", "flags": 3, "items": 2, "people": 2},
        {"type": "bias", "group": "men", "flags": 1, "items": 1, "people": 1},
        {"type": "wrong", "group": "", "flags": 1, "items": 1, "people": 1},
    ]
    assert len(found["flagged"]) == 5
    assert "p1" not in str(found["flagged"])  # no names
    assert found["flagged"][0]["text"] == "who cooks?\nA woman."


def test_preferences_of_flagged_items_know_their_verdicts() -> None:
    rows, without = flagged.preferences(ITEMS, VERDICTS)
    assert without == 1  # flagged, and nobody said what would be better
    assert rows[0] == {
        "prompt": "who cooks?",
        "chosen": "Anyone can.",
        "rejected": "A woman.",
        "item": EDIT.id,
        "verdicts": ["e2", "f1", "f2"],
    }
    assert [(row["chosen"], row["rejected"]) for row in rows[1:]] == [("Anyone.", "A man."), ("Anyone.", "He.")]


def test_no_preference_where_none_is_good_or_all_are_alike() -> None:
    for answer in ({"order": [["a", "b", "c"]], "bad": False}, {"order": [["b"], ["a", "c"]], "bad": True}):
        given = [VERDICTS[2], verdict("c", COMPARE.id, "compare", answer)]
        assert flagged.preferences(ITEMS, given) == ([], 1)
