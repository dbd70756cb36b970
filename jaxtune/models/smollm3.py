"""SmolLM3: Llama's block, where every fourth layer has no positions (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, rope, transformer
from jaxtune.models.spec import Config

Model = transformer.Model


def from_hf(hf: dict[str, Any]) -> Config:
    layers, every = reading.required(hf, "num_hidden_layers"), int(hf.get("no_rope_layer_interval") or 4)
    turns = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]  # 1: this layer does turn
    head_dim = int(
        hf.get("head_dim") or reading.required(hf, "hidden_size") // reading.required(hf, "num_attention_heads")
    )
    ropes = (rope.from_hf({"rope_theta": 2e6, **hf}, head_dim), rope.still(head_dim))
    return reading.decoder(
        {"use_sliding_window": False, **hf},
        "smollm3",
        "no_rope_layers no_rope_layer_interval",
        tied=True,
        ropes=ropes,
        rope_of=tuple(0 if turn else 1 for turn in turns),
    )


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(c, naming.Names())


PRESETS: dict[str, dict[str, Any]] = {
    "smollm3_3b": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008, "vocab_size": 128256,
        "rope_theta": 5e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        "max_position_embeddings": 65536,
    },
}  # fmt: skip
