"""Answers to one prompt that are compared, to rows of tokens: the answers are branches, and a row is never cut apart.

A row holds its prompt once, as branch 0, or (unshared) in each branch. A shared prompt leaves its last token to every
branch, for one position has one target: the first token of each answer is predicted from a copy of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import packing, templates
from jaxtune.data.batches import Rows, eval_batches, make_bins
from jaxtune.data.formats import Example
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import Batch, UserError

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
KINDS = ("pairs", "rewards", "judged")  # of readers that compare answers

CHOSEN, REJECTED, MISMATCHED = 1, 2, 3  # branches; of an answer that was judged alone: desirable, undesirable

DROPPED = {  # reasons to leave a row out or to cut it, as counted, and as told
    "chosen_equals_rejected": "the chosen and the rejected answer are the same: nothing to learn, left out",
    "empty_completion": "an answer is empty: left out",
    "prompt_over_window": "the prompt alone does not fit data.max_length: cut from the left, or left out",
}


class Answers(NamedTuple):
    """One row: the tokens of its prompt, and of each answer the branch, its tokens and which of them train."""

    prompt: np.ndarray  # int32
    branches: tuple[int, ...]
    completions: tuple[np.ndarray, ...]  # int32
    weights: tuple[np.ndarray, ...]  # float32

    def length(self, share: bool) -> int:
        """Tokens of the row as it is laid out."""
        shared = max(0, len(self.prompt) - 1) if share else 0
        return shared + sum(len(self.prompt) - shared + len(one) for one in self.completions)

    def cut(self, max_length: int, share: bool) -> Answers:
        """What fits: the prompt loses its first tokens, but the last; then the longest answers lose their last ones."""
        over = self.length(share) - max_length
        if over <= 0:
            return self
        times = 1 if share else len(self.completions)
        kept = self._replace(prompt=self.prompt[min(len(self.prompt) - 1, -(-over // times)) :])
        most = max(map(len, self.completions))
        while kept.length(share) > max_length and most > 1:
            over = kept.length(share) - max_length
            most = max(1, most - max(1, over // len(self.completions)))
            completions = tuple(one[:most] for one in kept.completions)
            kept = kept._replace(completions=completions, weights=tuple(one[:most] for one in kept.weights))
        return kept

    def apart(self, max_length: int) -> Answers:
        """What is left where each answer stands by itself after the prompt, in a window of its own."""
        most = max(map(len, self.completions))
        kept = self.prompt[max(0, min(len(self.prompt) - 1, len(self.prompt) + most - max_length)) :]
        room = max(1, max_length - len(kept))
        cut = (tuple(one[:room] for one in parts) for parts in (self.completions, self.weights))
        return Answers(kept, self.branches, *cut)

    def laid_out(self, share: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, weights, branches), each of the whole row."""
        shared, opening = (self.prompt[:-1], self.prompt[-1:]) if share else (self.prompt[:0], self.prompt)
        parts = [(shared, np.zeros(len(shared), np.float32), 0)]
        for branch, tokens, weights in zip(self.branches, self.completions, self.weights, strict=True):
            silent = np.zeros(len(opening), np.float32)
            parts.append((np.concatenate([opening, tokens]), np.concatenate([silent, weights]), branch))
        tokens, weights = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return tokens, weights, np.concatenate([np.full(len(part[0]), part[2], np.int32) for part in parts])


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, data: ConfigDict, progress: Progress, label: str, reader: Reader
) -> Rows:
    """Returns preferences as rows of branches, each at most `data.max_length` tokens.

    `Rows.counts` has the names of `pipeline.tokenize`, and those of `DROPPED`.

    Raises:
      UserError: a row that compares nothing, none left, or one too long with `data.too_long="error"`.
    """
    names = ("truncated", "too_long", "nothing_to_train", "without_trained_stop", "tools_not_in_template", *DROPPED)
    counts, kept, row_ids, margins = Counter(dict.fromkeys(names, 0)), [], [], []
    judged = each(examples, reader)
    for example in progress(judged, len(judged), label):
        found = encode(example, reader, tokenizer, data)
        reason = found if isinstance(found, str) else _unfit(found, example, reader, data, counts)
        if reason or isinstance(found, str):
            counts[reason] += 1
            continue
        counts["tools_not_in_template"] += templates.hides_tools((example.branches or (example,))[0], tokenizer)
        kept.append(found)
        row_ids.append(example.row_id)
        margins.append(example.margin)
    if not kept:
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UserError(
            f"nothing is left to train on: of {len(examples)} rows of {examples[0].row_id.rpartition(':')[0]}, {told} "
            f"(data.max_length={data.max_length}); raise data.max_length or mend the rows"
        )
    if reader.kind == "judged":
        kept = _with_mismatched(kept, reader.group)
    kept = [_cut(one, row_id, reader, data, counts) for one, row_id in zip(kept, row_ids, strict=True)]
    counts["without_trained_stop"] = _never_stop(kept, reader, tokenizer)
    return rows_of(kept, row_ids, margins, counts, reader)


