"""Files to rows of tokens: examples, split by a stable hash, then tokenised; `batches` goes on from there."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import readers, templates
from jaxtune.data.batches import BatchSource, Rows, eval_batches, iterate, make_bins, padding_share
from jaxtune.data.formats import Example, read_examples
from jaxtune.data.messages import ROLES
from jaxtune.data.privacy import Private
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError, nearest

__all__ = [
    "BatchSource",
    "Rows",
    "Splits",
    "eval_batches",
    "iterate",
    "load",
    "make_bins",
    "padding_share",
    "silent",
    "tokenize",
]

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, total, label) -> the same items


class Splits(NamedTuple):
    """The examples to train, validate and test on; `counts` of rows per split, and dropped by reason."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    counts: dict[str, int]
    support: list[Example] = []  # of tasks that are never trained on: rows to be shown, or adapted to


def silent(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """The progress that shows nothing."""
    return items


def load(
    data: ConfigDict, paths: dict[str, Path], tokenizer: Tokenizer, progress: Progress = silent, keep_rows: bool = False,
    answers: bool = True, task_column: str | None = None, private: Private | None = None,
) -> Splits:  # fmt: skip
    """Returns the examples of `paths` ("train", and optionally "eval" and "test") in three splits.

    A split without a file of its own is a share of the training rows, by a hash of each row's split key: it depends
    neither on the order of rows nor on any seed. Then `data.limit` keeps the training rows of the smallest hashes.
    `task_column` and `private` are `read_examples`'s.

    Where rewards are to judge (`keep_rows`), examples keep their rows, and those of a test file need no answer; without
    `answers`, none needs one.

    Raises:
      UserError: a bad row, a file without rows, or a split that leaves nothing to train on.
    """
    for role in data.roles:
        if role not in ROLES:
            raise UserError(f"data.roles has {role!r}{nearest(str(role), ROLES)}; expected of {', '.join(ROLES)}")
    if tokenizer.chat_template is None and data.format in ("messages", "sharegpt"):
        tokenizer.render([])  # says what to do about it, before a long file is read
    dropped: Counter[str] = Counter()
    read: dict[str, list[Example]] = {}
    for name in ("train", "eval", "test"):
        if name in paths:
            needs_answer = answers and not (keep_rows and name == "test")
            read[name], lost = read_examples(paths[name], data, needs_answer, keep_rows, task_column, private)
            dropped.update(lost)
    test_share = 0.0 if "test" in read else data.test_fraction
    validation_share = 0.0 if "eval" in read else data.validation_fraction
    splits: dict[str, list[Example]] = {"train": [], "eval": read.get("eval", []), "test": read.get("test", [])}
    for example in progress(read["train"], len(read["train"]), "splitting"):
        share = _share(_key(example, data.split_regex, hidden=private is not None))
        held_out = "test" if share < test_share else "eval" if share < test_share + validation_share else "train"
        splits[held_out].append(example)
    train = limited(splits["train"], data.limit)
    if not train:
        raise UserError(
            f"no training rows left of {sum(map(len, read.values()))} read ({_listed(dropped) or 'none dropped'}): "
            + (
                "all fell into validation or test; lower data.validation_fraction or data.test_fraction"
                if read["train"]
                else f"all of {paths['train']} were dropped, for the reason counted; mend them, or name other rows"
            )
        )
    counts = {"train": len(train), "validation": len(splits["eval"]), "test": len(splits["test"])}
    counts |= {"beyond_limit": len(splits["train"]) - len(train)} | dict(dropped)
    return Splits(train, splits["eval"], splits["test"], counts)


def _key(example: Example, pattern: str, hidden: bool) -> str:
    if not pattern:
        return example.split_key
    try:
        found = re.search(pattern, example.split_key)
    except re.error as error:
        raise UserError(f"data.split_regex {pattern!r} is not a regular expression: {error}") from None
    if not found:
        where = "what decides its split" if hidden else f"{example.split_key!r:.80}"
        raise UserError(f"{example.row_id}: data.split_regex {pattern!r} matches nothing in {where}")
    return found.group(1) or "" if found.re.groups else found.group(0)


def _share(text: str) -> float:
    """Returns a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def limited(examples: list[Example], limit: int) -> list[Example]:
    """Returns at most `limit` examples (0 = all) in their order: a choice that other rows and seeds do not change."""
    if not limit or len(examples) <= limit:
        return examples
    hashes = np.array([_share(f"limit:{_said(example)}") for example in examples])
    return [examples[i] for i in np.sort(np.argsort(hashes, kind="stable")[:limit])]


def _said(example: Example) -> str:
    """All that a row says: not by its split key, for rows of one group share that, and a limit should not keep whole groups; nor by
    the columns that some runs keep beside, for runs of any objective choose the same rows."""

    def bare(one: Example) -> Example:
        return one._replace(row=None, personal=(), branches=tuple(map(bare, one.branches)))

    e = bare(example)
    return json.dumps([*e[1:6], *filter(None, e[7:])], sort_keys=True, ensure_ascii=False, default=str)


def tokenize(
    examples: list[Example],
    tokenizer: Tokenizer,
    data: ConfigDict,
    progress: Progress = silent,
    label: str = "tokenising",
    reader: Reader = readers.NEXT,
) -> Rows:
    """Returns the examples as rows of at most `data.max_length` tokens; rows with nothing to train are dropped.

    `reader` says what of an example is learnt; its next tokens, unless told otherwise.

    `Rows.counts`: rows, tokens, trained_tokens, truncated, too_long, nothing_to_train, without_trained_stop (rows that
    never train a token that ends an answer), tools_not_in_template (rows with tools that the template does not print).

    Raises:
      UserError: no examples, none left, or a row over `data.max_length` with `data.too_long="error"`.
    """
    if not examples:
        raise UserError("the data set is empty; expected at least one row")
    names = ("truncated", "too_long", "nothing_to_train", "without_trained_stop", "tools_not_in_template")
    counts = Counter(dict.fromkeys(names, 0))
    kept: list[templates.Encoded] = []
    row_ids: list[str] = []
    is_next = reader.kind == "next"
    for example in progress(examples, len(examples), label):
        encoded = readers.encode(example, reader, tokenizer, data)
        length = len(encoded.tokens)
        if length > data.max_length:
            if data.too_long == "error":
                raise UserError(
                    f"{example.row_id}: {length} tokens; expected at most data.max_length={data.max_length}; "
                    'raise it, or set data.too_long to "truncate" or "drop"'
                )
            if data.too_long == "drop":
                counts["too_long"] += 1
                continue
            counts["truncated"] += 1
            encoded = encoded.cut(data.max_length)
        # Nothing comes before the first token, so it is never a target; but it may be classed.
        if not encoded.weights[1 if is_next else 0 :].any():
            counts["nothing_to_train"] += 1
            continue
        counts["without_trained_stop"] += is_next and not templates.trains_stop(encoded, tokenizer)
        counts["tools_not_in_template"] += templates.hides_tools(example, tokenizer)
        kept.append(encoded)
        row_ids.append(example.row_id)
    if not kept:
        raise UserError(_why_empty(examples, counts, data))
    return _rows(kept, row_ids, counts)


def _rows(kept: list[templates.Encoded], row_ids: list[str], counts: Counter[str]) -> Rows:
    tokens = np.concatenate([e.tokens for e in kept])
    weights = np.concatenate([e.weights for e in kept])
    offsets = np.cumsum([0, *(len(e.tokens) for e in kept)], dtype=np.int64)
    classed = [e.targets for e in kept if e.targets is not None]
    scored = [e.scores_C for e in kept if e.scores_C is not None]
    targets, scores_MC = np.concatenate(classed) if classed else None, np.stack(scored) if scored else None
    trained = int(np.count_nonzero(weights) - (0 if classed else np.count_nonzero(weights[offsets[:-1]])))
    totals = {"rows": len(kept), "tokens": len(tokens), "trained_tokens": trained}
    return Rows(tokens, weights, offsets, row_ids, totals | dict(counts), targets, scores_MC)


def _why_empty(examples: list[Example], counts: Counter[str], data: ConfigDict) -> str:
    advice = "raise data.max_length" if counts["too_long"] or counts["truncated"] else (
        "check the messages' weight, data.roles and data.end_of_turn"
    )  # fmt: skip
    return (
        f"nothing is left to train on: of {len(examples)} rows of {examples[0].row_id.rpartition(':')[0]}, {_listed(counts)} "
        f"(data.max_length={data.max_length}, data.roles={tuple(data.roles)}); {advice}"
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
