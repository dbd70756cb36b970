"""Rows to examples: each known shape of row becomes one `Example`, and a bad row one line with its file and number."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ConfigDict
from jaxtune.data.messages import Message, check_messages, check_tools, from_sharegpt
from jaxtune.data.sources import Row, read_rows
from jaxtune.types import UserError, nearest


class Example(NamedTuple):
    """One row, ready to be tokenised: a chat (`messages`), plain text (`text`), or a plain prompt and its `answer`.

    A pair of texts to be embedded has the query as its prompt, and the passage that answers it as its answer.
    """

    row_id: str  # "file.jsonl:17"
    messages: tuple[Message, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    prompt: str = ""  # plain text before the answer; "" for a chat
    answer: str | None = None  # last assistant content, completion, label or passage
    split_key: str = ""  # text whose hash decides the split
    is_pair: bool = False
    negative: str = ""  # of a pair: a passage that does not answer; "" = none


def read_examples(path: Path, data: ConfigDict, answers: bool = True) -> tuple[list[Example], Counter[str]]:
    """Returns the examples of one file in file order, and the counts of rows dropped by reason.

    Args:
      path: a file that `sources.read_rows` reads.
      data: the `data` section of the config.
      answers: False also admits rows that have no answer yet (prompts to generate for).

    Raises:
      UserError: a bad row ("file:row: …"), or a file without rows.
    """
    return to_examples(read_rows(path, tuple(data.columns)), Path(path).name, data, answers)


def to_examples(
    rows: Iterable[tuple[int, Row]], name: str, data: ConfigDict, answers: bool = True
) -> tuple[list[Example], Counter[str]]:
    """Returns the examples of numbered rows of the file called `name`, and the counts of rows dropped by reason."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    convert: Callable[[Row, ConfigDict, bool], Example | str] | None = None
    for number, row in rows:
        try:
            if convert is None:
                convert = _CONVERTERS[detect(row, data, answers) if data.format == "auto" else data.format]
            example = convert(row, data, answers)
            if isinstance(example, str):
                dropped[example] += 1
            else:
                key = _split_text(row, data) if answers else ""  # prompts are not split, so need not have its column
                examples.append(example._replace(row_id=f"{name}:{number}", split_key=key))
        except UserError as error:
            raise UserError(f"{name}:{number}: {error}") from None
    if not examples and not dropped:
        raise UserError(f"{name}: holds no rows; expected at least one")
    return examples, dropped


def detect(row: Row, data: ConfigDict, answers: bool = True) -> str:
    """Returns the format whose fields `row` has (without `answers`, those of its prompt). A file's first row decides for all."""
    if data.prompt and data.label_column:
        return "labelled"
    if data.passage:
        return "pair"
    formats = _FIELDS if answers else {name: fields[:1] for name, fields in _FIELDS.items()}
    for name, fields in formats.items():
        if all(field in row for field in fields):
            return name
    if _named(row, QUERIES) and _named(row, PASSAGES):
        return "pair"
    shapes = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in formats.items())
    known = sorted({field for fields in formats.values() for field in fields} - set(row))
    near = next((hint for hint in (nearest(field, known) for field in row) if hint), "")
    raise UserError(
        f"fields {_names(row)} fit no known format{near}; known: {shapes}; pair: {'|'.join(QUERIES)} + {'|'.join(PASSAGES)}; "
        "or set data.prompt and data.label_column or data.passage"
    )


def _field(row: Row, name: str, kind: type = str) -> Any:
    if name not in row:
        raise UserError(f"no field {name!r}{nearest(name, list(row))}; the row has {_names(row)}")
    value = row[name]
    if not isinstance(value, kind):
        raise UserError(f"field {name!r} is {value!r:.60}; expected a {'string' if kind is str else kind.__name__}")
    return value


def _names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Example:
    last = messages[-1]
    return Example("", tuple(messages), tools, answer=last["content"] if last["role"] == "assistant" else None)


def _messages(row: Row, data: ConfigDict, answers: bool) -> Example:
    return _chat(check_messages(_field(row, "messages", list), answers), check_tools(row.get("tools")))


def _sharegpt(row: Row, data: ConfigDict, answers: bool) -> Example:
    messages = from_sharegpt(_field(row, "conversations", list), row.get("system"))
    return _chat(check_messages(messages, answers), check_tools(row.get("tools")))


def _alpaca(row: Row, data: ConfigDict, answers: bool) -> Example:
    instruction, given = _field(row, "instruction"), _field(row, "input") if row.get("input") else ""
    answer = _field(row, "output") if answers or "output" in row else None
    if data.chat:
        return _turns(row.get("system") or "", f"{instruction}\n\n{given}" if given else instruction, answer)
    given = f"### Input:\n{given}\n\n" if given else ""
    return Example("", prompt=f"### Instruction:\n{instruction}\n\n{given}### Response:\n", answer=answer)