def encode(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Answers | str:
    """Returns a row's prompt and answers as tokens, whole, or the reason to leave it out.

    The prompt is what the encoded rows have in common before anything trains: so it ends where the answers diverge from
    it, also where the template or a token joins the two.

    Raises:
      UserError: the row compares nothing, by its id.
    """
    if reader.kind == "judged":
        if example.desirable is None:
            raise UserError(
                f"{example.row_id}: train.objective='kto' needs to know of each answer whether it is desirable: a 'label' of true "
                "or false beside 'prompt' and 'completion', or pairs of a chosen and a rejected answer"
            )
        if not (example.answer or "").strip() and not (example.messages or ({},))[-1].get("tool_calls"):
            return "empty_completion"
    elif not example.branches:
        raise UserError(
            f"{example.row_id}: this train.objective compares answers, and the row has one: expected 'prompt', 'chosen' and "
            "'rejected' (or OpenAI's 'input', 'preferred_output', 'non_preferred_output'; or 'prompt', 'completions', 'scores')"
        )
    encoded = [
        templates.encode(one._replace(row_id=example.row_id), tokenizer, data) for one in example.branches or (example,)
    ]
    if not all(one.weights.any() for one in encoded):
        return "nothing_to_train"
    first = min(int(np.argmax(one.weights != 0)) for one in encoded)
    first = min(first, len(os.path.commonprefix([one.tokens.tolist() for one in encoded])))
    # What follows the last token that trains, as a template's line break, is seen by none that counts.
    ends = [len(one.weights) - int(np.argmax(one.weights[::-1] != 0)) for one in encoded]
    completions = tuple(one.tokens[first:end] for one, end in zip(encoded, ends, strict=True))
    weights = tuple(one.weights[first:end] for one, end in zip(encoded, ends, strict=True))
    branches = (CHOSEN, REJECTED) if example.branches else (CHOSEN if example.desirable else REJECTED,)
    return Answers(encoded[0].tokens[:first], branches, completions, weights)


def each(examples: Sequence[Example], reader: Reader) -> list[Example]:
    """Returns the rows that a reader reads: a pair, for an objective that judges each answer by itself, is two."""
    if reader.kind != "judged":
        return list(examples)
    made = []
    for example in examples:
        answers = [one._replace(row_id=example.row_id) for one in example.branches] or [example]
        judged = [one._replace(desirable=at == 0) for at, one in enumerate(answers)] if example.branches else answers
        made += judged
    return made


def _unfit(found: Answers, example: Example, reader: Reader, data: ConfigDict, counts: Counter[str]) -> str:
    """Why a row is left out; "" where it is not. Counts prompts that fill the window."""
    length = found.length(reader.share)
    if length > data.max_length and data.too_long == "error":
        raise UserError(
            f"{example.row_id}: {length} tokens of prompt and answers; expected at most data.max_length={data.max_length}; raise it, "
            'or set data.too_long to "truncate" or "drop"'
        )
    over = len(found.prompt) >= data.max_length
    if length > data.max_length and data.too_long == "drop":
        return "prompt_over_window" if over else "too_long"
    counts["prompt_over_window"] += over
    cut = found.cut(data.max_length, reader.share)
    if cut.length(reader.share) > data.max_length:
        return "too_long"
    same = len(cut.completions) == 2 and np.array_equal(*cut.completions)
    return "chosen_equals_rejected" if same else "" if all(w.any() for w in cut.weights) else "nothing_to_train"


def _cut(row: Answers, row_id: str, reader: Reader, data: ConfigDict, counts: Counter[str]) -> Answers:
    counts["truncated"] += row.length(reader.share) > data.max_length
    return row.cut(data.max_length, reader.share)


def _with_mismatched(rows: list[Answers], group: int) -> list[Answers]:
    """Each row with the answer of a row before it too, the first of a group with its last's: for KTO's estimate of the KL."""
    made = []
    for at, row in enumerate(rows):
        other = rows[_mismatched(rows, at, group)]
        completions, weights = row.completions + other.completions[:1], row.weights + other.weights[:1]
        made.append(Answers(row.prompt, (*row.branches, MISMATCHED), completions, weights))
    return made


def _mismatched(rows: list[Answers], at: int, group: int) -> int:
    """The row whose answer row `at` gets: the nearest before it, in its group and round its start, of another prompt.

    Answers to one prompt stand together where pairs are taken apart: the second takes the second nearest, and so on, so that
    good and bad ones are handed round alike. A group of one prompt looks among all rows; where there is no other prompt at
    all, it is the row before.
    """
    start, mine = at - at % group, rows[at].prompt
    num = min(group, len(rows) - start)
    before = [start + (at - start - back) % num for back in range(1, num + 1)]
    alike = 0
    while alike < num - 1 and at - alike > start and np.array_equal(rows[at - alike - 1].prompt, mine):
        alike += 1
    everywhere = ((at - back) % len(rows) for back in range(1, len(rows)))
    for where in (before, everywhere):
        others = list(islice((i for i in where if not np.array_equal(rows[i].prompt, mine)), alike + 1))
        if others:
            return others[-1]
    return before[0]


def _never_stop(rows: list[Answers], reader: Reader, tokenizer: Tokenizer) -> int:
    if reader.kind == "rewards":
        return 0

    def stops(row: Answers) -> bool:
        return bool(np.isin(row.completions[0][row.weights[0] > 0], tokenizer.stop_ids).any())

    return sum(not stops(row) for row in rows)


def rows_of(
    rows: list[Answers], row_ids: list[str], margins: list[float], counts: Counter[str], reader: Reader
) -> Rows:
    laid = [row.laid_out(reader.share) for row in rows]
    tokens, weights, branches = (np.concatenate([one[i] for one in laid]) for i in range(3))
    offsets = np.cumsum([0, *(len(one[0]) for one in laid)], dtype=np.int64)
    targets, scores_MC = None, None
    if reader.kind == "rewards":
        weights = np.concatenate([_read_at(one[2], reader.pool) for one in laid])
        targets, scores_MC = np.zeros_like(tokens), np.asarray(margins, np.float32)[:, None]
    totals = {"rows": len(rows), "tokens": len(tokens), "trained_tokens": int(np.count_nonzero(weights))} | dict(counts)
    return Rows(tokens, weights, offsets, row_ids, totals, targets, scores_MC, branches=branches)


def _read_at(branches: np.ndarray, pool: str) -> np.ndarray:
    """1 at the token of each answer that a text's head reads."""
    weights = np.zeros(len(branches), np.float32)
    for branch in (CHOSEN, REJECTED):
        at = np.flatnonzero(branches == branch)
        weights[at[-1 if pool == "last" else 0]] = 1
    return weights


def with_reference(
    rows: Rows, score: Callable[[Batch], np.ndarray], data: ConfigDict, batch_size: int, pad_id: int, progress: Progress, label: str
) -> Rows:  # fmt: skip
    """Returns rows with the log-probability that `score` ((B, T), of each token's target) gives each token."""
    bins = make_bins(rows, data.max_length, data.packing)
    found = np.zeros(len(rows.tokens), np.float32)
    batches = eval_batches(rows, data.max_length, data.packing, batch_size, pad_id)
    starts = range(0, len(bins), batch_size)
    for start, batch in zip(progress(starts, len(starts), label), batches, strict=True):
        logps_BT = score(batch)
        for b, bin_rows in enumerate(bins[start : start + batch_size]):
            packing.take_back(logps_BT[b], found, rows.offsets, bin_rows)
    return replace(rows, reference_logps=np.where(rows.weights != 0, found, 0).astype(np.float32))
