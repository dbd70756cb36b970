"""Pairs of texts, a query and the passage that answers it, to rows of tokens for the `contrastive` objective."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import bm25
from jaxtune.data.batches import Passages, Rows
from jaxtune.data.formats import PASSAGES, QUERIES, Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
TextIds = list[int]


def encode(text: str, tokenizer: Tokenizer, max_length: int) -> tuple[TextIds, bool]:
    """Returns (the tokens of a text with the special ones around it, at most `max_length`; whether it was cut).

    What is cut off stands before the special token that closes the text, where there is one.
    """
    ids = tokenizer.encode_whole(text)
    if len(ids) <= max_length:
        return ids, False
    closed = ids[-1] in tokenizer.special_ids
    return [*ids[: max_length - 1], ids[-1]] if closed else ids[:max_length], True


def check(examples: Sequence[Example]) -> None:
    """Refuses rows that are no pairs.

    Raises:
      UserError: naming the first of them.
    """
    for example in examples:
        if not example.is_pair:
            raise UserError(
                f"{example.row_id}: train.objective='contrastive' needs a query and a passage in every row: columns "
                f"{'|'.join(QUERIES)} and {'|'.join(PASSAGES)}, or data.prompt and data.passage"
            )


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, data: ConfigDict, progress: Progress, label: str = "tokenising"
) -> Rows:
    """Returns the queries as rows, each beside its passages; equal texts are kept once and share a number.

    A row weighs 1, on its query's first token. `Rows.counts` has the names of `pipeline.tokenize`, and `passages`, the
    distinct ones; `tokens` are those of queries and passages, `trained_tokens` the pairs, `truncated` the rows of which
    any text was cut.

    Raises:
      UserError: a row that is no pair, none left, or one too long with `data.too_long="error"`.
    """
    check(examples)
    counts = Counter(dict.fromkeys(("truncated", "too_long", "nothing_to_train"), 0))
    texts: dict[str, int] = {}  # passages by their number
    queries: dict[str, int] = {}
    passages: list[TextIds] = []
    rows: list[TextIds] = []
    row_ids, of_row, query_ids, num_tokens = [], [], [], 0
    for example in progress(examples, len(examples), label):
        beside = [text for text in (example.answer, example.negative) if text]
        encoded = [encode(example.prompt, tokenizer, data.max_length)]
        encoded += [encode(text, tokenizer, data.max_passage_length) for text in beside]
        if any(cut for _, cut in encoded):
            if data.too_long == "error":
                raise UserError(
                    f"{example.row_id}: a text is longer than data.max_length={data.max_length} (query) or "
                    f"data.max_passage_length={data.max_passage_length} tokens; raise it, or set data.too_long"
                )
            counts["too_long" if data.too_long == "drop" else "truncated"] += 1
            if data.too_long == "drop":
                continue
        for text, (ids, _) in zip(beside, encoded[1:], strict=True):
            if text not in texts:
                texts[text] = len(passages)
                passages.append(ids)
        rows.append(encoded[0][0])
        row_ids.append(example.row_id)
        of_row.append([texts[text] for text in beside] + [-1] * (1 + bool(data.negative) - len(beside)))
        query_ids.append(queries.setdefault(example.prompt, len(queries)))
        num_tokens += sum(len(ids) for ids, _ in encoded)
    if not rows:
        raise UserError(
            f"nothing is left to train on: all {len(examples)} rows are longer than data.max_length={data.max_length} or "
            f"data.max_passage_length={data.max_passage_length} tokens; raise them"
        )
    of_row_MQ = np.asarray(of_row, np.int32)
    if data.mined_negatives:
        mined = _mined(list(queries), query_ids, list(texts), of_row_MQ[:, 0], data.mined_negatives, progress)
        of_row_MQ = np.concatenate([of_row_MQ, mined], axis=1)
    tokens, offsets = _joined(rows)
    weights = np.zeros(len(tokens), np.float32)
    weights[offsets[:-1]] = 1
    beside_rows = Passages(*_joined(passages), of_row_MQ, np.asarray(query_ids, np.int32), data.max_passage_length)
    totals = {"rows": len(rows), "tokens": num_tokens, "trained_tokens": len(rows), "passages": len(passages)}
    totals |= dict.fromkeys(("without_trained_stop", "tools_not_in_template"), 0) | dict(counts)
    return Rows(tokens, weights, offsets, row_ids, totals, np.zeros_like(tokens), passages=beside_rows)


def num_passages(data: ConfigDict) -> int:
    """Passages beside each query: the one that answers, and hard negatives."""
    return 1 + bool(data.negative) + int(data.mined_negatives)


def _mined(
    queries: list[str], query_ids: list[int], passages: list[str], own_M: np.ndarray, count: int, progress: Progress
) -> np.ndarray:
    """For each row the `count` passages that BM25 ranks first of those that do not answer its query (arXiv:2004.04906).

    Returns (M, count) int32, -1 where there are no more.
    """
    score, answers = bm25.scorer(passages), [set[int]() for _ in queries]
    for query, own in zip(query_ids, own_M.tolist(), strict=True):
        answers[query].add(own)
    best_of = np.full((len(queries), count), -1, np.int32)
    for number, query in progress(list(enumerate(queries)), len(queries), "mining negatives"):
        scores_W = score(query).astype(np.float64)
        scores_W[sorted(answers[number])] = -1
        best = np.argsort(-scores_W, kind="stable")[:count]
        best_of[number, : len(best)] = np.where(scores_W[best] >= 0, best, -1)
    return best_of[query_ids]


def _joined(texts: list[TextIds]) -> tuple[np.ndarray, np.ndarray]:
    """Texts end to end, and where each begins."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.fromiter((i for ids in texts for i in ids), np.int32, int(offsets[-1])), offsets


def prefix(template: str) -> str:
    """What a template puts before its one column, as "query: " of "query: {text}"; "" where it is of another form."""
    parts = list(string.Formatter().parse(template))
    return parts[0][0] if len(parts) == 1 and parts[0][1] is not None else ""
