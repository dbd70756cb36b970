"""The tasks of a config, and what an answer to one may be.

review.tasks = (
    ("sentiment", (("kind", "label"), ("labels", ("negative", "neutral", "positive")), ("guideline", "sentiment.md"), ("overlap", 2))),
    ("better", (("kind", "compare"), ("skill", "legal"))),
)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.review.record import FLAG_TYPES, TASK_KINDS, VERDICT_KINDS, Item
from jaxtune.types import UserError, nearest

MAX_TEXT = 100_000  # characters of an edited answer
MAX_NOTE = 4_000  # characters of a reason or note


class Task(NamedTuple):
    """What a task's keys may be, with what holds where one is left out."""

    name: str
    kind: str
    title: str = ""  # heading on the page; "" = the name
    question: str = ""  # the one line above each item
    labels: tuple[str, ...] = ()  # of label and span; the first nine have the keys 1 to 9
    multi: bool = False  # label: several may be chosen
    scale: tuple[float, float, float] = (1.0, 5.0, 1.0)  # rate: lowest, highest, step
    scale_ends: tuple[str, str] = ("", "")  # rate: what the lowest and the highest mean
    guideline: str = ""  # file of Markdown that is shown beside the task
    overlap: int = 1  # experts asked about each item
    skill: str = ""  # group that may be asked; "" = all
    prelabels: str = "hide"  # show | hide | half: whether a suggestion is shown; half: drawn for each item and expert, to measure what it does
    order: str = "added"  # added | random | priority: as review/active.py ranks them
    gold_every: int = 0  # about one in so many items is a gold one, where there are any; 0 = none
    adjudicate: bool = True  # a senior settles what experts disagree about, from two verdicts on
    groups: tuple[str, ...] = ()  # groups of people that a bias flag may name


def read(tasks: Sequence[tuple[str, Sequence[tuple[str, Any]]]]) -> dict[str, Task]:
    """Returns the tasks of `review.tasks` by name.

    Raises:
      UserError: a key is not known, a value is outside what it may be, or a name is there twice.
    """
    found: dict[str, Task] = {}
    for one in tasks:
        if not isinstance(one, tuple | list) or len(one) != 2 or not isinstance(one[0], str):
            raise UserError(f"review.tasks has {one!r:.80}; expected (name, ((key, value), …))")
        name, keys = _named(one[0]), _keys(*one)
        if name in found:
            raise UserError(f"review.tasks has {name!r} twice; give each task a name of its own")
        for key in keys:
            if key not in Task._fields[1:]:
                raise UserError(
                    f"task {name!r} has the key {key!r}, which is not known{nearest(key, Task._fields[1:])}"
                )
        if keys.get("kind") not in TASK_KINDS:
            raise UserError(f"task {name!r} has kind={keys.get('kind')!r}; expected one of {', '.join(TASK_KINDS)}")
        found[name] = Task(name, **keys)
        _check(found[name])
    return found


def _named(name: str) -> str:
    """A task's name, which stands in addresses of the page, in names of files, and in a column of 100 characters."""
    if not 0 < len(name) <= 100 or not name.isprintable() or name != name.strip() or set(name) & set("/\\?#%"):
        raise UserError(f"review.tasks has the name {name!r:.80}; expected 1 to 100 characters, none of / \\ ? # %")
    return name


def _keys(name: str, pairs: Any) -> dict[str, Any]:
    """The keys of a task and their values, lists as tuples."""
    good = isinstance(pairs, list | tuple) and all(isinstance(one, list | tuple) and len(one) == 2 for one in pairs)
    if not good or not all(isinstance(key, str) for key, _ in pairs):
        raise UserError(f"task {name!r} has {pairs!r:.80}; expected ((key, value), …)")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in pairs}