def _prompt_completion(row: Row, data: ConfigDict, answers: bool) -> Example:
    prompt = _field(row, "prompt", object)
    completion = _field(row, "completion", object) if answers or "completion" in row else None
    if isinstance(prompt, list) and isinstance(completion, list | None):
        # TRL's conversational form: only the completion is learned from.
        before = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
        return _chat(check_messages(before + (completion or []), answers), check_tools(row.get("tools")))
    prompt = _field(row, "prompt")
    completion = None if completion is None and not answers else _field(row, "completion")
    return _turns("", prompt, completion) if data.chat else Example("", prompt=prompt, answer=completion)


def _text(row: Row, data: ConfigDict, answers: bool) -> Example:
    text = _field(row, "text")
    return Example("", text=text) if answers else Example("", prompt=text)


def _labelled(row: Row, data: ConfigDict, answers: bool) -> Example | str:
    for option in ("prompt", "label_column"):
        if not data[option]:
            raise UserError(f'data.format="labelled" needs data.{option}; the row has {_names(row)}')
    prompt, system = fill(data.prompt, row, "data.prompt"), fill(data.system, row, "data.system")
    label = None
    if answers or data.label_column in row:
        label = _label(row, data)
        if label is None:
            return "label_outside_bins"
    if data.chat:
        return _turns(system, prompt, label)
    prompt = f"{system}\n\n{prompt}" if system else prompt
    # The label follows as a word of its own; templates.prompt_ids leaves the space for the model to write.
    return Example("", prompt=prompt if prompt[-1:].isspace() else prompt + " ", answer=label)


def _label(row: Row, data: ConfigDict) -> str | None:
    column = data.label_column
    value = _field(row, column, object)
    if not data.label_bins:
        label = json.dumps(value) if isinstance(value, bool) else str(value).strip()
        if value is None or not label:
            raise UserError(f"label column {column!r} is empty; expected an answer")
        return label
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"label column {column!r} is {value!r}; expected a number, because data.label_bins is set")
    return next((str(name) for low, high, name in data.label_bins if low <= number < high), None)


def _pair(row: Row, data: ConfigDict, answers: bool) -> Example:
    by_name = not data.prompt and not data.passage and not data.negative
    query = fill(data.prompt, row, "data.prompt") if data.prompt else _field(row, _named(row, QUERIES) or QUERIES[0])
    passage = (
        fill(data.passage, row, "data.passage") if data.passage else _field(row, _named(row, PASSAGES) or PASSAGES[0])
    )
    if by_name and row.get("negative"):
        raise UserError(
            "the row has a 'negative', which nothing uses: set data.negative='{negative}' to learn from it, or data.passage "
            "and data.prompt to say what is used"
        )
    negative = fill(data.negative, row, "data.negative") if data.negative else ""
    for what, text in (("query", query), ("passage", passage)):
        if not text.strip():
            raise UserError(f"the {what} is empty; expected a text")
    return Example("", prompt=query.strip(), answer=passage.strip(), is_pair=True, negative=negative.strip())


def _named(row: Row, names: tuple[str, ...]) -> str:
    """The first of `names` that the row has, or ""."""
    return next((name for name in names if name in row), "")


def _turns(system: str, user: str, answer: str | None) -> Example:
    turns = [("system", system)] * bool(system) + [("user", user)]
    turns += [("assistant", answer)] if answer is not None else []
    return _chat([{"role": role, "content": content} for role, content in turns])


def fill(template: str, row: Row, option: str) -> str:
    """Returns `template` with each `{column}` replaced by the row's value; `{{` and `}}` stand for braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{option} is not a template ({error}); write {{column}}, and {{{{ for a brace") from None
    filled = ""
    for literal, name, *_ in parts:
        filled += literal
        if name is not None:
            if name not in row:
                raise UserError(f"{option} names column {name!r}{nearest(name, list(row))}; the row has {_names(row)}")
            filled += "" if row[name] is None else str(row[name])
    return filled


def _split_text(row: Row, data: ConfigDict) -> str:
    if not data.split_key:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    if data.split_key not in row:
        near = nearest(data.split_key, list(row))
        raise UserError(f"data.split_key names column {data.split_key!r}{near}; the row has {_names(row)}")
    return str(row[data.split_key])


QUERIES, PASSAGES = ("query", "anchor", "question", "sentence1"), ("positive", "passage", "context", "sentence2")
_FIELDS: dict[str, tuple[str, ...]] = {  # of each format, the prompt's first
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}

_CONVERTERS: dict[str, Callable[[Row, ConfigDict, bool], Example | str]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "labelled": _labelled,
    "pair": _pair,
}
