"""OLMo 3: OLMo 2 with windows in three of four layers; long-context ropes only where a layer sees everything."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    types = hf.get("layer_types") or reading.alternating(int(hf.get("num_hidden_layers") or 0), 4)
    theta = {"rope_theta": hf.get("rope_theta", 5e5)}
    head_dim = int(hf.get("head_dim") or (hf.get("hidden_size") or 0) // max(1, hf.get("num_attention_heads") or 1))
    ropes, rope_of = reading.ropes_by_type(
        hf,
        dict.fromkeys(("sliding_attention", "full_attention"), head_dim),
        types,
        {
            "sliding_attention": {"rope_type": "default", **theta},
            "full_attention": theta | (hf.get("rope_parameters") or hf.get("rope_scaling") or {}),
        },
    )
    hf = {"sliding_window": 4096, **hf}
    return reading.decoder(
        hf, "olmo3", attention={"qk_norm": "all"}, norms="post", layer_types=types, ropes=ropes, rope_of=rope_of
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c, naming.Names(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
    )


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
            "attention_factor": 1.2079441541679836}  # fmt: skip
    return {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": 100278,
        "rope_theta": 5e5, "rope_scaling": yarn, "sliding_window": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "max_position_embeddings": 65536,
    }  # fmt: skip


PRESETS = {"olmo3_7b": _preset(4096, 32, 32, 32, 11008), "olmo3_32b": _preset(5120, 64, 40, 8, 27648)}
