"""What a record of an exchanged file holds, and what those who read and write such files share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jaxtune.review import tasks as tasks_lib
from jaxtune.review.record import Item, Verdict, make_item, stable
from jaxtune.review.tasks import Task
from jaxtune.types import UserError


class Parcel(NamedTuple):
    """What one record brings. people: ids and names. guideline: task and text. problems: parts of it that are left out, and why."""

    items: tuple[Item, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    people: tuple[tuple[str, str], ...] = ()
    guideline: tuple[str, str] | None = None
    problems: tuple[str, ...] = ()


class Reading(NamedTuple):
    """What is known to whoever reads a record.

    task, round: of records that name none. columns: our names of fields to the file's. item: an item that was imported before, by
    its id. guidelines: numbers here by `guideline_hash`.
    """

    tasks: dict[str, Task]
    task: str
    round: int
    columns: dict[str, str]
    source: str
    item: Callable[[str], Item | None]
    guidelines: dict[str, int]
    line: int = 0
    private: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # masks personal data, as `privacy` says

    def named(self, name: Any = None) -> Task:
        """The task of a record, by the name that it gives.

        Raises:
          UserError: the config has none of this name, or several and the record names none.
        """
        if not name and not self.task:
            raise UserError("the record names no task; say which by review.task")
        name = name or self.task
        if not isinstance(name, str) or name not in self.tasks:
            raise UserError(f"the task {name!r:.80} is not in review.tasks")
        return self.tasks[name]


class Writing(NamedTuple):
    """What is known to whoever writes a file. guidelines: by number. names: people's by id, none where they have pseudonyms."""

    tasks: dict[str, Task]
    guidelines: dict[int, dict[str, Any]]
    names: dict[str, str]
    pseudonyms: bool

    def guideline(self, number: int) -> str:
        """The hash by which other databases know it; "" where there is none."""
        one = self.guidelines.get(number)
        return "" if one is None else guideline_hash(one["task"], one["text"])


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def by_item(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts of each item, by its id; none, for one that nobody answered."""
    of: dict[str, list[Verdict]] = {one.id: [] for one in items}
    for verdict in verdicts:
        of[verdict.item].append(verdict)
    return of


def guideline_hash(task: str, text: str) -> str:
    return sha256(f"{task}\n{text}")


def short_id(*parts: Any) -> str:
    """An id that follows from the parts."""
    return sha256(stable(parts))[:32]


def item(
    reading: Reading, task: Task, payload: dict[str, Any], origin: dict[str, Any], more: dict[str, Any], known_as: str = ""
) -> Item:  # fmt: skip
    """Returns the item of a record, checked.

    Args:
      more: may have "round", "gold", "overlap" and "skill".
      known_as: the id that the record gives it.

    Raises:
      UserError: it cannot be asked; or what is asked has changed since it had this id.
    """
    _check_origin(origin)
    payload = _masked(reading, task, checked_payload(task, payload), more)
    round, overlap, skill = more.get("round") or reading.round, more.get("overlap") or task.overlap, more.get("skill")
    for name, value in (("round", round), ("overlap", overlap)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
            raise UserError(f"{name}={value!r:.80} came; expected a whole number from 1")
    skill = task.skill if skill is None else skill
    if not isinstance(skill, str) or len(skill) > 100:
        raise UserError(f"skill={skill!r:.80} came; expected a name of at most 100 characters")
    made = make_item(round, task.name, payload, origin, gold=None, overlap=overlap, skill=skill)
    if known_as and known_as != made.id:
        raise UserError(
            f"the item {known_as!r:.80} is not what it was when it got this id; take the id out to import it anew"
        )
    if more.get("gold") is not None:
        made = made._replace(gold=tasks_lib.checked(task, made, task.kind, more["gold"]))
    if "prelabel" in payload:
        tasks_lib.checked(task, made, task.kind, payload["prelabel"])
    return made


def _check_origin(origin: Any) -> None:
    """Refuses what the figures of a round could not read, for what is kept is kept for good."""
    parts = [origin] + [
        origin[key] for key in ("models", "probabilities") if isinstance(origin, dict) and key in origin
    ]
    if not all(isinstance(one, dict) for one in parts):
        raise UserError(f"origin={origin!r:.80} came; expected an object, and objects as its models and probabilities")
    for label, one in origin.get("probabilities", {}).items():
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise UserError(f"the probability {one!r:.40} of {label!r:.40} came; expected a number")


def _masked(reading: Reading, task: Task, payload: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The payload without personal data; spans that count characters of the text as it was are refused."""
    if reading.private is None:
        return payload
    masked = reading.private(payload)
    if task.kind == "span" and masked != payload and (more.get("gold") is not None or "prelabel" in payload):
        raise UserError(
            "its text holds personal data, and its spans count characters of it; mask it before it is marked"
        )
    return masked


def verdict(reading: Reading, item: Item, given: dict[str, Any]) -> Verdict:
    """Returns a verdict of a record, checked; `given` has the fields of `Verdict`, "guideline" as its hash.

    Raises:
      UserError: it is no answer to this item, or a field is not what it has to be.
    """
    task = reading.named(item.task)
    answer = tasks_lib.checked(task, item, given["kind"], given["answer"])
    for name in ("id", "person"):
        short(given, name)
    for name in ("seconds", "at"):
        value = given.get(name) or 0.0
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (math.isfinite(value) and 0 <= value < 1e11)
        ):
            raise UserError(f"{name}={value!r:.80} came; expected a number of seconds, 0 or more")
    for name, kind in (("supersedes", str), ("shown", dict), ("guideline", str)):
        if given.get(name) is not None and not isinstance(given[name], kind):
            raise UserError(f"{name}={given[name]!r:.80} came; expected {'an object' if kind is dict else 'a text'}")
    order = (given.get("shown") or {}).get("order", [])
    if not isinstance(order, list) or not all(isinstance(one, str) for one in order):
        raise UserError(f"shown.order={order!r:.80} came; expected ids of candidates")
    return Verdict(
        given["id"], item.id, given["person"], given["kind"], answer, given.get("shown") or {},
        reading.guidelines.get(given.get("guideline") or "", 0), float(given.get("seconds") or 0.0),
        float(given.get("at") or 0.0), given.get("supersedes") or "", given.get("adjudicates") is True,
    )  # fmt: skip


