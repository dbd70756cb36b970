"""How an objective reads an example: a text to go on with, to fill in, to class, to rate, or to tag word by word."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import templates
from jaxtune.data.formats import Example
from jaxtune.data.masking import Masking
from jaxtune.data.templates import Encoded
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError, nearest


class Reader(NamedTuple):
    """What an objective makes of an example, as plain data; `encode` goes by it, and so does what is measured.

    kind: next (tokens are predicted from those before) | masked (words are guessed) | label (one of `labels` for a text) |
    labels (any of them) | number (a score) | tags (one of `labels` for each word). pool: which token a text's head reads:
    first | last | mean. masking: of masked words.

    Answers that are compared (`data/preferences.py`): pairs (a chosen one and a rejected one) | rewards (the same, each to be
    scored by a head) | judged (each desirable or not). share: whether answers share their prompt's tokens. group: of judged
    rows, among so many each gets another's answer for KTO's estimate of the KL.
    """

    kind: str = "next"
    labels: tuple[str, ...] = ()
    pool: str = ""
    masking: Masking | None = None
    share: bool = False
    group: int = 0


NEXT = Reader()


def encode(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    """Returns an example's tokens and what is to be learnt at which of them.

    Raises:
      UserError: the row is not what this reader reads, by its id.
    """
    if reader.kind == "next":
        return templates.encode(example, tokenizer, data)
    try:
        return _ENCODERS[reader.kind](example, reader, tokenizer, data)
    except UserError as error:
        raise UserError(f"{example.row_id}: {error}") from None


def answer(example: Example, reader: Reader) -> str | list[str] | float:
    """What is right for a row, as it is written into predictions: a label, several, a number, or a tag for each word.

    Raises:
      UserError: the row does not have it.
    """
    try:
        if reader.kind == "number":
            return _number(example)
        if reader.kind == "labels":
            return [reader.labels[i] for i in _labels(example, reader)]
        if reader.kind == "tags":
            return [reader.labels[i] for i in _tags(example, reader)]
        return reader.labels[_index(example.answer, reader.labels)]
    except UserError as error:
        raise UserError(f"{example.row_id}: {error}") from None


def first_tokens(example: Example, tokenizer: Tokenizer) -> tuple[Encoded, list[int]]:
    """Returns a row of words as tokens, and where each word begins; -1 for a word that leaves no token."""
    assert example.words is not None
    ids, words = tokenizer.encode_words(example.words)
    first = [-1] * len(example.words)
    for at in reversed(range(len(ids))):
        if words[at] >= 0:
            first[words[at]] = at
    zeros = np.zeros(len(ids), np.float32)
    return Encoded(np.asarray(ids, np.int32), zeros, zeros.astype(np.int32), _closing(ids, tokenizer)), first


def _masked(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    """Any text: a chat by its template, a prompt with its answer, words. Every token but special ones may be masked."""
    if example.messages is not None:
        ids = tokenizer.encode(tokenizer.render(example.messages, example.tools))
    elif example.words is not None:
        ids = tokenizer.encode_whole(" ".join(example.words))
    else:
        ids = tokenizer.encode_whole(example.prompt + (example.answer or "") if example.text is None else example.text)
    tokens = np.asarray(ids, np.int32)
    weights = (~np.isin(tokens, tokenizer.special_ids)).astype(np.float32)
    return Encoded(tokens, weights, tokens, _closing(ids, tokenizer))


def _closing(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens close a text, and stay when it is cut."""
    return int(bool(ids) and ids[-1] in tokenizer.special_ids)


def _text(example: Example, reader: Reader, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """A text's tokens, the weights that mark the one its head reads, and how many of the last stay when it is cut.

    The text is the prompt: a chat by its template, plain text with the special tokens that the tokenizer puts around it.
    """
    if example.words is not None or example.text is not None:
        raise UserError("has no prompt apart from its answer; set data.prompt and data.label_column")
    chat = example.messages is not None
    ids = templates.prompt_ids(example, tokenizer) if chat else tokenizer.encode_whole(example.prompt.strip())
    if not ids:
        raise UserError("the text is empty: there is nothing to class")
    weights = np.zeros(len(ids), np.float32)
    weights[-1 if reader.pool == "last" else 0] = 1
    return np.asarray(ids, np.int32), weights, 1


def _label(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    tokens, weights, closing = _text(example, reader, tokenizer)
    return Encoded(tokens, weights, weights.astype(np.int32) * _index(example.answer, reader.labels), closing)


def _several(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    tokens, weights, closing = _text(example, reader, tokenizer)
    scores_C = np.zeros(len(reader.labels), np.float32)
    scores_C[_labels(example, reader)] = 1
    return Encoded(tokens, weights, np.zeros_like(tokens), closing, scores_C)


def _rated(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    tokens, weights, closing = _text(example, reader, tokenizer)
    return Encoded(tokens, weights, np.zeros_like(tokens), closing, np.asarray([_number(example)], np.float32))


def _tagged(example: Example, reader: Reader, tokenizer: Tokenizer, data: ConfigDict) -> Encoded:
    """A word's tag stands at its first sub-word; with `data.tag_subwords="all"` at every one, B-X going on as I-X."""
    tags = _tags(example, reader)
    encoded, first = first_tokens(example, tokenizer)
    targets, weights = np.zeros(len(encoded.tokens), np.int32), encoded.weights
    if data.tag_subwords == "all":
        on = [_inside(tag, reader.labels) for tag in tags]
        for at, word in enumerate(tokenizer.encode_words(example.words or ())[1]):
            if word >= 0:
                targets[at], weights[at] = on[word], 1
    at_W = np.asarray(first)
    found_W = at_W >= 0
    targets[at_W[found_W]], weights[at_W[found_W]] = np.asarray(tags, np.int32)[found_W], 1
    return encoded._replace(targets=targets)


def _inside(tag: int, labels: tuple[str, ...]) -> int:
    """The tag of a word's further sub-words: I-X after B-X, where there is one."""
    name = labels[tag]
    return labels.index("I-" + name[2:]) if name.startswith("B-") and "I-" + name[2:] in labels else tag


def _index(name: str | None, labels: tuple[str, ...], what: str = "answer", noun: str = "label") -> int:
    if name is None or name not in labels:
        near = nearest(name or "", labels)
        raise UserError(f"{what} {name!r} is no {noun}{near}; {noun}s: {', '.join(labels)}")
    return labels.index(name)


def _labels(example: Example, reader: Reader) -> list[int]:
    several = example.labels if example.labels is not None else (example.answer,)
    return sorted({_index(name, reader.labels) for name in several})


def _number(example: Example) -> float:
    try:
        number = float(example.answer or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"answer {example.answer!r} is no number; expected one, for problem_type='regression'")
    return number


def _tags(example: Example, reader: Reader) -> list[int]:
    """A tag's number for each word; a row may name tags or number them."""
    if example.words is None or example.labels is None:
        raise UserError('has no words with tags; expected "tokens" and "tags", two lists of one length')
    named = [_named(tag, reader.labels) for tag in example.labels]
    return [_index(tag, reader.labels, f"word {at}: tag", "tag") for at, tag in enumerate(named, 1)]


def _named(tag: str, labels: tuple[str, ...]) -> str:
    return labels[int(tag)] if tag not in labels and tag.isdecimal() and int(tag) < len(labels) else tag


_ENCODERS: dict[str, Callable[[Example, Reader, Tokenizer, ConfigDict], Encoded]] = {
    "masked": _masked,
    "label": _label,
    "labels": _several,
    "number": _rated,
    "tags": _tagged,
}
