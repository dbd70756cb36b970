"""Per-row results to metrics, and two results on the same rows to a verdict. Models come in as plain functions."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import statistics, tracking
from jaxtune.evals import spans
from jaxtune.statistics import Estimate
from jaxtune.types import UserError

# row_id: str, prompt_ids: list[int], answer: str; for labels also candidate_ids: list[list[int]]
Row = Mapping[str, Any]
ScoreFn = Callable[[list[list[int]], list[list[list[int]]]], np.ndarray]
GenerateFn = Callable[[list[list[int]]], list[str]]


@dataclass(frozen=True)
class Result:
    """What one model did on some rows: metrics with intervals, and JSON-ready rows they can be recomputed from."""

    metrics: dict[str, Estimate]
    rows: list[dict[str, Any]]
    labels: tuple[str, ...] = ()
    confusion: np.ndarray | None = None  # (C, C) counts, answers down, predictions across; labels only


class _Metric(NamedTuple):
    statistic: statistics.Statistic  # (column, *shared) -> number
    column: str  # what the model decides
    shared: tuple[str, ...] = ()  # what belongs to the row
    higher_is_better: bool = True


def _token_perplexity(nll_M: np.ndarray, num_tokens_M: np.ndarray) -> Any:
    return np.exp(nll_M.sum(-1) / num_tokens_M.sum(-1))


def _bits_per_byte(nll_M: np.ndarray, num_bytes_M: np.ndarray) -> Any:
    return nll_M.sum(-1) / (np.log(2) * num_bytes_M.sum(-1))


def _metrics(labels: Sequence[str]) -> dict[str, _Metric]:
    def f1(predicted_M: np.ndarray, answers_M: np.ndarray) -> Any:
        return statistics.macro_f1(predicted_M, answers_M, range(len(labels)))

    return {
        "accuracy": _Metric(statistics.mean, "correct"),
        "macro_f1": _Metric(f1, "prediction", ("answer",)),
        "label_nll": _Metric(statistics.mean, "label_nll", higher_is_better=False),
        "exact_match": _Metric(statistics.mean, "correct"),
        "pass_rate": _Metric(statistics.mean, "passed"),
        "mean_reward": _Metric(statistics.mean, "reward"),
        "recall_at_1": _Metric(statistics.mean, "correct"),
        "recall_at_5": _Metric(statistics.mean, "in_top_5"),
        "mrr_at_10": _Metric(statistics.mean, "reciprocal_rank"),
        "perplexity": _Metric(_token_perplexity, "nll_sum", ("num_tokens",), higher_is_better=False),
        "bits_per_byte": _Metric(_bits_per_byte, "text_nll_sum", ("num_bytes",), higher_is_better=False),
        "masked_perplexity": _Metric(_token_perplexity, "nll_sum", ("num_tokens",), higher_is_better=False),
        "masked_accuracy": _Metric(statistics.ratio, "num_right", ("num_tokens",)),
        "label_macro_f1": _Metric(statistics.kinds_macro_f1, "label_counts", ("labels_wanted",)),
        "label_micro_f1": _Metric(statistics.micro_f1, "label_counts", ("labels_wanted",)),
        "subset_accuracy": _Metric(statistics.mean, "correct"),
        "pearson": _Metric(statistics.pearson, "prediction", ("answer",)),
        "spearman": _Metric(statistics.spearman, "prediction", ("answer",)),
        "rmse": _Metric(statistics.rmse, "prediction", ("answer",), higher_is_better=False),
        "entity_micro_f1": _Metric(statistics.micro_f1, "entity_counts", ("entities_wanted",)),
        "entity_macro_f1": _Metric(statistics.kinds_macro_f1, "entity_counts", ("entities_wanted",)),
        "pair_accuracy": _Metric(statistics.mean, "correct"),
        "pair_accuracy_per_token": _Metric(statistics.mean, "correct_per_token"),
        "pair_nll": _Metric(statistics.mean, "pair_nll", higher_is_better=False),
        "calibration_error": _Metric(statistics.calibration_error, "sure", higher_is_better=False),
        "desirable_auc": _Metric(statistics.auc, "logp_per_token", ("answer",)),
        "tag_accuracy": _Metric(statistics.ratio, "words_right", ("num_words",)),
    }


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return _metrics(())[metric].higher_is_better


def score_labels(
    rows: Sequence[Row],
    labels: Sequence[str],
    score: ScoreFn,
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Result:
    """Measures a choice among labels: the prediction is the label whose tokens are the likeliest after the prompt.

    Args:
      rows: each with `candidate_ids` in the order of `labels`.
      labels: the candidate answers.
      score: (prompts, candidates) -> (M, C) summed log-likelihoods of the candidates' tokens, in nats.
      num_samples, confidence, seed: of the bootstrap.

    Returns:
      `accuracy`; `macro_f1` over all labels; `label_nll` in nats, the mean of -log softmax(scores)[answer].

    Raises:
      UserError: an answer is not a label, or a score is not finite.
    """
    for row in rows:
        if row["answer"] not in labels:
            known = ", ".join(map(repr, labels))
            raise UserError(f"row {row['row_id']} has answer {row['answer']!r}; expected one of eval.labels: {known}")
    scores_MC = np.asarray(score([r["prompt_ids"] for r in rows], [r["candidate_ids"] for r in rows]), np.float64)
    scores_MC = scores_MC.reshape(len(rows), len(labels))
    if not np.isfinite(scores_MC).all():
        broken = rows[int((~np.isfinite(scores_MC)).any(-1).argmax())]["row_id"]
        raise UserError(f"row {broken} has a score of NaN or infinity; expected numbers: have the weights diverged?")
    top_M1 = scores_MC.max(-1, keepdims=True)
    log_total_M = (top_M1 + np.log(np.exp(scores_MC - top_M1).sum(-1, keepdims=True)))[:, 0]

    results = []
    for row, scores_C, log_total in zip(rows, scores_MC, log_total_M, strict=True):
        prediction = labels[int(scores_C.argmax())]
        results.append(
            {
                "row_id": row["row_id"],
                "answer": row["answer"],
                "prediction": prediction,
                "correct": prediction == row["answer"],
                "label_nll": float(log_total - scores_C[labels.index(row["answer"])]),
                "scores": {label: float(s) for label, s in zip(labels, scores_C, strict=True)},
            }
        )
    metrics = _measure(("accuracy", "macro_f1", "label_nll"), results, labels, num_samples, confidence, seed)
    predicted_M, answers_M = (_column(results, name, labels) for name in ("prediction", "answer"))
    confusion = statistics.confusion_matrix(predicted_M, answers_M, range(len(labels)))
    return Result(metrics, results, tuple(labels), confusion)


def exact_match(
    rows: Sequence[Row], generate: GenerateFn, *, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Result:
    """Measures the share of rows whose generation equals the answer, both by `normalise`: `exact_match`.

    Args:
      rows: what to ask and the answers.
      generate: prompts of token ids -> texts.
      num_samples, confidence, seed: of the bootstrap.
    """
    results = []
    for row, text in zip(rows, generate([r["prompt_ids"] for r in rows]), strict=True):
        correct = normalise(text) == normalise(row["answer"])
        results.append({"row_id": row["row_id"], "answer": row["answer"], "prediction": text, "correct": correct})
    return Result(_measure(("exact_match",), results, (), num_samples, confidence, seed), results)


def rewarded(
    rows: Sequence[Row],
    generate: GenerateFn,
    score: Callable[[list[str]], np.ndarray],
    threshold: float,
    **options: Any,
) -> Result:
    """Measures generations by their rewards: `pass_rate`, the share of `threshold` or more, and `mean_reward`.

    Args:
      rows: what to ask.
      generate: prompts of token ids -> texts.
      score: texts -> their rewards, (M,); NaN, of one that could not be judged, counts as 0 and does not pass.
      threshold: from which a text passes.
      **options: num_samples, confidence and seed of the bootstrap.
    """
    texts = generate([row["prompt_ids"] for row in rows])
    results = []
    for row, text, reward in zip(rows, texts, score(texts), strict=True):
        judged = {"prediction": text, "passed": bool(reward >= threshold), "reward": float(np.nan_to_num(reward))}
        results.append({"row_id": row["row_id"], "answer": row["answer"], **judged})
    return measured(("pass_rate", "mean_reward"), results, (), **options)


def normalise(text: str) -> str:
    """Returns a text as `exact_match` compares it: case folded, white space collapsed, trailing punctuation cut."""
    return re.sub(r"\s+", " ", text.casefold()).strip().rstrip(string.punctuation + " ")


def perplexity(
    nll_sum_M: np.ndarray,
    num_tokens_M: np.ndarray,
    text_nll_sum_M: np.ndarray,
    num_bytes_M: np.ndarray,
    row_ids: Sequence[str] | None = None,
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Result:
    """Measures how well texts are predicted, per token and per byte.

    `perplexity` = exp(Σ nll / Σ tokens); `bits_per_byte` = Σ nll / (ln 2 · Σ bytes), over the tokens that are text: an
    end-of-turn token has no bytes of its own, so its nll counts in the first alone.

    Args:
      nll_sum_M: negative log-likelihood of each row's tokens, summed, in nats.
      num_tokens_M: how many tokens each sum is over.
      text_nll_sum_M: the sum over those of them that are no special tokens.
      num_bytes_M: UTF-8 bytes of the text of the latter; so bits per byte compare across tokenizers.
      row_ids: names of the rows; None = their numbers.
      num_samples, confidence, seed: of the bootstrap.
    """
    ids = [str(i) for i in range(len(nll_sum_M))] if row_ids is None else row_ids
    results = [
        {
            "row_id": i,
            "answer": None,
            "nll_sum": float(nll),
            "num_tokens": int(tokens),
            "text_nll_sum": float(text_nll),
            "num_bytes": int(size),
        }
        for i, nll, tokens, text_nll, size in zip(
            ids, nll_sum_M, num_tokens_M, text_nll_sum_M, num_bytes_M, strict=True
        )
    ]
    return Result(_measure(("perplexity", "bits_per_byte"), results, (), num_samples, confidence, seed), results)


def masked_words(
    nll_sum_M: np.ndarray,
    num_right_M: np.ndarray,
    num_tokens_M: np.ndarray,
    row_ids: Sequence[str],
    **options: Any,
) -> Result:
    """Measures how well masked tokens are guessed: `masked_perplexity` = exp(Σ nll / Σ tokens), and `masked_accuracy`.

    Args:
      nll_sum_M: negative log-likelihood of each row's masked tokens, summed, in nats.
      num_right_M: how many of them are the likeliest token.
      num_tokens_M: how many there are.
      row_ids: names of the rows.
      **options: num_samples, confidence and seed of the bootstrap.
    """
    columns = zip(row_ids, nll_sum_M, num_right_M, num_tokens_M, strict=True)
    rows = [
        {"row_id": i, "answer": None, "nll_sum": float(nll), "num_right": int(right), "num_tokens": int(num)}
        for i, nll, right, num in columns
    ]
    return measured(("masked_perplexity", "masked_accuracy"), rows, (), **options)


def measured(
    names: Sequence[str],
    rows: list[dict[str, Any]],
    labels: Sequence[str] = (),
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Result:
    """Returns the result that rows amount to by the metrics of these names."""
    return Result(_measure(names, rows, labels, num_samples, confidence, seed), rows, tuple(labels))


def compare(
    before: Result, after: Result, *, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Returns, per metric, after minus before with a paired interval, and a paired test of no difference.

    Returns:
      metric -> {value, low, high, p, test, higher_is_better}: exact McNemar where rows are right or wrong, else a
      permutation test that swaps before and after within rows.

    Raises:
      UserError: the results are not on the same rows.
    """
    if [(r["row_id"], r["answer"]) for r in before.rows] != [(r["row_id"], r["answer"]) for r in after.rows]:
        raise UserError(
            f"before has {len(before.rows)} rows and after {len(after.rows)}, not the same ones in the same order; "
            "expected equal rows and answers: measure both with one split, limit and seed"
        )
    report: dict[str, dict[str, Any]] = {}
    for name in before.metrics:
        metric = _metrics(before.labels)[name]
        before_M, after_M = (_column(result.rows, metric.column, result.labels) for result in (before, after))
        shared = [_column(before.rows, column, before.labels) for column in metric.shared]
        gap = statistics.difference(
            metric.statistic, before_M, after_M, *shared, num_samples=num_samples, confidence=confidence, seed=seed
        )
        if before_M.dtype == bool and before_M.ndim == 1:
            p, test = statistics.mcnemar(before_M, after_M), "exact McNemar"
        else:
            p = statistics.paired_permutation(before_M, after_M, *shared, statistic=metric.statistic, seed=seed)
            test = "paired permutation"
        report[name] = {**gap._asdict(), "p": p, "test": test, "higher_is_better": metric.higher_is_better}
    return report


