"""Rows to examples: each known shape of row becomes one `Example`, and a bad row one line with its file and number."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import registry
from jaxtune.config import ConfigDict
from jaxtune.data import preference_rows
from jaxtune.data.messages import Message, check_messages, check_tools, from_sharegpt
from jaxtune.data.privacy import Finding, Private
from jaxtune.data.sources import Row, folder_files, read_rows
from jaxtune.types import UserError, nearest


class Example(NamedTuple):
    """One row, ready to be tokenised: a chat (`messages`), plain text (`text`), or a plain prompt and its `answer`.

    A pair of texts to be embedded has the query as its prompt, and the passage that answers it as its answer. A preference
    is two examples with one prompt, the better answer first.
    """

    row_id: str  # "file.jsonl:17"
    messages: tuple[Message, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    prompt: str = ""  # plain text before the answer; "" for a chat
    answer: str | None = None  # last assistant content, completion, label or passage
    split_key: str = ""  # text whose hash decides the split
    words: tuple[str, ...] | None = None  # of a text to be tagged
    labels: tuple[str, ...] | None = None  # the tag of each word; or the labels of a text that may have several
    is_pair: bool = False
    negative: str = ""  # of a pair: a passage that does not answer; "" = none
    task: str = ""  # what it asks, among the tasks of a run that tells them apart
    row: Row | None = None  # the row itself, of a prompt: a reward may read its other fields
    branches: tuple[Example, ...] = ()  # of a preference: with the chosen answer, with the rejected one
    margin: float = 0.0  # by how much the chosen answer is better
    desirable: bool | None = None  # whether this answer is one to be given; None = the row does not say
    personal: tuple[Finding, ...] = ()  # personal data that the row held, and what became of it


def read_examples(
    path: Path, data: ConfigDict, answers: bool = True, keep_rows: bool = False, task_column: str | None = None,
    private: Private | None = None,
) -> tuple[list[Example], Counter[str]]:  # fmt: skip
    """Returns the examples of one file, or of a folder's files by name, in their order; and the rows dropped by reason.

    Args:
      path: a file that `sources.read_rows` reads, or a folder of such files (`data.files` says which).
      data: the `data` section of the config.
      answers: False also admits rows that have no answer yet (prompts to generate for).
      keep_rows: keep each example's row, for rewards to read; and what decides its split, without answers too.
      task_column: names a row's task; "" = the name of its file; None = tasks are not told apart.
      private: what makes a row private (`privacy.of`), before anything but `data.prepare` sees it; what decides its split stays as it was.

    Raises:
      UserError: a bad row ("file:row: …"), or a file without rows.
    """
    path, columns = Path(path), tuple(data.columns)
    if not path.is_dir():
        return to_examples(read_rows(path, columns), path.name, data, answers, keep_rows, task_column, private)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for file in folder_files(path, data.files):
        name = file.relative_to(path).as_posix()
        more, lost = to_examples(
            read_rows(file, columns, lone_object=True), name, data, answers, keep_rows, task_column, private
        )
        examples += more
        dropped += lost
    return examples, dropped


def to_examples(
    rows: Iterable[tuple[int, Row]],
    name: str,
    data: ConfigDict,
    answers: bool = True,
    keep_rows: bool = False,
    task_column: str | None = None,
    private: Private | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Returns the examples of numbered rows of the file called `name`, and the counts of rows dropped by reason."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    convert: Callable[[Row, ConfigDict, bool], Example | str] | None = None
    prepare = registry.function(data.prepare, "data.prepare") if data.prepare else None
    for number, given in rows:
        try:
            whole = _prepared(prepare, given, data.prepare) if prepare else given
            if whole is None:
                dropped["by_data_prepare"] += 1
                continue
            row, personal = private.row(whole) if private else (whole, ())
            if convert is None:
                convert = _CONVERTERS[detect(row, data, answers) if data.format == "auto" else data.format]
            example = convert(row, data, answers)
            if isinstance(example, str):
                dropped[example] += 1
            else:
                # Prompts alone are not split, so need not have its column.
                key = _split_text(whole, data) if answers or keep_rows else ""
                task = "" if task_column is None else _task(row, task_column) if task_column else name
                kept = row if keep_rows or not answers else None
                example = example._replace(row_id=f"{name}:{number}", split_key=key, task=task, row=kept)
                examples.append(example._replace(personal=personal) if personal else example)
        except UserError as error:
            raise UserError(f"{name}:{number}: {error}") from None
    if not examples and not dropped:
        raise UserError(f"{name}: holds no rows; expected at least one")
    return examples, dropped


def _prepared(prepare: Callable[[Row], Any], row: Row, name: str) -> Row | None:
    try:
        made = prepare(row)
    except Exception as error:  # the user's own code: its mistakes are theirs to read, with the row they happened at
        raise UserError(f"data.prepare={name!r} failed: {type(error).__name__}: {error}") from error
    if made is not None and not isinstance(made, dict):
        raise UserError(
            f"data.prepare={name!r} returned {made!r:.60}; expected a row (a dictionary), or None to drop it"
        )
    return made


def detect(row: Row, data: ConfigDict, answers: bool = True) -> str:
    """Returns the format whose fields `row` has (without `answers`, those of its prompt). A file's first row decides for all."""
    if data.prompt and data.label_column:
        return "labelled"
    if data.passage:
        return "pair"
    formats = _FIELDS if answers else {name: fields[:1] for name, fields in _FIELDS.items()}
    for name, fields in formats.items():
        if all(any(one in row for one in field.split("|")) for field in fields):
            return name
    if _named(row, QUERIES) and _named(row, PASSAGES):
        return "pair"
    shapes = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in formats.items())
    known = sorted({one for fields in formats.values() for field in fields for one in field.split("|")} - set(row))
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


