"""Figures of a round: planted experts come out as they are, and nothing that models judged is among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.review import insight, store, tasks
from jaxtune.review.record import Item, Verdict, make_item
from jaxtune.review.store import Engine

TASKS = tasks.read((
    ("mood", (("kind", "label"), ("labels", ("bad", "good")), ("overlap", 3), ("prelabels", "half"))),
    ("stars", (("kind", "rate"),)),
    ("better", (("kind", "compare"),)),
    ("names", (("kind", "span"), ("labels", ("who", "where")))),
    ("keep", (("kind", "accept"),)),
    ("mend", (("kind", "edit"),)),
    ("unused", (("kind", "label"), ("labels", ("x", "y")))),
))  # fmt: skip
PEOPLE = ("ann", "bea", "cem")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with store.opened(str(tmp_path / "review.db")) as engine:
        with store.writing(engine) as connection:
            for name in (*PEOPLE, "model:x"):
                row = {"id": name, "name": name.title(), "role": "expert", "skills": [], "active": True, "at": 0.0}
                connection.execute(store.people.insert().values(row))
        yield engine


class Writing:
    """Items and verdicts, all written at once."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.said: list[Verdict] = []

    def give(self, item: Item, person: str, kind: str, answer: dict[str, Any], **more: Any) -> None:
        given = {"shown": {}, "guideline": 0, "seconds": 4.0, "at": 1.0} | more
        self.said.append(Verdict(f"{item.id}/{person}/{kind}"[-64:], item.id, person, kind, answer, **given))

    def write(self, engine: Engine) -> None:
        store.add_items(engine, self.items)
        with store.writing(engine) as connection:
            store.insert_new(connection, store.verdicts, [one._asdict() for one in self.said])


def test_labels(engine: Engine) -> None:
    """Ann is right, Bea nearly, Cem guesses, and follows what is suggested to him; a gold item tells so too."""
    w, rng, items = Writing(), np.random.default_rng(0), []
    for number in range(120):
        truth, suggested = (("bad", "good")[rng.integers(2)] for _ in range(2))
        gold = {"labels": [truth]} if number < 20 else None
        payload = {"text": f"text {number}", "prelabel": {"labels": [suggested], "score": 0.9}}
        item = make_item(1, "mood", payload, {"row": number}, gold=gold, overlap=3)
        items.append((item, truth, suggested))
    w.items = [one for one, _, _ in items]
    for number, (item, truth, suggested) in enumerate(items):
        is_shown = number % 2 == 0
        wrong = {"bad": "good", "good": "bad"}[truth]
        said = {
            "ann": truth, "bea": wrong if rng.random() < 0.15 else truth,
            "cem": suggested if is_shown else ("bad", "good")[rng.integers(2)],
        }  # fmt: skip
        for person, label in said.items():
            w.give(item, person, "label", {"labels": [label]}, shown={"prelabel": is_shown}, seconds=2.0 if is_shown else 5.0)  # fmt: skip
        w.give(item, "model:x", "label", {"labels": [wrong]})
    w.give(items[3][0], "bea", "flag", {"flags": [{"type": "bias", "group": "age", "note": "x"}, {"type": "harm", "group": "", "note": ""}]})  # fmt: skip
    w.give(items[4][0], "cem", "skip", {"reason": "unclear"})
    w.write(engine)
    found = insight.figures(engine, TASKS, 1)
    mood = found["tasks"]["mood"]
    assert (found["people"], mood["answers"], mood["answered"], mood["skips"], mood["gold_items"]) == (
        3,
        360,
        120,
        1,
        20,
    )
    ann, bea, cem = mood["people"]
    assert (ann["name"], ann["gold"]["value"], ann["gold_of"]) == ("Ann", 1.0, 20)
    assert cem["gold"]["high"] < 0.9
    assert ann["with_others"]["value"] > cem["with_others"]["value"]
    assert mood["quality"]["people"]["ann"] > mood["quality"]["people"]["cem"] + 0.1
    pairs = {(one["first"], one["second"]): one for one in mood["confusion"]["pairs"]}
    assert pairs["Ann", "Bea"]["kappa"] > 0.55 > 0.2 > pairs["Ann", "Cem"]["kappa"]
    assert np.sum(pairs["Ann", "Bea"]["counts"]) == 100  # gold items are no evidence of agreement
    assert 0 < mood["agreement"]["alpha"]["low"] < mood["agreement"]["alpha"]["value"] < 0.5
    effect = mood["prelabels"]
    leans = effect["agreement_difference"]  # one of three people, half of whose guesses would have agreed anyway
    assert leans["value"] > 0.05
    assert leans["low"] < 1 / 6 < leans["high"]
    assert effect["seconds_difference"]["value"] == -3
    assert mood["flags"] == [
        {"type": "bias", "group": "age", "flags": 1, "items": 1},
        {"type": "harm", "group": "", "flags": 1, "items": 1},
    ]


