"""Rows that somebody else writes: the student itself in a share of the steps, or a teacher before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.train import own_words, sequences
from jaxtune.types import UserError
from jaxtune.validation import validate

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "deep", seed=5, num_hidden_layers=3)


@pytest.fixture
def taught(tiny_config: ConfigDict, teacher: Path) -> ConfigDict:
    tiny_config.train.objective, tiny_config.distill.teacher = "distill", str(teacher)
    return tiny_config


def steps_of(workdir: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["step"]] = found.get(row["step"], {}) | row
    return found


def test_a_share_of_the_steps_is_the_students_own(
    taught: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own steps have no cross-entropy, gold ones have; a run that was killed goes on to the same losses, to the bit."""
    config = taught
    config.distill.on_policy, config.rl.max_new_tokens, config.distill.alpha = 0.5, 6, 0.5
    config.checkpoint.every_steps, config.data.validation_fraction = 3, 0.1
    config.workdir = str(tmp_path / "whole")
    run.train(config, tmp_path / "whole")
    whole = steps_of(tmp_path / "whole")
    own = {step for step in range(6) if "own_words" in whole[step]}
    assert 0 < len(own) < 6
    assert {int(path.stem.split("_")[1]) for path in (tmp_path / "whole" / "rollouts").glob("*.npz")} == own
    for step in range(6):
        row = whole[step]
        learned = 0.0 if step in own else 0.5 * row["nll"]
        np.testing.assert_allclose(row["loss"], 0.5 * row["divergence"] + learned, rtol=1e-5)
        assert step not in own or row["completion_tokens"] <= 6
    written = own_words.OwnWords._own

    def killed(self: Any, step: int, current: Any) -> Any:
        if step == max(own):
            raise KeyboardInterrupt
        return written(self, step, current)

    config.workdir = str(tmp_path / "killed")
    monkeypatch.setattr(own_words.OwnWords, "_own", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train(config, tmp_path / "killed")
    monkeypatch.undo()
    config.checkpoint.resume = True
    run.train(config, tmp_path / "killed")
    again = steps_of(tmp_path / "killed")
    assert [again[step]["loss"] for step in range(6)] == [whole[step]["loss"] for step in range(6)]


def other_words(teacher: Path, folder: Path) -> Path:
    """The teacher with two words' numbers exchanged."""
    shutil.copytree(teacher, folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    vocab = made["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def test_a_teachers_answers_are_the_rows(
    taught: ConfigDict, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by a teacher of other words, kept, not written twice; only answers that ended are learned; other rows are refused."""
    config = taught
    config.distill.mode, config.distill.teacher = "sequence", str(other_words(teacher, tmp_path / "other"))
    config.generate.max_new_tokens, config.generate.temperature, config.data.max_length = 120, 1.0, 256
    config.workdir, config.train.steps = str(tmp_path / "run"), 2
    run.train(config, tmp_path / "run")
    parts = sorted((tmp_path / "run" / "teacher").glob("answers_*.json"))
    answers = [answer for part in parts for answer in json.loads(part.read_text())]
    ended = [text for text, ended in answers if ended and text.strip()]
    assert 0 < len(ended) < len(answers)
    monkeypatch.setattr(sequences, "_teacher", lambda *_: pytest.fail("written twice"))
    monkeypatch.setattr(run.rows_lib, "summary", lambda config, rows: seen.append(rows) or "")
    seen: list[Any] = []
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run" / "teacher", tmp_path / "again" / "teacher")
    config.workdir = str(tmp_path / "again")
    run.train(config, tmp_path / "again")
    assert [example.answer for example in seen[0].splits.train] == ended
    assert seen[0].splits.train[0].messages[-1]["content"] == ended[0]
    config.data.limit = 5
    with pytest.raises(UserError, match="answers of another teacher, to other rows"):
        sequences.taught(config, tmp_path / "again", seen[0].splits.train[:5], lambda items, *_: items)


def test_rows_without_a_prompt_are_told(taught: ConfigDict, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat sat on the mat"}) + "\n" for _ in range(40)))
    taught.data.train, taught.distill.on_policy = str(path), 1.0
    with pytest.raises(UserError, match="distill.on_policy has the student answer prompts"):
        run.train(taught, tmp_path / "run")
    taught.distill.on_policy, taught.distill.mode = 0.0, "sequence"
    with pytest.raises(UserError, match="has the teacher answer prompts, and this row has none"):
        run.train(taught, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.objective": "sft"}, "goes with train.objective='distill' alone, not with 'sft'"),
        ({"distill.mode": "precomputed", "distill.top_k": 4}, "what the student will write is not known"),
        ({"distill.alpha": 0.0}, "no step on its own answers would teach anything"),
        ({"distill.on_policy": 1.5}, "distill.on_policy is 1.5; expected 0 to 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_told(taught: ConfigDict, changes: dict[str, Any], message: str) -> None:
    taught.distill.on_policy = 0.5
    taught.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validate(taught)
