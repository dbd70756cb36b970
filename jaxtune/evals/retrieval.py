"""Search: held-out queries over a corpus of passages, by embeddings, and by BM25 beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.config import ConfigDict
from jaxtune.data import bm25, pairs
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import tasks
from jaxtune.models import layers
from jaxtune.objectives.ops import embedding
from jaxtune.sharding import to_host
from jaxtune.types import UserError

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
_BUCKET_TOKENS = 16  # batches are as wide as a multiple of this, so that few shapes are compiled
_BLOCK_QUERIES = 64  # scored against the whole corpus at a time
_SHOWN = 5  # passages kept of each ranking
_DEEPEST = 10  # rank beyond which a passage counts as not found, in the mean reciprocal rank


class Corpus(NamedTuple):
    """The distinct passages that are searched: `ids` names the first row that has each; `num_cut` were too long."""

    ids: list[str]
    texts: list[str]
    tokens: list[list[int]]
    num_cut: int


def collect(
    queries: Sequence[Example], passages: Iterable[Example], tokenizer: Tokenizer, data: ConfigDict
) -> tuple[list[dict[str, Any]], Corpus]:
    """Returns (a row for each query, the corpus of the distinct passages of `passages`, which hold the queries' own).

    A row: row_id, `answer` the id of its passage, `query` and `prompt_ids`, and `relevant`, numbers of all passages that
    any row pairs with the same query.

    Raises:
      UserError: a row is no pair.
    """
    passages = list(passages)
    pairs.check([*queries, *passages])
    numbers: dict[str, int] = {}
    ids: list[str] = []
    relevant: dict[str, list[int]] = {}
    for example in passages:
        text = example.answer or ""
        if text not in numbers:
            numbers[text] = len(ids)
            ids.append(example.row_id)
        relevant.setdefault(example.prompt, []).append(numbers[text])
    encoded = [pairs.encode(text, tokenizer, data.max_passage_length) for text in numbers]
    rows = [
        {
            "row_id": example.row_id,
            "answer": ids[numbers[example.answer or ""]],
            "query": example.prompt,
            "prompt_ids": pairs.encode(example.prompt, tokenizer, data.max_length)[0],
            "relevant": sorted(set(relevant[example.prompt])),
        }
        for example in queries
    ]
    return rows, Corpus(ids, list(numbers), [tokens for tokens, _ in encoded], sum(cut for _, cut in encoded))


@lru_cache(maxsize=4)  # measured before and after training: compiled once
def _embedder(graphdef: nnx.GraphDef, pool: str) -> Callable[..., jax.Array]:
    @jax.jit
    def run(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        model = layers.bind(graphdef, params)
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        segment_ids_BT = (index_BT < lengths_B[:, None]).astype(jnp.int32)
        return embedding(model(tokens_BT, index_BT, segment_ids_BT)[0], segment_ids_BT, pool)

    return run


def embed(
    graphdef: nnx.GraphDef,
    params: dict[str, jax.Array],
    pool: str,
    texts: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    progress: Progress,
    label: str,
) -> np.ndarray:
    """Returns each text's embedding, float32 (M, D), of length 1; texts of like length go together.

    Raises:
      UserError: one is not finite.
    """
    run = _embedder(graphdef, pool)
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for group in progress(groups, len(groups), label):
        filled = group + [group[0]] * (batch_size - len(group))  # one batch shape; the copies are dropped
        width = -(-len(texts[group[0]]) // _BUCKET_TOKENS) * _BUCKET_TOKENS
        tokens_BT = np.full((batch_size, width), pad_id, np.int32)
        for b, i in enumerate(filled):
            tokens_BT[b, : len(texts[i])] = texts[i]
        lengths_B = np.asarray([len(texts[i]) for i in filled], np.int32)
        found |= dict(zip(group, to_host(run(params, tokens_BT, lengths_B)), strict=False))
    vectors_MD = np.stack([found[i] for i in range(len(texts))])
    if not np.isfinite(vectors_MD).all():
        raise UserError("an embedding is NaN or infinite; expected numbers: have the weights diverged?")
    return vectors_MD


def search(
    rows: Sequence[tasks.Row], corpus: Corpus, score: Callable[[Sequence[tasks.Row]], np.ndarray], **intervals: Any
) -> tasks.Result:
    """Ranks the corpus for each query and measures where its passage comes.

    `recall_at_1`, `recall_at_5`: the share of queries with a passage of theirs among the first 1 or 5; `mrr_at_10`: the
    mean of 1 / rank, 0 beyond rank 10. Passages of equal score keep the order of the corpus.

    Args:
      score: some rows -> (rows, W) scores of every passage.
      intervals: keywords of `tasks.measured`.
    """
    results: list[dict[str, Any]] = []
    for start in range(0, len(rows), _BLOCK_QUERIES):
        block = rows[start : start + _BLOCK_QUERIES]
        for row, scores_W in zip(block, score(block), strict=True):
            order_W = np.argsort(-scores_W, kind="stable")
            rank = int(np.isin(order_W, row["relevant"]).argmax()) + 1
            top = [corpus.ids[int(number)] for number in order_W[:_SHOWN]]
            results.append(
                {
                    "row_id": row["row_id"],
                    "answer": row["answer"],
                    "prediction": top[0],
                    "rank": rank,
                    "top_5": top,
                    "correct": rank == 1,
                    "in_top_5": rank <= 5,
                    "reciprocal_rank": 1 / rank if rank <= _DEEPEST else 0.0,
                }
            )
    return tasks.measured(("recall_at_1", "recall_at_5", "mrr_at_10"), results, **intervals)


def by_embeddings(
    rows: Sequence[tasks.Row], corpus: Corpus, embed_texts: Callable[[list[list[int]]], np.ndarray], **intervals: Any
) -> tasks.Result:
    """`search` by cosine; `embed_texts`: token ids of texts -> vectors (M, D) of length 1."""
    corpus_WD = embed_texts(corpus.tokens)
    vectors_MD = embed_texts([row["prompt_ids"] for row in rows])
    numbers = {row["row_id"]: number for number, row in enumerate(rows)}
    return search(
        rows, corpus, lambda block: vectors_MD[[numbers[r["row_id"]] for r in block]] @ corpus_WD.T, **intervals
    )


def by_bm25(rows: Sequence[tasks.Row], corpus: Corpus, **intervals: Any) -> tasks.Result:
    """`search` by BM25, which reads whole texts where a model may read them cut."""
    score = bm25.scorer(corpus.texts)
    return search(rows, corpus, lambda block: np.stack([score(row["query"]) for row in block]), **intervals)
