"""The real SmolLM2-135M-Instruct from one GGUF file: jaxtune's reading against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune import run
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure
from jaxtune.generate.logits import Sampling
from jaxtune.train import start

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.samples,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# Against float64, torch's float32 logits are off by 5.8e-5 at most, jaxtune's by 5.8e-5 (rms 7.9e-6 both, on TEXT; logits reach
# 38): two right answers may lie further apart than 1e-4.
ROUNDING = 3e-4
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
    smollm2_ours: Any, smollm2_torch: Any, theirs: Any, apart: Any, tokenizer: Tokenizer, record_property: Any
) -> None:
    tokens = [tokenizer.encode(TEXT)]
    assert len(tokens[0]) >= 200
    worst = apart(smollm2_ours.logits(tokens), theirs(smollm2_torch, tokens), f"GGUF, {len(tokens[0])} tokens")
    record_property("max_logit_difference", worst)
    assert worst <= 1e-3


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


def test_trained_adapter_and_merged_model_load_in_torch(
    smollm2_gguf: Path, smollm2_torch: Any, chats: Path, config_of: Any, trained: Any, theirs: Any, from_folder: Any, apart: Any,
    same_tokenizer: Any, tokenizer: Tokenizer, tmp_path: Path,
) -> None:  # fmt: skip
    """GGUF in; a PEFT adapter and a merged Hugging Face folder out; all three agree, and so does the tokenizer."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    config = config_of(
        smollm2_gguf,
        {"data.train": str(chats), "data.max_length": 32, "train.batch_size": 8, "train.steps": 2, "tune.rank": 4,
         "optim.learning_rate": 2e-3, "optim.warmup_steps": 0, "data.validation_fraction": 0.0},
    )  # fmt: skip
    config.workdir = str(tmp_path / "run")
    run.train(config, Path(config.workdir))
    mine, tokens = trained(config), [tokenizer.encode(TEXT)[:48]]
    logits, untuned = mine.logits(tokens), theirs(smollm2_torch, tokens)
    assert np.abs(logits - untuned).max() > 0.1
    tuned = PeftModel.from_pretrained(smollm2_torch, tmp_path / "run" / "adapter").eval()
    expected = theirs(tuned, tokens)
    tuned.unload()  # the base model is shared with other tests
    assert apart(logits, expected, "SmolLM2 adapter") <= ROUNDING
    config.export.merge, config.export.output = True, str(tmp_path / "merged")
    start.write_result(
        config, Path(config.workdir), mine.model, tokenizer, mine.program, mine.state.params, mine.frozen
    )
    assert apart(logits, theirs(from_folder(tmp_path / "merged"), tokens), "SmolLM2 merged") <= ROUNDING
    same_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "merged"), tokenizer)
