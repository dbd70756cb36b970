"""RoBERTa: BERT's layers, positions that start after the padding's number (arXiv:1907.11692)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers
    position_embedding_type tie_word_embeddings type_vocab_size vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "roberta")
    dim, heads, act = (
        reading.required(hf, "hidden_size"),
        reading.required(hf, "num_attention_heads"),
        hf.get("hidden_act", "gelu"),
    )
    attention = spec.Attention(heads, heads, dim // heads, bias=True, out_bias=True, causal=False)
    mlp = spec.Mlp(reading.required(hf, "intermediate_size"), act, gated=False, bias=True)
    rows, offset = int(hf.get("max_position_embeddings", 514)), int(hf.get("pad_token_id", 1)) + 1
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp, "after"), reading.required(hf, "num_hidden_layers")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_eps", 1e-12))),
        max_positions=rows - offset,
        learned_positions=rows,
        position_offset=offset,
        token_types=int(hf.get("type_vocab_size", 2)),
        embed_norm=True,
        final_norm=False,
        tied_head=True,
        head=_head(hf),
    )


def _head(hf: dict[str, Any]) -> spec.Head:
    kind, labels = reading.task(hf), reading.num_labels(hf)
    if kind == "ForSequenceClassification":
        return spec.Head(labels, "classifier.out_proj", dense="classifier.dense", act="tanh", pool="first")
    if kind == "ForTokenClassification":
        return spec.Head(labels, "classifier")
    if kind == "Model":
        return spec.Head(reading.required(hf, "hidden_size"), dense="pooler.dense", act="tanh", pool="mean")
    vocab = reading.required(hf, "vocab_size")
    return spec.Head(vocab, "lm_head.bias", tied=True, dense="lm_head.dense", act="gelu", norm="lm_head.layer_norm")


def weights(c: Config) -> list[naming.Weight]:
    embeddings = "roberta.embeddings"
    return naming.table(
        c,
        naming.Names(
            embed=f"{embeddings}.word_embeddings",
            positions=f"{embeddings}.position_embeddings",
            types=f"{embeddings}.token_type_embeddings",
            embed_norm=f"{embeddings}.LayerNorm",
            layer="roberta.encoder.layer.{}",
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            up="intermediate.dense",
            down="output.dense",
            attn_post_norm="attention.output.LayerNorm",
            mlp_post_norm="output.LayerNorm",
        ),
    )


def _preset(dim: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": 50265, "type_vocab_size": 1, "pad_token_id": 1,
        "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    }  # fmt: skip


PRESETS = {"roberta_base": _preset(768, 12, 12, 3072), "roberta_large": _preset(1024, 24, 16, 4096)}
