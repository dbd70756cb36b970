"""The verbs, end to end on a tiny model: what a workdir holds and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run


def metrics(workdir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def test_train_leaves_a_whole_workdir(tiny_config: ConfigDict) -> None:
    config = tiny_config
    config.tracking.report, config.eval.before_after, config.data.test_fraction = True, True, 0.2
    config.eval.metric, config.eval.bootstrap_samples, config.train.eval_every_steps = "perplexity", 50, 3
    run.train(config, Path(config.workdir))
    workdir = Path(config.workdir)
    steps = [m for m in metrics(workdir) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(6))
    assert {"loss", "grad_norm", "learning_rate", "trained_tokens", "tokens_per_second"} <= set(steps[0])
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [m["step"] for m in metrics(workdir) if "eval/loss" in m] == [2, 5]
    report = json.loads((workdir / "report.json").read_text())
    assert report["after"]["perplexity"]["value"] < report["before"]["perplexity"]["value"]
    assert {"steps", "trained_tokens", "tokens_per_second", "seconds", "peak_memory_bytes"} <= set(report["train"])
    assert {"config.json", "predictions.jsonl", "checkpoints", "adapter", "report.html"} <= {
        p.name for p in workdir.iterdir()
    }
    lines = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert lines
    assert all({"row_id", "before", "after"} <= set(line) for line in lines)
    chats = Path(config.data.train).read_text().splitlines()
    for line in lines:  # bytes and nll are of the answer; the token that ends it has no bytes, and counts in neither
        answer = json.loads(chats[int(line["row_id"].rpartition(":")[2]) - 1])["messages"][1]["content"]
        assert line["after"]["num_bytes"] == len(answer)
        assert line["after"]["text_nll_sum"] < line["after"]["nll_sum"]


def test_labels_and_generations_are_measured(tiny_config: ConfigDict, tmp_path: Path, capsys) -> None:
    rng, rows = np.random.default_rng(0), tmp_path / "rows.csv"
    lines = [f"{' '.join(rng.choice(['red', 'cat', 'sat'], 3))} {mood},{mood}" for mood in ["good", "bad"] * 30]
    rows.write_text("text,mood\n" + "\n".join(lines) + "\n")
    config = tiny_config
    config.data.train, config.data.prompt, config.data.label_column = str(rows), "{text}", "mood"
    config.data.test_fraction, config.train.steps, config.eval.bootstrap_samples = 0.3, 40, 50
    config.eval.before_after = True
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "predictions.jsonl").read_text().splitlines()]
    assert np.mean([line["after"]["correct"] for line in lines]) > 0.9
    config.eval.metric, config.generate.max_new_tokens = "exact_match", 8
    run.evaluate(config, Path(config.workdir))
    result = json.loads((Path(config.workdir) / "evaluation.json").read_text())
    assert result["metrics"]["exact_match"]["value"] > 0.9
    assert "exact_match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "metric"), [("dpo", "pair_accuracy"), ("kto", "desirable_auc"), ("reward", "pair_nll")]
)
def test_preferences_go_the_whole_way(tiny_config: ConfigDict, tmp_path: Path, objective: str, metric: str) -> None:
    rng, rows, config = np.random.default_rng(0), tmp_path / "rows.jsonl", tiny_config
    prompts = [" ".join(rng.choice(["red", "cat", "sat", "mat"], 3)) for _ in range(40)]
    lines = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in prompts]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n")
    config.data.train, config.train.objective, config.train.steps = str(rows), objective, 20
    config.data.test_fraction, config.eval.bootstrap_samples, config.eval.before_after = 0.3, 50, True
    config.optim.learning_rate, config.tune.dropout, config.tracking.report = 1e-2, 0.0, True
    if objective == "reward":
        config.model.head, config.model.labels = "sequence", ("reward",)
    run.train(config, Path(config.workdir))
    report = json.loads((Path(config.workdir) / "report.json").read_text())
    before, after = (report[side][metric]["value"] for side in ("before", "after"))
    assert after < 0.5 * before if metric == "pair_nll" else after > 0.9
    assert "chosen" in (Path(config.workdir) / "report.html").read_text() or objective == "kto"
