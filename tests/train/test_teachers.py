"""A teacher's words computed before training: the numbers of one in the step, kept, gone on with, and refused for other rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.train import rows as rows_lib
from jaxtune.train import teachers
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "deep", seed=5, num_hidden_layers=3)


def losses(config: ConfigDict, workdir: Path) -> list[float]:
    config.workdir = str(workdir)
    run.train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "eval/loss") if name in row]


def test_kept_words_teach_as_the_teacher(
    tiny_config: ConfigDict, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss of training and validation is the online one's; what was stopped goes on; rows that changed are told."""
    config = tiny_config
    config.train.objective, config.distill.teacher, config.train.steps = "distill", str(teacher), 4
    config.distill.top_k, config.distill.divergence, config.distill.non_target = 5, "js", True
    online = losses(config, tmp_path / "online")
    config.distill.mode = "precomputed"
    workdir = tmp_path / "kept"
    monkeypatch.setattr(teachers, "_FLUSH_BATCHES", 1)
    speaker, said = teachers._speaker, list[int]()

    def stopped(*args: Any) -> Any:
        say = speaker(*args)

        def once(batch: Any) -> Any:
            if len(said) == 2:
                raise KeyboardInterrupt
            said.append(1)
            return say(batch)

        return once

    monkeypatch.setattr(teachers, "_speaker", stopped)
    with pytest.raises(KeyboardInterrupt):
        losses(config, workdir)
    assert json.loads((workdir / "teacher" / "about.json").read_text())["done"] == {"train": 2}

    def counted(*args: Any) -> Any:
        say = speaker(*args)
        return lambda batch: (said.append(1), say(batch))[1]

    monkeypatch.setattr(teachers, "_speaker", counted)
    np.testing.assert_allclose(losses(config, workdir), online, rtol=1e-5)
    batches = len(said)
    assert batches > 3
    again = tmp_path / "again"
    again.mkdir()
    (workdir / "teacher").rename(again / "teacher")
    np.testing.assert_allclose(losses(config, again), online, rtol=1e-5)
    assert len(said) == batches
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    for change, what in (("data.limit", "other rows"), ("distill.top_k", "another distill.top_k")):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({change: 7})
        rows = rows_lib.read(other, tokenizer, lambda items, *_: items)
        with pytest.raises(UserError, match=f"what a teacher said of {what}"):
            teachers.filled(other, again, rows, None, {}, None)  # type: ignore[arg-type]