def test_labels_with_probabilities(engine: Engine) -> None:
    pytest.importorskip("cleanlab")
    w, rng = Writing(), np.random.default_rng(0)
    for number in range(60):
        truth = rng.integers(2)
        origin = {"probabilities": {"bad": 0.9 - 0.8 * truth, "good": 0.1 + 0.8 * truth}}
        item = make_item(1, "mood", {"text": str(number)}, origin)
        w.items += [item]
        for person, skill in zip(PEOPLE, (0.95, 0.9, 0.5), strict=True):
            label = ("bad", "good")[truth if rng.random() < skill else 1 - truth]
            w.give(item, person, "label", {"labels": [label]})
    w.write(engine)
    quality = insight.figures(engine, TASKS, 1)["tasks"]["mood"]["quality"]
    assert quality["method"] == "crowdlab"
    assert min(quality["people"], key=quality["people"].get) == "cem"


def test_comparisons(engine: Engine) -> None:
    """ "new" wins two of three; Cem takes whatever stands first, and is seen to; an adjudication settles an item."""
    w, rng = Writing(), np.random.default_rng(1)
    for number in range(90):
        swapped = bool(rng.integers(2))
        models = {"a": {"model": "new" if swapped else "old"}, "b": {"model": "old" if swapped else "new"}}
        candidates = [{"id": one, "text": f"{one} {number}"} for one in "ab"]
        item = make_item(1, "better", {"prompt": str(number), "candidates": candidates}, {"models": models}, overlap=2)
        w.items += [item]
        best = "a" if swapped == (number % 3 > 0) else "b"
        other = "b" if best == "a" else "a"
        for person in ("ann", "cem"):
            order = ["a", "b"] if rng.integers(2) else ["b", "a"]
            win = best if person == "ann" else order[0]
            lose = other if win == best else best
            w.give(item, person, "compare", {"order": [[win], [lose]], "bad": False}, shown={"order": order})
        w.give(item, "bea", "compare", {"order": [[best], [other]], "bad": number < 9}, shown={"order": ["a", "b"]}, adjudicates=True)  # fmt: skip
        w.give(item, "model:x", "compare", {"order": [["a"], ["b"]], "bad": False})
    w.write(engine)
    better = insight.figures(engine, TASKS, 1)["tasks"]["better"]
    (rate,) = better["models"]["win_rates"]
    assert (rate["model"], rate["other"], rate["items"], rate["better"], rate["worse"]) == ("new", "old", 90, 60, 30)
    assert rate["win_rate"]["low"] < 2 / 3 < rate["win_rate"]["high"]
    sides = {one["name"]: one for one in better["position"]["people"]}
    assert (sides["Cem"]["share"]["value"], sides["Cem"]["decided"]) == (1.0, 90)
    assert sides["Ann"]["p"] > 0.01
    assert "Bea" not in sides
    assert better["models"]["strengths"]["new"]["low"] > 0
    assert abs(better["agreement"]["alpha"]["value"]) < 0.3
    assert better["adjudicated"] == 90
    assert better["both_bad"]["value"] == pytest.approx(9 / 270)


