"""Rollouts: many completions of many prompts, as fast as the machine goes, with the log-probability of every token drawn.

Continuous batching: a fixed number of rows decode side by side, and a row that ends takes the next job inside the compiled
loop; the host looks in once a block of steps, to prefill more prompts into a pool and to take what was made. A prompt is
prefilled once, whatever the number of its completions.

The cache is a ring with one clock for all rows: at each step every row writes the same slot, and a row that starts lays its
prompt into the slots just behind the clock. A row's tokens thus stand in order, wherever it began; segment 0 hides what
earlier rows left, and once a row is done its slots cost nothing to reuse. As every step reads the whole ring, it is only as
long as the oldest row needs, and grows between blocks. All but a prompt's last token is prefilled: that
one goes through the loop like any other, so a first token is drawn as every token is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune import sharding
from jaxtune.adapters import lora
from jaxtune.generate.jobs import NOBODY, Made, Progress, Queue, Rollout, Waiting, rounded
from jaxtune.generate.logits import Sampling, choose
from jaxtune.generate.sampler import left_padded, prefill
from jaxtune.models import layers, spec
from jaxtune.models.grouped import SLOTS_DIM, Cache
from jaxtune.models.transformer import KVCache
from jaxtune.types import UserError

__all__ = ["Roller", "Rollout"]

_BLOCK_STEPS = 64  # at most so many steps between two looks of the host
_FEWEST_ROWS = 8  # below so many, a step is bound by the weights that it reads


class _Pool(NamedTuple):
    """Prefilled prompts, E of them, at the right edge of their slots: stacks (1, E, …), how many tokens, and the one to go on from."""

    stacks: tuple[Cache, ...]
    lengths_E: jax.Array
    last_E: jax.Array


class _Rows(NamedTuple):
    """The rows that decode: their ring, last token and its position, their job (`NOBODY`: idle) and how many tokens it has."""

    cache: KVCache
    last_B: jax.Array
    position_B: jax.Array
    job_B: jax.Array
    made_B: jax.Array


class _Log(NamedTuple):
    """What a block of steps made, (steps, B): each row's job (`NOBODY` where it was idle), token and log-probability."""

    jobs_TB: jax.Array
    tokens_TB: jax.Array
    logps_TB: jax.Array


