"""CrowS-Pairs of a masked model, as `audit` scores it, is what a loop over torch's BERT gives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from jaxtune import bias_audit
from jaxtune import config as config_lib
from tests.conftest import WORDS

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compile")]
PAIRS = [
    ("the cat ran on the hill", "the dog ran on the hill"),
    ("a red bird", "a blue bird sat"),
    ("who was good", "what was good"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*special, *WORDS]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("bert")
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(
        BertConfig(vocab_size=len(names), max_position_embeddings=32, initializer_range=0.5, **shape)
    ).save_pretrained(folder)
    return folder


def test_pseudo_log_likelihoods(bert: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    with (tmp_path / "crows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        table.writerows([n, more, less, "stereo", "age"] for n, (more, less) in enumerate(PAIRS))
    config = config_lib.base()
    config.model.source, config.train.objective, config.tracking.progress = str(bert), "mlm", "off"
    config.audit.crows, config.eval.batch_size = str(tmp_path / "crows.csv"), 4
    bias_audit.audit(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "models" / "run.json").read_text())
    assert kept["how"]["crows"] == "pseudo-log-likelihood of shared tokens"

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for both, row in zip(PAIRS, kept["crows"], strict=True):
        shared = set(both[0].split()) & set(both[1].split())
        for text, got in zip(both, (row["more"], row["less"]), strict=True):
            ids, wanted = tokenizer(text, return_tensors="pt")["input_ids"], 0.0
            for at, word in enumerate(text.split(), start=1):
                if word not in shared:
                    continue
                masked = ids.clone()
                masked[0, at] = tokenizer.mask_token_id
                with torch.no_grad():
                    wanted += float(torch.log_softmax(model(masked).logits[0, at], -1)[ids[0, at]])
            assert got == pytest.approx(wanted, rel=1e-4)
        assert row["preferred"] == (row["more"] > row["less"])
