"""OLMo 2: norms after the sublayers instead of before, and over all queries and keys (arXiv:2501.00656)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    return reading.decoder(hf, "olmo2", attention={"qk_norm": "all"}, norms="post")


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c, naming.Names(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
    )


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": 100352,
        "rope_theta": 5e5, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }  # fmt: skip


PRESETS = {
    "olmo2_1b": _preset(2048, 16, 16, 16, 8192),
    "olmo2_7b": _preset(4096, 32, 32, 32, 11008),
    "olmo2_13b": _preset(5120, 40, 40, 40, 13824),
    "olmo2_32b": _preset(5120, 64, 40, 8, 27648),
}
