"""OPT (arXiv:2205.01068) and Galactica (2211.09085): learnt positions, ReLU or GELU."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model
_OFFSET = 2  # the position table's first rows are unused
_HANDLED = """activation_function do_layer_norm_before enable_bias ffn_dim hidden_size layer_norm_elementwise_affine
    learned_embeddings max_position_embeddings num_attention_heads num_hidden_layers scale_embeddings tie_word_embeddings vocab_size
    word_embed_proj_dim""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    reading.check_attributes(hf, _HANDLED, "opt")
    for name, only in (
        ("layer_norm_elementwise_affine", True),
        ("scale_embeddings", False),
        ("learned_embeddings", True),
    ):
        if hf.get(name, only) != only:
            raise UserError(f"config.json has {name}={hf[name]}; the opt family supports {only}")
    dim, heads = reading.required(hf, "hidden_size"), reading.required(hf, "num_attention_heads")
    bias, before = bool(hf.get("enable_bias", True)), bool(hf.get("do_layer_norm_before", True))
    attention = spec.Attention(heads, heads, dim // heads, bias=bias, out_bias=bias)
    mlp = spec.Mlp(reading.required(hf, "ffn_dim"), hf.get("activation_function", "relu"), gated=False, bias=bias)
    positions = int(hf.get("max_position_embeddings", 2048))
    return Config(
        vocab_size=reading.required(hf, "vocab_size"),
        dim=dim,
        groups=spec.uniform(
            spec.Block(attention, mlp, "pre" if before else "after"), reading.required(hf, "num_hidden_layers")
        ),
        norm=spec.Norm("layer", 1e-5),
        max_positions=positions,
        learned_positions=positions + _OFFSET,
        position_offset=_OFFSET,
        embed_dim=int(hf.get("word_embed_proj_dim") or dim),
        final_norm=before and not hf.get("_remove_final_layer_norm", False),
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        head=reading.decoder_head(hf),
    )


def weights(c: Config) -> list[naming.Weight]:
    model = "model.decoder"
    return naming.table(
        c,
        naming.Names(
            embed=f"{model}.embed_tokens",
            positions=f"{model}.embed_positions",
            project_in=f"{model}.project_in",
            project_out=f"{model}.project_out",
            norm=f"{model}.final_layer_norm",
            layer=f"{model}.layers.{{}}",
            out="self_attn.out_proj",
            up="fc1",
            down="fc2",
            attn_norm="self_attn_layer_norm",
            attn_post_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            mlp_post_norm="final_layer_norm",
        ),
    )


def _preset(dim: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "ffn_dim": 4 * dim, "vocab_size": 50272, "word_embed_proj_dim": dim,
        "activation_function": "relu", "do_layer_norm_before": True, "max_position_embeddings": 2048, **more,
    }  # fmt: skip


_GALACTICA = {"vocab_size": 50000, "activation_function": "gelu", "enable_bias": False}
PRESETS = {
    "opt_125m": _preset(768, 12, 12),
    "opt_350m": _preset(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt_1_3b": _preset(2048, 24, 32),
    "opt_2_7b": _preset(2560, 32, 32),
    "opt_6_7b": _preset(4096, 32, 32),
    "opt_13b": _preset(5120, 40, 40),
    "opt_30b": _preset(7168, 48, 56),
    "opt_66b": _preset(9216, 64, 72),
    "galactica_125m": _preset(768, 12, 12, **_GALACTICA),
    "galactica_1_3b": _preset(2048, 24, 32, **_GALACTICA),
    "galactica_6_7b": _preset(4096, 32, 32, **_GALACTICA),
    "galactica_30b": _preset(7168, 48, 56, **_GALACTICA),
    "galactica_120b": _preset(10240, 96, 80, **_GALACTICA),
}
