"""What experts are asked, and what they answer: plain values, the same in the database, over HTTP and in files.

An item is one question to an expert; a verdict is one answer to it. What a verdict's `answer` holds depends on the task's kind:

| kind | the item's payload | answer |
|---|---|---|
| label | text | {"labels": ["positive"]}; one, or several where the task says multi |
| span | text | {"spans": [{"start": 3, "end": 9, "label": "party"}]}, in characters, end exclusive; may be empty |
| rate | text, or prompt and answer | {"rating": 4.0} |
| compare | prompt, candidates of ids and texts | {"order": [["b"], ["a"]], "bad": false}: groups of ids, the best first; one group of all: a tie; bad: none is good |
| edit | prompt, answer | {"text": "the corrected answer"} |
| accept | prompt and answer, or text | {"accept": true, "reason": ""} |

On any item: a flag {"flags": [{"type": "bias", "group": "", "note": ""}]}, a skip {"reason": ""}, and a retraction {} of an
earlier verdict, which `supersedes` names (undo). Nothing is ever changed: of verdicts that supersede each other the last counts.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

TASK_KINDS = ("label", "span", "rate", "compare", "edit", "accept")
VERDICT_KINDS = (*TASK_KINDS, "flag", "skip", "retract")
FLAG_TYPES = ("bias", "privacy", "harm", "wrong", "off_guideline")
ROLES = ("expert", "senior", "owner")  # each may do what those before it may
MODEL = "model:"  # ids and names of model judges start so; their verdicts count in nothing that is said of people


class Item(NamedTuple):
    """One question. `id` is the SHA-256 of what is asked, so that the same question of a round is there once.

    payload: what the page shows, by the table above: "text" | "prompt" (a string, or messages of role and content) and "answer" |
      "candidates": ({"id": "a", "text": …}, …). Optional "prelabel": an answer suggested by a model, with "score".
    origin: never sent to the page: {"source": URI, "row": number, "row_sha256": …, "models": {candidate id: {"model", "checkpoint"}}, …}.
    gold: the right answer, of an item that checks attention; never sent to the page.
    """

    id: str
    round: int
    task: str
    payload: dict[str, Any]
    origin: dict[str, Any]
    gold: dict[str, Any] | None = None
    overlap: int = 1
    skill: str = ""


class Verdict(NamedTuple):
    """One answer, as it was given. `id` is chosen by whoever sends it: sent twice, it is there once.

    at: seconds since 1970, UTC, by the server's clock. shown: {"order": ids as they stood on the page, "prelabel": whether one was
    shown}. seconds: from the item's showing to its answer, without pauses of more than a minute. supersedes: id of the same
    person's earlier verdict that this one corrects or retracts, or "". adjudicates: it settles what others disagreed about.
    """

    id: str
    item: str
    person: str
    kind: str
    answer: dict[str, Any]
    shown: dict[str, Any]
    guideline: int
    seconds: float
    at: float = 0.0
    supersedes: str = ""
    adjudicates: bool = False


class Person(NamedTuple):
    """Someone with an account. skills: groups whose items they may be asked ("": no group needed)."""

    id: str
    name: str
    role: str
    skills: tuple[str, ...] = ()
    active: bool = True


def make_item(round: int, task: str, payload: dict[str, Any], origin: dict[str, Any], **more: Any) -> Item:
    """Returns the item whose id follows from round, task and payload."""
    asked = json.dumps([round, task, payload], sort_keys=True, ensure_ascii=False)
    return Item(hashlib.sha256(asked.encode()).hexdigest()[:32], round, task, payload, origin, **more)


def stable(value: Any) -> str:
    """JSON of one form for one value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
