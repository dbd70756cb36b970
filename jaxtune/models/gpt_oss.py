"""gpt-oss: experts with clamped gates, attention sinks, windows in every other layer (arXiv:2508.10925)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    experts = spec.Experts(
        num_experts=reading.required(hf, "num_local_experts"),
        top_k=int(hf.get("num_experts_per_tok") or hf.get("experts_per_token") or 4),
        dim=reading.required(hf, "intermediate_size"),
        scoring="top_softmax",
        router_bias=True,
        bias=True,
        clamp=(float(hf.get("swiglu_alpha", 1.702)), float(hf.get("swiglu_limit", 7.0))),
    )
    layers = reading.required(hf, "num_hidden_layers")
    hf = {"attention_bias": True, "sliding_window": 128, **hf, "head_dim": hf.get("head_dim", 64)}
    return reading.decoder(
        hf,
        "gpt_oss",
        "num_local_experts num_experts_per_tok experts_per_token swiglu_alpha swiglu_limit initial_context_length",
        attention={"sinks": True},
        groups=lambda block: spec.uniform(block._replace(ffn=experts), layers),
        layer_types=reading.alternating(layers, 2),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names(router="mlp.router", experts="mlp.experts"))


def _preset(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088,
        "rope_theta": 150000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
        "max_position_embeddings": 131072,
    }  # fmt: skip


PRESETS = {"gpt_oss_20b": _preset(24, 32), "gpt_oss_120b": _preset(36, 128)}
