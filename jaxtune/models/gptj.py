"""GPT-J: attention and MLP side by side after one norm, rotary pairs (2i, 2i + 1) in part of each head."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, rope, spec, transformer
from jaxtune.models.spec import Config

Model = transformer.Model
_HANDLED = """activation_function layer_norm_epsilon n_embd n_head n_inner n_layer n_positions rotary rotary_dim scale_attn_weights
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
    vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "gptj")
    dim, heads = reading.required(hf, "n_embd"), reading.required(hf, "n_head")
    turned = int(hf.get("rotary_dim") or dim // heads)
    attention = spec.Attention(heads, heads, dim // heads, rope_dims=turned, interleaved=True)
    mlp = spec.Mlp(int(hf.get("n_inner") or 4 * dim), hf.get("activation_function", "gelu_new"), gated=False, bias=True)
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(spec.Block(attention, mlp, "parallel_one"), reading.required(hf, "n_layer")),
        norm=spec.Norm("layer", float(hf.get("layer_norm_epsilon", 1e-5))),
        max_positions=int(hf.get("n_positions", 2048)),
        ropes=(rope.from_hf({}, turned),),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        head_bias=True,
        head=reading.decoder_head(hf),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            embed="transformer.wte",
            norm="transformer.ln_f",
            layer="transformer.h.{}",
            q="attn.q_proj",
            k="attn.k_proj",
            v="attn.v_proj",
            out="attn.out_proj",
            up="mlp.fc_in",
            down="mlp.fc_out",
            attn_norm="ln_1",
        ),
    )


PRESETS: dict[str, dict[str, Any]] = {
    "gptj_6b": {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
        "n_positions": 2048, "vocab_size": 50400, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    },
}  # fmt: skip
