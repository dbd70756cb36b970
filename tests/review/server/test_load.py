"""benchmarks/review_load.py in small: experts at a real server process that is killed, on both databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxtune.review import people, store

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import review_load

    return review_load


def test_what_was_acknowledged_is_there_once_though_the_server_was_killed(load: Any, url: str) -> None:
    found = load.measure(url, experts=6, seconds=5.0, kills=1, think=0.1)
    assert found["wrong"] == []
    assert found["acknowledged"] > 6
    assert found["outcomes"]["again: no answer"] > 0  # the kill was felt


def test_the_check_sees_what_is_lost_changed_doubled_and_too_many(load: Any, tmp_path: Path) -> None:
    url = str(tmp_path / "review.db")
    load.fill(url, 4, 2)
    with store.opened(url) as engine:
        first, *others = store.read_items(engine)
        known = {one.name: one.id for one in people.everyone(engine)}
        one = store.Verdict("kept", first.id, known["Expert 0"], "label", {"labels": ["praise"]}, {}, 0, 1.0)
        twice = [one, one._replace(id="changed"), *(one._replace(id=f"more {at}", person=known[f"Expert {at}"]) for at in (1, 2, 3))]  # fmt: skip
        for verdict in twice:
            store.add_verdict(engine, verdict)
    expert = load.Expert("Expert 0", 1, 1.0, 0.0, load.threading.Barrier(1))
    expert.tried = {"kept", "changed", "lost", "more 1", "more 2"}
    expert.sent = [load.Sent(name, first.id, "Expert 0", "other" if name == "changed" else "praise", 0.1, 0.1) for name in ("kept", "changed", "lost")]  # fmt: skip
    told = " ".join(load.wrong(url, [expert]))
    for words in ("lost was acknowledged and is lost", "changed was changed", "more 3 was never sent", "Expert 0 answered", f"{first.id} has 5 answers"):  # fmt: skip
        assert words in told
    assert "kept was" not in told
