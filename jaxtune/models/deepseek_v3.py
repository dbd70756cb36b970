"""DeepSeek-V3 and R1: latent attention, experts chosen inside the best groups, dense first layers (arXiv:2412.19437)."""

from __future__ import annotations

import math
from typing import Any

from jaxtune.models import naming, reading, rope, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """attention_bias ep_size first_k_dense_replace head_dim hidden_act hidden_size intermediate_size kv_lora_rank
    max_position_embeddings moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob
    num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers pretraining_tp q_lora_rank
    qk_head_dim qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_interleave rope_parameters rope_scaling rope_theta
    routed_scaling_factor scoring_func seq_aux tie_word_embeddings topk_group topk_method aux_loss_alpha v_head_dim vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "deepseek_v3")
    need = reading.required
    turning, nope = need(hf, "qk_rope_head_dim"), need(hf, "qk_nope_head_dim")
    attention = spec.Latent(
        num_heads=need(hf, "num_attention_heads"),
        q_rank=int(hf["q_lora_rank"]) if hf.get("q_lora_rank") else None,
        kv_rank=need(hf, "kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turning,
        value_dim=need(hf, "v_head_dim"),
        bias=bool(hf.get("attention_bias", False)),
        scale=(nope + turning) ** -0.5 * _warmth(hf) ** 2,
        interleaved=bool(hf.get("rope_interleave", True)),
    )
    act, width, shared = (
        hf.get("hidden_act", "silu"),
        need(hf, "moe_intermediate_size"),
        int(hf.get("n_shared_experts") or 0),
    )
    dense = spec.Block(attention, spec.Mlp(need(hf, "intermediate_size"), act))
    experts = spec.Experts(
        num_experts=need(hf, "n_routed_experts"),
        top_k=int(hf.get("num_experts_per_tok", 8)),
        dim=width,
        scoring="sigmoid",
        normalised=bool(hf.get("norm_topk_prob", True)),
        select_bias=True,
        groups=int(hf.get("n_group") or 1),
        top_groups=int(hf.get("topk_group") or 1),
        weight_scale=float(hf.get("routed_scaling_factor", 1.0)),
        act=act,
        shared=spec.Mlp(width * shared, act) if shared else None,
    )
    layers, first = need(hf, "num_hidden_layers"), int(hf.get("first_k_dense_replace", 3))
    first = min(first, layers)
    groups = [spec.Group((dense,), first)] if first else []
    groups += [spec.Group((dense._replace(ffn=experts),), layers - first)] if layers > first else []
    return Config(
        vocab_size=need(hf, "vocab_size"),
        dim=need(hf, "hidden_size"),
        groups=tuple(groups),
        norm=spec.Norm("rms", float(hf.get("rms_norm_eps", 1e-6))),
        max_positions=int(hf.get("max_position_embeddings", 4096)),
        ropes=(rope.from_hf(hf, turning),),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        head=reading.decoder_head(hf),
    )


def _warmth(hf: dict[str, Any]) -> float:
    """YaRN's factor on the scores: 0.1 m ln(s) + 1 (arXiv:2309.00071 eq. 22)."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if (scaling.get("rope_type") or scaling.get("type") or "default") == "default":
        return 1.0
    m, factor = float(scaling.get("mscale_all_dim") or 0), float(scaling.get("factor") or 1)
    return 0.1 * m * math.log(factor) + 1.0 if m and factor > 1 else 1.0


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 163840,
        "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
