"""An embedding model trained here is the same in torch: a folder for AutoModel, or an adapter upon it for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import retrieval
from tests.conftest import WORDS, write_tokenizer
from tests.families import TASKS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
TEXTS = ["the red cat", "who was on the hill where the bird sat", "sky"]


def write_bert(folder: Path) -> Path:
    """A tiny random BERT without a head, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    settings = {k: v for k, v in TASKS["BertModel"].items() if k not in ("model_type", "architectures", "vocab_size")}
    BertModel(BertConfig(**settings, vocab_size=write_tokenizer(folder))).save_pretrained(folder)
    return folder


@pytest.fixture
def embedding_config(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    rng, path = np.random.default_rng(0), tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(48):
            words = [str(word) for word in rng.choice(WORDS, 5)]
            file.write(json.dumps({"anchor": " ".join(words[:3]), "positive": " ".join(words)}) + "\n")
    config = tiny_config
    config.data.train, config.data.max_length, config.data.max_passage_length = str(path), 32, 32
    config.train.objective, config.train.steps, config.optim.learning_rate = "contrastive", 3, 1e-2
    return config


@pytest.mark.parametrize(
    ("kind", "method", "pool"),
    [("encoder", "full", "mean"), ("encoder", "lora", "first"), ("decoder", "lora", "last")],
)
def test_embeddings_are_the_same_in_torch(
    kind: str, method: str, pool: str, embedding_config: ConfigDict, tmp_path: Path, trained: Any
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    config = embedding_config
    if kind == "encoder":
        config.model.source = str(write_bert(tmp_path / "bert"))
    config.tune.method, config.model.pooling = method, "" if pool in ("mean", "last") else pool
    workdir = Path(config.workdir)
    run.train(config, workdir)
    mine = trained(config)
    assert mine.program.pool == pool
    assert not any("task_head" in path or "lm_head" in path for path in mine.program.state.params)
    if method == "full":
        folder = workdir / "model"
        theirs, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    else:
        folder = workdir / "adapter"
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert (settings["task_type"], settings["modules_to_save"]) == ("FEATURE_EXTRACTION", None)
        theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(config.model.source), folder)
    tokenizer, own = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    ids = [own.encode_whole(text) for text in TEXTS]
    assert ids == [tokenizer(text)["input_ids"] for text in TEXTS]
    silent = (lambda items, total, label: items, "")
    found = retrieval.embed(mine.program.inference, mine.params, pool, ids, own.pad_id, 4, *silent)
    untrained = retrieval.embed(
        mine.program.inference, {**mine.params, **start_of(config)}, pool, ids, own.pad_id, 4, *silent
    )
    assert np.abs(found - untrained).max() > 1e-2, "training moved nothing, so nothing is shown"
    for row, vector in zip(ids, found, strict=True):
        with torch.no_grad():
            hidden = theirs.eval()(input_ids=torch.as_tensor([row])).last_hidden_state[0]
        state = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pool]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(state, dim=-1).numpy(), atol=1e-5)


def start_of(config: ConfigDict) -> dict[str, Any]:
    """The parameters that the run started from."""
    from tests.oracle.conftest import load_ours

    return load_ours(config).params
