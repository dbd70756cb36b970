"""ERNIE 4.5, dense: Llama's block with rotary pairs side by side (2i, 2i + 1)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    bias = bool(hf.get("use_bias", False))
    hf = {"attention_bias": bias, "mlp_bias": bias, "rms_norm_eps": 1e-5, **hf, "head_dim": hf.get("head_dim", 128)}
    return reading.decoder(hf, "ernie4_5", "use_bias", attention={"interleaved": True}, tied=True)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


PRESETS: dict[str, dict[str, Any]] = {
    "ernie4_5_0_3b": {
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "hidden_size": 1024, "num_hidden_layers": 18,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 103424,
        "rope_theta": 5e5, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
