"""Rows that compare answers, as their parts: every known shape becomes two rows of prompt and completion, or says why not."""

from __future__ import annotations

import math
import os
from typing import Any

from jaxtune.data.sources import Row
from jaxtune.types import UserError, nearest

CHOSEN, REJECTED = "chosen|preferred_output", "rejected|non_preferred_output"  # TRL's and OpenAI's names
RATED, RATINGS = "completions|responses", "scores|ratings"  # several answers to one prompt, a number for each
_DESIRABLE = {"true": True, "1": True, "false": False, "0": False}


def prompt(row: Row) -> Row:
    """Returns the part of a row that comes before its answers, as a row of a prompt alone."""
    return _split(row)[0]


def pair(row: Row) -> tuple[Row, Row, float] | str:
    """Returns (prompt with the better answer, prompt with the worse one, by how much it is better), or a reason to drop the row.

    The answers stand as TRL has them (`prompt`, `chosen`, `rejected`: texts or messages; the prompt may also be what both
    begin with), as OpenAI (`input.messages`, `preferred_output`, `non_preferred_output`), or rated (`prompt`,
    `completions`, `scores`): then the best is compared with the worst. The margin is the row's, or the difference of ratings.

    Raises:
      UserError: a field is missing or is not what it should be.
    """
    opening, better, worse = _split(row)
    for answer in (better, worse):
        if not _says_something(answer):
            return "empty_completion"
    if _plain(better) == _plain(worse):
        return "chosen_equals_rejected"
    return {**opening, "completion": better}, {**opening, "completion": worse}, _margin(row)


def desirable(row: Row) -> bool | None:
    """Returns what a row's `label` says of its completion (true or false, 1 or 0); None where it says neither."""
    return _DESIRABLE.get(str(row.get("label")).strip().lower())


def _split(row: Row) -> tuple[Row, Any, Any]:
    """Returns (the row's prompt and tools, the better answer, the worse one)."""
    if _named(row, RATED) and _named(row, RATINGS):
        better, worse = _rated(row)
    else:
        better, worse = (_field(row, names) for names in (CHOSEN, REJECTED))
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    given = row.get("input")
    if isinstance(given, dict):  # OpenAI's
        tools = {"tools": given["tools"]} if given.get("tools") else tools
        return {"prompt": _messages(given.get("messages"), "input.messages"), **tools}, better, worse
    opening = row.get("prompt")
    if isinstance(better, list) != isinstance(worse, list):
        raise UserError("one answer is a text and the other is messages; expected two of a kind")
    if isinstance(better, list) and not isinstance(opening, list) and _opens(better):
        shared = _shared_messages(better, worse)  # both hold the whole chat, which `prompt`, if there, only repeats
        return {"prompt": better[:shared], **tools}, better[shared:], worse[shared:]
    if opening is None:
        if isinstance(better, list):
            raise UserError(
                "no 'prompt', and the answers do not begin with one: expected chats with the same first turns"
            )
        shared = _shared_text(better, worse)
        return {"prompt": better[:shared], **tools}, better[shared:], worse[shared:]
    if isinstance(opening, list) and not isinstance(better, list):
        better, worse = ([{"role": "assistant", "content": text}] for text in (better, worse))
    if isinstance(better, list) and not isinstance(opening, list):
        opening = [{"role": "user", "content": opening}]
    return {"prompt": opening, **tools}, better, worse


def _rated(row: Row) -> tuple[Any, Any]:
    answers, scores = row[_named(row, RATED)], row[_named(row, RATINGS)]
    good = isinstance(scores, list) and all(isinstance(s, int | float) and math.isfinite(s) for s in scores)
    if not isinstance(answers, list) or not good or len(answers) != len(scores) or len(answers) < 2:
        raise UserError(
            f"{_named(row, RATED)!r} and {_named(row, RATINGS)!r} are no answers with a number each; expected two lists of one "
            "length, of two or more"
        )
    return answers[scores.index(max(scores))], answers[scores.index(min(scores))]


def _margin(row: Row) -> float:
    if _named(row, RATED) and _named(row, RATINGS):
        return float(max(row[_named(row, RATINGS)]) - min(row[_named(row, RATINGS)]))
    value = row.get("margin")
    try:
        margin = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise UserError(f"field 'margin' is {value!r:.60}; expected a number")
    return margin


def _field(row: Row, names: str) -> Any:
    name = _named(row, names)
    if not name:
        raise UserError(f"no field {names.replace('|', ' or ')}{nearest(names.split('|')[0], list(row))}")
    value = row[name]
    if isinstance(value, dict):  # one message
        value = [value]
    if not isinstance(value, str | list):
        raise UserError(f"field {name!r} is {value!r:.60}; expected a text or a list of messages")
    return value


def _named(row: Row, names: str) -> str:
    return next((name for name in names.split("|") if name in row), "")


def _messages(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"field {name!r} is {value!r:.60}; expected a list of messages")
    return value


def _opens(messages: list[Any]) -> bool:
    """Whether messages begin as a chat does, and not as an answer."""
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer", "user")


def _shared_messages(better: list[Any], worse: list[Any]) -> int:
    most = min(len(better), len(worse))
    return next((at for at in range(most) if better[at] != worse[at]), most)


def _shared_text(better: str, worse: str) -> int:
    """How many characters both begin with, less a space before the first that differs: it belongs to the answers."""
    shared = len(os.path.commonprefix([better, worse]))
    return shared - 1 if better[shared - 1 : shared] == " " else shared


def _says_something(answer: Any) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(isinstance(m, dict) and (str(m.get("content") or "").strip() or m.get("tool_calls")) for m in answer)


def _plain(answer: Any) -> Any:
    """An answer as it is compared: white space around it makes no difference."""
    if isinstance(answer, str):
        return answer.strip()
    return [{**m, "content": str(m.get("content") or "").strip()} if isinstance(m, dict) else m for m in answer]
