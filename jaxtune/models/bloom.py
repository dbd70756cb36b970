"""BLOOM: ALiBi in place of positions, a norm over the embeddings (arXiv:2211.05100)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """hidden_size layer_norm_epsilon masked_softmax_fusion n_embed n_head n_inner n_layer num_attention_heads num_hidden_layers
    offset_alibi pretraining_tp seq_length skip_bias_add skip_bias_add_qkv slow_but_exact tie_word_embeddings unk_token_id
    vocab_size bias_dropout_fusion attention_softmax_in_fp32""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "bloom")
    hf = {
        "hidden_size": hf.get("n_embed"),
        "n_head": hf.get("num_attention_heads"),
        "n_layer": hf.get("num_hidden_layers"),
    } | {k: v for k, v in hf.items() if v is not None}
    dim, heads = reading.required(hf, "hidden_size"), reading.required(hf, "n_head")
    slopes = reading.alibi_slopes(heads)
    attention = spec.Attention(heads, heads, dim // heads, "grouped", True, True, slopes=slopes)
    mlp = spec.Mlp(int(hf.get("n_inner") or 4 * dim), "gelu_pytorch_tanh", gated=False, bias=True)
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp), reading.required(hf, "n_layer")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_epsilon", 1e-5))),
        max_positions=1 << 20,  # ALiBi has no last position
        embed_norm=True,
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        head=reading.decoder_head(hf, "classifier"),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="transformer.word_embeddings",
            embed_norm="transformer.word_embeddings_layernorm",
            norm="transformer.ln_f",
            layer="transformer.h.{}",
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    )


def _preset(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": dim, "n_layer": layers, "n_head": heads,
        "vocab_size": 250880, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip


PRESETS = {
    "bloom_560m": _preset(1024, 24, 16),
    "bloom_1b1": _preset(1536, 24, 16),
    "bloom_1b7": _preset(2048, 24, 16),
    "bloom_3b": _preset(2560, 30, 32),
    "bloom_7b1": _preset(4096, 30, 32),
    "bloom_176b": _preset(14336, 70, 112),
}
