"""ModernBERT: an encoder with rotary positions, gated MLPs, and windows in two of three layers (arXiv:2412.13663)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """attention_bias classifier_activation classifier_bias classifier_pooling cls_token_id decoder_bias deterministic_flash_attn
    embedding_dropout global_attn_every_n_layers global_rope_theta hidden_activation hidden_size initializer_cutoff_factor
    intermediate_size layer_norm_eps layer_types local_attention local_rope_theta max_position_embeddings mlp_bias mlp_dropout
    norm_bias norm_eps num_attention_heads num_hidden_layers position_embedding_type reference_compile repad_logits_with_grad
    rope_parameters sparse_pred_ignore_index sparse_prediction tie_word_embeddings vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "modernbert")
    dim, heads, layers = (
        reading.required(hf, f"{n}") for n in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    every = int(hf.get("global_attn_every_n_layers", 3))
    types = hf.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    reading.check_layer_types(types, layers, ("sliding_attention", "full_attention"))
    theta = {
        "full_attention": hf.get("global_rope_theta", 160000.0),
        "sliding_attention": hf.get("local_rope_theta", 1e4),
    }
    fallback = {kind: {"rope_type": "default", "rope_theta": value} for kind, value in theta.items()}
    ropes, rope_of = reading.ropes_by_type(hf, dict.fromkeys(theta, dim // heads), types, fallback)
    bias = bool(hf.get("attention_bias", False))
    attention = spec.Attention(heads, heads, dim // heads, "joined", bias, bias, rope_dims=dim // heads, causal=False)
    act = hf.get("hidden_activation", "gelu")
    mlp = spec.Mlp(reading.required(hf, "intermediate_size"), act, joined=True, bias=bool(hf.get("mlp_bias", False)))
    block = spec.Block(attention, mlp)
    first = spec.Group((block._replace(first_norm=False),), 1)  # the embeddings are normed already
    window = int(hf.get("local_attention", 128)) // 2
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=(first, spec.Group((block,), layers - 1)) if layers > 1 else (first,),
        norm=spec.Norm("layer", float(hf.get("norm_eps", 1e-5)), bias=bool(hf.get("norm_bias", False))),
        max_positions=int(hf.get("max_position_embeddings", 8192)),
        ropes=ropes,
        rope_of=rope_of,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
        embed_norm=True,
        tied_head=True,
        head=_head(hf),
    )


def _head(hf: dict[str, Any]) -> spec.Head:
    kind, labels = reading.task(hf), reading.num_labels(hf)
    if kind == "Model":
        return spec.Head(reading.required(hf, "hidden_size"), pool="mean")
    common: dict[str, Any] = {
        "dense": "head.dense",
        "dense_bias": bool(hf.get("classifier_bias", False)),
        "norm": "head.norm",
    }
    common["act"] = hf.get("classifier_activation", "gelu")
    if kind in ("ForSequenceClassification", "ForTokenClassification"):
        pooled = {"cls": "first", "mean": "mean"}[hf.get("classifier_pooling", "cls")]
        return spec.Head(labels, "classifier", pool=pooled if kind == "ForSequenceClassification" else "", **common)
    out = "decoder.bias" if hf.get("decoder_bias", True) else ""
    return spec.Head(reading.required(hf, "vocab_size"), out, tied=True, **common)


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="model.embeddings.tok_embeddings",
            embed_norm="model.embeddings.norm",
            norm="model.final_norm",
            layer="model.layers.{}",
            qkv="attn.Wqkv",
            out="attn.Wo",
            gate_up="mlp.Wi",
            down="mlp.Wo",
            attn_norm="attn_norm",
            mlp_norm="mlp_norm",
        ),
    )


def _preset(dim: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": 50368, "max_position_embeddings": 8192,
        "global_attn_every_n_layers": 3, "local_attention": 128,
    }  # fmt: skip


PRESETS = {"modernbert_base": _preset(768, 22, 12, 1152), "modernbert_large": _preset(1024, 28, 16, 2624)}
