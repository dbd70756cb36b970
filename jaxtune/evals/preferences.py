"""Held-out preferences: how often a model finds the chosen answer likelier, or scores it higher, than the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import preferences
from jaxtune.data.batches import Rows
from jaxtune.data.formats import Example
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import likelihood, tasks
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError

Asked = list[dict[str, Any]]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def rows(config: ConfigDict, examples: list[Example], reader: Reader, tokenizer: Tokenizer) -> Asked:
    """What is asked of a model: for each row its prompt, and the answers with which of their tokens count.

    A row that training would leave out (an empty answer, two equal ones) is left out here too.

    Raises:
      UserError: no row is left, or one compares nothing.
    """
    asked: Asked = []
    for example in preferences.each(examples, reader):
        found = preferences.encode(example, reader, tokenizer, config.data)
        if isinstance(found, str):
            continue
        found = found.apart(config.data.max_length)
        answer: Any = "chosen" if example.branches else found.branches == (preferences.CHOSEN,)
        trained = [np.flatnonzero(w).tolist() for w in found.weights]
        if not all(trained) or (len(trained) == 2 and np.array_equal(found.completions[0], found.completions[1])):
            continue
        answers = [one.tolist() for one in found.completions]
        row = {"row_id": example.row_id, "answer": answer, "prompt_ids": found.prompt.tolist()}
        asked.append({**row, "candidate_ids": answers, "trained": trained})
    if not asked:
        raise UserError(
            f"none of the {len(examples)} rows of eval.split={config.eval.split!r} compares two different answers"
        )
    return asked


def measure(
    config: ConfigDict, asked: Asked, reader: Reader, tokenizer: Tokenizer, program: Program, params: Params, progress: Progress,
    what: str, options: dict[str, Any],
) -> tasks.Result:  # fmt: skip
    """Measures one model. `options` say how intervals are made.

    Of a language model: `pair_accuracy` (the chosen answer is the likelier one) and `pair_accuracy_per_token` (by the mean
    over an answer's tokens, which does not favour short ones). Of answers judged alone: `desirable_auc`, the chance that a
    desirable answer has the higher mean log-probability of a token. Of a reward model: `pair_accuracy`, `pair_nll`
    in nats (ln 2 is a coin's), `calibration_error`.
    """
    size, pad_id = config.eval.batch_size, tokenizer.pad_id
    if reader.kind == "rewards":
        texts = [row["prompt_ids"] + answer for row in asked for answer in row["candidate_ids"]]
        score = likelihood.head_scorer(
            program.inference, params, reader.pool == "mean", pad_id, size, progress, f"scoring, {what}"
        )
        at = [[len(text) - 1 if reader.pool == "last" else 0] for text in texts]
        return scored(asked, np.asarray([one[0, 0] for one in score(texts, at)], np.float64).reshape(-1, 2), options)
    whole = _rows(asked)
    nll, num, _ = likelihood.row_nll(
        program.inference, params, whole, tokenizer.special_ids, pad_id, size, progress, f"reading, {what}"
    )
    logps, means = -nll, -nll / np.maximum(num, 1)
    if not np.isfinite(logps).all():
        raise UserError("a log-probability is NaN or infinite: have the weights diverged?")
    if reader.kind == "judged":
        found = [
            {**_about(row, float(mean)), "logp_per_token": float(mean)} for row, mean in zip(asked, means, strict=True)
        ]
        return tasks.measured(("desirable_auc",), found, **options)
    pairs = zip(asked, logps.reshape(-1, 2), means.reshape(-1, 2), strict=True)
    found = [
        {
            **_about(row, _preferred(total[0] > total[1])),
            "correct": bool(total[0] > total[1]),
            "correct_per_token": bool(mean[0] > mean[1]),
            "logps": total.tolist(),
        }
        for row, total, mean in pairs
    ]
    return tasks.measured(("pair_accuracy", "pair_accuracy_per_token"), found, **options)


def scored(asked: Asked, scores_M2: np.ndarray, options: dict[str, Any]) -> tasks.Result:
    """The result of a reward model's scores, of the chosen and of the rejected answer of each row."""
    if not np.isfinite(scores_M2).all():
        raise UserError("a score is NaN or infinite: have the weights diverged?")
    found = []
    for row, (chosen, rejected) in zip(asked, scores_M2, strict=True):
        gap, correct = float(chosen - rejected), bool(chosen > rejected)
        sure = 1 / (1 + np.exp(-abs(gap)))  # what the model gives the answer that it prefers
        nll = float(np.logaddexp(0.0, -gap))
        found.append(
            {
                **_about(row, _preferred(correct)),
                "correct": correct,
                "scores": [float(chosen), float(rejected)],
                "pair_nll": nll,
                "sure": [sure, correct],
            }
        )
    return tasks.measured(("pair_accuracy", "pair_nll", "calibration_error"), found, **options)


def _about(row: dict[str, Any], prediction: Any) -> dict[str, Any]:
    return {"row_id": row["row_id"], "answer": row["answer"], "prediction": prediction}


def _preferred(chosen: Any) -> str:
    return "chosen" if chosen else "rejected"


def _rows(asked: Asked) -> Rows:
    """Each prompt with each answer, as rows of their own."""
    tokens, weights = [], []
    for row in asked:
        for answer, trained in zip(row["candidate_ids"], row["trained"], strict=True):
            text = row["prompt_ids"] + answer
            weight = np.zeros(len(text), np.float32)
            weight[np.asarray(trained) + len(row["prompt_ids"])] = 1
            tokens.append(np.asarray(text, np.int32))
            weights.append(weight)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Rows(np.concatenate(tokens), np.concatenate(weights), offsets, [str(i) for i in range(len(tokens))])
