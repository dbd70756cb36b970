"""How likely a model finds given texts: label candidates after a prompt, and whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.data.batches import Rows
from jaxtune.generate.sampler import left_padded, prefill
from jaxtune.models import layers
from jaxtune.objectives.ops import Head, segment_mean, token_nll
from jaxtune.sharding import to_host

_BUCKET_TOKENS = 16
_CHUNK_TOKENS = 64
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def _order(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows in groups of `size`, alike in length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _rounded(tokens: int, bucket_tokens: int = _BUCKET_TOKENS) -> int:
    return -(-tokens // bucket_tokens) * bucket_tokens


def _head(model: Any) -> Head:
    graphdef, params = nnx.split(model.head)
    return Head(params, lambda p, h: nnx.merge(graphdef, p)(h), _CHUNK_TOKENS)


def label_scorer(
    graphdef: nnx.GraphDef, params: dict[str, jax.Array], pad_id: int, batch_size: int, progress: Progress, label: str,
    bucket_tokens: int = _BUCKET_TOKENS,
) -> Callable[..., np.ndarray]:  # fmt: skip
    """Returns `score(prompts, candidates, own=None) -> (M, C)`: summed log-likelihood (nats) of each candidate after its prompt.

    A prompt is run once; its cache serves all of its candidates. Prompts are padded to a multiple of `bucket_tokens`. A
    call's `own` parameters take the place of these.
    """
    run = partial(_score, graphdef)

    def score(prompts: list[list[int]], candidates: list[list[list[int]]], own: Any = None) -> np.ndarray:
        num_labels = len(candidates[0])
        longest = max(len(ids) for row in candidates for ids in row)
        scores_MC = np.zeros((len(prompts), num_labels), np.float64)
        groups = _order([len(p) for p in prompts], batch_size)
        for group in progress(groups, len(groups), label):
            filled = group + [group[0]] * (batch_size - len(group))  # one batch shape; the copies are dropped
            width = _rounded(max(len(prompts[i]) for i in filled), bucket_tokens)
            tokens_BT, lengths_B = left_padded([prompts[i] for i in filled], width, pad_id)
            options_BCT = np.full((batch_size, num_labels, longest), pad_id, np.int32)
            mask_BCT = np.zeros(options_BCT.shape, np.float32)
            for b, i in enumerate(filled):
                for c, ids in enumerate(candidates[i]):
                    options_BCT[b, c, : len(ids)], mask_BCT[b, c, : len(ids)] = ids, 1
            scores_MC[group] = to_host(run(own or params, tokens_BT, lengths_B, options_BCT, mask_BCT))[: len(group)]
        return scores_MC

    return score


# Jitted here, by graphdef, so that a model that is measured again and again while it trains is compiled once.
@partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    options_BCT: jax.Array,
    mask_BCT: jax.Array,
) -> jax.Array:
    model = layers.bind(graphdef, params)
    B, C, T = options_BCT.shape
    cache, last_BD = prefill(model, tokens_BT, lengths_B, tokens_BT.shape[1] + T)
    cache = cache._replace(
        stacks=jax.tree.map(lambda x_LB: jnp.repeat(x_LB, C, axis=1), cache.stacks),
        segment_ids_BS=jnp.repeat(cache.segment_ids_BS, C, axis=0),
    )
    targets = options_BCT.reshape(B * C, T)
    hidden = jnp.repeat(last_BD, C, axis=0)[:, None]
    if T > 1:
        positions = jnp.repeat(lengths_B, C)[:, None] + jnp.arange(T - 1)[None, :]
        more, _ = model(targets[:, :-1], positions, jnp.ones((B * C, T - 1), jnp.int32), cache)
        hidden = jnp.concatenate([hidden, more], axis=1)
    nll = token_nll(_head(model), hidden, targets)
    return -jnp.sum(nll * mask_BCT.reshape(B * C, T), axis=1).reshape(B, C)


def head_scorer(
    graphdef: nnx.GraphDef, params: dict[str, jax.Array], mean: bool, pad_id: int, batch_size: int, progress: Progress, label: str
) -> Callable[..., list[np.ndarray]]:  # fmt: skip
    """Returns `score(texts, at, own=None) -> (K, C) each`: what a head scores at some tokens of whole texts, float32.

    With `mean` every token of a text stands for the mean of all. A call's `own` parameters take the place of these.
    """

    @jax.jit
    def run(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, at_BK: jax.Array) -> jax.Array:
        model = layers.bind(graphdef, params)
        return model.head(_hidden_at(model, tokens_BT, lengths_B, at_BK, mean))

    def score(texts: list[list[int]], at: list[list[int]], own: Any = None) -> list[np.ndarray]:
        scores: dict[int, np.ndarray] = {}
        for group, *arrays in _asked(texts, at, batch_size, pad_id, progress, label):
            found_BKC = to_host(run(own or params, *arrays))
            scores |= {i: found_BKC[b, : len(at[i])] for b, i in enumerate(group)}
        return [scores[i] for i in range(len(texts))]

    return score


def masked_nll(
    graphdef: nnx.GraphDef, params: dict[str, jax.Array], rows: Rows, pad_id: int, batch_size: int, progress: Progress, label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Returns, each (M,) and over each row's masked tokens: summed nll in nats, how many were guessed right, how many there are."""

    @jax.jit
    def run(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, at_BK: jax.Array, targets_BK: jax.Array) -> Any:
        model = layers.bind(graphdef, params)

        def one(
            xs: tuple[jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array]:  # a row at a time: logits (K, V) are large
            logits_KV, targets_K = model.head(xs[0]), xs[1]
            wanted_K = jnp.take_along_axis(logits_KV, targets_K[:, None], axis=-1)[:, 0]
            return jax.nn.logsumexp(logits_KV, axis=-1) - wanted_K, wanted_K >= jnp.max(logits_KV, axis=-1)

        return jax.lax.map(one, (_hidden_at(model, tokens_BT, lengths_B, at_BK), targets_BK))

    assert rows.targets is not None, "masked rows know what was masked"
    parts = [slice(start, end) for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    texts, at = [rows.tokens[part].tolist() for part in parts], [np.flatnonzero(rows.weights[part]) for part in parts]
    nll_M, right_M = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    for group, *arrays, at_BK in _asked(texts, at, batch_size, pad_id, progress, label):
        targets_BK = np.zeros_like(at_BK)
        for b, i in enumerate(group):
            targets_BK[b, : len(at[i])] = rows.targets[parts[i]][at[i]]
        nll_BK, right_BK = map(to_host, run(params, *arrays, at_BK, targets_BK))
        for b, i in enumerate(group):
            nll_M[i], right_M[i] = nll_BK[b, : len(at[i])].sum(dtype=np.float64), right_BK[b, : len(at[i])].sum()
    return nll_M, right_M, np.asarray([len(one) for one in at])


def _hidden_at(
    model: Any, tokens_BT: jax.Array, lengths_B: jax.Array, at_BK: jax.Array, mean: bool = False
) -> jax.Array:
    """The hidden states (B, K, D) of some tokens of whole texts, padded on the right."""
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    segments_BT = (index_BT < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD, _ = model(tokens_BT, index_BT, segments_BT)
    hidden_BTD = segment_mean(hidden_BTD, segments_BT) if mean else hidden_BTD
    return jnp.take_along_axis(hidden_BTD, at_BK[..., None], axis=1)


def _asked(
    texts: Sequence[Sequence[int]], at: Sequence[Any], size: int, pad_id: int, progress: Progress, label: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (numbers of texts, tokens (B, T), lengths (B,), tokens asked for (B, K)) in batches of few shapes.

    What is asked of a batch's rows beyond a text's own, and beyond the texts, means nothing.
    """
    groups = _order([len(text) for text in texts], size)
    for group in progress(groups, len(groups), label):
        filled = group + [group[0]] * (size - len(group))  # one batch shape; the copies are dropped
        most = max(len(at[i]) for i in filled)
        tokens_BT = np.full((size, _rounded(max(len(texts[i]) for i in filled))), pad_id, np.int32)
        at_BK = np.zeros((size, 1 if most == 1 else _rounded(most)), np.int32)
        for b, i in enumerate(filled):
            tokens_BT[b, : len(texts[i])], at_BK[b, : len(at[i])] = texts[i], at[i]
        yield group, tokens_BT, np.asarray([len(texts[i]) for i in filled], np.int32), at_BK


def row_nll(
    graphdef: nnx.GraphDef,
    params: dict[str, jax.Array],
    rows: Rows,
    special_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    label: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, each (M,) and over each row's trained tokens: summed nll in nats, how many, and the sum without `special_ids`."""

    sums_2M, counts_M = np.zeros((2, len(rows))), np.zeros(len(rows), np.int64)
    groups = _order([int(n) for n in rows.lengths], batch_size)
    for group in progress(groups, len(groups), label):
        filled = group + [group[0]] * (batch_size - len(group))
        width = _rounded(int(max(rows.lengths[i] for i in filled)))
        tokens_BT = np.full((batch_size, width), pad_id, np.int32)
        trained_BT = np.zeros((batch_size, width), bool)
        for b, i in enumerate(filled):
            row = slice(rows.offsets[i], rows.offsets[i + 1])
            tokens_BT[b, : rows.lengths[i]], trained_BT[b, : rows.lengths[i]] = rows.tokens[row], rows.weights[row] != 0
        masks_2BT = np.stack([trained_BT, trained_BT & ~np.isin(tokens_BT, special_ids)]).astype(np.float32)
        found = _summed_nll(graphdef, params, tokens_BT, np.asarray(rows.lengths[filled], np.int32), masks_2BT)
        sums_2M[:, group] = to_host(found)[:, : len(group)]
        counts_M[group] = trained_BT[: len(group), 1:].sum(1)
    return sums_2M[0], counts_M, sums_2M[1]


@partial(jax.jit, static_argnums=0)
def _summed_nll(
    graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, masks_2BT: jax.Array
) -> jax.Array:
    model = layers.bind(graphdef, params)
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_BTD, _ = model(tokens_BT, index_BT, (index_BT < lengths_B[:, None]).astype(jnp.int32))
    nll_BT = token_nll(_head(model), hidden_BTD[:, :-1], tokens_BT[:, 1:])
    return jnp.sum(nll_BT[None] * masks_2BT[:, :, 1:], axis=2)
