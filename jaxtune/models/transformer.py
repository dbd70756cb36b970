"""The transformer that every family describes: embeddings, stacks of scanned blocks, norm and head, built from a `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models import context, rope, spec
from jaxtune.models.embed_noise import noisy
from jaxtune.models.experts import Experts
from jaxtune.models.grouped import At, Attention, Cache, Where, distinct
from jaxtune.models.heads import LMHead, ScoreHead, TaskHead, TiedHead, ValueHead
from jaxtune.models.layer_inputs import LayerInput, LayerInputs
from jaxtune.models.layers import (
    Embed,
    Linear,
    Runtime,
    VirtualTokens,
    activation,
    gathered_weights,
    in_blocks,
    make_norm,
    named,
    recomputed,
    run_stack,
    stack,
)
from jaxtune.models.taps import Tap, of_block, tap


class KVCache(NamedTuple):
    """What decoding remembers. `stacks` holds a dictionary for each stack of layers, arrays (L, B, …): keys and values for
    S slots, or a recurrence's state. segment_ids: (B, S) int32, 0 for empty or padding slots; used: () int32, the slots
    written so far, the same in every row. Single tokens may go on past S: the slots are then a ring, and what they
    overwrite must be of no use to their row any more.
    """

    stacks: tuple[Cache, ...]
    segment_ids_BS: jax.Array
    used: jax.Array


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
        num_blocks = self.run.mlp_blocks
        if num_blocks == 1 or x_BTD.ndim != 3 or x_BTD.shape[1] % num_blocks:
            return self._whole(x_BTD, key)
        return in_blocks(gathered_weights(self, self.run)._whole, x_BTD, key, num_blocks)

    def _whole(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        act = activation(self.m.act)
        if not self.m.gated:
            h_BTF = recomputed(act)(self.up_proj(x_BTD, key))
        else:
            if self.m.joined:
                gate, up = jnp.split(self.gate_up_proj(x_BTD, key), 2, axis=-1)
            else:
                gate, up = self.gate_proj(x_BTD, key), self.up_proj(x_BTD, key)
            h_BTF = recomputed(lambda gate, up: act(gate) * up)(gate, up)
        return self.down_proj(self.run.constrain(named(h_BTF, "mlp"), ("batch", "length", "mlp")), key)


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
        self.beside: Any = Experts(c.dim, b.beside, run, rngs, Mlp) if b.beside else none
        self.mlp_own_norm, self.beside_norm, self.beside_post_norm = (norm(bool(b.beside)) for _ in range(3))
        self.layer_input = LayerInput(c, b, run, rngs) if b.layer_input else none
        ones = jnp.ones((1,), run.param_dtype)
        self.residual_scale = nnx.Param(ones, axes=(None,)) if b.residual_scale else none

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

        def feed_both(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            own = self.mlp_own_norm(self.mlp(self.mlp_norm(x), key))
            routed, report = self.beside.route(self.beside_norm(x), where.segment_ids_BT, key, seen_BTD=x)
            return own + self.beside_post_norm(routed), report

        kind, x = self.b.norms, x_BTD
        h = normed("attn_norm", x)
        mixed, cache = self.attn(h, where, at, cache, key)
        mixed = named(mixed, "mixed")
        if kind.startswith("parallel"):
            fed, report = feed(h if kind == "parallel_one" else self.mlp_norm(x))
            x = x + mixed + fed
        elif kind == "after":
            x = self.attn_post_norm(x + mixed)
            fed, report = feed(x)
            x = self.mlp_post_norm(x + fed)
        else:
            x = x + normed("attn_post_norm", mixed)
            fed, report = feed(normed("mlp_norm", x)) if self.beside is None else feed_both(x)
            x = x + normed("mlp_post_norm", fed)
        if self.layer_input is not None:
            assert at.layer_input_BTP is not None
            x = x + self.layer_input(x, at.layer_input_BTP, key)
        if self.residual_scale is not None:  # published models keep it apart from what trains
            x = x * jax.lax.stop_gradient(self.residual_scale[...]).astype(x.dtype)[None, None]
        return self.run.constrain(x, ("batch", "length", None)), cache, report


class Reused:
    """The keys and values that later layers attend to in place of their own, by their layer's number, as a pass finds them."""

    def __init__(self, c: spec.Config):
        self.wanted = {getattr(block.attention, "reuse", None) for block, _ in c.blocks} - {None}
        self.found: dict[int, tuple[jax.Array, jax.Array]] = {}

    def of(self, block: spec.Block) -> tuple[jax.Array, jax.Array] | None:
        reuse = getattr(block.attention, "reuse", None)
        return None if reuse is None else self.found[reuse]

    def _positions(self, group: spec.Group, end: int) -> dict[int, int]:
        """Which blocks of a group's last round are wanted: position -> layer number. `end` is the group's last layer + 1."""
        first = end - len(group.blocks)
        return {at: first + at for at in range(len(group.blocks)) if first + at in self.wanted}

    def room(self, group: spec.Group, end: int, x_BTD: jax.Array) -> dict[int, Cache]:
        """Where a scan without a cache keeps what it finds: the last round's stay."""
        B, T, _ = x_BTD.shape
        attention = [block.attention for block in group.blocks]
        empty = {
            at: mixer(attention[at]).empty(attention[at], 1, B, T, x_BTD.dtype) for at in self._positions(group, end)
        }
        return {at: {name: value[0] for name, value in each.items()} for at, each in empty.items()}

    def take(self, group: spec.Group, end: int, caches: Sequence[Cache] | None, kept: dict[int, Cache]) -> None:
        for at, number in self._positions(group, end).items():
            seen = kept[at] if caches is None else {name: value[-1] for name, value in caches[at].items()}
            self.found[number] = (seen["k"], seen["v"])


