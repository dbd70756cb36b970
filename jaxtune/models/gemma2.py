"""Gemma 2: Gemma with norms around both sublayers, soft caps, windows in every other layer (arXiv:2408.00118)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    hf = {**hf, "head_dim": hf.get("head_dim", 256), "sliding_window": hf.get("sliding_window", 4096)}
    return reading.decoder(
        hf,
        "gemma2",
        "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping",
        attention={
            "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            "softcap": hf.get("attn_logit_softcapping", 50.0),
        },
        mlp={"act": hf.get("hidden_activation") or "gelu_pytorch_tanh"},
        norm={"plus_one": True},
        norms="sandwich",
        layer_types=reading.alternating(int(hf.get("num_hidden_layers") or 0), 2),
        tied=True,
        embed_scale=float(hf.get("hidden_size") or 1) ** 0.5,
        head_softcap=hf.get("final_logit_softcapping", 30.0),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            attn_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
        ),
    )


def _preset(dim: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int, query: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "intermediate_size": ffn,
        "query_pre_attn_scalar": query, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "vocab_size": 256000, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    }  # fmt: skip


PRESETS = {
    "gemma2_2b": _preset(2304, 26, 8, 4, 256, 9216, 256),
    "gemma2_9b": _preset(3584, 42, 16, 8, 256, 14336, 256),
    "gemma2_27b": _preset(4608, 46, 32, 16, 128, 36864, 144),
}
