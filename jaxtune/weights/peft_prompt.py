"""PEFT's prompt-tuning folders, written and read: one tensor, `prompt_embeddings`, and what PEFT wants to know of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.prompt import PATH, Options
from jaxtune.types import UserError
from jaxtune.weights import peft_read

KIND = "PROMPT_TUNING"


def save(folder: Path, model_config: Any, prompt_PD: np.ndarray, base: str) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md`; `base` is what the prompt was tuned for."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    num_tokens, dim = prompt_PD.shape
    tensors = {"prompt_embeddings": np.ascontiguousarray(prompt_PD)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": KIND, "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "num_virtual_tokens": num_tokens,
        "token_dim": dim, "num_transformer_submodules": 1, "num_attention_heads": model_config.num_heads,
        "num_layers": model_config.num_layers, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(_card(base, num_tokens))


def _card(base: str, num_tokens: int) -> str:
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [prompt-tuning, jaxtune]
---
# Soft prompt

{num_tokens} virtual tokens in front of every text, trained by jaxtune on `{base}`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE_MODEL_FOLDER)
model = PeftModel.from_pretrained(base, THIS_FOLDER)
```
"""


def read_config(folder: Path, tune_dtype: str = "float32") -> Options:
    """Reads what `adapter_config.json` says of a soft prompt.

    Raises:
      UserError: the folder holds another kind of adapter, or a prompt that is not plain prompt tuning of a decoder.
    """
    file, config = folder / "adapter_config.json", peft_read.raw_config(folder)
    if config.get("peft_type") != KIND:
        raise UserError(
            f"{file} has peft_type={config.get('peft_type')!r}; tune.method='prompt' reads {KIND!r} (for LoRA, set tune.method='lora')"
        )
    number = config.get("num_virtual_tokens")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(f"{file} has num_virtual_tokens={number!r}; expected a whole number above 0")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(
            f"{file} has num_transformer_submodules={config['num_transformer_submodules']!r}; jaxtune reads 1, a decoder's"
        )
    return Options(number, dtype=jnp.dtype(tune_dtype))


def load(folder: Path, tune_dtype: str = "float32") -> tuple[Options, dict[str, np.ndarray]]:
    """Returns (options, our path -> host array).

    Raises:
      UserError: as `read_config`, or the file does not hold the prompt that the config describes.
    """
    options, have = read_config(folder, tune_dtype), peft_read.tensors(folder)
    found = have.get("prompt_embeddings")
    if list(have) != ["prompt_embeddings"] or found is None or found.ndim != 2 or len(found) != options.num_tokens:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in sorted(have.items())[:3])
        raise UserError(
            f"{folder}/adapter_model.safetensors holds {shapes or 'nothing'}; expected prompt_embeddings of "
            f"{options.num_tokens} rows alone"
        )
    return options, {PATH: found}