def _preference(row: Row, data: ConfigDict, answers: bool) -> Example | str:
    if not answers:
        return _prompt_completion(preference_rows.prompt(row), data, False)
    found = preference_rows.pair(row)
    if isinstance(found, str):
        return found
    better, worse, margin = found
    branches = tuple(_prompt_completion(one, data, True) for one in (better, worse))
    return Example("", branches=branches, margin=margin)


def _prompt_completion(row: Row, data: ConfigDict, answers: bool) -> Example:
    return _completed(row, data, answers)._replace(desirable=preference_rows.desirable(row))


def _completed(row: Row, data: ConfigDict, answers: bool) -> Example:
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
    label, several = None, None
    if answers or data.label_column in row:
        several = _several(row, data)
        label = _label(row, data) if several is None else f"{data.label_separator or ','} ".join(several)
        if label is None:
            return "label_outside_bins"
    if data.chat:
        return _turns(system, prompt, label)._replace(labels=several)
    prompt = f"{system}\n\n{prompt}" if system else prompt
    # The label follows as a word of its own; templates.prompt_ids leaves the space for the model to write.
    return Example("", prompt=prompt if prompt[-1:].isspace() else prompt + " ", answer=label, labels=several)


def _several(row: Row, data: ConfigDict) -> tuple[str, ...] | None:
    """The labels of a row that may have several, none among them: a list, or a text cut at `data.label_separator`."""
    value = _field(row, data.label_column, object)
    if isinstance(value, list):
        return tuple(str(label).strip() for label in value)
    if not data.label_separator:
        return None
    return tuple(filter(None, (label.strip() for label in str(value or "").split(data.label_separator))))


def _tagged(row: Row, data: ConfigDict, answers: bool) -> Example:
    words = _words(row, "tokens|words")
    tags = _words(row, data.label_column or _TAGS) if answers else None
    if tags is not None and len(tags) != len(words):
        raise UserError(f"{len(words)} words and {len(tags)} tags; expected a tag for each word")
    if not all(words) or not words:
        raise UserError(
            f"word {words.index('') + 1} is empty; remove it with its tag" if words else "there are no words"
        )
    return Example("", words=words, labels=tags)


def _words(row: Row, names: str) -> tuple[str, ...]:
    """A list of words, or of tags by name or number; a text is cut at white space."""
    name = next((name for name in names.split("|") if name in row), names.split("|")[0])
    value = _field(row, name, object)
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
        raise UserError(f"field {name!r} is {value!r:.60}; expected a list of words")
    return tuple(str(one).strip() for one in value)


def _label(row: Row, data: ConfigDict) -> str | None:
    column = data.label_column
    value = _cell(_field(row, column, object), column)
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


def _cell(value: Any, column: str) -> Any:
    """A table's value that reads as text; None where there is none, which pandas writes as NaN."""
    if isinstance(value, bytes | list | dict):
        kind = {bytes: "bytes (a binary column of Parquet)", list: "a list", dict: "an object"}[type(value)]
        raise UserError(
            f"column {column!r} is {value!r:.60}, {kind}; expected text or a number: make it one in data.prepare"
        )
    return None if isinstance(value, float) and math.isnan(value) else value


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
    for literal, name, form, conversion in parts:
        filled += literal
        if form or conversion:
            raise UserError(f"{option} has a format in {{{name}…}}; expected the column's name alone: {{{name}}}")
        if name is not None:
            if name not in row:
                raise UserError(f"{option} names column {name!r}{nearest(name, list(row))}; the row has {_names(row)}")
            value = _cell(row[name], name)
            filled += "" if value is None else str(value)
    return filled


def constant(template: str) -> str:
    """Returns what a template says of every row alike; "" where it names a column."""
    parts = list(string.Formatter().parse(template))
    return "" if any(name is not None for _, name, *_ in parts) else "".join(literal for literal, *_ in parts)


def _split_text(row: Row, data: ConfigDict) -> str:
    if not data.split_key:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    if data.split_key not in row:
        near = nearest(data.split_key, list(row))
        raise UserError(f"data.split_key names column {data.split_key!r}{near}; the row has {_names(row)}")
    return str(row[data.split_key])


def _task(row: Row, column: str) -> str:
    if column not in row:
        near = nearest(column, list(row))
        raise UserError(f"meta.task_column names column {column!r}{near}; the row has {_names(row)}")
    return str(row[column])


_TAGS = "tags|ner_tags|labels"
QUERIES, PASSAGES = ("query", "anchor", "question", "sentence1"), ("positive", "passage", "context", "sentence2")
_FIELDS: dict[str, tuple[str, ...]] = {  # of each format, the prompt's first
    "preference": (preference_rows.CHOSEN, preference_rows.REJECTED),
    "rated": (preference_rows.RATED, preference_rows.RATINGS),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "tagged": ("tokens|words", _TAGS),
    "text": ("text",),
}

_CONVERTERS: dict[str, Callable[[Row, ConfigDict, bool], Example | str]] = {
    "preference": _preference,
    "rated": _preference,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "tagged": _tagged,
    "text": _text,
    "labelled": _labelled,
    "pair": _pair,
}
