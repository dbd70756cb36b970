"""Adapters trained over a quantised base, in PEFT: on the base as it was, and on what the codes stand for, to the digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.train import start

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 1e-4  # of float32 logits


@pytest.mark.parametrize(("kind", "use_dora"), [("nf4", False), ("int8", True)])
def test_an_adapter_over_codes_loads_in_peft(
    tiny_config: ConfigDict, from_folder: Any, ours: Any, trained: Any, theirs: Any, apart: Any, tmp_path: Path, kind: str, use_dora: bool
) -> None:  # fmt: skip
    from peft import PeftModel

    config = tiny_config
    config.model.quantize, config.tune.use_dora, config.data.validation_fraction = kind, use_dora, 0.0
    begun = ours(config)
    config.export.merge, config.export.output = True, str(tmp_path / "dequantised")
    start.write_result(config, tmp_path, begun.model, None, begun.program, begun.state.params, begun.frozen)
    config.export.merge, config.export.output = False, ""
    run.train(config, Path(config.workdir))
    mine, folder = trained(config), Path(config.workdir) / "adapter"
    tokens = np.random.default_rng(5).integers(4, mine.program.model_config.vocab_size, (2, 32))
    logits = mine.logits(tokens)

    dequantised = from_folder(tmp_path / "dequantised")
    base_logits = theirs(dequantised, tokens)
    assert apart(begun.logits(tokens), base_logits, f"{kind}, untuned") <= TOLERANCE
    assert np.abs(logits - base_logits).max() > 100 * TOLERANCE, "training moved nothing: the comparison would be empty"
    assert apart(logits, theirs(PeftModel.from_pretrained(dequantised, folder).eval(), tokens), kind) <= TOLERANCE

    original = from_folder(Path(config.model.source))
    lost = np.abs(theirs(original, tokens) - base_logits).max()
    adapted = theirs(PeftModel.from_pretrained(original, folder).eval(), tokens)
    assert np.abs(adapted - logits).max() < 4 * lost, "apart by what quantising the base lost, about"

    config.export.merge, config.export.output = True, str(tmp_path / "merged")
    start.write_result(config, tmp_path, mine.model, None, mine.program, mine.state.params, mine.frozen)
    assert apart(logits, theirs(from_folder(tmp_path / "merged"), tokens), f"{kind}, merged") <= TOLERANCE


def test_a_real_gguf_in_codes_still_answers(smollm2_gguf: Path, config_of: Any, ours: Any) -> None:
    """SmolLM2, read from GGUF into 8 bits at the bytes that docs/quantised.md says, knows the capital of France."""
    from jaxtune.evals import measure
    from jaxtune.generate.logits import Sampling
    from jaxtune.weights import source

    changes = {"tune.rank": 1, "model.quantize": "int8", "model.param_dtype": "bfloat16"}
    mine = ours(config_of(smollm2_gguf, changes))
    kept = sum(array.nbytes for path, array in mine.frozen.items() if ".kernel." in path)
    weights = sum(like.size for like in mine.program.quantised.kernels.values())
    assert weights == 106_168_320
    assert kept / weights == pytest.approx(1 + 1 / 64 + 4 / 772, rel=1e-3)
    tokenizer = source.find_tokenizer(mine.config, mine.model)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.render(asked, add_generation_prompt=True))
    sampler = measure.sampler(tokenizer, mine.program, mine.params)
    assert "Paris" in sampler.generate([prompt], Sampling(temperature=0.0), 8)[0]
