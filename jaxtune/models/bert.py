"""BERT and MiniLM: attention both ways, norms after each sum (arXiv:1810.04805)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model
_HANDLED = """gradient_checkpointing hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads
    num_hidden_layers position_embedding_type tie_word_embeddings type_vocab_size vocab_size directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "bert")
    if hf.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"config.json has position_embedding_type={hf['position_embedding_type']!r}; expected 'absolute'"
        )
    dim, heads, act = (
        reading.required(hf, "hidden_size"),
        reading.required(hf, "num_attention_heads"),
        hf.get("hidden_act", "gelu"),
    )
    attention = spec.Attention(heads, heads, dim // heads, bias=True, out_bias=True, causal=False)
    mlp = spec.Mlp(reading.required(hf, "intermediate_size"), act, gated=False, bias=True)
    positions = int(hf.get("max_position_embeddings", 512))
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp, "after"), reading.required(hf, "num_hidden_layers")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_eps", 1e-12))),
        max_positions=positions,
        learned_positions=positions,
        token_types=int(hf.get("type_vocab_size", 2)),
        embed_norm=True,
        final_norm=False,
        tied_head=True,
        head=_head(hf, act),
    )


def _head(hf: dict[str, Any], act: str) -> spec.Head:
    kind, labels = reading.task(hf), reading.num_labels(hf)
    if kind == "ForSequenceClassification":
        return spec.Head(labels, "classifier", dense="bert.pooler.dense", act="tanh", pool="first")
    if kind == "ForTokenClassification":
        return spec.Head(labels, "classifier")
    if kind == "Model":
        return spec.Head(reading.required(hf, "hidden_size"), dense="pooler.dense", act="tanh", pool="mean")
    at = "cls.predictions"
    return spec.Head(
        reading.required(hf, "vocab_size"),
        f"{at}.bias",
        tied=True,
        dense=f"{at}.transform.dense",
        act=act,
        norm=f"{at}.transform.LayerNorm",
    )


def weights(c: Config) -> list[naming.Weight]:
    embeddings = "bert.embeddings"
    return naming.table(
        c,
        naming.Names(
            embed=f"{embeddings}.word_embeddings",
            positions=f"{embeddings}.position_embeddings",
            types=f"{embeddings}.token_type_embeddings",
            embed_norm=f"{embeddings}.LayerNorm",
            layer="bert.encoder.layer.{}",
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


def _preset(dim: int, layers: int, heads: int, ffn: int, vocab: int = 30522) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": vocab, "type_vocab_size": 2,
        "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip


PRESETS = {
    "bert_base": _preset(768, 12, 12, 3072),
    "bert_large": _preset(1024, 24, 16, 4096),
    "minilm_l6": _preset(384, 6, 12, 1536) | {"architectures": ["BertModel"]},
    "minilm_l12": _preset(384, 12, 12, 1536) | {"architectures": ["BertModel"]},
}
