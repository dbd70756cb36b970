"""Qwen 3 with experts: Qwen 3's attention, 128 small experts of which eight are chosen (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    experts = spec.Experts(
        num_experts=int(hf.get("num_experts") or reading.required(hf, "num_local_experts")),
        top_k=int(hf.get("num_experts_per_tok", 8)),
        dim=reading.required(hf, "moe_intermediate_size"),
        act=hf.get("hidden_act", "silu"),
        normalised=bool(hf.get("norm_topk_prob", False)),
    )
    layers, every = reading.required(hf, "num_hidden_layers"), int(hf.get("decoder_sparse_step", 1))
    dense = set(hf.get("mlp_only_layers") or [])

    def groups(block: spec.Block) -> tuple[spec.Group, ...]:
        sparse = block._replace(ffn=experts)
        return reading.runs([block if i in dense or (i + 1) % every else sparse for i in range(layers)])

    return reading.decoder(
        {"use_sliding_window": False, **hf},
        "qwen3_moe",
        "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers",
        attention={"qk_norm": "head"},
        groups=groups,
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(dim: int, layers: int, heads: int, kv: int, experts_dim: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128, "intermediate_size": ffn,
        "moe_intermediate_size": experts_dim, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
    }  # fmt: skip


PRESETS = {
    "qwen3_30b_a3b": _preset(2048, 48, 32, 4, 768, 6144),
    "qwen3_235b_a22b": _preset(4096, 94, 64, 4, 1536, 12288),
}