class Roller:
    """Makes rollouts with one model structure, whatever the parameters of the moment. Compiled functions are kept by shape.

    Args:
      graphdef: the model, as `models.layers.flatten` gives it: `train.state.Program.inference`, over whose parameters,
        adapter and all, it works where they lie.
      stop_ids: tokens that end a completion.
      pad_id: fills prompts up.
      vocab_size: of the tokenizer; ids above it (padding rows of the embedding) are never drawn.
      max_positions: the longest sequence the model knows.
      slots: rows that decode side by side: more of them use the weights better, and take more memory.
      mesh: of the parameters; rows are spread over it as batches are. None: one device.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, stop_ids: Sequence[int], pad_id: int, vocab_size: int, max_positions: int, slots: int = 64,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self._graphdef, self._stop_ids, self._pad_id, self._max_positions = (
            graphdef,
            tuple(stop_ids),
            pad_id,
            max_positions,
        )
        self._shards = 1 if mesh is None else sharding.num_batch_shards(mesh)
        self._slots = -(-slots // self._shards) * self._shards
        constrain = layers.unconstrained if mesh is None else sharding.constrain_on(mesh)
        self._apart = jax.jit(partial(_layers_apart, graphdef))
        self._empty = jax.jit(partial(_empty, constrain), static_argnums=(0, 2, 3, 4))
        self._prefill = jax.jit(partial(_prefill, graphdef), donate_argnums=1)
        self._block = jax.jit(
            partial(_block, constrain, self._stop_ids, vocab_size),
            static_argnames=("graphdef", "sampling", "max_new_tokens"),
            donate_argnames="rows",
        )
        self._fewer = jax.jit(partial(_fewer, constrain), static_argnames="num")
        self._longer = jax.jit(partial(_longer, constrain), static_argnames="ring")

    def __call__(
        self, params: dict[str, jax.Array], prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, max_new_tokens: int,
        seed: int, progress: Progress = lambda items, *_: iter(items),
    ) -> list[Rollout]:  # fmt: skip
        """Returns `group_size` rollouts of each prompt, in the order of the prompts, those of one next to each other.

        What rollout j of prompt i draws depends on `seed`, i * group_size + j and its prompt, not on the others, nor on
        `slots` (but for rounding: a matmul of other rows may round a probability otherwise).

        Raises:
          UserError: a prompt is empty, or prompt and completion exceed what the model knows.
        """
        if not prompts:
            return []
        self._check(params, prompts, max_new_tokens)
        num_jobs, longest = len(prompts) * group_size, max(map(len, prompts), default=1) - 1
        slots = self._slots
        while slots // 2 >= num_jobs and self._may_be(slots // 2):
            slots //= 2
        graphdef, standing = self._decoding(params)
        ring = _ring(longest, 0, max_new_tokens)
        rows, pool = self._empty(graphdef, standing, slots, ring, rounded(longest))
        waiting = Waiting(prompts, group_size, slots)
        made, key = Made(num_jobs, self._stop_ids, max_new_tokens, progress), jax.random.key(seed)
        while True:
            for batch in waiting.to_prefill():
                tokens_RT, lengths_R = left_padded([prompts[i][:-1] for i in batch.prompts], batch.width, self._pad_id)
                last_R = np.asarray([prompts[i][-1] for i in batch.prompts], np.int32)
                pool = self._prefill(params, pool, tokens_RT, lengths_R, last_R, batch.entries_R)
            smaller = slots // 2 if self._may_be(slots // 2) else 0
            rows, log, started, reach = self._block(
                graphdef=graphdef, params=standing, rows=rows, pool=pool, queue=waiting.queue(), enough=smaller, key=key, sampling=sampling,
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
            waiting.take(int(started))
            made.add(*(sharding.to_host(each) for each in log))
            if made.num == num_jobs:
                return made.rollouts(group_size)
            if waiting.num == 0 and num_jobs - made.num <= smaller:
                slots, rows = smaller, self._fewer(rows, num=smaller)
            ring = _ring(longest, int(reach) - longest, max_new_tokens)
            if ring > rows.cache.segment_ids_BS.shape[1]:
                rows = self._longer(rows, ring=ring)

    def _decoding(self, params: dict[str, jax.Array]) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
        """The model as it decodes. On a CPU each layer stands by itself, for there a scan copies each layer's part of the cache; as
        that is a copy of the layers' weights, it has adapters in it.
        """
        if not _unrolled(layers.bind(self._graphdef, params)):
            return self._graphdef, params
        graphdef, apart = self._apart(params)
        return graphdef, {path: value for path, value in params.items() if not path.startswith("layers.")} | apart

    def _may_be(self, slots: int) -> bool:
        return slots >= _FEWEST_ROWS and slots % self._shards == 0

    def _check(self, params: dict[str, jax.Array], prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not all(map(len, prompts)):
            raise UserError("a prompt is empty: there is nothing to go on from")
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self._max_positions:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {self._max_positions} positions: shorten "
                "one of them"
            )
        stretched = [rope.dynamic[2] for rope in layers.bind(self._graphdef, params).c.ropes if rope.dynamic]
        if stretched and longest + max_new_tokens > min(stretched):
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {min(stretched)} positions from which rope_type "
                "'dynamic' turns every earlier token anew, which no cache can follow: shorten one of them"
            )


# ---- what is compiled ----


def _ring(longest: int, made: int, max_new_tokens: int) -> int:
    """Slots for rows that began with at most `longest` tokens and have `made` more, during a block: a few sizes, each compiled once."""
    room = _BLOCK_STEPS
    while room < min(made + _BLOCK_STEPS, max_new_tokens):
        room *= 2
    return rounded(longest + min(room, max_new_tokens))


def _unrolled(model: Any) -> bool:
    return bool(model.run.platform == "cpu")


def _layers_apart(graphdef: nnx.GraphDef, params: dict[str, jax.Array]) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
    """The same model with a stack for each of its layers, and the parameters of these; adapters are folded into float32 kernels."""
    model = layers.bind(graphdef, params)
    for path, linear in lora.linears(model).items():
        adapter = linear.adapter
        plain = isinstance(linear.kernel, nnx.Variable) and linear.kernel[...].dtype == jnp.float32
        if path.startswith("layers.") and isinstance(adapter, lora.LowRank) and plain:
            magnitude = None if adapter.magnitude is None else adapter.magnitude[...]
            factors = (adapter.lora_a[...], adapter.lora_b[...], magnitude)
            linear.kernel[...] = lora.merged(linear.kernel[...], *factors, adapter.scale)
            linear.adapter = nnx.data(None)
    stacks = [model.layers] if len(model.c.blocks) == 1 else list(model.layers)
    alone = {}
    for (block, numbers), stacked in zip(model.c.blocks, stacks, strict=True):
        graphdef, state = nnx.split(stacked)
        for at, number in enumerate(numbers):
            alone[number] = block, nnx.merge(graphdef, jax.tree.map(lambda p, at=at: p[at : at + 1], state))
    ordered = [alone[number] for number in range(len(alone))]
    model.c = model.c._replace(groups=tuple(spec.Group((block,), 1) for block, _ in ordered))
    model.layers = ordered[0][1] if len(ordered) == 1 else nnx.List([layer for _, layer in ordered])
    made, variables = layers.flatten(model)
    return made, {path: value[...] for path, value in variables.items() if path.startswith("layers.")}


def _caches_apart(c: spec.Config, stacks: tuple[Cache, ...]) -> tuple[Cache, ...]:
    alone = {
        number: {name: value[at : at + 1] for name, value in cache.items()}
        for (_, numbers), cache in zip(c.blocks, stacks, strict=True)
        for at, number in enumerate(numbers)
    }
    return tuple(alone[number] for number in range(len(alone)))


def _spread(constrain: Any, rows: _Rows) -> _Rows:
    """Rows over the mesh as batches are, heads as those of the weights that make them."""

    def one(name: str, value: jax.Array) -> jax.Array:
        heads = "kv_heads" if name in SLOTS_DIM else None
        return constrain(value, (None, "batch", heads, *[None] * (value.ndim - 3)))

    stacks = tuple({name: one(name, value) for name, value in cache.items()} for cache in rows.cache.stacks)
    segments_BS = constrain(rows.cache.segment_ids_BS, ("batch", None))
    return rows._replace(cache=rows.cache._replace(stacks=stacks, segment_ids_BS=segments_BS))


def _empty(
    constrain: Any, graphdef: nnx.GraphDef, params: Any, slots: int, ring: int, width: int
) -> tuple[_Rows, _Pool]:
    """Idle rows, and a pool of as many places for prompts of `width` tokens."""
    model = layers.bind(graphdef, params)
    cache = model.empty_cache(slots, ring)._replace(
        used=jnp.int32(ring)
    )  # the clock: every slot has been written, if by nobody
    zeros_B = jnp.zeros((slots,), jnp.int32)
    rows = _Rows(cache, zeros_B, zeros_B, zeros_B + NOBODY, zeros_B)
    return _spread(constrain, rows), _Pool(model.empty_cache(slots, width).stacks, zeros_B, zeros_B)


def _prefill(
    graphdef: nnx.GraphDef, params: Any, pool: _Pool, tokens_RT: jax.Array, lengths_R: jax.Array, last_R: jax.Array, entries_R: jax.Array
) -> _Pool:  # fmt: skip
    """Runs left-padded prompts through the model, each without its last token, and puts what is remembered into the pool."""
    model = layers.bind(graphdef, params)
    cache, _ = prefill(model, tokens_RT, lengths_R, tokens_RT.shape[1])
    stacks = _caches_apart(model.c, cache.stacks) if _unrolled(model) else cache.stacks

    def put(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        where: list[Any] = [slice(None)] * old.ndim
        where[1] = entries_R
        if name in SLOTS_DIM:
            dim = SLOTS_DIM[name]
            where[dim] = slice(old.shape[dim] - new.shape[dim], None)
        return old.at[tuple(where)].set(new, mode="drop")

    stacks = tuple(
        {name: put(name, old[name], new[name]) for name in old} for old, new in zip(pool.stacks, stacks, strict=True)
    )
    return _Pool(
        stacks,
        pool.lengths_E.at[entries_R].set(lengths_R, mode="drop"),
        pool.last_E.at[entries_R].set(last_R, mode="drop"),
    )


def _begin(pool: _Pool, queue: Queue, began: jax.Array, rows: _Rows) -> _Rows:
    """The first idle row takes job `began` of the queue: its prompt goes into the slots just behind the clock."""
    row, entry = jnp.argmax(rows.job_B == NOBODY), queue.entries_Q[began]
    cache = rows.cache
    ring, clock = cache.segment_ids_BS.shape[1], cache.used
    length = pool.lengths_E[entry]

    def lay(name: str, into: jax.Array, kept: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(kept, entry, 1, axis=1)
        if name in SLOTS_DIM:
            dim = SLOTS_DIM[name]
            wider = [(0, 0)] * mine.ndim
            wider[dim] = (ring - mine.shape[dim], 0)
            mine = jnp.roll(jnp.pad(mine, wider), clock % ring, axis=dim)
        return jax.lax.dynamic_update_slice_in_dim(into, mine, row, axis=1)

    stacks = tuple(
        {name: lay(name, into[name], kept[name]) for name in into}
        for into, kept in zip(cache.stacks, pool.stacks, strict=True)
    )
    mine_S = jnp.roll((jnp.arange(ring) >= ring - length).astype(jnp.int32), clock % ring)
    segments_BS = jax.lax.dynamic_update_slice(cache.segment_ids_BS, mine_S[None], (row, 0))
    new = (pool.last_E[entry], length, queue.jobs_Q[began], 0)
    return _Rows(
        KVCache(stacks, segments_BS, clock), *(old.at[row].set(value) for old, value in zip(rows[1:], new, strict=True))
    )


def _block(
    constrain: Any, stop_ids: tuple[int, ...], vocab_size: int, graphdef: nnx.GraphDef, params: Any, rows: _Rows, pool: _Pool,
    queue: Queue, enough: jax.Array, key: jax.Array, sampling: Sampling, max_new_tokens: int,
) -> tuple[_Rows, _Log, jax.Array, jax.Array]:  # fmt: skip
    """Steps until the host has something to do: a block is full, the queue is empty and the host has more, or no job waits
    anywhere and `enough` rows or fewer are busy. Returns also how many jobs began, and the tokens of the longest row.
    """
    model = layers.bind(graphdef, params)
    B = rows.job_B.shape[0]
    none_TB = jnp.full((_BLOCK_STEPS, B), NOBODY, jnp.int32)
    log = _Log(none_TB, none_TB, jnp.zeros((_BLOCK_STEPS, B), jnp.float32))

    def wanted(carry: tuple[jax.Array, jax.Array, _Rows, _Log]) -> jax.Array:
        step, began, rows, _ = carry
        num_busy = jnp.sum(rows.job_B != NOBODY)
        busy = jnp.where(queue.more, num_busy == B, num_busy > enough)
        return (step < _BLOCK_STEPS) & ((began < queue.num) | busy)

    def one(carry: tuple[jax.Array, jax.Array, _Rows, _Log]) -> tuple[jax.Array, jax.Array, _Rows, _Log]:
        step, began, rows, log = carry
        began, rows = jax.lax.while_loop(
            lambda each: (each[0] < queue.num) & jnp.any(each[1].job_B == NOBODY),
            lambda each: (each[0] + 1, view(_begin(pool, queue, each[0], whole(each[1])))),
            (began, rows),
        )
        rows, new = advance(whole(rows))
        log = _Log(*(old.at[step].set(value) for old, value in zip(log, new, strict=True)))
        return step + 1, began, view(rows), log

    view, whole = (partial(_shaped, model, one=each) for each in (lambda x: x[0], lambda x: x[None]))
    advance = partial(_advance, model, constrain, stop_ids, vocab_size, key, sampling, max_new_tokens)
    _, began, rows, log = jax.lax.while_loop(wanted, one, (jnp.int32(0), jnp.int32(0), view(rows), log))
    return whole(rows), log, began, jnp.max(jnp.where(rows.job_B == NOBODY, 0, rows.position_B))


def _shaped(model: Any, rows: _Rows, one: Callable[[jax.Array], jax.Array]) -> _Rows:
    """`one` takes the dim of a single layer off the cache, or puts it on: XLA's CPU compiler writes a carried array where it
    lies, and not a copy, if a step only views it with that dim.
    """
    if not _unrolled(model):
        return rows
    return rows._replace(cache=rows.cache._replace(stacks=jax.tree.map(one, rows.cache.stacks)))


def _advance(
    model: Any, constrain: Any, stop_ids: tuple[int, ...], vocab_size: int, key: jax.Array, sampling: Sampling, max_new_tokens: int,
    rows: _Rows,
) -> tuple[_Rows, tuple[jax.Array, jax.Array, jax.Array]]:  # fmt: skip
    """One token for every row: (rows, (each row's job, token, log-probability))."""
    busy_B = (rows.job_B != NOBODY).astype(jnp.int32)
    hidden_B1D, cache = model(rows.last_B[:, None], rows.position_B[:, None], busy_B[:, None], rows.cache)
    logits_BV = model.head(hidden_B1D[:, 0])
    if logits_BV.shape[1] > vocab_size:
        logits_BV = jnp.where((jnp.arange(logits_BV.shape[1]) < vocab_size)[None], logits_BV, -1e30)
    keys_B = jax.vmap(lambda job, made: jax.random.fold_in(jax.random.fold_in(key, job), made))(rows.job_B, rows.made_B)
    token_B, logp_B = choose(logits_BV, sampling, keys_B)
    made_B = rows.made_B + 1
    done_B = jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32)) | (made_B >= max_new_tokens)
    on = _Rows(cache, token_B, rows.position_B + busy_B, jnp.where(done_B, NOBODY, rows.job_B), made_B)
    return _spread(constrain, on), (rows.job_B, token_B, logp_B)


