"""ERNIE 2.0 and 3.0, the encoders: BERT with a table of tasks (arXiv:1907.12412, 2107.02137)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """enable_recompute hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads
    num_hidden_layers pool_act position_embedding_type task_type_vocab_size tie_word_embeddings type_vocab_size use_task_id
    vocab_size fuse task_id""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "ernie")
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
        task_types=int(hf.get("task_type_vocab_size", 3)) if hf.get("use_task_id") else 0,
        embed_norm=True,
        final_norm=False,
        tied_head=True,
        head=_head(hf, act),
    )


def _head(hf: dict[str, Any], act: str) -> spec.Head:
    kind, labels = reading.task(hf), reading.num_labels(hf)
    if kind == "ForSequenceClassification":
        return spec.Head(labels, "classifier", dense="ernie.pooler.dense", act="tanh", pool="first")
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
    embeddings = "ernie.embeddings"
    return naming.table(
        c,
        naming.Names(
            embed=f"{embeddings}.word_embeddings",
            positions=f"{embeddings}.position_embeddings",
            types=f"{embeddings}.token_type_embeddings",
            task_types=f"{embeddings}.task_type_embeddings",
            embed_norm=f"{embeddings}.LayerNorm",
            layer="ernie.encoder.layer.{}",
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


def _preset(
    dim: int, layers: int, heads: int, ffn: int, vocab: int, positions: int, types: int, tasks: bool
) -> dict[str, Any]:
    return {
        "architectures": ["ErnieForMaskedLM"], "model_type": "ernie", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": vocab, "type_vocab_size": types, "hidden_act": "gelu",
        "max_position_embeddings": positions, "layer_norm_eps": 1e-12, "use_task_id": tasks, "task_type_vocab_size": 3,
    }  # fmt: skip


PRESETS = {
    "ernie2_base_en": _preset(768, 12, 12, 3072, 30522, 512, 4, False),
    "ernie3_base_zh": _preset(768, 12, 12, 3072, 40000, 2048, 4, True),
}
