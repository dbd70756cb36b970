"""A classifier trained here is the same classifier in torch: as a whole model, and as an adapter beside its head."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.types import UserError

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LABELS = ("bad", "fine", "good")


@pytest.fixture
def classified(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """Sentences whose first word gives their class, for a tiny decoder with a new head."""
    rng, path = np.random.default_rng(0), tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(160):
            label = str(rng.choice(LABELS))
            rest = " ".join(rng.choice(["the", "cat", "sat", "on", "hill", "sky"], rng.integers(2, 9)))
            file.write(json.dumps({"text": f"{label} {rest}", "label": label}) + "\n")
    config = tiny_config
    config.data.train, config.data.format, config.data.prompt, config.data.label_column = (
        str(path),
        "labelled",
        "{text}",
        "label",
    )
    config.data.chat, config.data.test_fraction = False, 0.2
    config.model.head, config.model.labels, config.train.objective = "sequence", LABELS, "classify"
    config.train.steps, config.tracking.report, config.eval.before_after = 30, True, True
    return config


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_trained_classifier_is_the_same_in_torch(classified: ConfigDict, method: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = classified
    config.tune.method = method
    workdir = Path(config.workdir)
    run.train(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert report["after"]["accuracy"]["value"] > 0.9 > report["before"]["accuracy"]["value"]
    if method == "full":
        folder = workdir / "model"
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert list(model.config.id2label.values()) == list(LABELS)
    else:
        folder = workdir / "adapter"
        base = AutoModelForSequenceClassification.from_pretrained(config.model.source, num_labels=3, pad_token_id=0)
        model = PeftModel.from_pretrained(base, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), {}
    for line in Path(config.data.train).read_text().splitlines():
        texts[len(texts) + 1] = json.loads(line)["text"]
    for line in (workdir / "predictions.jsonl").read_text().splitlines()[:12]:
        row = json.loads(line)
        ids = tokenizer(texts[int(row["row_id"].rsplit(":", 1)[1])], return_tensors="pt")
        with torch.no_grad():
            scores = torch.log_softmax(model.eval()(input_ids=ids["input_ids"]).logits[0], -1).numpy()
        np.testing.assert_allclose([row["after"]["scores"][name] for name in LABELS], scores, atol=1e-4)


def test_a_head_and_its_objective_go_together(classified: ConfigDict) -> None:
    classified.train.objective = "sft"
    with pytest.raises(UserError, match="'classify' with model.head='sequence'"):
        run.train(classified, Path(classified.workdir))
    classified.train.objective, classified.model.labels = "classify", ("bad", "good")
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: answer 'fine' is no label"):
        run.train(classified, Path(classified.workdir))
