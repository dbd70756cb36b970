"""A model on held-out rows: which rows, what is measured on them, and the sampler and scorers that measure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import bm25, pipeline, templates
from jaxtune.data import preferences as preferences_data
from jaxtune.data.formats import Example
from jaxtune.data.readers import NEXT, Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import heads, likelihood, preferences, retrieval, tasks
from jaxtune.generate.logits import Sampling
from jaxtune.generate.sampler import Sampler
from jaxtune.rewards import scoring
from jaxtune.train import rows as rows_lib
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError
from jaxtune.validation_methods import ON_POLICY

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
_MANY_LABELS = 50


class HeldOut(NamedTuple):
    """The rows to measure on, as the metric wants them; `labels` and `rows` for labels and exact_match.

    With a `reader` of other than next tokens the metrics are those of its head. `corpus`: what is searched, for retrieval.
    """

    metric: str
    examples: list[Example]
    labels: tuple[str, ...]
    rows: list[dict[str, Any]]
    reader: Reader = NEXT
    corpus: retrieval.Corpus | None = None


def held_out(
    config: ConfigDict, splits: pipeline.Splits, tokenizer: Tokenizer, reader: Reader = NEXT
) -> HeldOut | None:
    """Picks rows of `eval.split` (the same ones for everybody who asks), or None where it is empty.

    `reader` says how the objective reads an example.

    Raises:
      UserError: a labels metric without labels to choose among, or a metric of language models for another head.
    """
    examples: list[Example] = getattr(splits, config.eval.split)
    if not examples:
        return None
    of_split, examples = examples, pipeline.limited(examples, config.eval.limit)
    metric = config.eval.metric
    if config.train.objective == "contrastive" and metric in ("auto", "retrieval"):
        searched = of_split if config.eval.corpus == "split" else [e for split in splits[:3] for e in split]
        found, corpus = retrieval.collect(examples, searched, tokenizer, config.data)
        return HeldOut("retrieval", examples, (), found, corpus=corpus)
    if config.train.objective == "contrastive" or metric == "retrieval":
        raise UserError(
            f"eval.metric={metric!r} with train.objective={config.train.objective!r}: 'retrieval' goes with 'contrastive'"
        )
    if reader.kind != "next":
        if metric != "auto":
            raise UserError(
                f"eval.metric={metric!r} measures language models; train.objective={config.train.objective!r} has metrics of its "
                f"own: set 'auto'"
            )
        if reader.kind in preferences_data.KINDS:
            found = preferences.rows(config, examples, reader, tokenizer)
            return HeldOut(reader.kind, examples, (), found, reader)
        return HeldOut(reader.kind, examples, reader.labels, heads.rows(config, examples, reader, tokenizer), reader)
    if rows_lib.judged(config):
        return HeldOut("reward", examples, (), _judged_rows(config, examples, tokenizer))
    if metric == "auto":
        metric = "labels" if config.data.label_column or config.eval.labels else "perplexity"
    if metric == "perplexity":
        return HeldOut(metric, examples, (), [])
    without = [e.row_id for e in examples if e.answer is None]
    if without:
        raise UserError(f"eval.metric={metric!r} needs an answer in every row; {without[0]} has none: use 'perplexity'")
    rows: list[dict[str, Any]] = [
        {"row_id": e.row_id, "answer": e.answer, "prompt_ids": templates.prompt_ids(e, tokenizer)} for e in examples
    ]
    if metric == "exact_match":
        return HeldOut(metric, examples, (), rows)
    labels = tuple(config.eval.labels) or tuple(sorted({e.answer or "" for s in splits[:3] for e in s}))
    if not 2 <= len(labels) <= _MANY_LABELS:
        raise UserError(
            f"eval.metric='labels' found {len(labels)} different answers; expected 2 to {_MANY_LABELS}: set eval.labels or another metric"
        )
    known = ", ".join(map(repr, labels))
    for row, example in zip(rows, examples, strict=True):
        if row["answer"] not in labels:
            raise UserError(f"row {row['row_id']} has answer {row['answer']!r}; expected one of eval.labels: {known}")
        row["prompt_ids"], row["candidate_ids"] = templates.continuations(example, labels, tokenizer)
    return HeldOut(metric, examples, labels, rows)


def _judged_rows(config: ConfigDict, examples: list[Example], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What rewards need to judge an answer to each example; refuses rows that they cannot judge."""
    scoring.names(config.reward)
    rows = [scoring.row_of(example) for example in examples]
    scoring.check_rows(config.reward, [example.row_id for example in examples], rows)
    return [
        {
            "row_id": example.row_id,
            "answer": example.answer,
            "prompt_ids": templates.prompt_ids(example, tokenizer),
            "prompt": scoring.prompt_of(example),
            "row": row,
        }
        for example, row in zip(examples, rows, strict=True)
    ]