def _check_types(task: Task) -> None:
    """Refuses what would be taken for something else: "bad" for the labels "b", "a" and "d", "no" for True."""
    for key, usual in Task._field_defaults.items():
        value = getattr(task, key)
        if isinstance(usual, tuple):
            kind, numbers = ("numbers", True) if key == "scale" else ("texts", False)
            good = isinstance(value, tuple) and (not usual or len(value) == len(usual))
            good = good and all(_is_number(one) if numbers else isinstance(one, str) for one in value)
            wanted = f"{len(usual) or 'a tuple of'} {kind}" + (
                ' with a comma after a lone one: ("a",)' if not usual else ""
            )
        else:
            good, wanted = (
                type(value) is type(usual),
                {bool: "True or False", int: "a whole number", str: "a text"}[type(usual)],
            )
        if not good:
            raise UserError(f"task {task.name!r} has {key}={value!r:.80}; expected {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(task: Task) -> None:
    told = f"task {task.name!r}"
    _check_types(task)
    if any(not one.strip() for one in task.labels):
        raise UserError(f"{told} has labels={task.labels!r}; expected names, none of them empty")
    if task.kind in ("label", "span") and (not task.labels or len(set(task.labels)) != len(task.labels)):
        raise UserError(f"{told} is of kind {task.kind!r} and has labels={task.labels!r}; expected names, none twice")
    if task.kind == "rate":
        low, high, step = task.scale
        if not (low < high and step > 0 and (high - low) / step <= 100):
            raise UserError(
                f"{told} has scale={task.scale!r}; expected (lowest, highest, step), with 100 steps at most"
            )
    if task.overlap < 1:
        raise UserError(f"{told} has overlap={task.overlap!r}; expected a number of experts, 1 or more")
    for key, allowed in (("prelabels", ("show", "hide", "half")), ("order", ("added", "random", "priority"))):
        if getattr(task, key) not in allowed:
            raise UserError(f"{told} has {key}={getattr(task, key)!r}; expected one of {', '.join(allowed)}")
    if task.gold_every < 0:
        raise UserError(f"{told} has gold_every={task.gold_every!r}; expected 0 or more")


def guideline(task: Task) -> str:
    """The text of the task's guideline; "" where it has none.

    Raises:
      UserError: the file is not there, or no text.
    """
    if not task.guideline:
        return ""
    try:
        text = Path(task.guideline).expanduser().read_text(encoding="utf-8-sig")  # some editors put a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task {task.name!r}: its guideline {task.guideline} cannot be read ({error})") from error
    if "\x00" in text:  # PostgreSQL's texts cannot hold it
        raise UserError(f"task {task.name!r}: its guideline {task.guideline} has a character 0; expected a text")
    return text


def checked(task: Task, item: Item, kind: str, answer: Any) -> dict[str, Any]:
    """Returns an answer as it is to be kept.

    Raises:
      UserError: it is none of this task to this item; says what came and what was expected.
    """
    if kind not in VERDICT_KINDS or (kind in TASK_KINDS and kind != task.kind):
        raise UserError(
            f"a verdict of kind {kind!r} came to the task {task.name!r}; expected {task.kind!r}, 'flag' or 'skip'"
        )
    if not isinstance(answer, dict):
        raise UserError(f"an answer of type {type(answer).__name__} came; expected an object")
    return _CHECKS[kind](task, item, answer)


def _label(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    labels = answer.get("labels")
    if not isinstance(labels, list) or any(one not in task.labels for one in labels) or len(set(labels)) != len(labels):
        raise UserError(f"labels={labels!r:.80} came; expected a list of {', '.join(task.labels)}, none twice")
    if not task.multi and len(labels) != 1:
        raise UserError(f"{len(labels)} labels came; expected one")
    return {"labels": [one for one in task.labels if one in labels]}


def _span(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    spans, length = answer.get("spans"), len(str(item.payload.get("text", "")))
    if not isinstance(spans, list):
        raise UserError(f"spans={spans!r:.80} came; expected a list of objects with start, end and label")
    kept = []
    for one in spans:
        start, end, label = (
            (one.get(key) for key in ("start", "end", "label")) if isinstance(one, dict) else (None,) * 3
        )
        whole = all(isinstance(at, int) and not isinstance(at, bool) for at in (start, end))
        if not whole or not 0 <= start < end <= length or label not in task.labels:  # type: ignore[operator]
            raise UserError(
                f"the span {one!r:.80} came; expected 0 <= start < end <= {length} and one of {', '.join(task.labels)}"
            )
        kept.append({"start": start, "end": end, "label": label})
    return {"spans": sorted(kept, key=lambda one: (one["start"], one["end"], one["label"]))}


def _rate(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    rating, (low, high, step) = answer.get("rating"), task.scale
    if isinstance(rating, bool) or not isinstance(rating, int | float):
        raise UserError(f"rating={rating!r:.80} came; expected a number")
    if not low <= rating <= high or abs((rating - low) / step - round((rating - low) / step)) > 1e-6:
        raise UserError(f"rating={rating!r:.80} came; expected a number from {low} to {high} in steps of {step}")
    return {"rating": float(rating)}


def _compare(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    order, bad = answer.get("order"), answer.get("bad", False)
    ids = sorted(str(one["id"]) for one in item.payload.get("candidates", ()))
    groups = isinstance(order, list) and all(isinstance(group, list) and group for group in order)
    if not groups or sorted(str(one) for group in order for one in group) != ids:  # type: ignore[union-attr]
        raise UserError(f"order={order!r:.80} came; expected groups of {', '.join(ids)}, the best first, each once")
    if not isinstance(bad, bool):
        raise UserError(f"bad={bad!r:.80} came; expected true or false")
    assert isinstance(order, list)
    return {"order": [sorted(str(one) for one in group) for group in order], "bad": bad}


def _edit(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(answer, "text", MAX_TEXT, empty=False)}


def _accept(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(answer.get("accept"), bool):
        raise UserError(f"accept={answer.get('accept')!r:.80} came; expected true or false")
    return {"accept": answer["accept"], "reason": _text(answer, "reason", MAX_NOTE)}


def _flag(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    flags, kept = answer.get("flags"), []
    if not isinstance(flags, list) or not flags:
        raise UserError(f"flags={flags!r:.80} came; expected a list of objects with type, group and note, not empty")
    for one in flags:
        if not isinstance(one, dict) or one.get("type") not in FLAG_TYPES:
            raise UserError(f"the flag {one!r:.80} came; expected a type of {', '.join(FLAG_TYPES)}")
        kept.append({"type": one["type"], "group": _text(one, "group", 200), "note": _text(one, "note", MAX_NOTE)})
    return {"flags": kept}


def _skip(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    return {"reason": _text(answer, "reason", MAX_NOTE)}


def _retract(task: Task, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
    return {}


def _text(answer: dict[str, Any], key: str, limit: int, empty: bool = True) -> str:
    text = answer.get(key, "")
    text = text.replace("\x00", "") if isinstance(text, str) else text  # PostgreSQL's texts cannot hold it
    if not isinstance(text, str) or len(text) > limit or (not empty and not text.strip()):
        raise UserError(f"{key}={text!r:.80} came; expected a text of {'0' if empty else '1'} to {limit} characters")
    return text


_CHECKS = {
    "label": _label, "span": _span, "rate": _rate, "compare": _compare, "edit": _edit, "accept": _accept,
    "flag": _flag, "skip": _skip, "retract": _retract,
}  # fmt: skip
