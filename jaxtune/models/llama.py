"""Llama 2 and 3.x, SmolLM2 and their like: RMSNorm, rotary, grouped-query attention, SwiGLU (arXiv:2307.09288, 2407.21783)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    """Reads a Hugging Face `config.json`; refuses what this family does not handle."""
    if hf.get("pretraining_tp", 1) != 1:
        raise UserError(f"config.json has pretraining_tp={hf['pretraining_tp']}; the llama family supports 1")
    return reading.decoder(hf, "llama", "pretraining_tp")


def weights(c: Config) -> list[naming.Weight]:
    """The table of weight names, `Hugging Face <-> ours`."""
    return naming.table(c, naming.Names())


def _preset(
    dim: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, theta: float, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


_31 = {"max_position_embeddings": 131072, "rope_scaling": _llama3_rope(8.0)}
_32 = {"max_position_embeddings": 131072, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_SMOL = {"max_position_embeddings": 8192, "tie_word_embeddings": True}

# The published config.json numbers of well-known models: shapes for `plan` and benchmarks, with random weights.
PRESETS: dict[str, dict[str, Any]] = {
    "llama_tiny": _preset(64, 2, 4, 2, 128, 256, 1e4, max_position_embeddings=512),
    "smollm2_135m": _preset(576, 30, 9, 3, 1536, 49152, 1e5, **_SMOL),
    "smollm2_360m": _preset(960, 32, 15, 5, 2560, 49152, 1e5, **_SMOL),
    "smollm2_1_7b": _preset(2048, 24, 32, 32, 8192, 49152, 1.3e5, **_SMOL),
    "llama2_7b": _preset(4096, 32, 32, 32, 11008, 32000, 1e4, max_position_embeddings=4096),
    "llama2_13b": _preset(5120, 40, 40, 40, 13824, 32000, 1e4, max_position_embeddings=4096),
    "llama2_70b": _preset(8192, 80, 64, 8, 28672, 32000, 1e4, max_position_embeddings=4096),
    "llama3_8b": _preset(4096, 32, 32, 8, 14336, 128256, 5e5, max_position_embeddings=8192),
    "llama3_1_8b": _preset(4096, 32, 32, 8, 14336, 128256, 5e5, **_31),
    "llama3_1_70b": _preset(8192, 80, 64, 8, 28672, 128256, 5e5, **_31),
    "llama3_1_405b": _preset(16384, 126, 128, 8, 53248, 128256, 5e5, **_31),
    "llama3_2_1b": _preset(2048, 16, 32, 8, 8192, 128256, 5e5, head_dim=64, **_32),
    "llama3_2_3b": _preset(3072, 28, 24, 8, 8192, 128256, 5e5, head_dim=128, **_32),
}
