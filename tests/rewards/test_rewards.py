"""Rewards: what each verifiable one accepts, how they add up, and that a broken one costs its value and never the run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import validation
from jaxtune.data.formats import Example, read_examples
from jaxtune.rewards import scoring, worker
from jaxtune.types import UserError

GSM = {"answer": "She has 3 * 4 = 12 eggs.\n#### 12"}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
MINE = """\
import os, time

def shout(prompt, completion, row):
    return float(completion.isupper()) + row.get("bonus", 0.0)

def unsure(prompt, completion, row):
    print("said aloud")
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        time.sleep(600)
    if completion == "die":
        os._exit(7)
    return {"nan": float("nan"), "none": None, "text": "much"}.get(completion, 1.0)

def two(prompt, completion):
    return 1.0
"""


def section(**changes: object) -> ConfigDict:
    reward = config_lib.base().reward
    reward.update(changes)
    return reward


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.mark.parametrize(
    ("name", "completion", "row", "options", "value"),
    [
        ("exact_answer", "23 + 25 = 48", {"answer": "48"}, {}, 1),
        ("exact_answer", "so it is 49.", {"answer": "48"}, {}, 0),
        ("exact_answer", "Half: $\\frac{1}{2}$", {"answer": 0.5}, {}, 1),
        ("exact_answer", "\\boxed{1,200} of 7", {"answer": "1200"}, {}, 1),
        ("exact_answer", "$(x+1)^2$", {"answer": "x^2+2x+1"}, {}, 1),
        ("exact_answer", "", {"answer": "48"}, {}, 0),
        ("exact_answer", " paris. ", {"answer": "Paris"}, {}, 1),
        ("exact_answer", "London", {"answer": "Paris"}, {}, 0),
        ("exact_answer", "12", GSM, {"answer_regex": r"####\s*(.+)"}, 1),
        ("exact_answer", "12, or 13", GSM, {"answer_regex": r"####\s*(.+)", "completion_regex": r"^(\d+),"}, 1),
        ("exact_answer", "twelve", GSM, {"answer_regex": r"####\s*(.+)", "completion_regex": r"\d+"}, 0),
        ("choice", "Not A, so (B).", {"answer": "b"}, {"choices": ("A", "B")}, 1),
        ("choice", "Bad. A", {"answer": "B"}, {"choices": ("A", "B")}, 0),
        ("choice", "very good", {"answer": "good"}, {"choices": ("good", "very good")}, 0),
        ("choice", "neither", {"answer": "B"}, {"choices": ("A", "B")}, 0),
        ("choice", "**Yes**.", {"answer": "yes"}, {}, 1),
        ("json_schema", 'Here:\n```json\n{"age": 3}\n```', {"schema": SCHEMA}, {}, 1),
        ("json_schema", '{"age": "three"}', {"schema": json.dumps(SCHEMA)}, {}, 0),
        ("json_schema", "age 3", {"schema": SCHEMA}, {}, 0),
        ("regex", "Answer: 4", {}, {"regex": r"\AAnswer: \d+\Z"}, 1),
        ("regex", "The Answer: 4", {}, {"regex": r"\AAnswer: \d+\Z"}, 0),
        ("length", "x" * 5, {}, {"length_characters": (10, 20)}, 0.5),
        ("length", "x" * 20, {}, {"length_characters": (10, 20)}, 1),
        ("length", "x" * 30, {}, {"length_characters": (10, 20)}, 0.5),
        ("length", "x" * 90, {}, {"length_characters": (0, 20)}, 0),
        ("length", "", {}, {"length_characters": (0, 20)}, 1),
    ],
)  # fmt: skip
def test_what_each_accepts(name: str, completion: str, row: dict, options: dict, value: float) -> None:
    reward = worker.function(name, section(**options))
    assert worker.judge(reward, "prompt", completion, row) == (value, "", "")


def test_a_schema_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    reward = worker.function("json_schema", section(json_schema=str(path)))
    assert [reward("", text, {}) for text in ('{"age": 1}', "{}")] == [1, 0]


@pytest.fixture(scope="module")
def unsure(mine: str) -> Iterator[scoring.Rewarder]:
    functions = (("length", 2.0), (f"{mine}:unsure", 1.0))
    with scoring.Rewarder(section(functions=functions, timeout_seconds=6.0, workers=2)) as rewarder:
        yield rewarder


COMPLETIONS = ["good", "raise", "hang", "die", "nan", "none", "text", "good"]


def test_a_broken_reward_costs_its_value_and_is_counted(unsure: scoring.Rewarder) -> None:
    scores = unsure(["p"] * 8, COMPLETIONS, [{}] * 8)
    np.testing.assert_array_equal(scores.parts["length"], np.ones(8))
    np.testing.assert_array_equal(scores.parts["unsure"], [1, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(scores.total, 2 + scores.parts["unsure"])
    assert scores.total.dtype == np.float32
    assert scores.errors == {"unsure: raised": 2, "unsure: timed_out": 1, "unsure: not_a_number": 3}
    assert unsure.first_errors["unsure: timed_out"] == "ran longer than reward.timeout_seconds=6"
    assert {"KeyError", "ended"} & set(unsure.first_errors["unsure: raised"].replace(":", " ").split())
    again = unsure(["p"], ["good"], [{}])
    assert (again.total[0], again.errors) == (3, {})


def test_a_worker_that_was_killed_between_two_calls_is_replaced(unsure: scoring.Rewarder) -> None:
    os.kill(unsure._workers[0]._process.pid, signal.SIGKILL)
    unsure._workers[0]._process.wait()
    scores = unsure(["p"] * 4, ["good"] * 4, [{}] * 4)
    assert scores.total.sum() >= 9  # one value may be lost, and is then counted
    assert sum(scores.errors.values()) <= 1
    assert unsure(["p"] * 4, ["good"] * 4, [{}] * 4).errors == {}


def test_dropped_or_stopped(mine: str) -> None:
    functions = (("length", 1.0), (f"{mine}:unsure", 1.0))
    with scoring.Rewarder(section(functions=functions, on_error="drop")) as rewarder:
        scores = rewarder(["p"] * 2, ["raise", "good"], [{}] * 2)
        np.testing.assert_array_equal(scores.total, [np.nan, 2])
        rewarder._options = section(on_error="stop")
        with pytest.raises(UserError, match=r"reward unsure: not_a_number \(returned nan\) on an answer to 'p'; mend"):
            rewarder(["p"] * 2, ["nan", "good"], [{}] * 2)
        rewarder._options = section(on_error="zero")
        assert rewarder(["p"], ["good"], [{}]).total == 2, "no answer of the call that stopped is left over"


def test_rows_and_modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_as_module.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(tmp_path) in sys.path
    with scoring.Rewarder(section(functions=(("mine_as_module:shout", 0.5),))) as rewarder:
        scores = rewarder(["p"] * 2, ["AH", "oh"], [{}, {"bonus": 3.0}])
    np.testing.assert_array_equal(scores.total, [0.5, 1.5])


@pytest.mark.parametrize(
    ("functions", "options", "says"),
    [
        ((), {}, r"reward\.functions is empty: name at least one"),
        ((("exact_anser", 1.0),), {}, "unsupported reward 'exact_anser'; did you mean 'exact_answer'"),
        ((("regex", 1.0),), {}, r"needs a pattern: set reward\.regex"),
        ((("length", 1.0),), {"length_characters": (9, 3)}, r"expected \(low, high\)"),
        ((("json_schema", 1.0),), {"json_schema": "none.json"}, "'none.json' is not a file"),
        ((("length", 1.0), ("length", 2.0)), {}, "'length' twice"),
        ((("{mine}:shot", 1.0),), {}, "has no function 'shot'; did you mean 'shout'"),
        ((("{mine}:two", 1.0),), {}, r"too many positional arguments; expected f\(prompt, completion, row\)"),
        ((("no_such_module:f", 1.0),), {}, "importing 'no_such_module' failed: ModuleNotFoundError"),
    ],
)
def test_refused_when_the_run_starts(functions: tuple, options: dict, says: str, mine: str) -> None:
    named = tuple((name.format(mine=mine), weight) for name, weight in functions)
    with pytest.raises(UserError, match=says):
        scoring.Rewarder(section(functions=named, **options))


@pytest.mark.parametrize(
    ("name", "row", "options", "says"),
    [
        ("exact_answer", {"question": "1 + 1", "anwser": "2"}, {}, "'answer', which is missing; did you mean 'anwser'"),
        ("exact_answer", {"answer": " "}, {}, "rows:2: .* which is empty"),
        ("exact_answer", {"answer": "12"}, {"answer_regex": "#### (.+)"}, "matches nothing in the answer '12'"),
        ("choice", {"answer": "C"}, {"choices": ("A", "B")}, "'C' is none of reward.choices"),
        ("json_schema", {"prompt": "x"}, {}, "has no schema"),
        ("exact_answer", {"answer": "#### "}, {"answer_regex": "####(.*)"}, "matches nothing in the answer '#### '"),
        ("json_schema", {"schema": "{type: object}"}, {}, "is not JSON"),
        ("json_schema", {"schema": {"type": "objet"}}, {}, "is not a JSON schema"),
    ],
)
def test_a_verifier_without_answers(name: str, row: dict, options: dict, says: str) -> None:
    good = {"answer": "#### A", "schema": SCHEMA} if "answer_regex" in options else {"answer": "A", "schema": SCHEMA}
    with pytest.raises(UserError, match=f"rows:2: .*{says}|{says}"):
        scoring.check_rows(section(functions=((name, 1.0),), **options), ["rows:1", "rows:2"], [good, row])


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("exact_answer", "math_verify"), ("json_schema", "jsonschema")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"needs {module.replace('_', '-')}: pip install 'jaxtune\[rewards\]'"):
            worker.function(name, section())


def test_a_chat_s_last_turn_is_its_answer(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "level": 1}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat))
    (example,), _ = read_examples(tmp_path / "chats.jsonl", config_lib.base().data, answers=False)
    assert scoring.row_of(example) == chat | {"answer": "2"}
    assert scoring.row_of(Example("x", answer="2", row={"answer": "two"})) == {"answer": "two"}


@pytest.mark.parametrize(
    ("functions", "says"),
    [(("length",), r"has 'length'; expected \(reward, weight\)"), ((("length", "1"),), "expected")],
)
def test_the_form_of_the_config(functions: tuple, says: str) -> None:
    config = config_lib.base()
    config.reward.functions = functions
    with pytest.raises(UserError, match=says):
        validation.validate(config)
