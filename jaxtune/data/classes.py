"""Texts and their classes: what an example's text is to a classifier, and where its class stands."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxtune.data import templates
from jaxtune.data.formats import Example
from jaxtune.data.templates import Encoded
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError, nearest


class Classifier(NamedTuple):
    """A classification head's labels, and which token it reads: first | last | mean."""

    labels: tuple[str, ...]
    pool: str


def encode(example: Example, classifier: Classifier, tokenizer: Tokenizer) -> Encoded:
    """An example for the `classify` objective: its class at the first token, or (pool "last") at the last.

    The text is the prompt: a chat by its template, plain text with the special tokens that the tokenizer puts around it.

    Raises:
      UserError: the row has no answer, or one that is no label.
    """
    labels = list(classifier.labels)
    if example.answer is None or example.answer not in labels:
        near = nearest(example.answer or "", labels)
        raise UserError(f"{example.row_id}: answer {example.answer!r} is no label{near}; labels: {', '.join(labels)}")
    chat = example.messages is not None
    ids = templates.prompt_ids(example, tokenizer) if chat else tokenizer.encode_whole(example.prompt.strip())
    tokens = np.asarray(ids, np.int32)
    targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    at = len(tokens) - 1 if classifier.pool == "last" else 0
    targets[at], weights[at] = labels.index(example.answer), 1.0
    return Encoded(tokens, weights, targets)
