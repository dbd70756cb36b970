"""Gemma 3, text: five windowed layers for each that sees all, each kind with a rope of its own (arXiv:2503.19786)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    hf = {**hf, "head_dim": hf.get("head_dim", 256), "sliding_window": hf.get("sliding_window", 4096)}
    layers, every = (
        int(hf.get("num_hidden_layers") or 0),
        int(hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6),
    )
    types = hf.get("layer_types") or reading.alternating(layers, every)
    ropes, rope_of = reading.ropes_by_type(
        hf,
        dict.fromkeys(("sliding_attention", "full_attention"), int(hf["head_dim"])),
        types,
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": hf.get("rope_local_base_freq", 1e4)},
            "full_attention": {"rope_theta": hf.get("rope_theta", 1e6), **(hf.get("rope_scaling") or {})},
        },
    )
    return reading.decoder(
        hf,
        "gemma3_text",
        """query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window_pattern _sliding_window_pattern
        rope_local_base_freq""",
        attention={
            "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            "qk_norm": "head",
        },
        mlp={"act": hf.get("hidden_activation") or "gelu_pytorch_tanh"},
        norm={"plus_one": True},
        norms="sandwich",
        layer_types=types,
        tied=True,
        ropes=ropes,
        rope_of=rope_of,
        embed_scale=float(hf.get("hidden_size") or 1) ** 0.5,
        head_softcap=hf.get("final_logit_softcapping"),
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


def _preset(
    dim: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int, window: int, query: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "intermediate_size": ffn,
        "query_pre_attn_scalar": query, "sliding_window": window, "sliding_window_pattern": 6, "vocab_size": 262144,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, **more,
    }  # fmt: skip


_LONG = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "vocab_size": 262208}
PRESETS = {
    "gemma3_270m": _preset(640, 18, 4, 1, 256, 2048, 512, 256, max_position_embeddings=32768),
    "gemma3_1b": _preset(1152, 26, 4, 1, 256, 6912, 512, 256, max_position_embeddings=32768),
    "gemma3_4b": _preset(2560, 34, 8, 4, 256, 10240, 1024, 256, **_LONG),
    "gemma3_12b": _preset(3840, 48, 16, 8, 256, 15360, 1024, 256, **_LONG),
    "gemma3_27b": _preset(5376, 62, 32, 16, 128, 21504, 1024, 168, **_LONG),
}
