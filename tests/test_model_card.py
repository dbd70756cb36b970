"""The README of a result: what Hugging Face reads of it, and that it says what the run measured, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from ml_collections import ConfigDict

from jaxtune import model_card, run, validation, verbs
from jaxtune.train import goodput
from jaxtune.types import UserError

AUDIT = {
    "figures": {
        "base": [{"part": "probes", "name": "gender", "metric": "flip rate", "rows": 60, "value": 0.1, "low": 0.05, "high": 0.2}],
        "tuned": [{"part": "probes", "name": "gender", "metric": "flip rate", "rows": 60, "value": 0.3, "low": 0.2, "high": 0.43}],
    },
    "differences": {
        "tuned - base": [{"part": "probes", "name": "gender", "metric": "flip rate", "rows": 60, "value": 0.2, "low": 0.1, "high": 0.3, "p": 0.001}]
    },
    "notices": ["gender: words were swapped in 60 rows."],
}  # fmt: skip
ROUND = {
    "ledger": {
        "round": 2, "verdicts": {"verdicts": 1234, "people": 5, "seconds": 10.0}, "items": {"better": 600},
        "data": {"pairs.jsonl": {"rows": 410, "sha256": "ab"}},
    },
    "comparison": {"wins": 30, "ties": 5, "losses": 15, "rate": {"value": 0.65, "low": 0.52, "high": 0.76}},
    "figures": {"tasks": {"better": {"kind": "compare", "answers": 1234, "agreement": {"level": "nominal", "alpha": {"value": 0.61, "low": 0.5, "high": 0.7}}}}},
}  # fmt: skip


@pytest.fixture
def config(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """A run on chats in which people write their addresses, with a protected set."""
    chats = Path(tiny_config.data.train).read_text().splitlines()
    rows = tmp_path / "rows|<b>.jsonl"
    with rows.open("w") as file:
        for number, line in enumerate(chats):
            row = json.loads(line)
            row["messages"][0]["content"] += f" write to p{number}@acme.com"
            file.write(json.dumps(row) + "\n")
    kept = tmp_path / "kept.txt"
    kept.write_text("the cat sat on the mat\nthe red cat ran, said bob@acme.com\n" * 3)
    tiny_config.data.train, tiny_config.data.test_fraction = str(rows), 0.2
    tiny_config.eval.metric, tiny_config.eval.before_after, tiny_config.eval.bootstrap_samples = "perplexity", True, 50
    settings = (("data.test", str(kept)), ("data.format", "text"), ("eval.bootstrap_samples", 50), ("tolerance", 9.0))
    tiny_config.protect.sets = (("kept", settings),)
    return tiny_config


def read(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def section(body: str, name: str) -> str:
    return body.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_a_run_with_private_rows_tells_what_it_did(config: ConfigDict, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("presidio_analyzer", reason="needs jaxtune[privacy]")
    (tmp_path / "audit.json").write_text(json.dumps(AUDIT))
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "report.json").write_text(json.dumps(ROUND))
    config.privacy.enabled, config.privacy.names = True, ("Jane Doe",)
    config.tracking.report, config.tracking.progress, config.train.steps = True, "lines", 2
    config.card.audit, config.card.guidance = str(tmp_path / "audit.json"), str(tmp_path / "round")
    config.card.license, config.card.language, config.card.intended_use = "apache-2.0", ("en",), "Answering **mail**."
    config.name = "support | mail"
    validation.validate(config)
    workdir = Path(config.workdir)
    run.train(config, workdir)
    # What was found is counted, in the terminal, the report and the table of findings, and nowhere shown.
    said, report = capsys.readouterr().err, json.loads((workdir / "report.json").read_text())
    assert "personal data: 96 email masked, in 96 rows" in said
    assert report["privacy"]["found"] == {"email": {"masked": 96}}
    assert sum(one["rows"] for one in report["privacy"]["by_split"].values()) == 96
    found = (workdir / "personal_data.csv").read_text().splitlines()
    assert len(found) == 1 + 96
    assert found[1].split(",")[2:5] == ["messages[0].content", "email", "mask"]
    for path in workdir.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".csv", ".html", ".md") and path.name != "config.json":
            assert "acme" not in path.read_text("utf-8"), path
            assert "Jane" not in path.read_text("utf-8") or path.parent.parent.name == "checkpoints", path
    front, body = read(workdir / "adapter")
    assert {"library_name", "base_model", "license", "datasets", "metrics", "model-index", "tags"} <= set(front)
    assert (front["library_name"], front["base_model_relation"], front["license"]) == ("peft", "adapter", "apache-2.0")
    assert front["datasets"] == ["rows|<b>.jsonl"]  # of a file of this machine the name alone
    result = front["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == report["after"][result["metrics"][0]["type"]]["value"]
    card = ModelCard((workdir / "adapter" / "README.md").read_text("utf-8"), ignore_metadata_errors=False)
    name, results = model_index_to_eval_results(yaml.safe_load(yaml.safe_dump(front["model-index"])))
    assert name == "support | mail"
    assert results[0].metric_type in report["after"]
    assert card.data.base_model == front["base_model"]

    assert "<b>" not in body
    assert "| email | masked | 96 |" in section(body, "Personal data")
    assert report["files"][0]["sha256"] in section(body, "Training data")
    assert "| kept | Bits per byte |" in section(body, "What it forgot")
    assert "0.3 (0.2 to 0.43)" in section(body, "Bias")
    assert "| probes: gender | flip rate | tuned - base | 0.2 (0.1 to 0.3) | 0.001 |" in section(body, "Bias")
    guidance = section(body, "Human guidance")
    assert "- Verdicts: 1,234" in guidance
    assert "30 won, 5 tied, 15 lost; win rate 0.65 (0.52 to 0.76)" in guidance
    assert "| better | compare | 1,234 | nominal | 0.61 (0.5 to 0.7) |" in guidance
    assert section(body, "Intended use").strip() == "Answering **mail**."
    assert section(body, "Limitations").strip() == "Not stated."
    assert "PeftModel.from_pretrained(base, THIS_FOLDER)" in section(body, "How to load")


def test_without_all_that_the_card_says_what_is_not_known(config: ConfigDict) -> None:
    config.protect.sets, config.train.steps = (), 2
    workdir = Path(config.workdir)
    run.train(config, workdir)
    _, body = read(workdir / "adapter")
    assert section(body, "Bias").strip() == "Not audited."
    assert "were not looked for" in section(body, "Personal data")
    assert "not known" in section(body, "What it forgot")
    assert "No verdict of a person" in section(body, "Human guidance")
    # Exported again, merged: a model's card, with what the run measured, if it has a report.
    config.tracking.report, config.export.merge = True, True
    (workdir / "report.json").write_text(json.dumps({"name": config.name, "after": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "how_to": [["In PyTorch", "model = load()"]]}))  # fmt: skip
    run.export(config, workdir)
    front, body = read(workdir / "model")
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")
    assert "| Accuracy |  | 50.0% (40.0% to 60.0%) |" in section(body, "Results")
    assert "model = load()" in section(body, "How to load")


def test_how_to_load_is_kept_however_often_a_card_is_written(tmp_path: Path, tiny_config: ConfigDict) -> None:
    given = '---\nlibrary_name: peft\nbase_model: "a/b"\ntags: [lora]\n---\n# LoRA adapter\n\nRank 4.\n\n```python\n# loads\nx = 1\n```\n'
    (tmp_path / "README.md").write_text(given)
    facts = {
        "name": "x: [y]\n---",
        "config": tiny_config.to_dict(),
        "after": {"rmse": {"value": float("nan"), "low": 0, "high": 1}},
    }
    model_card.write(tmp_path, facts)
    first = (tmp_path / "README.md").read_text()
    front, body = read(tmp_path)
    assert (front["base_model"], front["tags"]) == ("a/b", ["lora", "jaxtune", "sft"])
    assert front["model-index"][0]["name"] == "x: [y]\n---"
    assert section(body, "How to load").splitlines()[2:] == [
        "### LoRA adapter", "", "Rank 4.", "", "```python", "# loads", "x = 1", "```", "<!-- end of how to load -->",
    ]  # fmt: skip
    model_card.write(tmp_path, facts)
    assert (tmp_path / "README.md").read_text() == first


def test_what_is_named_must_be_there(tmp_path: Path, tiny_config: ConfigDict) -> None:
    tiny_config.card.audit = str(tmp_path / "gone.json")
    with pytest.raises(UserError, match="card.audit=.*does not exist"):
        validation.validate(tiny_config)
    (tmp_path / "gone.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'figures'"):  # before anything is trained
        verbs.asked(tiny_config, tmp_path / "run", goodput.Wall())
    with pytest.raises(UserError, match="has no 'figures'"):
        model_card.write(tmp_path, {"name": "x", "config": tiny_config.to_dict()})
    tiny_config.card.audit, tiny_config.card.guidance = "", str(tmp_path / "gone.json")
    with pytest.raises(UserError, match="neither a round's ledger line"):
        model_card.write(tmp_path, {"name": "x", "config": tiny_config.to_dict()})
    with pytest.raises(UserError, match="neither a round's ledger line"):
        model_card.check(tiny_config.card)
    tiny_config.card.guidance = str(tmp_path)  # whose report may be written yet
    validation.validate(tiny_config)
    model_card.check(tiny_config.card)


def test_what_others_wrote_above_a_readme_may_be_anything() -> None:
    assert model_card.split("---\nlicense: [mit\n---\nText") == ({}, "Text")
    facts = {
        "name": "x",
        "config": {"card": {"base_model": "", "license": "", "language": ()}, "train": {"objective": "sft"}},
    }
    assert model_card.front_matter(facts, {"tags": "chat"})["tags"] == ["chat", "jaxtune", "sft"]


@pytest.mark.parametrize(
    ("uri", "name"),
    [("hf:owner/set@main#a.jsonl", "owner/set"), ("/home/me/secret/rows.csv", "rows.csv"), ("npm:a@1#b", "npm:a@1#b")],
)
def test_names_of_data(uri: str, name: str) -> None:
    assert model_card.dataset(uri) == name
