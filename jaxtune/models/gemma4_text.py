"""Gemma 4, text: windowed and full layers of their own head sizes, inputs to each layer, shared keys and values, experts."""

from __future__ import annotations

from typing import Any

from jaxtune.models import naming, reading, spec, transformer
from jaxtune.models.spec import Config
from jaxtune.types import UserError

Model = transformer.Model
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def from_hf(hf: dict[str, Any]) -> Config:
    hf = {
        **hf, "head_dim": hf.get("head_dim") or 256, "sliding_window": hf.get("sliding_window") or 512,
        "hidden_activation": hf.get("hidden_activation") or "gelu_pytorch_tanh",
    }  # fmt: skip
    if hf.get("use_bidirectional_attention") == "all":
        raise UserError(
            "config.json has use_bidirectional_attention='all', which the gemma4_text family does not handle: it is causal"
        )
    num_layers = reading.required(hf, "num_hidden_layers")
    types = list(hf.get("layer_types") or reading.alternating(num_layers, 6))
    reading.check_layer_types(types, num_layers, (_SLIDING, _FULL))
    types[-1] = _FULL  # as transformers has it
    heads = _heads(hf, types)
    dims = {kind: {dim for dim, _, of in zip(*heads, types, strict=True) if of == kind} for kind in set(types)}
    ropes, rope_of = reading.ropes_by_type(hf, {kind: max(of) for kind, of in dims.items()}, types, _ROPES)
    if any(len(of) > 1 for of in dims.values()):
        raise UserError("config.json: per_layer_config gives layers of one type different head_dim; they share a rope")
    with_inputs = int(hf.get("hidden_size_per_layer_input", 256) or 0)
    return reading.decoder(
        hf,
        "gemma4_text",
        """attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim hidden_size_per_layer_input moe_intermediate_size
        num_experts num_global_key_value_heads num_kv_shared_layers per_layer_config top_k_experts use_bidirectional_attention
        use_double_wide_mlp vocab_size_per_layer_input""",
        attention={"scale": 1.0, "qk_norm": "head", "v_norm": True},
        norms="sandwich",
        groups=lambda block: _groups(hf, block, types, heads),
        layer_types=types,
        tied=True,
        ropes=ropes,
        rope_of=rope_of,
        embed_scale=float(hf.get("hidden_size") or 1) ** 0.5,
        head_softcap=hf.get("final_logit_softcapping"),
        layer_input_vocab=int(hf.get("vocab_size_per_layer_input", 262144)) if with_inputs else 0,
    )


def _heads(hf: dict[str, Any], types: list[str]) -> tuple[list[int], list[int]]:
    """Each layer's (head dim, number of key/value heads)."""
    own = hf.get("per_layer_config")
    if own is None:
        full = {"head_dim": hf.get("global_head_dim") or 512}
        if hf.get("attention_k_eq_v") and hf.get("num_global_key_value_heads"):
            full["num_key_value_heads"] = hf["num_global_key_value_heads"]
        own = {str(layer): full for layer, kind in enumerate(types) if kind == _FULL}
    given = {int(layer): settings for layer, settings in own.items()}
    unknown = {name for settings in given.values() for name in settings} - {"head_dim", "num_key_value_heads"}
    if unknown:
        raise UserError(f"config.json: per_layer_config has {sorted(unknown)[0]!r}, which gemma4_text does not handle")
    usual = {"head_dim": hf["head_dim"], "num_key_value_heads": hf.get("num_key_value_heads", 4)}
    layers = [{**usual, **given.get(layer, {})} for layer in range(len(types))]
    return [int(each["head_dim"]) for each in layers], [int(each["num_key_value_heads"]) for each in layers]


def _groups(
    hf: dict[str, Any], block: spec.Block, types: list[str], heads: tuple[list[int], list[int]]
) -> tuple[spec.Group, ...]:
    """The layers' blocks: those with keys and values of their own, then those that reuse them."""
    sharing = int(hf.get("num_kv_shared_layers") or 0)
    first = len(types) - sharing
    last = {kind: layer for layer, kind in enumerate(types[:first])}
    if not set(types[first:]) <= set(last):
        raise UserError(
            f"config.json: num_kv_shared_layers={sharing} leaves no layer of type "
            f"{sorted(set(types[first:]) - set(last))[0]!r} to share the keys and values of"
        )
    a, m = block.attention, block.ffn
    assert isinstance(a, spec.Attention)
    assert isinstance(m, spec.Mlp)
    wide = m._replace(dim=2 * m.dim) if hf.get("use_double_wide_mlp") else m
    need, experts = reading.required, None
    if hf.get("enable_moe_block"):
        experts = spec.Experts(
            need(hf, "num_experts"), need(hf, "top_k_experts"), need(hf, "moe_intermediate_size"), act=m.act, joined=True,
            router_norm=float(hf.get("rms_norm_eps", 1e-6)), expert_scale=True,
        )  # fmt: skip

    def of(layer: int) -> spec.Block:
        kind, dim = types[layer], heads[0][layer]
        attention = a._replace(
            head_dim=dim,
            num_kv_heads=heads[1][layer],
            rope_dims=dim,
            shared_kv=bool(hf.get("attention_k_eq_v")) and kind == _FULL,
            reuse=last[kind] if layer >= first else None,
        )
        return block._replace(
            attention=attention, ffn=wide if layer >= first else m, beside=experts, residual_scale=True,
            layer_input=int(hf.get("hidden_size_per_layer_input", 256) or 0),
        )  # fmt: skip

    own, sharing_blocks = [of(layer) for layer in range(first)], [of(layer) for layer in range(first, len(types))]
    return (*reading.runs(own), *reading.runs(sharing_blocks))


def weights(c: Config) -> list[naming.Weight]:
    return naming.table(
        c,
        naming.Names(
            attn_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            router="router.proj",
            experts="experts",
            experts_transposed=True,
        ),
    )


def _preset(
    dim: int, layers: int, heads: int, kv: int, ffn: int, window: int, period: int = 6, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 256, "global_head_dim": 512, "intermediate_size": ffn,
        "sliding_window": window, "layer_types": reading.alternating(layers, period), "vocab_size": 262144, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, "rope_parameters": _ROPES, "hidden_size_per_layer_input": 0, **more,
    }  # fmt: skip


_INPUTS = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
_LONG = {"max_position_embeddings": 262144, "attention_k_eq_v": True}
PRESETS = {
    "gemma4_e2b": _preset(1536, 35, 8, 1, 6144, 512, 5, num_kv_shared_layers=20, use_double_wide_mlp=True, **_INPUTS),
    "gemma4_e4b": _preset(2560, 42, 8, 2, 10240, 512, num_kv_shared_layers=18, **_INPUTS),
    "gemma4_31b": _preset(5376, 60, 32, 16, 21504, 1024, num_global_key_value_heads=4, **_LONG),
    "gemma4_26b_a4b": _preset(
        2816, 30, 16, 8, 2112, 1024, num_global_key_value_heads=2, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704, **_LONG,
    ),
}  # fmt: skip
