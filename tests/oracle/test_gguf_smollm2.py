"""The real SmolLM2-135M-Instruct from one GGUF file: jaxtune's reading against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure
from jaxtune.generate.logits import Sampling

pytestmark = [pytest.mark.oracle, pytest.mark.samples]

TEXT = """The lighthouse keeper had counted ships for thirty-one years. Each evening, before the lamp was lit, she wrote
the number in a ledger bound in green cloth: 14 on a calm day, 3 in a storm, none at all when the fog came down. "Why do
you bother?" her nephew asked. "Nobody reads it." She turned a page. "The harbour was built for two hundred ships a day,"
she said, "and when they asked me whether it should be closed, I was the only person in the county who knew the answer."
He thought about that for a while. Later he became an engineer, and whenever somebody showed him a design he would ask
what had been measured, by whom, and how often; if they could not say, he asked them to come back in a year. His
colleagues found this tiresome, until the bridge at Arden (which he had refused to sign) cracked along its eastern span.
def total(values): return sum(v for v in values if v > 0)  # 12.5% of cases fail: see table 4."""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Any) -> Tokenizer:
    return Tokenizer.load(smollm2_gguf)


def test_logits_agree(
    smollm2_ours: Any, smollm2_torch: Any, theirs: Any, tokenizer: Tokenizer, record_property
) -> None:
    tokens = [tokenizer.encode(TEXT)]
    assert len(tokens[0]) >= 200
    expected = theirs(smollm2_torch, tokens)
    apart = np.abs(smollm2_ours.logits(tokens) - expected).max()
    record_property("max_logit_difference", float(apart))
    print(
        f"\nSmolLM2 from GGUF, {len(tokens[0])} tokens: max |Δ logit| {apart:.2e} (logits reach {expected.max():.1f})"
    )
    assert apart <= 1e-3


def test_greedy_answer_is_the_same(smollm2_ours: Any, smollm2_torch: Any, tokenizer: Tokenizer) -> None:
    import torch

    prompt = tokenizer.encode(tokenizer.render(QUESTION, add_generation_prompt=True))
    sampler = measure.sampler(tokenizer, smollm2_ours.program, smollm2_ours.params)
    greedy = Sampling.from_config(smollm2_ours.config.generate)
    blocks = list(sampler.stream([prompt], greedy, 24))
    made = [int(t) for t in np.concatenate(blocks, axis=1)[0]]
    end = next(i for i, token in enumerate(made) if token in tokenizer.stop_ids)
    out = smollm2_torch.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=24, eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    assert made[: end + 1] == out[0, len(prompt) :].tolist()
    assert sampler.generate([prompt], greedy, 24) == [ANSWER]
