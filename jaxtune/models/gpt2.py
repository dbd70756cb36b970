"""GPT-2, the architecture of GPT-3's dense sizes too: learnt positions, layer norm, GELU (Radford et al., 2019)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """activation_function layer_norm_epsilon n_ctx n_embd n_head n_inner n_layer n_positions reorder_and_upcast_attn
    scale_attn_weights summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    tie_word_embeddings vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "gpt2")
    dim, heads = reading.required(hf, "n_embd"), reading.required(hf, "n_head")
    scale = None if hf.get("scale_attn_weights", True) else 1.0
    attention = spec.Attention(heads, heads, dim // heads, "joined", bias=True, out_bias=True, scale=scale)
    mlp = spec.Mlp(int(hf.get("n_inner") or 4 * dim), hf.get("activation_function", "gelu_new"), gated=False, bias=True)
    positions = int(hf.get("n_positions", 1024))
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp), reading.required(hf, "n_layer")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_epsilon", 1e-5))),
        max_positions=positions,
        learned_positions=positions,
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        head=reading.decoder_head(hf, "classifier"),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="transformer.wte",
            positions="transformer.wpe",
            norm="transformer.ln_f",
            layer="transformer.h.{}",
            qkv="attn.c_attn",
            out="attn.c_proj",
            up="mlp.c_fc",
            down="mlp.c_proj",
            attn_norm="ln_1",
            mlp_norm="ln_2",
            transposed=False,
        ),
    )


def _preset(dim: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": dim, "n_layer": layers, "n_head": heads,
        "n_positions": positions, "vocab_size": 50257, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    }  # fmt: skip


PRESETS = {
    "gpt2": _preset(768, 12, 12),
    "gpt2_medium": _preset(1024, 24, 16),
    "gpt2_large": _preset(1280, 36, 20),
    "gpt2_xl": _preset(1600, 48, 25),
    "gpt3_2_7b": _preset(2560, 32, 32, 2048),
    "gpt3_6_7b": _preset(4096, 32, 32, 2048),
    "gpt3_13b": _preset(5120, 40, 40, 2048),
    "gpt3_175b": _preset(12288, 96, 96, 2048),
}