def short(given: dict[str, Any], name: str) -> str:
    """An id that a column of the database holds."""
    value = given.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isprintable():
        raise UserError(f"{name}={value!r:.80} came; expected 1 to 64 printable characters")
    return value


def origin_told(item: Item) -> dict[str, Any]:
    """What may be known of an item's origin where experts may look: which row, but not which models wrote what."""
    return {key: item.origin[key] for key in ("source", "row", "row_sha256") if key in item.origin}


def told(verdict: Verdict, writing: Writing) -> dict[str, Any]:
    """What a verdict is besides its answer, for a place in another tool's record."""
    kept = verdict._asdict() | {"guideline": writing.guideline(verdict.guideline)}
    return {key: value for key, value in kept.items() if key not in ("item", "answer", "supersedes")}


def checked_payload(task: Task, payload: dict[str, Any]) -> dict[str, Any]:
    """Returns a payload that the page can show for this kind of task.

    Raises:
      UserError: a text is missing, or is none.
    """
    kept = {
        key: payload[key]
        for key in ("text", "prompt", "answer", "candidates", "prelabel")
        if payload.get(key) is not None
    }
    needed = {"label": ("text",), "span": ("text",), "compare": ("candidates",), "edit": ("prompt", "answer")}.get(
        task.kind
    )
    needed = needed or (("text",) if "text" in kept else ("prompt", "answer"))
    for key in needed:
        if key not in kept:
            raise UserError(
                f"there is no {key!r}, which the task {task.name!r} ({task.kind}) shows; review.columns renames fields"
            )
    for key in ("text", "answer"):
        if key in kept and (not isinstance(kept[key], str) or not kept[key].strip()):
            raise UserError(f"{key}={kept[key]!r:.60} came; expected a text")
    if task.kind == "edit" and len(kept["answer"]) > tasks_lib.MAX_TEXT:  # it could not be sent back
        raise UserError(f"an answer of {len(kept['answer'])} characters came; expected {tasks_lib.MAX_TEXT} at most")
    if "prompt" in kept and not _is_prompt(kept["prompt"]):
        raise UserError(f"prompt={kept['prompt']!r:.60} came; expected a text, or messages of role and content")
    if "candidates" in kept:
        kept["candidates"] = _candidates(kept["candidates"])
    if "prelabel" in kept and not isinstance(kept["prelabel"], dict):
        raise UserError(f'prelabel={kept["prelabel"]!r:.60} came; expected an answer, such as {{"labels": ["yes"]}}')
    return kept


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    messages = isinstance(prompt, list) and all(isinstance(one, dict) for one in prompt)
    return (
        messages
        and bool(prompt)
        and all(isinstance(one.get(key), str) for one in prompt for key in ("role", "content"))
    )


def _candidates(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        given = [{"id": name_of(at), "text": one} for at, one in enumerate(given)]
    good = isinstance(given, list) and all(
        isinstance(one, dict) and isinstance(one.get("id"), str) and isinstance(one.get("text"), str) for one in given
    )
    if not good or not 2 <= len(given) <= 26 or len({one["id"] for one in given}) < len(given):
        raise UserError(
            f"candidates={given!r:.60} came; expected 2 to 26 texts, or objects of an id of its own and a text"
        )
    return [{"id": one["id"], "text": one["text"]} for one in given]


def name_of(at: int) -> str:
    """The id of a candidate that comes without one: a, b, c …"""
    return chr(ord("a") + at)


def as_text(prompt: Any) -> str:
    """A prompt as one text, for tools that know no messages."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{one['role']}: {one['content']}" for one in prompt)


def groups_of(ranks: Sequence[tuple[Any, str]]) -> list[list[str]]:
    """Ids by rank, the best first, those of one rank together."""
    return [[id for rank, id in ranks if rank == one] for one in sorted({rank for rank, _ in ranks})]


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def seconds_of(moment: Any) -> float:
    """Seconds since 1970 of an ISO date; 0 where it is none."""
    try:
        return datetime.fromisoformat(str(moment).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
