"""Llama 2 and 3.x, SmolLM2 and their like: RMSNorm, rotary, grouped-query attention, SwiGLU (arXiv:2307.09288, 2407.21783)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxtune.models import naming, rope
from jaxtune.models.attention import attend
from jaxtune.models.heads import LMHead, TiedHead
from jaxtune.models.layers import Embed, KVCache, Linear, RMSNorm, Runtime, recomputed, run_stack, stack
from jaxtune.types import UserError


class Config(NamedTuple):
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope: rope.Rope
    max_positions: int
    tied_head: bool
    attention_bias: bool = False
    mlp_bias: bool = False


class Attention(nnx.Module):
    def __init__(self, c: Config, run: Runtime, rngs: nnx.Rngs):
        self.c, self.run = c, run
        q_dim, kv_dim, bias = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.attention_bias
        self.q_proj = Linear(c.dim, q_dim, ("embed", "heads"), run, rngs, use_bias=bias)
        self.k_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=bias)
        self.v_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=bias)
        self.o_proj = Linear(q_dim, c.dim, ("heads", "embed"), run, rngs, use_bias=bias)

    def __call__(
        self, x_BTD: jax.Array, where: Where, index: jax.Array, cache: KVCache | None, key: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        c, run = self.c, self.run
        B, T, _ = x_BTD.shape

        def heads(proj: Linear, num: int, axis: str) -> jax.Array:
            return run.constrain(proj(x_BTD, key).reshape(B, T, num, c.head_dim), ("batch", "length", axis, None))

        q_BTNH = rope.rotate(heads(self.q_proj, c.num_heads, "heads"), where.cos, where.sin)
        k_BTKH = rope.rotate(heads(self.k_proj, c.num_kv_heads, "kv_heads"), where.cos, where.sin)
        v_BTKH = heads(self.v_proj, c.num_kv_heads, "kv_heads")
        if cache is None:
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, where.segment_ids_BT, where.segment_ids_BT, run)
        else:
            start = (index, 0, cache.used, 0, 0)
            cache = cache._replace(
                k_LBSKH=jax.lax.dynamic_update_slice(cache.k_LBSKH, k_BTKH[None].astype(cache.k_LBSKH.dtype), start),
                v_LBSKH=jax.lax.dynamic_update_slice(cache.v_LBSKH, v_BTKH[None].astype(cache.v_LBSKH.dtype), start),
            )
            k_BSKH = jax.lax.dynamic_index_in_dim(cache.k_LBSKH, index, keepdims=False)
            v_BSKH = jax.lax.dynamic_index_in_dim(cache.v_LBSKH, index, keepdims=False)
            out_BTNH = attend(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                where.segment_ids_BT,
                cache.segment_ids_BS,
                run,
                offset=cache.used,
                self_attention=False,
            )
        return self.o_proj(out_BTNH.reshape(B, T, c.num_heads * c.head_dim), key), cache


class Mlp(nnx.Module):
    def __init__(self, c: Config, run: Runtime, rngs: nnx.Rngs):
        self.run = run
        self.gate_proj = Linear(c.dim, c.ffn_dim, ("embed", "mlp"), run, rngs, use_bias=c.mlp_bias)
        self.up_proj = Linear(c.dim, c.ffn_dim, ("embed", "mlp"), run, rngs, use_bias=c.mlp_bias)
        self.down_proj = Linear(c.ffn_dim, c.dim, ("mlp", "embed"), run, rngs, use_bias=c.mlp_bias)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        h_BTF = recomputed(lambda gate, up: jax.nn.silu(gate) * up)(
            self.gate_proj(x_BTD, key), self.up_proj(x_BTD, key)
        )
        return self.down_proj(self.run.constrain(h_BTF, ("batch", "length", "mlp")), key)


class Where(NamedTuple):
    """Where each token stands: its segment (B, T) and its rotary tables, each (B, T, H/2) float32."""

    segment_ids_BT: jax.Array
    cos: jax.Array
    sin: jax.Array


class Block(nnx.Module):
    def __init__(self, c: Config, run: Runtime, rngs: nnx.Rngs):
        self.run = run
        self.attn_norm = RMSNorm(c.dim, c.norm_eps, run)
        self.attn = Attention(c, run, rngs)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps, run)
        self.mlp = Mlp(c, run, rngs)

    def __call__(
        self, x_BTD: jax.Array, where: Where, index: jax.Array, cache: KVCache | None, key: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        out_BTD, cache = self.attn(self.attn_norm(x_BTD), where, index, cache, key)
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD), key)
        return self.run.constrain(x_BTD, ("batch", "length", None)), cache


class Model(nnx.Module):
    def __init__(self, c: Config, run: Runtime, rngs: nnx.Rngs):
        self.c, self.run = c, run
        self.embed = Embed(c.vocab_size, c.dim, run, rngs)
        self.layers = stack(lambda rngs: Block(c, run, rngs), c.num_layers, rngs)
        self.norm = RMSNorm(c.dim, c.norm_eps, run)
        self.lm_head = nnx.data(None) if c.tied_head else Linear(c.dim, c.vocab_size, ("embed", "vocab"), run, rngs)

    @property
    def head(self) -> nnx.Module:
        """The output head, hidden (..., D) -> logits (..., V) float32."""
        return TiedHead(self.embed) if self.lm_head is None else LMHead(self.lm_head)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the normed last hidden state (B, T, D), ready for `head`, and the cache one prefill or step further on."""
        run = self.run
        where = Where(segment_ids_BT, *rope.tables(self.c.rope, positions_BT))
        if cache is not None:
            segments_BS = jax.lax.dynamic_update_slice(cache.segment_ids_BS, segment_ids_BT, (0, cache.used))
            cache = cache._replace(segment_ids_BS=segments_BS)

        def body(block: Block, x_BTD: jax.Array, index: jax.Array, cache: KVCache | None) -> tuple[jax.Array, Any]:
            return block(x_BTD, where, index, cache, None if key is None else jax.random.fold_in(key, index))

        x_BTD = run.constrain(self.embed(tokens_BT), ("batch", "length", None))
        x_BTD, cache = run_stack(self.layers, x_BTD, body, cache, run)
        if cache is not None:
            cache = cache._replace(used=cache.used + tokens_BT.shape[1])
        return self.norm(x_BTD), cache

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """A cache of `slots` tokens for each of `rows` sequences."""
        c = self.c
        return KVCache.zeros(c.num_layers, rows, slots, c.num_kv_heads, c.head_dim, self.run.compute_dtype)


