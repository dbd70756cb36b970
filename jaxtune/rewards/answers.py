"""What a row says the answer is, and what a completion says it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxtune.config import ConfigDict
from jaxtune.types import UserError, nearest

Row = Mapping[str, Any]


def check(row: Row, options: ConfigDict) -> None:
    """Refuses a row without an answer.

    Raises:
      UserError: the column is missing or empty, or `reward.answer_regex` matches nothing in it.
    """
    gold(row, options)


def gold(row: Row, options: ConfigDict) -> str:
    """The row's answer: its column `reward.answer_column`, of that what `reward.answer_regex` matches.

    Raises:
      UserError: there is none.
    """
    column = options.answer_column
    if row.get(column) is None or not str(row[column]).strip():
        has = "is empty" if column in row else f"is missing{nearest(column, list(row))}"
        raise UserError(
            f"a reward compares with the answer in column {column!r}, which {has}; the row has {', '.join(map(repr, row))}: "
            "give every row its answer, or name its column in reward.answer_column"
        )
    text = str(row[column])
    found = matched(options.answer_regex, text)
    if not found:
        raise UserError(f"reward.answer_regex {options.answer_regex!r} matches nothing in the answer {text!r:.80}")
    return found


def said(completion: str, options: ConfigDict) -> str | None:
    """What of the completion is its answer: the last match of `reward.completion_regex`; None where there is none."""
    return matched(options.completion_regex, completion)


def matched(pattern: str, text: str) -> str | None:
    """The last match of a pattern, its group 1 where it has one; the whole text where there is no pattern."""
    if not pattern:
        return text.strip()
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return (found[-1].group(1) or "" if found[-1].re.groups else found[-1].group(0)).strip()


def plain(text: str) -> str:
    """A text as it is compared: without its case, its outer punctuation, and how its words are spaced."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")