def _judged(rewarder: scoring.Rewarder, rows: list[dict[str, Any]], texts: list[str]) -> np.ndarray:
    return rewarder([row["prompt"] for row in rows], texts, [row["row"] for row in rows]).total


def nothing_held(config: ConfigDict) -> str:
    """What to say where `held_out` finds no rows."""
    keys = {
        "test": "data.test_fraction, data.test, or eval.split='validation'",
        "validation": "data.validation_fraction, data.eval, or eval.split='test' with data.test",
    }
    return f"no {config.eval.split} rows: nothing is measured before and after; set {keys[config.eval.split]}"


def asked(config: ConfigDict, held: HeldOut) -> str:
    """A hash of all that measuring the untuned model depends on: its source, rows, answers, labels, metric, intervals, tokens."""
    data = {key: value for key, value in config.data.items() if key not in ("train", "eval", "test")}
    settings = {**data, **intervals(config)}  # what the files hold stands in the rows
    settings |= {"model": config.model.to_dict(), "adapter": config.tune.adapter}
    if held.metric == "reward":
        settings |= {"reward": config.reward.to_dict()}
    if held.metric in ("exact_match", "reward"):
        settings |= {key: config.generate[key] for key in config.generate if key not in ("input", "output")}
    text = json.dumps([held, settings], ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def intervals(config: ConfigDict) -> dict[str, Any]:
    """How every figure's interval is made, as keywords of the functions in `tasks`."""
    e = config.eval
    return {"num_samples": e.bootstrap_samples, "confidence": e.confidence, "seed": config.train.seed}


def measure(
    config: ConfigDict,
    held: HeldOut,
    tokenizer: Tokenizer,
    program: Program,
    params: Params,
    progress: Progress,
    what: str,
) -> tasks.Result:
    """Measures one model on the held-out rows; every figure with a bootstrap interval."""
    options = intervals(config)
    if held.corpus:

        def embed(texts: list[list[int]]) -> np.ndarray:
            where = (texts, tokenizer.pad_id, config.eval.batch_size, progress, f"embedding, {what}")
            return retrieval.embed(program.inference, params, program.pool, *where)

        return retrieval.by_embeddings(held.rows, held.corpus, embed, **options)
    if held.reader.kind in preferences_data.KINDS:
        given = (held.rows, held.reader, tokenizer, program, params, progress, what)
        return preferences.measure(config, *given, options)
    if held.reader.kind != "next":
        model = (held.reader, tokenizer, program, params, progress, what)
        return heads.measure(config, held.examples, held.rows, *model, options)
    if held.metric == "exact_match":
        return tasks.exact_match(
            held.rows, generator(config, tokenizer, program, params, progress, f"answering, {what}"), **options
        )
    if held.metric == "reward":
        answer = generator(config, tokenizer, program, params, progress, f"answering, {what}")
        with scoring.Rewarder(config.reward) as rewarder:
            judge = partial(_judged, rewarder, held.rows)
            return tasks.rewarded(held.rows, answer, judge, config.reward.threshold, **options)
    if held.metric == "labels":
        size, doing = config.eval.batch_size, f"scoring, {what}"
        score = likelihood.label_scorer(program.inference, params, tokenizer.pad_id, size, progress, doing)
        return tasks.score_labels(held.rows, held.labels, score, **options)
    rows = pipeline.tokenize(held.examples, tokenizer, config.data, progress, "tokenising")
    size, special = config.eval.batch_size, tokenizer.special_ids
    nll_M, tokens_M, text_nll_M = likelihood.row_nll(
        program.inference, params, rows, special, tokenizer.pad_id, size, progress, f"reading, {what}"
    )
    return tasks.perplexity(nll_M, tokens_M, text_nll_M, _trained_bytes(rows, tokenizer), rows.row_ids, **options)


def beside(config: ConfigDict, held: HeldOut) -> dict[str, tasks.Result]:
    """What others make of the same rows, by name: BM25 of a search, where it is installed."""
    if not held.corpus or not bm25.is_installed():
        return {}
    return {"BM25": retrieval.by_bm25(held.rows, held.corpus, **intervals(config))}


def _trained_bytes(rows: pipeline.Rows, tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of each row's trained text."""

    def one(row: int) -> int:
        inside = slice(int(rows.offsets[row]) + 1, int(rows.offsets[row + 1]))
        return len(tokenizer.decode(rows.tokens[inside][rows.weights[inside] != 0], skip_special=True).encode())

    return np.asarray([max(1, one(row)) for row in range(len(rows))])


def sampler(tokenizer: Tokenizer, program: Program, params: Params) -> Sampler:
    """A sampler over these parameters."""
    return Sampler(
        program.inference,
        params,
        tokenizer.decode,
        tokenizer.stop_ids,
        tokenizer.pad_id,
        tokenizer.vocab_size,
        program.model_config.max_positions,
    )


def check(config: ConfigDict, held: HeldOut | None, tokenizer: Tokenizer, program: Program) -> None:
    """Refuses held-out rows that cannot be measured, and rewards that cannot be run: before anything is trained, for afterwards it
    would cost the result.

    Raises:
      UserError: naming the first row that is too long for the model, or why none is left.
    """
    if config.train.objective in ON_POLICY if held is None else held.metric == "reward":
        scoring.check(config.reward)
    if held is None:
        return None
    ids = [row["row_id"] for row in held.rows]
    if held.metric in ("exact_match", "reward"):
        return check_prompts(config, program, ids, [row["prompt_ids"] for row in held.rows])
    if held.metric == "perplexity":
        try:
            rows = pipeline.tokenize(held.examples, tokenizer, config.data)
        except UserError as error:
            raise UserError(f"the rows of eval.split={config.eval.split!r} cannot be measured: {error}") from None
        ids, lengths = rows.row_ids, rows.lengths.tolist()
    else:
        answers = [max(map(len, row.get("candidate_ids", ())), default=0) for row in held.rows]
        lengths = [len(row.get("prompt_ids", ())) + answer for row, answer in zip(held.rows, answers, strict=True)]
    most = program.model_config.max_positions
    for row_id, length in zip(ids, lengths, strict=True):
        if length > most:
            raise UserError(
                f"{row_id}: {length} tokens with the answer exceed the model's {most} positions: shorten it"
            )


def check_prompts(config: ConfigDict, program: Program, row_ids: list[str], prompts: list[list[int]]) -> None:
    """Refuses, before any is answered, a prompt that is empty or leaves no room for an answer.

    Raises:
      UserError: naming the row.
    """
    room, most = config.generate.max_new_tokens, program.model_config.max_positions
    for row_id, prompt in zip(row_ids, prompts, strict=True):
        if not prompt:
            raise UserError(f"{row_id}: the prompt is empty: there is nothing to go on from")
        if len(prompt) + room > most:
            raise UserError(
                f"{row_id}: a prompt of {len(prompt)} tokens and generate.max_new_tokens={room} exceed the model's {most} "
                "positions: shorten one of them"
            )


def generator(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, params: Params, progress: Progress, label: str
) -> tasks.GenerateFn:
    """Returns prompts -> texts by the config's sampling, `generate.batch_size` at a time, likes with likes."""
    own, options = sampler(tokenizer, program, params), config.generate

    def generate(prompts: list[list[int]]) -> list[str]:
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        groups = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
        for group in progress(groups, len(groups), label):
            filled = group + [group[0]] * (options.batch_size - len(group))
            made = own.generate(
                [prompts[i] for i in filled],
                Sampling.from_config(options),
                options.max_new_tokens,
                options.seed,
                options.stop,
                filled,
            )
            for i, text in zip(group, made, strict=False):
                texts[i] = text
        return texts

    return generate
