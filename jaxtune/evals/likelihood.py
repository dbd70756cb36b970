"""How likely a model finds given texts: label candidates after a prompt, and whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


def _rounded(tokens: int) -> int:
    return -(-tokens // _BUCKET_TOKENS) * _BUCKET_TOKENS


def _head(model: Any) -> Head:
    graphdef, params = nnx.split(model.head)
    return Head(params, lambda p, h: nnx.merge(graphdef, p)(h), _CHUNK_TOKENS)


def label_scorer(
    graphdef: nnx.GraphDef, params: dict[str, jax.Array], pad_id: int, batch_size: int, progress: Progress, label: str
) -> Callable[[list[list[int]], list[list[list[int]]]], np.ndarray]:
    """Returns `score(prompts, candidates) -> (M, C)`: summed log-likelihood (nats) of each candidate after its prompt.

    A prompt is run once; its cache serves all of its candidates.
    """
    run = jax.jit(partial(_score, graphdef))

    def score(prompts: list[list[int]], candidates: list[list[list[int]]]) -> np.ndarray:
        num_labels = len(candidates[0])
        longest = max(len(ids) for row in candidates for ids in row)
        scores_MC = np.zeros((len(prompts), num_labels), np.float64)
        groups = _order([len(p) for p in prompts], batch_size)
        for group in progress(groups, len(groups), label):
            filled = group + [group[0]] * (batch_size - len(group))  # one batch shape; the copies are dropped
            width = _rounded(max(len(prompts[i]) for i in filled))
            tokens_BT, lengths_B = left_padded([prompts[i] for i in filled], width, pad_id)
            options_BCT = np.full((batch_size, num_labels, longest), pad_id, np.int32)
            mask_BCT = np.zeros(options_BCT.shape, np.float32)
            for b, i in enumerate(filled):
                for c, ids in enumerate(candidates[i]):
                    options_BCT[b, c, : len(ids)], mask_BCT[b, c, : len(ids)] = ids, 1
            scores_MC[group] = to_host(run(params, tokens_BT, lengths_B, options_BCT, mask_BCT))[: len(group)]
        return scores_MC

    return score


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


def class_scorer(
    graphdef: nnx.GraphDef,
    params: dict[str, jax.Array],
    pool: str,
    pad_id: int,
    batch_size: int,
    progress: Progress,
    label: str,
) -> Callable[[list[list[int]], list[list[list[int]]]], np.ndarray]:
    """Returns `score(texts, _) -> (M, C)`: log-probabilities of a classification head over each whole text."""

    @jax.jit
    def run(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        model = layers.bind(graphdef, params)
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        segments_BT = (index_BT < lengths_B[:, None]).astype(jnp.int32)
        hidden_BTD, _ = model(tokens_BT, index_BT, segments_BT)
        at_B = jnp.zeros_like(lengths_B) if pool == "first" else lengths_B - 1
        if pool == "mean":
            hidden_BTD = segment_mean(hidden_BTD, segments_BT)
        pooled_BD = jnp.take_along_axis(hidden_BTD, at_B[:, None, None], axis=1)[:, 0]
        return jax.nn.log_softmax(model.head(pooled_BD), axis=-1)

    def score(texts: list[list[int]], _: Any) -> np.ndarray:
        scores: dict[int, np.ndarray] = {}
        groups = _order([len(text) for text in texts], batch_size)
        for group in progress(groups, len(groups), label):
            filled = group + [group[0]] * (batch_size - len(group))
            tokens_BT = np.full((batch_size, _rounded(max(len(texts[i]) for i in filled))), pad_id, np.int32)
            for b, i in enumerate(filled):
                tokens_BT[b, : len(texts[i])] = texts[i]
            lengths_B = np.asarray([len(texts[i]) for i in filled], np.int32)
            scores |= dict(zip(group, to_host(run(params, tokens_BT, lengths_B)), strict=False))
        return np.stack([scores[i] for i in range(len(texts))])

    return score


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

    @jax.jit
    def run(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, masks_2BT: jax.Array) -> jax.Array:
        model = layers.bind(graphdef, params)
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        hidden_BTD, _ = model(tokens_BT, index_BT, (index_BT < lengths_B[:, None]).astype(jnp.int32))
        nll_BT = token_nll(_head(model), hidden_BTD[:, :-1], tokens_BT[:, 1:])
        return jnp.sum(nll_BT[None] * masks_2BT[:, :, 1:], axis=2)

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
        found = run(params, tokens_BT, np.asarray(rows.lengths[filled], np.int32), masks_2BT)
        sums_2M[:, group] = to_host(found)[:, : len(group)]
        counts_M[group] = trained_BT[: len(group), 1:].sum(1)
    return sums_2M[0], counts_M, sums_2M[1]
