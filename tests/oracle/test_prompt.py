"""Soft prompts against PEFT, both ways: what jaxtune writes PEFT loads, what PEFT writes jaxtune loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.train import start
from tests.families import CASES, VOCAB

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # PEFT's, where it generates
]

TOLERANCE = 1e-4  # of float32 logits
NUM = 4
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 20))


def behind(tokens: np.ndarray, vocab: int, num: int) -> np.ndarray:
    """Tokens after their virtual ones."""
    return np.concatenate([np.broadcast_to(np.arange(vocab, vocab + num), (len(tokens), num)), tokens], axis=1)


# What differs between families before the first layer: positions, a scaled table, a norm, a projection, no attention.
@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "bloom", "opt_350m", "qwen3_5_text"])
def test_prompt_from_peft_goes_in_and_out(
    case: str, tmp_path: Path, config_of: Any, ours: Any, theirs: Any, apart: Any
) -> None:
    import torch
    from peft import PeftModel, PromptTuningConfig, get_peft_model
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {k: v for k, v in CASES[case].items() if k != "model_type"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(CASES[case]["model_type"], **settings)).eval()
    base.save_pretrained(tmp_path / "base")
    width = base.get_input_embeddings().weight.shape[1]
    model = get_peft_model(
        base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM, token_dim=width)
    ).eval()
    with torch.no_grad():
        for value in model.prompt_encoder.parameters():
            value.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "made")
    expected = theirs(model, TOKENS)

    mine = ours(config_of(tmp_path / "base", {"tune.method": "prompt", "tune.adapter": str(tmp_path / "made")}))
    logits = mine.logits(behind(TOKENS, VOCAB, NUM))
    assert apart(logits, expected, case) <= TOLERANCE
    mine.config.workdir = str(tmp_path / "run")
    folder = start.write_result(
        mine.config, tmp_path / "run", mine.model, None, mine.program, mine.state.params, mine.frozen
    )
    made, written = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "made", folder))
    assert made.keys() == written.keys() == {"prompt_embeddings"}
    assert np.array_equal(made["prompt_embeddings"], written["prompt_embeddings"])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    assert np.array_equal(theirs(again, TOKENS), expected)


def test_trained_prompt_loads_in_peft(
    tiny_config: ConfigDict, from_folder: Any, trained: Any, theirs: Any, apart: Any
) -> None:
    """Training on eight devices, packed rows; PEFT generates what jaxtune generates."""
    import torch
    from peft import PeftModel

    config = tiny_config
    config.tune.method, config.tune.virtual_tokens, config.data.validation_fraction = "prompt", NUM, 0.0
    config.optim.learning_rate = 0.1
    run.train(config, Path(config.workdir))
    folder, mine = Path(config.workdir) / "adapter", trained(config)
    base, vocab = from_folder(Path(config.model.source)), mine.program.model_config.vocab_size
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["num_virtual_tokens"], stored["token_dim"]) == ("PROMPT_TUNING", NUM, 64)
    tokens = np.random.default_rng(5).integers(4, vocab, (2, 24))
    untuned = theirs(base, tokens)
    model = PeftModel.from_pretrained(base, folder).eval()
    logits = mine.logits(behind(tokens, vocab, NUM))
    assert np.abs(logits[:, NUM:] - untuned).max() > 100 * TOLERANCE
    assert apart(logits, theirs(model, tokens), "trained") <= TOLERANCE

    config.generate.max_new_tokens, config.generate.input = 8, str(Path(config.workdir) / "asked.jsonl")
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ("the cat", "who sat on the red mat?")]
    Path(config.generate.input).write_text("".join(json.dumps(one) + "\n" for one in asked))
    run.generate(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "generations.jsonl").read_text().splitlines()]
    from jaxtune.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.model.source)
    for line in lines:
        ids = torch.as_tensor([tokenizer.encode(line["prompt"])])
        made = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(made[0, ids.shape[1] :]) == line["generation"]
