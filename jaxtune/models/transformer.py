"""The transformer that every family describes: embeddings, stacks of scanned blocks, norm and head, built from a `Config`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models import rope, spec
from jaxtune.models.attention import Rule, attend
from jaxtune.models.experts import Experts
from jaxtune.models.heads import LMHead, ScoreHead, TaskHead, TiedHead
from jaxtune.models.layers import (
    Embed,
    Linear,
    Runtime,
    activation,
    make_norm,
    recomputed,
    run_stack,
    stack,
)

Cache = dict[str, jax.Array]


class KVCache(NamedTuple):
    """What decoding remembers. `stacks` holds a dictionary for each stack of layers, arrays (L, B, …): keys and values for
    S slots, or a recurrence's state. segment_ids: (B, S) int32, 0 for empty or padding slots; used: () int32, the slots
    written so far, the same in every row.
    """

    stacks: tuple[Cache, ...]
    segment_ids_BS: jax.Array
    used: jax.Array


class Where(NamedTuple):
    """Where each token stands: its segment (B, T), and for each of the model's ropes (cos, sin), each (B, T, H/2) float32."""

    segment_ids_BT: jax.Array
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    key_segments_BS: jax.Array | None  # of the cache's slots, where there is a cache
    used: jax.Array | None

    def rotary(self, which: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of the rope that a layer picks."""
        if isinstance(which, int):
            return self.tables[which]
        cos, sin = (jnp.stack(each) for each in zip(*self.tables, strict=True))
        return cos[which], sin[which]


class At(NamedTuple):
    """Which layer of a scan this is: its row in the stack, and what it picks from the model's windows and ropes."""

    row: jax.Array
    window: jax.Array | int
    rope: jax.Array | int


class Attention(nnx.Module):
    """Grouped-query attention in every form that `spec.Attention` can say."""

    def __init__(self, c: spec.Config, a: spec.Attention, run: Runtime, rngs: nnx.Rngs):
        self.a, self.run, self.windows = a, run, distinct(c.windows)
        q_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        none: Any = nnx.data(None)
        self.qkv_proj = self.q_proj = self.k_proj = self.v_proj = none
        if a.projection == "split":
            self.q_proj = Linear(c.dim, q_dim, ("embed", "heads"), run, rngs, use_bias=a.bias)
            self.k_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=a.bias)
            if not a.shared_kv:
                self.v_proj = Linear(c.dim, kv_dim, ("embed", "kv_heads"), run, rngs, use_bias=a.bias)
        else:
            self.qkv_proj = Linear(c.dim, q_dim + 2 * kv_dim, ("embed", "heads"), run, rngs, use_bias=a.bias)
        self.o_proj = Linear(q_dim, c.dim, ("heads", "embed"), run, rngs, use_bias=a.out_bias)
        per_head = a.qk_norm == "head"
        self.q_norm = make_norm(c.norm, a.head_dim if per_head else q_dim, run) if a.qk_norm else none
        self.k_norm = make_norm(c.norm, a.head_dim if per_head else kv_dim, run) if a.qk_norm else none
        self.v_norm = make_norm(c.norm._replace(scale=False), a.head_dim, run) if a.v_norm else none
        zeros = jnp.zeros((a.num_heads,), run.param_dtype)
        self.sinks = nnx.Param(zeros, axes=("heads",)) if a.sinks else none

    def __call__(
        self, x_BTD: jax.Array, where: Where, at: At, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        a, run = self.a, self.run
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self._projected(x_BTD, key)
        if a.rope_dims:
            cos, sin = where.rotary(at.rope)
            q_BTNH = rope.rotate(q_BTNH, cos, sin, a.rope_dims, a.interleaved)
            k_BTKH = rope.rotate(k_BTKH, cos, sin, a.rope_dims, a.interleaved)
        scale = a.head_dim**-0.5 if a.scale is None else a.scale
        rule = Rule(scale, a.softcap, a.causal, a.slopes, self.windows)
        sinks = None if self.sinks is None else self.sinks[...]
        out_BTNH, cache = attend_cached(rule, run, q_BTNH, k_BTKH, v_BTKH, where, at, cache, sinks)
        return self.o_proj(out_BTNH.reshape(B, T, a.num_heads * a.head_dim), key), cache

    def _projected(self, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        a, run = self.a, self.run
        lead, N, K, H = x_BTD.shape[:2], a.num_heads, a.num_kv_heads, a.head_dim
        if a.projection == "split":
            q, k = self.q_proj(x_BTD, key), self.k_proj(x_BTD, key)
            v = k if a.shared_kv else self.v_proj(x_BTD, key)
        elif a.projection == "joined":
            q, k, v = jnp.split(self.qkv_proj(x_BTD, key), [N * H, (N + K) * H], axis=-1)
        else:
            grouped = self.qkv_proj(x_BTD, key).reshape(*lead, K, N // K + 2, H)
            q, k, v = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
        q, k, v = q.reshape(*lead, N * H), k.reshape(*lead, K * H), v.reshape(*lead, K * H)
        if a.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)

        def heads(x: jax.Array, num: int, axis: str) -> jax.Array:
            return run.constrain(x.reshape(*lead, num, H), ("batch", "length", axis, None))

        q_BTNH, k_BTKH, v_BTKH = heads(q, N, "heads"), heads(k, K, "kv_heads"), heads(v, K, "kv_heads")
        if a.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return q_BTNH, k_BTKH, v_BTKH if self.v_norm is None else self.v_norm(v_BTKH)

    @staticmethod
    def empty(a: spec.Attention, rows: int, slots: int) -> dict[str, tuple[int, ...]]:
        shape = (rows, slots, a.num_kv_heads, a.head_dim)
        return {"k": shape, "v": shape}


def attend_cached(
    rule: Rule, run: Runtime, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, where: Where, at: At, cache: Cache | None,
    sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:  # fmt: skip
    """Attention over the tokens themselves or, with a cache, over all slots once these tokens are written to theirs."""
    options: dict[str, Any] = {"window_index": at.window, "sinks_N": sinks_N}
    segments_BT = where.segment_ids_BT
    if cache is None:
        return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, rule, run, **options), None
    assert where.key_segments_BS is not None
    assert where.used is not None
    start = (at.row, 0, where.used, 0, 0)
    cache = {
        name: jax.lax.dynamic_update_slice(cache[name], new[None].astype(cache[name].dtype), start)
        for name, new in (("k", k_BTKH), ("v", v_BTKH))
    }
    k_BSKH, v_BSKH = (jax.lax.dynamic_index_in_dim(cache[name], at.row, keepdims=False) for name in ("k", "v"))
    out = attend(
        q_BTNH, k_BSKH, v_BSKH, segments_BT, where.key_segments_BS, rule, run, offset=where.used, self_attention=False, **options
    )  # fmt: skip
    return out, cache


def distinct(windows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(windows))) or (0,)


class Mlp(nnx.Module):
    """The feed-forward block, plain or gated (arXiv:2002.05202)."""

    def __init__(self, dim: int, m: spec.Mlp, run: Runtime, rngs: nnx.Rngs):
        self.m, self.run = m, run
        none: Any = nnx.data(None)

        def into(width: int) -> Linear:
            return Linear(dim, width, ("embed", "mlp"), run, rngs, use_bias=m.bias)

        self.gate_up_proj = into(2 * m.dim) if m.gated and m.joined else none
        self.gate_proj = into(m.dim) if m.gated and not m.joined else none
        self.up_proj = none if m.gated and m.joined else into(m.dim)
        self.down_proj = Linear(m.dim, dim, ("mlp", "embed"), run, rngs, use_bias=m.bias)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        act = activation(self.m.act)
        if not self.m.gated:
            h_BTF = recomputed(act)(self.up_proj(x_BTD, key))
        else:
            if self.m.joined:
                gate, up = jnp.split(self.gate_up_proj(x_BTD, key), 2, axis=-1)
            else:
                gate, up = self.gate_proj(x_BTD, key), self.up_proj(x_BTD, key)
            h_BTF = recomputed(lambda gate, up: act(gate) * up)(gate, up)
        return self.down_proj(self.run.constrain(h_BTF, ("batch", "length", "mlp")), key)


class Block(nnx.Module):
    def __init__(self, c: spec.Config, b: spec.Block, run: Runtime, rngs: nnx.Rngs):
        self.b, self.run = b, run
        self.attn = mixer(b.attention)(c, b.attention, run, rngs)
        f, none = b.ffn, nnx.data(None)
        self.mlp: Any = Experts(c.dim, f, run, rngs, Mlp) if isinstance(f, spec.Experts) else Mlp(c.dim, f, run, rngs)
        before, after = b.norms not in ("post", "after"), b.norms in ("post", "after", "sandwich")

        def norm(wanted: bool) -> Any:
            return make_norm(c.norm, c.dim, run) if wanted else none

        self.attn_norm, self.attn_post_norm = norm(before and b.first_norm), norm(after)
        self.mlp_norm, self.mlp_post_norm = norm(before and b.norms != "parallel_one"), norm(after)
        self.scale = nnx.Param(jnp.ones((1,), run.param_dtype), axes=(None,)) if b.residual_scale else none

    def __call__(
        self, x_BTD: jax.Array, where: Where, at: At, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        """Returns (x, cache, what the router reports: sums over tokens, empty for a dense block)."""

        def normed(name: str, x: jax.Array) -> jax.Array:
            norm = getattr(self, name)
            return x if norm is None else norm(x)

        def feed(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            if isinstance(self.mlp, Experts):
                return self.mlp.route(x, where.segment_ids_BT, key)
            return self.mlp(x, key), {}

        kind, x = self.b.norms, x_BTD
        h = normed("attn_norm", x)
        mixed, cache = self.attn(h, where, at, cache, key)
        if kind.startswith("parallel"):
            fed, report = feed(h if kind == "parallel_one" else self.mlp_norm(x))
            x = x + mixed + fed
        elif kind == "after":
            x = self.attn_post_norm(x + mixed)
            fed, report = feed(x)
            x = self.mlp_post_norm(x + fed)
        else:
            x = x + normed("attn_post_norm", mixed)
            fed, report = feed(normed("mlp_norm", x))
            x = x + normed("mlp_post_norm", fed)
        if self.scale is not None:
            x = x * self.scale[...].astype(x.dtype)[None, None]
        return self.run.constrain(x, ("batch", "length", None)), cache, report


class Model(nnx.Module):
    def __init__(self, c: spec.Config, run: Runtime, rngs: nnx.Rngs):
        self.c, self.run = c, run
        none: Any = nnx.data(None)
        width = c.embed_dim or c.dim
        self.embed = Embed(c.vocab_size, width, run, rngs)
        self.position_embed = Embed(c.learned_positions, c.dim, run, rngs) if c.learned_positions else none
        self.type_embed = Embed(c.token_types, c.dim, run, rngs) if c.token_types else none
        self.task_embed = Embed(c.task_types, c.dim, run, rngs) if c.task_types else none
        self.embed_norm = make_norm(c.norm, c.dim, run) if c.embed_norm else none
        self.project_in = Linear(width, c.dim, (None, "embed"), run, rngs) if width != c.dim else none

        def layers(block: spec.Block, numbers: tuple[int, ...]) -> nnx.Module:
            return stack(lambda rngs: Block(c, block, run, rngs), len(numbers), rngs)

        made = [layers(*each) for each in c.blocks]
        self.layers: Any = made[0] if len(made) == 1 else nnx.List(made)
        self.norm = make_norm(c.norm, c.dim, run) if c.final_norm else none
        self.project_out = Linear(c.dim, width, ("embed", None), run, rngs) if width != c.dim else none
        plain = c.head is None and not c.tied_head
        self.lm_head = (
            Linear(width, c.vocab_size, ("embed", "vocab"), run, rngs, use_bias=c.head_bias) if plain else none
        )
        self.task_head = TaskHead(c.head, c.norm, width, run, rngs) if c.head else none

    @property
    def head(self) -> nnx.Module:
        """The output head, hidden (..., D) -> logits (..., V), or a task's scores, float32."""
        if self.task_head is not None:
            return ScoreHead(self.task_head, self.embed if self.c.head and self.c.head.tied else None)
        if self.lm_head is None:
            return TiedHead(self.embed, self.c.head_softcap)
        return LMHead(self.lm_head, self.c.head_softcap)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the normed last hidden state (B, T, D), ready for `head`, and the cache one prefill or step further on."""
        x_BTD, cache, _ = self.run_all(tokens_BT, positions_BT, segment_ids_BT, cache, key)
        return x_BTD, cache

    def run_all(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: KVCache | None = None,
        key: jax.Array | None = None, token_types_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:  # fmt: skip
        """As `__call__`, and what routers report, summed over layers (empty for a dense model)."""
        where, cache = self._where(positions_BT, segment_ids_BT, cache)
        x_BTD = self._embedded(tokens_BT, positions_BT, token_types_BT)
        x_BTD, caches, report = self._stacks(x_BTD, where, None if cache is None else cache.stacks, key)
        if cache is not None:
            cache = cache._replace(stacks=caches, used=cache.used + tokens_BT.shape[1])
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if self.project_out is not None:
            x_BTD = self.project_out(x_BTD, key)
        return self.run.constrain(x_BTD, ("batch", "length", None)), cache, report

    def _embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None) -> jax.Array:
        c = self.c
        x_BTD = self.embed(tokens_BT)
        if c.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)
        if self.project_in is not None:
            x_BTD = self.project_in(x_BTD)
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        if self.type_embed is not None:
            x_BTD = x_BTD + self.type_embed(jnp.zeros_like(tokens_BT) if types_BT is None else types_BT)
        if self.task_embed is not None:
            x_BTD = x_BTD + self.task_embed(jnp.zeros_like(tokens_BT))
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        return self.run.constrain(x_BTD, ("batch", "length", None))

    def _where(self, positions_BT: Any, segment_ids_BT: Any, cache: KVCache | None) -> tuple[Where, KVCache | None]:
        tables = tuple(rope.tables(one, jnp.asarray(positions_BT)) for one in self.c.ropes)
        if cache is None:
            return Where(segment_ids_BT, tables, None, None), None
        segments_BS = jax.lax.dynamic_update_slice(
            cache.segment_ids_BS, jnp.asarray(segment_ids_BT, jnp.int32), (0, cache.used)
        )
        where = Where(segment_ids_BT, tables, segments_BS, cache.used)
        return where, cache._replace(segment_ids_BS=segments_BS)

    def _stacks(
        self, x_BTD: jax.Array, where: Where, caches: tuple[Cache, ...] | None, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[Cache, ...], dict[str, jax.Array]]:
        """Runs the groups in order, each one scan over its repeats."""
        c = self.c
        sizes = distinct(c.windows)
        windows = [sizes.index(w) for w in c.windows] or [0] * c.num_layers
        ropes = list(c.rope_of) or [0] * c.num_layers
        stacks = [self.layers] if len(c.blocks) == 1 else list(self.layers)
        done: list[Cache] = []
        reports: dict[str, jax.Array] = {}
        first = 0
        for group in c.groups:
            period, at = len(group.blocks), len(done)
            numbers = np.arange(first, first + period * group.repeats).reshape(group.repeats, period)

            def picked(values: list[int], numbers: np.ndarray = numbers) -> np.ndarray:
                return np.asarray(values, np.int32)[numbers]

            xs = (picked(windows), picked(ropes), numbers.astype(np.int32))

            def body(blocks: Any, x: jax.Array, index: jax.Array, carry: Any, xs: Any, whole: Any = xs) -> Any:
                caches, report = carry
                made = []
                for position, block in enumerate(blocks):
                    # What all layers of a stack share is a constant of the program; what differs is scanned.
                    own = [
                        int(every[0, position]) if len(set(every[:, position])) == 1 else x_[position]
                        for every, x_ in zip(whole[:2], xs, strict=False)
                    ]
                    layer_key = None if key is None else jax.random.fold_in(key, xs[2][position])
                    cache = None if caches is None else caches[position]
                    x, cache, more = block(x, where, At(index, *own), cache, layer_key)
                    made.append(cache)
                    report = {name: report[name] + value for name, value in more.items()} if more else report
                return x, (None if caches is None else tuple(made), report)

            start = Experts.nothing(group.blocks)
            mine = None if caches is None else tuple(caches[at : at + period])
            x_BTD, (mine, report) = run_stack(stacks[at : at + period], x_BTD, body, (mine, start), xs, self.run)
            done += mine or [{}] * period
            reports = {name: reports.get(name, 0) + value for name, value in report.items()} or reports
            first += period * group.repeats
        return x_BTD, tuple(done), reports

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """A cache of `slots` tokens for each of `rows` sequences."""

        def zeros(block: spec.Block, layers: int) -> Cache:
            shapes = mixer(block.attention).empty(block.attention, rows, slots)
            return {name: jnp.zeros((layers, *shape), self.run.compute_dtype) for name, shape in shapes.items()}

        stacks = tuple(zeros(block, len(numbers)) for block, numbers in self.c.blocks)
        return KVCache(stacks, jnp.zeros((rows, slots), jnp.int32), jnp.int32(0))


def mixer(a: spec.Attention | spec.Latent | spec.Delta) -> Any:
    """The module that mixes tokens as `a` says."""
    if isinstance(a, spec.Latent):
        from jaxtune.models.latent import LatentAttention

        return LatentAttention
    if isinstance(a, spec.Delta):
        from jaxtune.models.delta import GatedDelta

        return GatedDelta
    return Attention