def _fewer(constrain: Any, rows: _Rows, num: int) -> _Rows:
    """The busy rows among `num`, where no more are busy: fewer rows are a cheaper step."""
    kept_B = jnp.argsort(rows.job_B == NOBODY, stable=True)[:num]
    stacks = jax.tree.map(lambda x_LB: jnp.take(x_LB, kept_B, axis=1), rows.cache.stacks)
    cache = KVCache(stacks, rows.cache.segment_ids_BS[kept_B], rows.cache.used)
    return _spread(constrain, _Rows(cache, *(each[kept_B] for each in rows[1:])))


def _longer(constrain: Any, rows: _Rows, ring: int) -> _Rows:
    """The same rows in a longer ring: what was written last stands at its end, where the clock begins anew."""
    cache = rows.cache
    old = cache.segment_ids_BS.shape[1]

    def laid(value: jax.Array, dim: int) -> jax.Array:
        wider = [(0, 0)] * value.ndim
        wider[dim] = (ring - old, 0)
        return jnp.pad(jnp.roll(value, -(cache.used % old), axis=dim), wider)

    stacks = tuple(
        {name: laid(value, SLOTS_DIM[name]) if name in SLOTS_DIM else value for name, value in each.items()}
        for each in cache.stacks
    )
    return _spread(constrain, rows._replace(cache=KVCache(stacks, laid(cache.segment_ids_BS, 1), jnp.int32(ring))))
