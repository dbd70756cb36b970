"""Phi-3 and Phi-4: Llama's block with joined projections (arXiv:2404.14219)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    return reading.decoder(
        hf, "phi3", "original_max_position_embeddings", attention={"projection": "joined"}, mlp={"joined": True}
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names(qkv="self_attn.qkv_proj"))


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": 4096, **more,
    }  # fmt: skip


PRESETS = {
    "phi3_mini_4k": _preset(3072, 32, 32, 32, 8192, 32064, sliding_window=2047),
    "phi3_medium_4k": _preset(5120, 40, 40, 10, 17920, 32064, sliding_window=2047),
    "phi4": _preset(5120, 40, 40, 10, 17920, 100352, rope_theta=2.5e5, max_position_embeddings=16384),
}
