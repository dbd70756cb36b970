"""Falcon: 7B (one key/value head), 40B and 180B (grouped, two norms), RW (ALiBi, in sequence) (arXiv:2311.16867)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, rope, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """activation alibi bias ffn_hidden_size hidden_size layer_norm_epsilon max_position_embeddings multi_query
    new_decoder_architecture num_attention_heads num_hidden_layers num_kv_heads num_ln_in_parallel_attn parallel_attn
    rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size apply_residual_connection_post_layernorm n_head n_layer
    n_head_kv""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    old = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
    hf = {**hf, **{new: hf[name] for new, name in old.items() if hf.get(new) is None and hf.get(name) is not None}}
    reading.check_attributes(hf, _HANDLED, "falcon")
    dim, heads = reading.required(hf, "hidden_size"), reading.required(hf, "num_attention_heads")
    grouped, bias = bool(hf.get("new_decoder_architecture", False)), bool(hf.get("bias", False))
    kv_heads = int(hf.get("num_kv_heads") or heads) if grouped else 1 if hf.get("multi_query", True) else heads
    alibi, H = bool(hf.get("alibi", False)), dim // heads
    # ALiBi is added before scores are scaled.
    slopes = tuple(slope * H**-0.5 for slope in reading.alibi_slopes(heads)) if alibi else ()
    attention = spec.Attention(heads, kv_heads, H, "grouped", bias, bias, rope_dims=0 if alibi else H, slopes=slopes)
    width = int(hf.get("ffn_hidden_size") or 4 * dim)
    block = spec.Block(attention, spec.Mlp(width, hf.get("activation", "gelu"), gated=False, bias=bias), _norms(hf))
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(block, reading.required(hf, "num_hidden_layers")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_epsilon", 1e-5))),
        max_positions=int(hf.get("max_position_embeddings", 2048)),
        ropes=() if alibi else (rope.from_hf(hf, H),),
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        head=reading.decoder_head(hf, "classifier"),
    )


def _norms(hf: dict[str, Any]) -> str:
    if hf.get("new_decoder_architecture"):
        return "parallel" if (hf.get("num_ln_in_parallel_attn") or 2) == 2 else "parallel_one"
    return "parallel_one" if hf.get("parallel_attn", True) else "pre"


def weights(c: Config) -> list[naming.Weight]:
    two = c.blocks[0][0].norms == "parallel"
    return naming.table(
        c,
        naming.Names(
            embed="transformer.word_embeddings",
            norm="transformer.ln_f",
            layer="transformer.h.{}",
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            attn_norm="ln_attn" if two else "input_layernorm",
            mlp_norm="ln_mlp" if two else "post_attention_layernorm",
        ),
    )


def _preset(dim: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_kv_heads": kv, "vocab_size": 65024, "bias": False, "alibi": False,
        "parallel_attn": True, "multi_query": True, "new_decoder_architecture": kv > 1, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048, **more,
    }  # fmt: skip


PRESETS = {
    "falcon_rw_1b": _preset(
        2048, 24, 32, 1, vocab_size=50304, alibi=True, bias=True, parallel_attn=False, multi_query=False
    ),
    "falcon_7b": _preset(4544, 32, 71, 1),
    "falcon_40b": _preset(8192, 60, 128, 8),
    "falcon_180b": _preset(14848, 80, 232, 8),
}