def read_predictions(path: str | os.PathLike[str], side: str) -> list[dict[str, Any]]:
    """Returns the rows of one side ("before", "after") of what `write_predictions` wrote."""
    lines = [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]
    return [{"row_id": line["row_id"], "answer": line["answer"], **line[side]} for line in lines]


def write_predictions(path: str | os.PathLike[str], before: Result | None, after: Result | None) -> None:
    """Writes a JSON line a row: `row_id`, `answer`, and what each model gave under `before` and `after`.

    A side that was not measured is left out. The file appears whole or not at all.
    """
    path = Path(path)
    sides = {name: side for name, side in (("before", before), ("after", after)) if side is not None}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tracking.writing(path), open(partial, "w", encoding="utf-8") as file:
        for rows in zip(*(side.rows for side in sides.values()), strict=True):
            line: dict[str, Any] = {key: rows[0][key] for key in ("row_id", "answer")}
            for name, row in zip(sides, rows, strict=True):
                line[name] = {key: value for key, value in row.items() if key not in line}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def to_json(result: Result, asked: str = "") -> str:
    """Returns a result as JSON text that `from_json` reads back equal; `asked` says by what it was measured."""
    confusion = None if result.confusion is None else result.confusion.tolist()
    metrics = {name: list(estimate) for name, estimate in result.metrics.items()}
    return json.dumps(
        {"asked": asked, "metrics": metrics, "rows": result.rows, "labels": result.labels, "confusion": confusion},
        ensure_ascii=False,
    )


