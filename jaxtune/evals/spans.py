"""Tags of words as entities (IOB2), and rows of labels or entities as the counts that an F1 is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
Span = tuple[str, int, int]  # kind, first word, the word after the last


def are_iob2(labels: Sequence[str]) -> bool:
    """Returns whether tags are O, B-X and I-X."""
    return any(label.startswith("B-") for label in labels) and all(
        label == "O" or label[:2] in ("B-", "I-") for label in labels
    )


def kinds(labels: Sequence[str]) -> list[str]:
    """The kinds of entity that IOB2 tags tell apart."""
    return sorted({label[2:] for label in labels if label != "O"})


def entities(tags: Sequence[str | None]) -> set[Span]:
    """Returns the entities of a row of IOB2 tags, strictly: one begins at B-X alone and goes on through I-X.

    An I-X that follows neither B-X nor I-X is part of none.
    """
    found: set[Span] = set()
    start: int | None = None
    kind = ""
    for at, tag in enumerate([*tags, None]):
        mark, _, name = (tag or "O").partition("-")
        if start is not None and (mark, name) != ("I", kind):
            found.add((kind, start, at))
            start = None
        if mark == "B":
            start, kind = at, name
    return found


def entity_counts(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    """(M, K, 2): of each row and kind, how many predicted entities are right in every word and in kind, and how many there are."""
    return np.asarray([_pairs(entities(r["answer"]), entities(r["prediction"]), kinds(labels)) for r in rows])


def entities_wanted(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    """(M, K): how many entities of each kind a row's answer has."""
    found = [entities(row["answer"]) for row in rows]
    return np.asarray([[sum(span[0] == kind for span in one) for kind in kinds(labels)] for one in found])


def label_counts(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    """(M, C, 2): of each row and label, whether it was predicted rightly, and whether it was predicted."""
    predicted_MC, wanted_MC = _hot(rows, "prediction", labels), labels_wanted(rows, labels)
    return np.stack([predicted_MC & wanted_MC, predicted_MC], axis=-1)


def labels_wanted(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    """(M, C): whether a label is in a row's answer."""
    return _hot(rows, "answer", labels)


def num_right(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    """(M,): how many of a row's words have the right tag."""
    return np.asarray([sum(p == a for p, a in zip(r["prediction"], r["answer"], strict=True)) for r in rows])


def num_words(rows: Rows, labels: Sequence[str]) -> np.ndarray:
    return np.asarray([len(row["answer"]) for row in rows])


def _hot(rows: Rows, side: str, labels: Sequence[str]) -> np.ndarray:
    return np.asarray([[label in row[side] for label in labels] for row in rows], bool)


def _pairs(wanted: set[Span], predicted: set[Span], kinds: Sequence[str]) -> list[list[int]]:
    right = wanted & predicted
    return [[sum(span[0] == kind for span in side) for side in (right, predicted)] for kind in kinds]
