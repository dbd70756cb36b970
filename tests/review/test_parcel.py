"""Records that would break what reads them later are refused when they come: what is kept is kept for good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtune.review import exchange, insight, people, queue, store, tasks
from jaxtune.review.record import make_item

TASKS = tasks.read((
    ("tone", (("kind", "label"), ("labels", ("good", "bad")))),
    ("better", (("kind", "compare"),)),
    ("fix", (("kind", "edit"),)),
))  # fmt: skip


@pytest.fixture
def db(url: str) -> Iterator[store.Engine]:
    with store.opened(url) as engine:
        yield engine


def _read(db: store.Engine, tmp_path: Path, *rows: dict[str, Any]) -> exchange.Imported:
    """Imports the rows, and one that is good."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (*rows, {"text": "good one", "task": "tone"})))
    return exchange.read_file(db, TASKS, path)


def _asked(task: str, payload: dict[str, Any], origin: dict[str, Any]) -> list[dict[str, Any]]:
    """An item and a verdict on it."""
    item = make_item(1, task, payload, origin)
    answer = {"tone": {"labels": ["good"]}, "better": {"order": [["a"], ["b"]], "bad": False}}[task]
    verdict = {"record": "verdict", "id": item.id, "item": item.id, "person": "p", "kind": TASKS[task].kind, "answer": answer}  # fmt: skip
    return [{"record": "item", **item._asdict()}, verdict]


def test_figures_can_be_read_after_any_import(db: store.Engine, tmp_path: Path) -> None:
    def two(text: str) -> dict[str, Any]:
        return {"candidates": [{"id": "a", "text": text}, {"id": "b", "text": "other"}]}

    found = _read(
        db, tmp_path, *_asked("better", two("1"), {"models": None}), *_asked("better", two("2"), {"models": ["x"]}),
        *_asked("tone", {"text": "3"}, {"probabilities": {"good": "x"}}), *_asked("tone", {"text": "4"}, {"probabilities": {"good": None}}),
    )  # fmt: skip
    assert [found.items, found.verdicts, len(found.broken)] == [1, 0, 8]
    item, verdict = _asked("better", two("5"), {"models": {"a": "old", "b": {"model": "new"}}})
    found = _read(
        db, tmp_path, item, verdict | {"shown": {"order": 5}}, verdict | {"id": "v", "shown": {"order": ["b", "a"]}}
    )
    assert [found.items, found.verdicts, [one.line for one in found.broken]] == [1, 1, [2]]
    assert insight.figures(db, TASKS, 1)["tasks"]["better"]["answers"] == 1


def test_an_id_that_one_database_could_not_hold(db: store.Engine, tmp_path: Path) -> None:
    found = _read(db, tmp_path, {"record": "person", "id": "x" * 65, "name": "Xaver"})
    assert [found.items, found.people, found.broken[0].line] == [1, 0, 1]


def test_an_imported_namesake_keeps_nobody_out(db: store.Engine, tmp_path: Path) -> None:
    ann = people.add(db, "Ann", "expert")
    item, verdict = _asked("tone", {"text": "1"}, {})
    _read(db, tmp_path, {"record": "person", "id": "other", "name": "ANN"}, item, verdict | {"person": "other"})
    people.set_password(db, ann.id, "four plain garden words")
    assert people.check_password(db, "ann", "four plain garden words") == ann
    assert "ANN (other)" in [one.name for one in people.everyone(db)]


def test_an_empty_guideline_and_an_answer_that_could_not_be_sent_back(db: store.Engine, tmp_path: Path) -> None:
    known = store.set_guideline(db, "tone", "")
    long = {"task": "fix", "prompt": "p", "answer": "x" * (tasks.MAX_TEXT + 1)}
    found = _read(db, tmp_path, {"record": "guideline", "task": "tone", "version": 1, "text": ""}, long)
    assert [found.items, [one.line for one in found.broken]] == [1, [2]]
    assert exchange._guidelines(db)[-1]["number"] == known


def test_another_databases_guideline_is_kept_and_not_in_force(db: store.Engine, tmp_path: Path) -> None:
    store.set_guideline(db, "tone", "Ours.")
    item, verdict = _asked("tone", {"text": "1"}, {})
    theirs = {"record": "guideline", "task": "tone", "version": 1, "text": "Theirs."}
    _read(db, tmp_path, theirs, item, verdict | {"guideline": exchange.parcel.guideline_hash("tone", "Theirs.")})
    texts = {one["number"]: one["text"] for one in exchange._guidelines(db)}
    assert texts[store.read_verdicts(db)[0].guideline] == "Theirs."
    given = queue.assign(db, people.add(db, "Ann", "expert"), TASKS, 1, "tone")
    assert given is not None
    assert texts[given.guideline] == "Ours."


def test_nobody_answers_twice_by_a_file(db: store.Engine, tmp_path: Path) -> None:
    """Two corrections of one answer cannot both count, and two answers of one person fill one place."""
    item, verdict = _asked("tone", {"text": "1"}, {})
    item["overlap"] = 2
    bad = {"answer": {"labels": ["bad"]}}
    found = _read(
        db, tmp_path, item, verdict | {"id": "first"}, verdict | {"id": "then", "supersedes": "first"} | bad, verdict | {"id": "or", "supersedes": "first"},
        verdict | {"id": "again"},
    )  # fmt: skip
    assert [one.line for one in found.broken] == [4]
    assert "corrected or taken back already" in found.broken[0].reason
    assert [one.id for one in store.read_verdicts(db)] == ["then", "again"]
    assert queue.open_items(db, TASKS, 1)["tone"] == (1, 3)
    assert queue.disagreements(db, TASKS, 1) == []