def from_json(text: str, asked: str = "") -> Result | None:
    """Returns the result that `to_json` wrote, or None where it was measured by something else than `asked`."""
    saved = json.loads(text)
    if saved.get("asked") != asked:
        return None
    confusion = None if saved["confusion"] is None else np.asarray(saved["confusion"])
    metrics = {name: Estimate(*values) for name, values in saved["metrics"].items()}
    return Result(metrics, saved["rows"], tuple(saved["labels"]), confusion)


# Columns that are counted from a row's answer and prediction.
_COUNTED: dict[str, Callable[[Sequence[Row], Sequence[str]], np.ndarray]] = {
    "label_counts": spans.label_counts,
    "labels_wanted": spans.labels_wanted,
    "entity_counts": spans.entity_counts,
    "entities_wanted": spans.entities_wanted,
    "words_right": spans.num_right,
    "num_words": spans.num_words,
}


def _column(rows: Sequence[Row], name: str, labels: Sequence[str]) -> np.ndarray:
    """Returns one column of numbers; labels become their numbers, which compare faster than strings."""
    if name in _COUNTED:
        return _COUNTED[name](rows, labels)
    values = [row[name] for row in rows]
    return np.asarray([labels.index(v) for v in values] if labels and name in ("prediction", "answer") else values)


def _measure(
    names: Sequence[str],
    rows: list[dict[str, Any]],
    labels: Sequence[str],
    num_samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    measured = {}
    for name in names:
        metric = _metrics(labels)[name]
        columns = [_column(rows, column, labels) for column in (metric.column, *metric.shared)]
        measured[name] = statistics.bootstrap(
            metric.statistic, *columns, num_samples=num_samples, confidence=confidence, seed=seed
        )
    return measured
