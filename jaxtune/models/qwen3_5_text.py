"""Qwen 3.5, text: three layers of gated delta rule for each of gated attention (arXiv:2412.06464, 2505.06708)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model
_LINEAR, _FULL = "linear_attention", "full_attention"


def from_hf(hf: dict[str, Any]) -> Config:
    if hf.get("attn_output_gate") is False:
        raise UserError("config.json has attn_output_gate=False: the qwen3_5_text family gates its attention")
    num_layers, every = reading.required(hf, "num_hidden_layers"), int(hf.get("full_attention_interval") or 4)
    types = hf.get("layer_types") or [_LINEAR if (i + 1) % every else _FULL for i in range(num_layers)]
    reading.check_layer_types(types, num_layers, (_LINEAR, _FULL))
    delta = spec.Delta(
        num_key_heads=int(hf.get("linear_num_key_heads", 16)),
        num_value_heads=int(hf.get("linear_num_value_heads", 32)),
        key_dim=int(hf.get("linear_key_head_dim", 128)),
        value_dim=int(hf.get("linear_value_head_dim", 128)),
        kernel=int(hf.get("linear_conv_kernel_dim", 4)),
        act=hf.get("hidden_act") or "silu",
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise UserError(
            f"config.json: linear_num_value_heads={delta.num_value_heads} is no multiple of "
            f"linear_num_key_heads={delta.num_key_heads}"
        )
    return reading.decoder(
        {
            **hf,
            "head_dim": hf.get("head_dim") or 256,
            "partial_rotary_factor": hf.get("partial_rotary_factor") or 0.25,
        },
        "qwen3_5_text",
        """attn_output_gate full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
        linear_num_value_heads linear_value_head_dim mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings""",
        attention={"qk_norm": "head", "gated": True},
        norm={"plus_one": True},
        groups=lambda block: reading.runs(
            [block if kind == _FULL else block._replace(attention=delta) for kind in types]
        ),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


def _preset(dim: int, layers: int, heads: int, kv: int, ffn: int, values: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 256, "intermediate_size": ffn,
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "vocab_size": 248320, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, **more,
    }  # fmt: skip


PRESETS = {
    "qwen3_5_0_8b": _preset(1024, 24, 8, 2, 3584, 16, tie_word_embeddings=True),
    "qwen3_5_2b": _preset(2048, 24, 8, 2, 6144, 16, tie_word_embeddings=True),
    "qwen3_5_4b": _preset(2560, 32, 16, 4, 9216, 32, tie_word_embeddings=True),
    "qwen3_5_9b": _preset(4096, 32, 16, 4, 12288, 32),
    "qwen3_5_27b": _preset(5120, 64, 24, 4, 17408, 48),
}
