"""MPT: ALiBi, layer norms without bias, joined projections (MosaicML, 2023)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model
_HANDLED = """attn_config d_model embedding_fraction emb_pdrop expansion_ratio init_config init_device layer_norm_epsilon
    learned_pos_emb max_seq_len n_heads n_layers no_bias norm_type tie_word_embeddings use_cache verbose vocab_size""".split()
_ATTENTION = "alibi alibi_bias_max attn_impl attn_pdrop attn_type attn_uses_sequence_id softmax_scale".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "mpt")
    own = hf.get("attn_config") or {}
    reading.check_attributes(own, _ATTENTION, "mpt")
    # transformers reads these and goes by the published models' values whatever they say.
    for name, value, only in (
        ("attn_config.alibi", own.get("alibi", True), True),
        ("attn_config.alibi_bias_max", own.get("alibi_bias_max", 8), 8),
        ("expansion_ratio", hf.get("expansion_ratio", 4), 4),
    ):
        if value != only:
            raise UserError(f"config.json has {name}={value}; the mpt family supports {only}")
    dim, heads = reading.required(hf, "d_model"), reading.required(hf, "n_heads")
    slopes = reading.alibi_slopes(heads, odd_first=True)
    attention = spec.Attention(heads, heads, dim // heads, "joined", scale=own.get("softmax_scale"), slopes=slopes)
    mlp = spec.Mlp(4 * dim, "gelu", gated=False)
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp), reading.required(hf, "n_layers")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_epsilon", 1e-5)), bias=False),
        max_positions=int(hf.get("max_seq_len", 2048)),
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        head=reading.decoder_head(hf, "classifier"),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="transformer.wte",
            norm="transformer.norm_f",
            layer="transformer.blocks.{}",
            qkv="attn.Wqkv",
            out="attn.out_proj",
            up="ffn.up_proj",
            down="ffn.down_proj",
            attn_norm="norm_1",
            mlp_norm="norm_2",
        ),
    )


def _preset(dim: int, layers: int, heads: int, length: int) -> dict[str, Any]:
    return {
        "architectures": ["MptForCausalLM"], "model_type": "mpt", "d_model": dim, "n_layers": layers, "n_heads": heads,
        "expansion_ratio": 4, "max_seq_len": length, "vocab_size": 50432, "no_bias": True, "attn_config": {"alibi": True},
    }  # fmt: skip


PRESETS = {"mpt_7b": _preset(4096, 32, 32, 2048), "mpt_30b": _preset(7168, 48, 64, 8192)}
