"""DistilBERT: half of BERT's layers, no token types (arXiv:1910.01108)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """activation dim hidden_dim max_position_embeddings n_heads n_layers qa_dropout seq_classif_dropout sinusoidal_pos_embds
    tie_weights_ tie_word_embeddings vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "distilbert")
    dim, heads, act = reading.required(hf, "dim"), reading.required(hf, "n_heads"), hf.get("activation", "gelu")
    attention = spec.Attention(heads, heads, dim // heads, bias=True, out_bias=True, causal=False)
    mlp = spec.Mlp(reading.required(hf, "hidden_dim"), act, gated=False, bias=True)
    positions = int(hf.get("max_position_embeddings", 512))
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp, "after"), reading.required(hf, "n_layers")),
        norm=spec.Norm("layer", 1e-12),
        max_positions=positions,
        learned_positions=positions,
        embed_norm=True,
        final_norm=False,
        tied_head=True,
        head=_head(hf, act),
    )


def _head(hf: dict[str, Any], act: str) -> spec.Head:
    kind, labels = reading.task(hf), reading.num_labels(hf)
    if kind == "ForSequenceClassification":
        return spec.Head(labels, "classifier", dense="pre_classifier", act="relu", pool="first")
    if kind == "ForTokenClassification":
        return spec.Head(labels, "classifier")
    if kind == "Model":
        return spec.Head(reading.required(hf, "dim"), pool="mean")
    vocab = reading.required(hf, "vocab_size")
    return spec.Head(
        vocab, "vocab_projector.bias", tied=True, dense="vocab_transform", act=act, norm="vocab_layer_norm"
    )


def weights(c: Config) -> list[naming.Weight]:
    embeddings = "distilbert.embeddings"
    return naming.table(
        c,
        naming.Names(
            embed=f"{embeddings}.word_embeddings",
            positions=f"{embeddings}.position_embeddings",
            embed_norm=f"{embeddings}.LayerNorm",
            layer="distilbert.transformer.layer.{}",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            out="attention.out_lin",
            up="ffn.lin1",
            down="ffn.lin2",
            attn_post_norm="sa_layer_norm",
            mlp_post_norm="output_layer_norm",
        ),
    )


PRESETS: dict[str, dict[str, Any]] = {
    "distilbert_base": {
        "architectures": ["DistilBertForMaskedLM"], "model_type": "distilbert", "dim": 768, "n_layers": 6, "n_heads": 12,
        "hidden_dim": 3072, "vocab_size": 30522, "max_position_embeddings": 512, "activation": "gelu",
    },
}  # fmt: skip
