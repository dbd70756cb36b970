"""JSON values out of files that may be broken: each with the line on which it begins, or with what is wrong there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_KEYS = ("data", "fields", "record")  # one of these is in every record of an array; a part of a record has none
_NEXT = re.compile(r"[\n,]\s*(?=\{)")
_SPACE = re.compile(r"\s*")


class Found(NamedTuple):
    """A value; or where there is none, the text that stood there and the problem with it."""

    line: int  # the first is 1
    value: Any
    problem: str = ""


def values(content: bytes) -> Iterator[Found]:
    """Yields the values of a JSON array, of JSON lines, or the one value of a file."""
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _of_array(content)
        return
    whole = _one(content.decode("utf-8-sig", "surrogateescape"))
    if whole.problem:
        yield from _of_lines(content)
    elif content.strip():
        yield whole


def _of_lines(content: bytes) -> Iterator[Found]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip(b"\xef\xbb\xbf \t\r\n"):
            continue
        try:
            found = _one(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            shown = line.decode("utf-8", "replace")
            found = Found(number, shown, f"byte {error.start + 1} of the line is no UTF-8")
        yield found._replace(line=number)


def _of_array(content: bytes) -> Iterator[Found]:
    """Where an element cannot be read, goes on at the next that looks like a record."""
    text = content.decode("utf-8-sig", "replace")
    decoder, at, line, counted = json.JSONDecoder(parse_constant=_refuse), text.index("[") + 1, 1, 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            yield Found(line, "", "the file ends within the list; it may have been cut off")
            return
        if text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
            yield Found(line, value)
            after = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            at = after + 1 if text[after : after + 1] == "," else after
        except (ValueError, RecursionError) as error:
            following = _resume(decoder, text, at)
            yield Found(line, text[at : min(at + 1000, following)], _told(error))
            if following == len(text):
                return
            at = following


def _resume(decoder: json.JSONDecoder, text: str, at: int) -> int:
    """Where the next record after the broken one at `at` begins; the text's end where there is none."""
    for match in _NEXT.finditer(text, at + 1):
        try:
            value, _ = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        if any(key in value for key in _KEYS):
            return match.end()
    return len(text)


def _one(text: str) -> Found:
    try:
        return Found(1, json.loads(text, parse_constant=_refuse) if text.strip() else None)
    except (ValueError, RecursionError) as error:
        return Found(1, text, _told(error))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _told(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
