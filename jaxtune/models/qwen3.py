"""Qwen 3: Llama's block with a norm over each head's queries and keys (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    layers, first = int(hf.get("num_hidden_layers") or 0), int(hf.get("max_window_layers") or 0)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    hf = {"use_sliding_window": False, "head_dim": 128, **hf}
    return reading.decoder(hf, "qwen3", attention={"qk_norm": "head"}, layer_types=types)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(dim: int, layers: int, heads: int, ffn: int, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn, "vocab_size": 151936,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
    }  # fmt: skip


PRESETS = {
    "qwen3_0_6b": _preset(1024, 28, 16, 3072, True),
    "qwen3_1_7b": _preset(2048, 28, 16, 6144, True),
    "qwen3_4b": _preset(2560, 36, 32, 9728, True),
    "qwen3_8b": _preset(4096, 36, 32, 12288),
    "qwen3_14b": _preset(5120, 40, 40, 17408),
    "qwen3_32b": _preset(5120, 64, 64, 25600),
}
