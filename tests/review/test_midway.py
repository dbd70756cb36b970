"""What the queue does when the config or a role changes midway: tasks that go, kinds that change, seniors who are none any more."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtune.review import insight, people, queue, store, tasks
from jaxtune.review.record import Person, Verdict, make_item
from jaxtune.types import UserError

LABEL, RATE = (("kind", "label"), ("labels", ("good", "bad", "odd"))), (("kind", "rate"),)
TASKS = tasks.read((("tone", LABEL), ("stars", RATE)))


@pytest.fixture
def db(url: str) -> Iterator[store.Engine]:
    with store.opened(url) as engine:
        store.add_items(engine, [make_item(1, name, {"text": "x"}, {}, overlap=2) for name in TASKS])
        yield engine


def _say(db: store.Engine, person: Person, name: str, answer: dict[str, Any]) -> None:
    one = queue.assign(db, person, TASKS, 1, name)
    assert one is not None
    queue.submit(db, person, TASKS, _verdict(person, one.item.id, TASKS[name].kind, answer))


def _verdict(person: Person, item: str, kind: str, answer: dict[str, Any]) -> Verdict:
    return Verdict(str(uuid.uuid4()), item, person.id, kind, answer, {}, 0, 1.0)


def test_undo_leaves_what_is_asked_no_longer(db: store.Engine) -> None:
    ann = people.add(db, "Ann", "expert")
    _say(db, ann, "tone", {"labels": ["good"]})
    _say(db, ann, "stars", {"rating": 3.0})
    retracted = queue.undo(db, ann, 1, tasks.read((("tone", LABEL),)))
    assert retracted is not None
    assert [one.kind for one in store.read_verdicts(db)] == ["rate"]


def test_a_task_that_became_another_is_refused(db: store.Engine) -> None:
    _say(db, people.add(db, "Ann", "expert"), "tone", {"labels": ["good"]})
    other = tasks.read((("tone", RATE), ("stars", RATE)))
    with pytest.raises(UserError, match="'tone' is of kind 'rate', but round 1 has answers of kind 'label'"):
        queue.check_kinds(db, other, 1)
    queue.check_kinds(db, other, 2)  # another round may ask something else
    queue.check_kinds(db, TASKS, 1)


def test_the_page_does_not_start_with_a_task_that_became_another(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'jaxtune[review]'")
    from jaxtune import config as config_lib
    from jaxtune.review.server import app

    with store.opened(str(tmp_path / "review.db")) as db:
        store.add_items(db, [make_item(1, "tone", {"text": "x"}, {})])
        _say(db, people.add(db, "Ann", "expert"), "tone", {"labels": ["good"]})
        with pytest.raises(UserError, match="a name of its own"):
            app.make(db, tasks.read((("tone", RATE),)), config_lib.base())


def test_figures_of_a_label_that_was_taken_out(db: store.Engine) -> None:
    for name, label in (("Ann", "odd"), ("Bea", "good")):
        _say(db, people.add(db, name, "expert"), "tone", {"labels": [label]})
    fewer = tasks.read((("tone", (("kind", "label"), ("labels", ("good", "bad")))),))
    found = insight.figures(db, fewer, 1)["tasks"]["tone"]
    assert found["confusion"]["values"] == ["good", "bad", "odd"]
    assert found["agreement"]["alpha"]["value"] == 0.0  # D_o = 1, D_e = 1


def test_who_is_no_senior_any_more_settles_nothing(db: store.Engine) -> None:
    for name, label in (("Ann", "odd"), ("Bea", "good")):
        _say(db, people.add(db, name, "expert"), "tone", {"labels": [label]})
    senior = people.add(db, "Sue", "senior")
    given = queue.assign(db, senior, TASKS, 1, "tone")
    assert given is not None
    assert given.adjudicates
    sue = people.change(db, senior.id, role="expert")
    assert queue.assign(db, sue, TASKS, 1, "tone") is None
    with pytest.raises(queue.Refused) as refused:
        queue.submit(db, sue, TASKS, _verdict(sue, given.item.id, "label", {"labels": ["good"]}))
    assert refused.value.reason == "unknown"
    sue = people.change(db, senior.id, role="senior")
    queue.submit(db, sue, TASKS, _verdict(sue, given.item.id, "label", {"labels": ["good"]}))
