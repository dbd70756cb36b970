"""Mixtral: Mistral with eight experts in place of each MLP, two chosen for a token (arXiv:2401.04088)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    experts = spec.Experts(
        num_experts=reading.required(hf, "num_local_experts"),
        top_k=int(hf.get("num_experts_per_tok", 2)),
        dim=reading.required(hf, "intermediate_size"),
        act=hf.get("hidden_act", "silu"),
    )
    layers = reading.required(hf, "num_hidden_layers")
    return reading.decoder(
        hf,
        "mixtral",
        "num_local_experts num_experts_per_tok",
        groups=lambda block: spec.uniform(block._replace(ffn=experts), layers),
    )


def weights(c: Config) -> list[naming.Weight]:
    experts = "block_sparse_moe.experts.{e}"
    return naming.table(
        c,
        naming.Names(
            router="block_sparse_moe.gate",
            expert_gate=f"{experts}.w1",
            expert_up=f"{experts}.w3",
            expert_down=f"{experts}.w2",
        ),
    )


def _preset(dim: int, layers: int, heads: int, ffn: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "intermediate_size": ffn, "vocab_size": vocab,
        "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "max_position_embeddings": length,
    }  # fmt: skip


PRESETS = {
    "mixtral_8x7b": _preset(4096, 32, 32, 14336, 32000, 32768),
    "mixtral_8x22b": _preset(6144, 56, 48, 16384, 32768, 65536),
}
