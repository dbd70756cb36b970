"""An embedding model, end to end on a tiny decoder: trained on pairs, searched with before and after, told, exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from tests.conftest import WORDS


@pytest.fixture
def pairs_config(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """Passages of six words; a query holds five of them, after words that every query has."""
    rng, path = np.random.default_rng(0), tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(240):
            words = [str(word) for word in rng.choice(WORDS[:24], 6, replace=False)]
            row = {"query": f"who is {' '.join(words[:5])}", "passage": f"{' '.join(words)} was fine"}
            file.write(json.dumps(row) + "\n")
    config = tiny_config
    config.data.train, config.data.test_fraction, config.data.validation_fraction = str(path), 0.3, 0.1
    config.data.max_length, config.data.max_passage_length = 32, 32
    config.train.objective, config.tune.method, config.model.pooling = "contrastive", "full", "mean"
    config.train.batch_size, config.train.steps, config.optim.learning_rate = 32, 40, 2e-3
    config.train.symmetric, config.eval.bootstrap_samples = True, 50
    config.eval.before_after, config.tracking.report, config.mesh.fsdp, config.mesh.data = True, True, 1, -1
    return config


@pytest.mark.usefixtures("quick_compile")
def test_an_embedding_model_from_pairs_to_report(pairs_config: ConfigDict, capsys: pytest.CaptureFixture[str]) -> None:
    config = pairs_config
    workdir = Path(config.workdir)
    run.dry_run(config, workdir)
    assert "passage of" in capsys.readouterr().out
    run.train(config, workdir)
    said = capsys.readouterr().out
    assert "recall_at_1, after against BM25: " in said
    report = json.loads((workdir / "report.json").read_text())
    assert report["after"]["recall_at_1"]["value"] > report["before"]["recall_at_1"]["value"] + 0.1
    assert report["difference"]["recall_at_5"]["test"] == "exact McNemar"
    bm25 = report["beside"]["BM25"]
    assert bm25["metrics"]["recall_at_1"]["value"] > 0.5, "the words of a query are those of its passage"
    gap = report["after"]["mrr_at_10"]["value"] - bm25["metrics"]["mrr_at_10"]["value"]
    assert bm25["difference"]["mrr_at_10"]["value"] == pytest.approx(gap)
    assert "Beside BM25" in (workdir / "report.html").read_text()
    assert report["examples"][0]["after"].endswith("was fine"), "passages are shown, not their ids"
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == report["data"]["measured_rows"]
    assert not report["data"]["dropped"]
    for row in rows:
        for side in (row["before"], row["after"]):
            assert len(side["top_5"]) == 5
            assert (row["answer"] in side["top_5"]) == (side["rank"] <= 5)
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0]
    assert 0 < steps[0]["padding_share"] < 1
    assert steps[0]["trained_tokens"] == 32, "pairs"

    pooling = json.loads((workdir / "model" / "1_Pooling" / "config.json").read_text())
    assert (pooling["word_embedding_dimension"], pooling["pooling_mode_mean_tokens"]) == (64, True)
    assert not pooling["pooling_mode_lasttoken"]
    config.model.source, config.model.pooling = str(workdir / "model"), ""  # the folder says how it is pooled
    config.workdir = str(workdir) + "-again"
    run.evaluate(config, Path(config.workdir))
    again = json.loads((Path(config.workdir) / "evaluation.json").read_text())
    assert again["metrics"]["mrr_at_10"]["value"] == pytest.approx(report["after"]["mrr_at_10"]["value"], abs=0.02)
    assert "BM25" in capsys.readouterr().out
