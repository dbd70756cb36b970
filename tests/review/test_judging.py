"""The verb judge: blind items, people's verdicts to a decision, a judge that is heard only where it agrees with people; and resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import judging, validation
from jaxtune.review import store, tasks
from jaxtune.review.record import Item, Verdict
from jaxtune.types import UserError
from tests.review.test_endpoint import Server, says
from tests.review.test_endpoint import server as server  # a fixture

NUM = 80


def outputs(path: Path, side: str) -> Path:
    """What a model says to 80 prompts; "new" is the better one at 70% of them, and says the same as "old" at four more."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(NUM + 4):
        good = (rng.random() < 0.7) == (side == "new")
        text = "the same" if number >= NUM else f"{'right' if good else 'wrong'} {number}"
        lines.append(json.dumps({"row_id": f"p:{number}", "prompt": f"question {number}", "generation": text}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    config = config_lib.base()
    config.review.tasks = (("better", (("kind", "compare"),)),)
    config.judging.first, config.judging.second = (
        str(outputs(tmp_path / f"{side}.jsonl", side)) for side in ("old", "new")
    )
    config.judging.names = ("old", "new")
    config.tracking.progress = "off"
    return config


def answer(workdir: Path, num: int, person: str = "ann") -> None:
    """An expert judges the first so many items: the right one is better."""
    with store.opened(str(workdir / "review.db")) as engine, store.writing(engine) as connection:
        row = {"id": person, "name": person, "role": "expert", "skills": [], "active": True, "at": 0.0}
        store.insert_new(connection, store.people, [row])
        for item in store.read_items(engine, 1)[:num]:
            best = right_one(item)
            order = [[best], [({"a", "b"} - {best}).pop()]]
            given = Verdict(f"{item.id[:20]}{person}", item.id, person, "compare", {"order": order, "bad": False}, {"order": ["a", "b"]}, 0, 3.0)  # fmt: skip
            store.insert_verdict(connection, given)


def right_one(item: Item) -> str:
    return next(one["id"] for one in item.payload["candidates"] if one["text"].startswith("right"))


def told(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "judging.json").read_text())


def reads_well(body: dict[str, Any]) -> tuple[int, bytes]:
    """A judge that knows."""
    text = body["messages"][0]["content"]
    first = re.search(r"# Answer A\n(\w+)", text).group(1)  # type: ignore[union-attr]
    return 200, says("A" if first == "right" else "B")


def test_people_decide(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validation.validate(config)
    judging.judge(config, tmp_path)
    assert "No decision yet" in capsys.readouterr().out
    assert told(tmp_path)["figures"] | {"people": 0} == {
        "task": "better", "names": ["old", "new"], "items": NUM, "alike": 4, "alpha": 0.05, "margin": 0.0, "people": 0,
    }  # fmt: skip
    answer(tmp_path, NUM)
    judging.judge(config, tmp_path)
    people = told(tmp_path)["figures"]["people"]
    assert (people["decision"], people["items"], people["people"]) == ("better", NUM, 1)
    assert people["low"] > 0.5
    assert 0 < people["stopped_at"] <= NUM
    assert "new is better, by people" in capsys.readouterr().out
    assert "new is better" in (tmp_path / "report.html").read_text()


def test_items_are_blind(config: ConfigDict, tmp_path: Path) -> None:
    """Neither ids nor their order nor payloads say which model an answer is of; the origin does."""
    judging.judge(config, tmp_path)
    with store.opened(str(tmp_path / "review.db")) as engine:
        items = store.read_items(engine)
    assert not re.search("old|new|first|second|checkpoint", json.dumps([item.payload for item in items]))
    of_a = [item.origin["models"]["a"]["model"] for item in items]
    assert 0.3 < of_a.count("new") / NUM < 0.7
    for item in items:
        number = item.payload["prompt"].split()[1]
        assert {one["text"].split()[1] for one in item.payload["candidates"]} == {number}
        assert item.origin["models"]["a"]["model"] != item.origin["models"]["b"]["model"]


def test_a_judge_that_agrees_is_heard(config: ConfigDict, tmp_path: Path, server: Server) -> None:
    config.judging.judge, config.judging.judge_model, server.reply = server.url, "good", reads_well
    judging.judge(config, tmp_path)
    alone = told(tmp_path)["figures"]
    assert alone["judge"]["items"] == NUM
    assert alone["judge"]["trust"]["why"] == "no item was judged by people and by it"
    assert alone["judge"]["together"] is None
    assert alone["people"]["num"] == 0  # its verdicts are no people's
    answer(tmp_path, 30)
    judging.judge(config, tmp_path)
    found = told(tmp_path)["figures"]
    assert len(server.seen) == 2 * NUM  # both orders, once
    assert (found["people"]["items"], found["people"]["people"]) == (30, 1)
    assert found["judge"]["trust"]["trusted"]
    assert found["judge"]["trust"]["contradictions"] == 0
    assert (found["judge"]["together"]["num"], found["judge"]["together"]["decision"]) == (NUM, "better")
    assert found["judge"]["corrected"]["low"] < 0.7 < found["judge"]["corrected"]["high"]


@pytest.mark.parametrize("reply", ["A", "coin"])
def test_a_judge_that_does_not_agree_is_not(config: ConfigDict, tmp_path: Path, server: Server, reply: str) -> None:
    """One that takes whatever stands first contradicts itself and says nothing but ties; one that guesses is found out."""
    config.judging.judge, config.judging.judge_model = server.url, "bad"
    coin = {"A": lambda text: "A", "coin": lambda text: "AB"[sum(text.encode()) % 2]}[reply]
    server.reply = lambda body: (200, says(coin(body["messages"][0]["content"])))
    judging.judge(config, tmp_path)
    answer(tmp_path, 60)
    judging.judge(config, tmp_path)
    judge = told(tmp_path)["figures"]["judge"]
    assert not judge["trust"]["trusted"]
    assert "lower end must exceed 0.7" in judge["trust"]["why"]
    assert judge["together"] is None
    if reply == "A":
        assert judge["trust"]["contradictions"] == 1.0
        assert judge["win_rate"]["value"] == 0.5


def test_a_judge_that_always_names_the_winner_is_not_trusted(
    config: ConfigDict, tmp_path: Path, server: Server
) -> None:
    """Where the new model wins nine of ten, naming it each time agrees at 0.9 and knows nothing: kappa says so."""
    config.judging.judge, config.judging.judge_model, config.judging.trust = server.url, "flatterer", 0.55
    judging_config_lines = [json.loads(line) for line in Path(config.judging.second).read_text().splitlines()]
    new = {line["generation"] for line in judging_config_lines}

    def flatters(body: dict[str, Any]) -> tuple[int, bytes]:
        first = re.search(r"# Answer A\n(.*)", body["messages"][0]["content"]).group(1)  # type: ignore[union-attr]
        return 200, says("A" if first in new else "B")

    server.reply = flatters
    judging.judge(config, tmp_path)
    answer(tmp_path, NUM)
    judging.judge(config, tmp_path)
    trust = told(tmp_path)["figures"]["judge"]["trust"]
    assert trust["agreement"]["low"] > 0.55
    assert not trust["trusted"]
    assert "always naming one model" in trust["why"]


def test_a_flaky_endpoint(
    config: ConfigDict, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes silent midway; what it said is kept, the same command goes on, and asks again about what could not be read."""
    config.judging.judge, config.judging.judge_model = server.url, "flaky"
    config.judging.retries, config.judging.parallel, config.tracking.progress = 0, 2, "lines"
    server.reply = lambda body: reads_well(body) if len(server.seen) < 60 else (500, b"down")
    with pytest.raises(UserError, match="has stopped answering .HTTP 500: down.; what it said is kept"):
        judging.judge(config, tmp_path)
    with store.opened(str(tmp_path / "review.db")) as engine:
        kept = len(store.read_verdicts(engine, 1, models=True))
        assert not store.read_verdicts(engine, 1)
    assert 25 <= kept <= 30
    server.seen.clear()
    server.reply = lambda body: (
        (200, says("I cannot say")) if "question 79\n" in body["messages"][0]["content"] else reads_well(body)
    )
    judging.judge(config, tmp_path)
    assert told(tmp_path)["figures"]["judge"]["items"] == NUM - 1
    assert f"{kept} of {NUM} items are judged" in capsys.readouterr().err
    server.seen.clear()
    server.reply = reads_well
    judging.judge(config, tmp_path)
    assert told(tmp_path)["figures"]["judge"]["items"] == NUM
    assert len(server.seen) == 2


def test_no_difference(config: ConfigDict, tmp_path: Path) -> None:
    """Ties all along: no difference larger than the margin, and nobody need go on."""
    config.judging.margin = 0.15
    judging.judge(config, tmp_path)
    with store.opened(str(tmp_path / "review.db")) as engine:
        row = {"id": "ann", "name": "ann", "role": "expert", "skills": [], "active": True, "at": 0.0}
        with store.writing(engine) as connection:
            store.insert_new(connection, store.people, [row])
            for item in store.read_items(engine, 1):
                tie = {"order": [["a", "b"]], "bad": False}
                store.insert_verdict(connection, Verdict(item.id, item.id, "ann", "compare", tie, {}, 0, 1.0))
    judging.judge(config, tmp_path)
    people = told(tmp_path)["figures"]["people"]
    assert people["decision"] == "same"
    assert people["stopped_at"] < NUM
    assert "No difference larger than 0.15" in told(tmp_path)["headline"]


@pytest.mark.usefixtures("quick_compile")
def test_local_models(tiny_model: Path, make_model: Any, tmp_path: Path) -> None:
    """Two models answer, a third judges, and nothing is made twice."""
    config = config_lib.base()
    config.model.source, config.tracking.progress = str(tiny_model), "off"
    config.review.tasks = (("better", (("kind", "compare"),)),)
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": text}]} for text in ("who sat on the mat", "what was red", "the sky")
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.judging.prompts, config.judging.second = str(prompts), str(make_model(tmp_path / "other", seed=1))
    config.judging.judge, config.generate.max_new_tokens = "local", 6
    config.eval.batch_size = config.generate.batch_size = 8
    question = tmp_path / "question.txt"
    question.write_text("{prompt} | {first} | {second}")
    config.judging.question = str(question)
    validation.validate(config)
    judging.judge(config, tmp_path / "run")
    made = sorted((tmp_path / "run" / "outputs").glob("*.jsonl"))
    assert len(made) == 2
    with store.opened(str(tmp_path / "run" / "review.db")) as engine:
        (who,) = {v.person for v in store.read_verdicts(engine, 1, models=True)}
        first = store.read_verdicts(engine, 1, models=True)
        assert who.startswith("model:")
        assert all(np.isfinite([one["logit"] for one in v.shown["asked"]]).all() for v in first)
        assert store.read_items(engine)[0].payload["prompt"] == "who sat on the mat"
    before = [path.stat().st_mtime_ns for path in made]
    judging.judge(config, tmp_path / "run")
    assert [path.stat().st_mtime_ns for path in made] == before
    with store.opened(str(tmp_path / "run" / "review.db")) as engine:
        assert store.read_verdicts(engine, 1, models=True) == first


def test_what_it_refuses(config: ConfigDict, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        own = config.copy_and_resolve_references()
        for name, value in changes.items():
            own.judging[name] = value
        with pytest.raises(UserError, match=match):
            (validation.validate(own), judging.judge(own, tmp_path / "run"))

    refused("judging.alpha=0", alpha=0.0)
    refused("judging.margin=0.6", margin=0.6)
    refused("two names that differ", names=("a", "a"))
    refused("'local' or an address", judge="gpt")
    refused("judge_model is empty", judge="https://example.org/v1")
    refused("of kind 'compare'", task="mood")
    refused("expected two that differ", second=config.judging.first)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"row_id": "q:1", "prompt": "x", "generation": "y"}) + "\n")
    refused("no row in common", second=str(other))
    other.write_text(json.dumps({"row_id": "p:1", "prompt": "x", "generation": "y"}) + "\n")
    refused("different prompts", second=str(other))
    other.write_text(json.dumps({"row_id": "p:1", "prompt": "x"}) + "\n")
    refused("other.jsonl:1: no text", second=str(other))
    other.write_text(json.dumps({"row_id": "p:1", "prompt": 5, "generation": "y"}) + "\n")
    refused("the prompt is 5; expected a text or a list", second=str(other))
    other.write_text(2 * (json.dumps({"row_id": "p:1", "prompt": "question 1", "generation": "y"}) + "\n"))
    refused("other.jsonl:2: the row_id 'p:1' is there twice", second=str(other))


def test_outputs_of_files_are_private_too(config: ConfigDict, tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer", reason="needs jaxtune[privacy]")
    for side in ("first", "second"):
        file = tmp_path / f"{side}.jsonl"
        line = {"row_id": "1", "prompt": "who is ann@acme.com?", "generation": f"{side}, ask bo@acme.com"}
        file.write_text(json.dumps(line) + "\n")
        config.judging[side] = str(file)
    config.privacy.enabled = True
    judging.judge(config, tmp_path / "run")
    with store.opened(str(tmp_path / "run" / "review.db")) as engine:
        (item,) = store.read_items(engine)
    assert item.payload["prompt"] == "who is [EMAIL]?"
    assert sorted(one["text"] for one in item.payload["candidates"]) == ["first, ask [EMAIL]", "second, ask [EMAIL]"]


def test_a_judge_fills_no_place(config: ConfigDict, tmp_path: Path, server: Server) -> None:
    """What a model has judged is asked of people all the same, and no disagreement with it is theirs."""
    queue = pytest.importorskip("jaxtune.review.queue")
    config.judging.judge, config.judging.judge_model, server.reply = server.url, "good", reads_well
    judging.judge(config, tmp_path)
    asked = tasks.read(config.review.tasks)
    with store.opened(str(tmp_path / "review.db")) as engine:
        assert queue.open_items(engine, asked, 1) == {"better": (0, NUM)}
        assert not queue.disagreements(engine, asked, 1)