class Model(nnx.Module):
    def __init__(self, c: spec.Config, run: Runtime, rngs: nnx.Rngs):
        self.c, self.run = c, run
        none: Any = nnx.data(None)
        width = c.embed_dim or c.dim
        self.embed = Embed(c.vocab_size, width, run, rngs)
        self.virtual_tokens = VirtualTokens(c.vocab_size)
        self.position_embed = Embed(c.learned_positions, c.dim, run, rngs) if c.learned_positions else none
        self.type_embed = Embed(c.token_types, c.dim, run, rngs) if c.token_types else none
        self.task_embed = Embed(c.task_types, c.dim, run, rngs) if c.task_types else none
        self.embed_norm = make_norm(c.norm, c.dim, run) if c.embed_norm else none
        self.project_in = Linear(width, c.dim, (None, "embed"), run, rngs) if width != c.dim else none
        self.layer_inputs = LayerInputs(c, run, rngs) if c.layer_input_vocab else none

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
        self.value_head = ValueHead(width, run) if c.value_head else none

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
        return self._run(tokens_BT, positions_BT, segment_ids_BT, cache, key, token_types_BT, ())[:3]

    def tapped(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, key: jax.Array | None, numbers: tuple[int, ...],
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[int, Tap]]:  # fmt: skip
        """(the last hidden state, what routers report, what the layers with these numbers made)."""
        x_BTD, _, report, taps = self._run(tokens_BT, positions_BT, segment_ids_BT, None, key, None, numbers)
        return x_BTD, report, taps

    def _run(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: KVCache | None, key: jax.Array | None,
        token_types_BT: jax.Array | None, numbers: tuple[int, ...],
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array], dict[int, Tap]]:  # fmt: skip
        where, cache = self._where(positions_BT, segment_ids_BT, cache)
        x_BTD = self._embedded(tokens_BT, positions_BT, token_types_BT, segment_ids_BT, key)
        inputs_LBTP = None if self.layer_inputs is None else self.layer_inputs(tokens_BT, x_BTD, key)
        stacks = None if cache is None else cache.stacks
        x_BTD, caches, report, taps = self._stacks(x_BTD, where, stacks, inputs_LBTP, key, numbers)
        if cache is not None:
            cache = cache._replace(stacks=caches, used=cache.used + tokens_BT.shape[1])
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if self.project_out is not None:
            x_BTD = self.project_out(x_BTD, key)
        return self.run.constrain(x_BTD, ("batch", "length", None)), cache, report, taps

    def _embedded(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None, segment_ids_BT: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        c = self.c
        x_BTD = context.embedded(self.embed, self.virtual_tokens.known(tokens_BT), self.run)
        if self.run.neftune_alpha and key is not None:
            x_BTD = noisy(x_BTD, segment_ids_BT, self.run.neftune_alpha, key)
        if c.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)
        x_BTD = self.virtual_tokens(x_BTD, tokens_BT)
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
            cache.segment_ids_BS,
            jnp.asarray(segment_ids_BT, jnp.int32),
            (0, cache.used % cache.segment_ids_BS.shape[1]),
        )
        where = Where(segment_ids_BT, tables, segments_BS, cache.used)
        return where, cache._replace(segment_ids_BS=segments_BS)

    def _stacks(
        self, x_BTD: jax.Array, where: Where, caches: tuple[Cache, ...] | None, inputs_LBTP: jax.Array | None, key: jax.Array | None,
        tapped: tuple[int, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...], dict[str, jax.Array], dict[int, Tap]]:  # fmt: skip
        """Runs the groups in order, each one scan over its repeats; a scan with a layer that is `tapped` keeps what all of its make."""
        c = self.c
        sizes = distinct(c.windows)
        windows = [sizes.index(w) for w in c.windows] or [0] * c.num_layers
        picks = np.asarray([windows, c.rope_of or [0] * c.num_layers, range(c.num_layers)], np.int32)
        stacks = [self.layers] if len(c.blocks) == 1 else list(self.layers)
        done: list[Cache] = []
        reports: dict[str, jax.Array] = {}
        first, reused, taps = 0, Reused(c), dict[int, Tap]()
        for group in c.groups:
            period, at = len(group.blocks), len(done)
            last, numbers = first + period * group.repeats, np.arange(first, first + period * group.repeats)
            xs: Any = [pick[numbers].reshape(group.repeats, period) for pick in picks]
            if inputs_LBTP is not None:
                inputs = inputs_LBTP[first:last]
                xs.append(inputs.reshape(group.repeats, period, *inputs.shape[1:]))
            mine_tapped = [number for number in tapped if first <= number < last]
            body = partial(self._round, where, reused, xs, key, bool(mine_tapped))
            start = Experts.nothing(group.blocks)
            mine = None if caches is None else tuple(caches[at : at + period])
            kept = {} if caches is not None else reused.room(group, last, x_BTD)
            carry = (mine, kept, start)
            x_BTD, (mine, kept, report), seen = run_stack(stacks[at : at + period], x_BTD, body, carry, xs, self.run)
            reused.take(group, last, mine, kept)
            for number in mine_tapped:
                turn, position = divmod(number - first, period)
                window = c.windows[number] if c.windows else 0
                one = {name: value[turn] for name, value in seen[position].items()}
                taps[number] = tap(group.blocks[position], window, one, where.segment_ids_BT)
            done += mine or [{}] * period
            reports = {name: reports.get(name, 0) + value for name, value in report.items()} or reports
            first = last
        return x_BTD, tuple(done), reports, taps

    def _round(
        self, where: Where, reused: Reused, every: Any, key: jax.Array | None, tapped: bool, blocks: Any, x: jax.Array, index: jax.Array,
        carry: Any, xs: Any,
    ) -> tuple[jax.Array, Any, Any]:  # fmt: skip
        """One round of a scan: each block of the pattern once. `every` holds all rounds' `xs`."""
        caches, kept, report = carry
        made, seen = [], []
        for position, block in enumerate(blocks):
            # What all layers of a stack share is a constant of the program; what differs is scanned.
            window, turn = [
                int(all_[0, position]) if len(set(all_[:, position])) == 1 else one[position]
                for all_, one in zip(every[:2], xs[:2], strict=True)
            ]
            layer_key = None if key is None else jax.random.fold_in(key, xs[2][position])
            at = At(index, window, turn, reused.of(block.b), xs[3][position] if len(xs) > 3 else None)
            x, cache, more = block(x, where, at, None if caches is None else caches[position], layer_key)
            made.append(cache)
            if position in kept:
                kept = {**kept, position: {name: cache[name] for name in kept[position]}}
            seen += [of_block(block, cache, x)] if tapped else []
            report = {name: report[name] + value for name, value in more.items()} if more else report
        return x, (None if caches is None else tuple(made), kept, report), tuple(seen)

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """A cache of `slots` tokens for each of `rows` sequences."""

        def zeros(block: spec.Block, layers: int) -> Cache:
            return mixer(block.attention).empty(block.attention, layers, rows, slots, self.run.compute_dtype)

        stacks = tuple(zeros(block, len(numbers)) for block, numbers in self.c.blocks)
        return KVCache(stacks, jnp.zeros((rows, slots), jnp.int32), jnp.int32(0))


def depths(c: spec.Config, path: str) -> np.ndarray:
    """How deep a parameter lies: 0 = embeddings, 1 to n = the layers, n + 1 = after them; (L,) for one of stacked layers, else ()."""
    first, *rest = path.split(".")
    if first == "layers":
        _, numbers = c.blocks[0 if len(c.blocks) == 1 else int(rest[0])]
        return np.asarray(numbers) + 1
    return np.asarray(0 if first in _BEFORE else c.num_layers + 1)


_BEFORE = ("embed", "position_embed", "type_embed", "task_embed", "embed_norm", "project_in", "layer_inputs")


def mixer(a: spec.Attention | spec.Latent | spec.Delta) -> Any:
    """The module that mixes tokens as `a` says."""
    if isinstance(a, spec.Latent):
        from jaxtune.models.latent import LatentAttention

        return LatentAttention
    if isinstance(a, spec.Delta):
        from jaxtune.models.delta import GatedDelta

        return GatedDelta
    return Attention
