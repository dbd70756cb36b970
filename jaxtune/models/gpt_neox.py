"""GPT-NeoX and Pythia: attention and MLP side by side, rotary in part of each head (arXiv:2204.06745)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, rope, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """attention_bias hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads
    num_hidden_layers num_key_value_heads partial_rotary_factor rope_parameters rope_scaling rope_theta rotary_emb_base rotary_pct
    tie_word_embeddings use_parallel_residual vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "gpt_neox")
    dim, heads = reading.required(hf, "hidden_size"), reading.required(hf, "num_attention_heads")
    hf = {"rope_theta": hf.get("rotary_emb_base", 1e4), "partial_rotary_factor": hf.get("rotary_pct", 0.25), **hf}
    turned, bias = reading.rotary_dims(hf, dim // heads), bool(hf.get("attention_bias", True))
    attention = spec.Attention(heads, heads, dim // heads, "grouped", bias, bias, rope_dims=turned)
    mlp = spec.Mlp(reading.required(hf, "intermediate_size"), hf.get("hidden_act", "gelu"), gated=False, bias=True)
    norms = "parallel" if hf.get("use_parallel_residual", True) else "pre"
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp, norms), reading.required(hf, "num_hidden_layers")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_eps", 1e-5))),
        max_positions=int(hf.get("max_position_embeddings", 2048)),
        ropes=(rope.from_hf(hf, turned),),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        head=reading.decoder_head(hf, "classifier"),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="gpt_neox.embed_in",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            layer="gpt_neox.layers.{}",
            qkv="attention.query_key_value",
            out="attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    )


def _preset(dim: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * dim, "vocab_size": vocab, "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip


PRESETS = {
    "pythia_70m": _preset(512, 6, 8),
    "pythia_160m": _preset(768, 12, 12),
    "pythia_410m": _preset(1024, 24, 16),
    "pythia_1b": _preset(2048, 16, 8),
    "pythia_1_4b": _preset(2048, 24, 16),
    "pythia_2_8b": _preset(2560, 32, 32),
    "pythia_6_9b": _preset(4096, 32, 32, 50432),
    "pythia_12b": _preset(5120, 36, 40, 50688),
    "gpt_neox_20b": _preset(6144, 44, 64, 50432) | {"hidden_act": "gelu_fast"},
}