def test_other_kinds(engine: Engine) -> None:
    """Cem rates a star higher than the others; spans are compared by characters; what was accepted and changed is counted."""
    w = Writing()
    for number in range(30):
        stars = make_item(1, "stars", {"text": str(number)}, {})
        names = make_item(1, "names", {"text": f"Ann went to Rome {number}"}, {})
        keep = make_item(1, "keep", {"prompt": "p", "answer": str(number)}, {})
        mend = make_item(1, "mend", {"prompt": "p", "answer": str(number)}, {})
        w.items += [stars, names, keep, mend]
        for person in PEOPLE:
            w.give(stars, person, "rate", {"rating": float(1 + number % 4 + (person == "cem"))})
            spans = [{"start": 0, "end": 3, "label": "who"}, {"start": 12, "end": 16, "label": "where"}]
            w.give(names, person, "span", {"spans": spans[: 1 if person == "cem" else 2]})
        w.give(keep, "ann", "accept", {"accept": number % 3 > 0, "reason": ""})
        w.give(mend, "ann", "edit", {"text": str(number) if number % 2 else "better"})
    w.write(engine)
    found = insight.figures(engine, TASKS, 1)["tasks"]
    assert [round(one["offset"], 2) for one in found["stars"]["people"]] == [-0.5, -0.5, 1.0]
    assert found["stars"]["confusion"]["values"] == ["1", "2", "3", "4", "5"]
    assert 0.5 < found["stars"]["agreement"]["alpha"]["value"] < 0.9
    assert found["names"]["agreement"]["level"] == "nominal"
    assert 0.5 < found["names"]["agreement"]["alpha"]["value"] < 1
    assert found["keep"]["accepted"]["value"] == pytest.approx(2 / 3)
    assert found["mend"]["changed"]["value"] == 0.5


def test_page(engine: Engine, tmp_path: Path) -> None:
    w, item = Writing(), make_item(1, "mood", {"text": "x"}, {})
    w.items += [item]
    for person in PEOPLE:
        w.give(item, person, "label", {"labels": ["bad"]})
    bad = {"type": "bias", "group": "<script>alert(1)</script>", "note": ""}
    w.give(item, "ann", "flag", {"flags": [bad]})
    w.write(engine)
    found = insight.write(engine, TASKS, 1, tmp_path / "insight")
    page = (tmp_path / "insight" / "report.html").read_text()
    assert json.loads((tmp_path / "insight" / "report.json").read_text())["figures"] == found
    assert "mood: people" in page
    assert "<script>alert" not in page
    assert found["tasks"]["mood"]["agreement"]["alpha"]["value"] is None  # all agree on one value: not defined


def test_an_empty_round(engine: Engine, tmp_path: Path) -> None:
    found = insight.write(engine, TASKS, 7, tmp_path / "insight")
    assert {one["answers"] for one in found["tasks"].values()} == {0}


def test_no_label_is_not_the_label_none(engine: Engine) -> None:
    """Ann says "none", Bea chooses nothing: that is no agreement."""
    task = tasks.read((("topics", (("kind", "label"), ("labels", ("none", "price")), ("multi", True))),))
    w = Writing()
    for number in range(8):
        item = make_item(1, "topics", {"text": str(number)}, {})
        w.items.append(item)
        w.give(item, "ann", "label", {"labels": ["none"] if number % 2 else ["price"]})
        w.give(item, "bea", "label", {"labels": [] if number % 2 else ["price"]})
    w.write(engine)
    found = insight.figures(engine, task, 1)["tasks"]["topics"]["agreement"]
    # Of 16 ratings 8 are "price", 4 "none", 4 nothing; D_o = 8 / 16; D_e = (256 - 64 - 16 - 16) / (16 * 15)
    assert found["alpha"]["value"] == pytest.approx(1 - 0.5 / (160 / 240))
