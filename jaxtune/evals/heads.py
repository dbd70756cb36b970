"""Heads that are not a language model's, on held-out rows: labels of texts, numbers, tags of words, masked words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import masking, pipeline, readers
from jaxtune.data.formats import Example
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import likelihood, spans, tasks
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError

Rows = list[dict[str, Any]]


def rows(config: ConfigDict, examples: list[Example], reader: Reader, tokenizer: Tokenizer) -> Rows:
    """What is asked of a head: for each text its tokens, at which of them (-1: none) scores are read, and the answer.

    None for masked words, which are asked for where they are masked.
    """
    if reader.kind == "masked":
        return []
    asked: Rows = []
    for example in examples:
        if reader.kind == "tags":
            whole, first = readers.first_tokens(example, tokenizer)
            text = whole.cut(config.data.max_length)
            at = [i if i < len(text.tokens) - text.closing else -1 for i in first]
        else:
            text = readers.encode(example, reader, tokenizer, config.data).cut(config.data.max_length)
            at = [int(np.argmax(text.weights))]
        row = {"row_id": example.row_id, "prompt_ids": text.tokens.tolist(), "at": at}
        asked.append({**row, "answer": readers.answer(example, reader)})
    return asked


def measure(
    config: ConfigDict,
    examples: list[Example],
    asked: Rows,
    reader: Reader,
    tokenizer: Tokenizer,
    program: Program,
    params: Params,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]],
    what: str,
    options: dict[str, Any],
) -> tasks.Result:
    """Measures one model's head by what it scores; `options` say how intervals are made."""
    size, pad_id = config.eval.batch_size, tokenizer.pad_id
    if reader.masking is not None:
        texts = pipeline.tokenize(examples, tokenizer, config.data, progress, "tokenising", reader)
        texts = masking.fixed(texts, reader.masking)
        found = likelihood.masked_nll(program.inference, params, texts, pad_id, size, progress, f"guessing, {what}")
        return tasks.masked_words(*found, texts.row_ids, **options)
    read = likelihood.head_scorer(
        program.inference, params, reader.pool == "mean", pad_id, size, progress, f"scoring, {what}"
    )
    scores = read([row["prompt_ids"] for row in asked], [[max(0, at) for at in row["at"]] for row in asked])
    for row, scores_KC in zip(asked, scores, strict=True):
        if not np.isfinite(scores_KC).all():
            raise UserError(f"row {row['row_id']} has a score of NaN or infinity: have the weights diverged?")
    if reader.kind == "label":
        return tasks.score_labels(
            [{**row, "candidate_ids": []} for row in asked],
            reader.labels,
            lambda *_: _log_softmax(_one(scores)),
            **options,
        )
    if reader.kind == "labels":
        return _several(asked, reader.labels, _one(scores), options)
    if reader.kind == "number":
        return _numbers(asked, _one(scores)[:, 0], options)
    return _tags(asked, reader.labels, scores, options)


def _one(scores: list[np.ndarray]) -> np.ndarray:
    return np.stack([scores_KC[0] for scores_KC in scores]).astype(np.float64)


def _log_softmax(scores_MC: np.ndarray) -> np.ndarray:
    shifted_MC = scores_MC - scores_MC.max(-1, keepdims=True)
    return shifted_MC - np.log(np.exp(shifted_MC).sum(-1, keepdims=True))


def _several(asked: Rows, labels: Sequence[str], scores_MC: np.ndarray, options: dict[str, Any]) -> tasks.Result:
    """Any of the labels: those whose probability, the sigmoid of their score, is above a half."""
    found = []
    for row, scores_C in zip(asked, scores_MC, strict=True):
        prediction = [label for label, score in zip(labels, scores_C, strict=True) if score > 0]
        shares = {label: float(share) for label, share in zip(labels, 1 / (1 + np.exp(-scores_C)), strict=True)}
        correct = prediction == row["answer"]
        found.append({**_about(row), "prediction": prediction, "correct": correct, "probabilities": shares})
    names = ("label_macro_f1", "label_micro_f1", "subset_accuracy")
    return tasks.measured(names, found, labels, **options)


def _numbers(asked: Rows, scores_M: np.ndarray, options: dict[str, Any]) -> tasks.Result:
    found = [{**_about(row), "prediction": float(score)} for row, score in zip(asked, scores_M, strict=True)]
    return tasks.measured(("pearson", "spearman", "rmse"), found, (), **options)


def _tags(asked: Rows, labels: Sequence[str], scores: list[np.ndarray], options: dict[str, Any]) -> tasks.Result:
    """The likeliest tag of each word; none, which is wrong, for a word that was cut off."""
    found = []
    for row, scores_KC in zip(asked, scores, strict=True):
        best = scores_KC.argmax(-1)
        prediction = [labels[tag] if at >= 0 else None for tag, at in zip(best, row["at"], strict=True)]
        found.append({**_about(row), "prediction": prediction})
    entities = ("entity_micro_f1", "entity_macro_f1") if spans.are_iob2(labels) else ()
    return tasks.measured((*entities, "tag_accuracy"), found, labels, **options)


def _about(row: dict[str, Any]) -> dict[str, Any]:
    return {"row_id": row["row_id"], "answer": row["answer"]}
