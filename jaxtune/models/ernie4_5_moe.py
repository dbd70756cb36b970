"""ERNIE 4.5 with experts: chosen with a bias that balances them, beside shared ones that every token takes."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_MOE = "moe_intermediate_size moe_k moe_num_experts moe_num_shared_experts moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min use_bias"


def from_hf(hf: dict[str, Any]) -> Config:
    layers, bias = reading.required(hf, "num_hidden_layers"), bool(hf.get("use_bias", False))
    width, shared = reading.required(hf, "moe_intermediate_size"), int(hf.get("moe_num_shared_experts") or 0)
    act = hf.get("hidden_act", "silu")
    experts = spec.Experts(
        num_experts=reading.required(hf, "moe_num_experts"),
        top_k=int(hf.get("moe_k", 6)),
        dim=width,
        select_bias=True,
        bias=bias,
        act=act,
        shared=spec.Mlp(width * shared, act, bias=bias) if shared else None,
    )
    first, every = int(hf.get("moe_layer_start_index", 1)), int(hf.get("moe_layer_interval", 1))
    last = int(hf.get("moe_layer_end_index", -1))
    last = layers - 1 if last == -1 else last

    def groups(block: spec.Block) -> tuple[spec.Group, ...]:
        sparse = block._replace(ffn=experts)
        return reading.runs([sparse if (i + 1) % every == 0 and first <= i <= last else block for i in range(layers)])

    hf = {"attention_bias": bias, "mlp_bias": bias, "rms_norm_eps": 1e-5, **hf}
    return reading.decoder(hf, "ernie4_5_moe", _MOE, attention={"interleaved": True}, groups=groups, tied=True)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names(select_bias="mlp.moe_statics.e_score_correction_bias"))


def _preset(
    dim: int, layers: int, heads: int, kv: int, ffn: int, width: int, shared: int, first: int, last: int
) -> dict[str, Any]:
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "moe_intermediate_size": width,
        "moe_num_experts": 64, "moe_k": 6 if shared else 8, "moe_num_shared_experts": shared, "moe_layer_start_index": first,
        "moe_layer_end_index": last, "moe_layer_interval": 1, "vocab_size": 103424, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": bool(shared), "max_position_embeddings": 131072,
    }  # fmt: skip


PRESETS = {
    "ernie4_5_21b_a3b": _preset(2560, 28, 20, 4, 12288, 1536, 2, 1, 27),
    "ernie4_5_300b_a47b": _preset(8192, 54, 64, 8, 28672, 3584, 0, 3, 53),
}
