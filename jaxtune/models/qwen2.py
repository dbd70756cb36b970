"""Qwen 2 and 2.5: Llama's block with biases on queries, keys and values (arXiv:2407.10671)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    layers, first = int(hf.get("num_hidden_layers") or 0), int(hf.get("max_window_layers") or 0)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return reading.decoder({"use_sliding_window": False, **hf}, "qwen2", attention={"bias": True}, layer_types=types)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }  # fmt: skip


PRESETS = {
    "qwen2_5_0_5b": _preset(896, 24, 14, 2, 4864, 151936, True),
    "qwen2_5_1_5b": _preset(1536, 28, 12, 2, 8960, 151936, True),
    "qwen2_5_3b": _preset(2048, 36, 16, 2, 11008, 151936, True),
    "qwen2_5_7b": _preset(3584, 28, 28, 4, 18944, 152064),
    "qwen2_5_14b": _preset(5120, 48, 40, 8, 13824, 152064),
    "qwen2_5_32b": _preset(5120, 64, 40, 8, 27648, 152064),
    "qwen2_5_72b": _preset(8192, 80, 64, 8, 29568, 152064),
}
