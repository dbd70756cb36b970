"""A tiny model that says good or bad, and is right now and then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    """A config whose model says good or bad, and is right now and then: taught by a few steps."""
    folder, rng = tmp_path_factory.mktemp("moods"), np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(['red', 'cat', 'sat'], 3))} {mood},{mood}" for mood in ["good", "bad"] * 30]
    (folder / "rows.csv").write_text("text,answer\n" + "\n".join(rows) + "\n")
    config = config_lib.base()
    config.workdir, config.model.source, config.data.train = (
        str(folder / "sft"),
        str(tiny_model),
        str(folder / "rows.csv"),
    )
    config.data.prompt, config.data.label_column, config.data.test_fraction = "{text}", "answer", 0.2
    config.data.max_length, config.train.batch_size, config.train.steps, config.train.loss_chunk_tokens = 64, 8, 8, 64
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.0, 1e-2
    config.tracking.progress, config.tracking.report, config.eval.before_after = "off", False, False
    config.eval.bootstrap_samples, config.generate.max_new_tokens = 20, 6
    run.train(config.copy_and_resolve_references(), Path(config.workdir))
    config.tune.adapter = str(folder / "sft" / "adapter")
    config.reward.functions = (("exact_answer", 1.0),)
    config.self_training.rounds, config.self_training.samples, config.self_training.max_new_tokens = 2, 2, 6
    config.self_training.temperature, config.self_training.part_prompts, config.self_training.slots = 1.0, 16, 8
    config.train.steps, config.checkpoint.every_steps = 6, 2
    config.eval.before_after, config.tracking.report = True, True
    return config


@pytest.fixture
def config(started: ConfigDict, tmp_path: Path) -> ConfigDict:
    config = started.copy_and_resolve_references()
    config.workdir = str(tmp_path / "rounds")
    return config
