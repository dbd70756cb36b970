"""Gemma: Llama's block with scaled embeddings, norms that store scale - 1, GeGLU (arXiv:2403.08295)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    # Published configs say "gelu" and mean its tanh form: transformers always takes that one.
    hf = {**hf, "head_dim": hf.get("head_dim", 256), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}
    scale = float(hf.get("hidden_size") or 1) ** 0.5
    return reading.decoder(hf, "gemma", norm={"plus_one": True}, embed_scale=scale, tied=True)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 256, "intermediate_size": ffn,
        "vocab_size": 256000, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    }  # fmt: skip


PRESETS = {"gemma_2b": _preset(2048, 18, 8, 1, 16384), "gemma_7b": _preset(3072, 28, 16, 16, 24576)}
