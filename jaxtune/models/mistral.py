"""Mistral: Llama's block with a sliding window over all layers (arXiv:2310.06825)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    return reading.decoder(hf, "mistral")


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(layers: int, heads: int, head_dim: int, dim: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim, "intermediate_size": ffn,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None,
        "max_position_embeddings": 32768, **more,
    }  # fmt: skip


PRESETS = {
    "mistral_7b_v0_1": _preset(32, 32, 128, 4096, 14336, 32000, rope_theta=1e4, sliding_window=4096),
    "mistral_7b_v0_3": _preset(32, 32, 128, 4096, 14336, 32768, rope_theta=1e6),
    "mistral_nemo_12b": _preset(40, 32, 128, 5120, 14336, 131072, rope_theta=1e6, max_position_embeddings=131072),
    "mistral_small_24b": _preset(40, 32, 128, 5120, 32768, 131072, rope_theta=1e8),
}