_HANDLED = """attention_bias attention_dropout head_dim hidden_act hidden_size intermediate_size max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads partial_rotary_factor pretraining_tp rms_norm_eps rope_parameters
    rope_scaling rope_theta tie_word_embeddings vocab_size""".split()


def from_hf(hf: dict[str, Any]) -> Config:
    """Reads a Hugging Face `config.json`; refuses what this family does not handle."""
    naming.check_attributes(hf, _HANDLED, "llama")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json has hidden_act={hf['hidden_act']!r}; the llama family supports 'silu'")
    if hf.get("pretraining_tp", 1) != 1:
        raise UserError(f"config.json has pretraining_tp={hf['pretraining_tp']}; the llama family supports 1")
    if hf.get("attention_dropout"):
        raise UserError(f"config.json has attention_dropout={hf['attention_dropout']}; the llama family supports 0")
    dim, num_heads = naming.required(hf, "hidden_size"), naming.required(hf, "num_attention_heads")
    num_kv_heads = int(hf.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"config.json: {num_heads} attention heads do not divide into {num_kv_heads} key/value heads")
    head_dim = int(hf.get("head_dim") or dim // num_heads)
    return Config(
        vocab_size=naming.required(hf, "vocab_size"),
        dim=dim,
        num_layers=naming.required(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=naming.required(hf, "intermediate_size"),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope=rope.from_hf(hf, head_dim),
        max_positions=int(hf.get("max_position_embeddings", 2048)),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        attention_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


def weights(c: Config) -> list[naming.Weight]:
    """The table of weight names, `Hugging Face <-> ours`."""
    table = [
        naming.Weight("model.embed_tokens.weight", "embed.table"),
        naming.Weight("model.norm.weight", "norm.scale"),
        naming.Weight("model.layers.{}.input_layernorm.weight", "layers.attn_norm.scale"),
        naming.Weight("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        table += naming.linear(f"model.layers.{{}}.self_attn.{name}", f"layers.attn.{name}", bias=c.attention_bias)
    for name in ("gate_proj", "up_proj", "down_proj"):
        table += naming.linear(f"model.layers.{{}}.mlp.{name}", f"layers.mlp.{name}", bias=c.mlp_bias)
    return table if c.tied_head else table + naming.linear("lm_head", "lm_head")


def _preset(
    dim: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, theta: float, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


_31 = {"max_position_embeddings": 131072, "rope_scaling": _llama3_rope(8.0)}
_32 = {"max_position_embeddings": 131072, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_SMOL = {"max_position_embeddings": 8192, "tie_word_embeddings": True}

# The published config.json numbers of well-known models: shapes for `plan` and benchmarks, with random weights.
PRESETS: dict[str, dict[str, Any]] = {
    "llama_tiny": _preset(64, 2, 4, 2, 128, 256, 1e4, max_position_embeddings=512),
    "smollm2_135m": _preset(576, 30, 9, 3, 1536, 49152, 1e5, **_SMOL),
    "smollm2_360m": _preset(960, 32, 15, 5, 2560, 49152, 1e5, **_SMOL),
    "smollm2_1_7b": _preset(2048, 24, 32, 32, 8192, 49152, 1.3e5, **_SMOL),
    "llama2_7b": _preset(4096, 32, 32, 32, 11008, 32000, 1e4, max_position_embeddings=4096),
    "llama2_13b": _preset(5120, 40, 40, 40, 13824, 32000, 1e4, max_position_embeddings=4096),
    "llama2_70b": _preset(8192, 80, 64, 8, 28672, 32000, 1e4, max_position_embeddings=4096),
    "llama3_8b": _preset(4096, 32, 32, 8, 14336, 128256, 5e5, max_position_embeddings=8192),
    "llama3_1_8b": _preset(4096, 32, 32, 8, 14336, 128256, 5e5, **_31),
    "llama3_1_70b": _preset(8192, 80, 64, 8, 28672, 128256, 5e5, **_31),
    "llama3_1_405b": _preset(16384, 126, 128, 8, 53248, 128256, 5e5, **_31),
    "llama3_2_1b": _preset(2048, 16, 32, 8, 8192, 128256, 5e5, head_dim=64, **_32),
    "llama3_2_3b": _preset(3072, 28, 24, 8, 8192, 128256, 5e5, head_dim=128, **_32),
}
