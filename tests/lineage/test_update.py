"""`update` end to end on a tiny model: releases, a refusal, force, rollback, a kill in the middle; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, update, validation
from jaxtune.lineage import ledger
from jaxtune.types import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")
LABELS = {"colours": {"red": "good", "blue": "bad"}, "animals": {"cat": "fine", "dog": "answer"}}


def here(config: Path, workdir: Path, resume: bool, log: Path) -> int:
    """Trains as a process of its own would, in this one, where programs are compiled already."""
    given = config_lib.from_json(config.read_text())
    given.checkpoint.resume = resume
    run.train(given, workdir)
    return 0


def write_rows(path: Path, labels: dict[str, str], seed: int, num: int = 120) -> str:
    """Texts whose last word decides the answer."""
    rng = np.random.default_rng(seed)
    lines = ["text,answer"]
    for _ in range(num):
        word = str(rng.choice(list(labels)))
        lines.append(
            f"{' '.join(rng.choice(['sat', 'ran', 'on', 'mat', 'hill', 'sky', 'under'], 3))} {word},{labels[word]}"
        )
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def stage(folder: Path, model: Path, name: str, rows: str, labels: tuple[str, ...]) -> ConfigDict:
    config = config_lib.base()
    config.name, config.model.source, config.data.train = name, str(model), rows
    config.data.prompt, config.data.label_column, config.data.test_fraction = "{text}", "answer", 0.3
    config.data.validation_fraction, config.data.max_length, config.eval.labels = 0.0, 64, labels
    config.train.batch_size, config.train.steps, config.train.loss_chunk_tokens = 8, 30, 64
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.0, 1e-2
    config.tracking.progress, config.eval.bootstrap_samples = "off", 100
    config.lineage.folder, config.lineage.drift_rows, config.lineage.drift_permutations = (
        str(folder / "lineage"),
        30,
        99,
    )
    config.lineage.replay_share, config.lineage.margin = 0.25, 0.2
    return config


@pytest.fixture(scope="module")
def stages(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigDict]:
    folder = tmp_path_factory.mktemp("stages")
    made = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        rows = write_rows(folder / f"{name}.csv", labels, seed)
        made[name] = stage(folder, tiny_model, name, rows, tuple(labels.values()))
    flipped = dict(zip(LABELS["colours"], reversed(LABELS["colours"].values()), strict=True))
    rows = write_rows(folder / "flipped.csv", flipped, 2)
    made["flipped"] = stage(folder, tiny_model, "flipped", rows, tuple(flipped.values()))
    made["flipped"].lineage.replay_share = 0.0
    for config in made.values():
        validation.validate(config)
    return made


@pytest.fixture(scope="module")
def lineage(stages: dict[str, ConfigDict]) -> Path:
    """Base, two releases, and a stage that was made bad on purpose and is refused."""
    update.update(stages["colours"], Path("unused"), here)
    update.update(stages["animals"], Path("unused"), here)
    with pytest.raises(UserError, match=r"refused: .*colours: accuracy .*; release 2 stays"):
        update.update(stages["flipped"], Path("unused"), here)
    return Path(stages["colours"].lineage.folder)


def test_x(lineage: Path) -> None:
    print((lineage / "ledger.md").read_text())
    print((lineage / "attempts/003/report.json").read_text()[:3000])
    assert 0
