"""Verdicts to training rows: what experts agreed on becomes data; the rest is left out, and counted with its reason. Pure.

| task | what counts | rows |
|---|---|---|
| label | the labels that more than half of the experts gave | `sft`: prompt, and the labels as its completion |
| edit | the text that more than half gave, or each one's own (`Rules.edits`) | `sft`; where it differs from the answer shown, also `pairs`: the edited text over that answer |
| accept | what more than half said | `kto`: the answer with label true or false; accepted also `sft` (`texts`, where there is no prompt) |
| compare | of each two candidates, what more than half preferred | `pairs`; a tie, and "none is good", give none |
| rate | the mean rating of each answer | `rewards`: the answers to one prompt with their ratings, two or more that differ |

A senior's adjudication takes the place of what others said. An item that was flagged trains nothing, nor does one that checks attention.
A row's columns are those of `data/formats.py`, and beside them `id`, `item`, `task`, `round`, `verdicts` (ids of those that agree with
it), `guideline` (numbers of the versions they were given under), and how many `agreed` of how many `asked`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from jaxtune.review.record import FLAG_TYPES, Item, Verdict, stable
from jaxtune.review.tasks import Task

Row = dict[str, Any]
KINDS = ("sft", "texts", "pairs", "kto", "rewards")
# Kinds of task whose verdicts can become such rows.
SOURCES = {
    "sft": ("label", "edit", "accept"), "texts": ("accept",), "pairs": ("compare", "edit"), "kto": ("accept",), "rewards": ("rate",),
}  # fmt: skip
REASONS = {
    "no_verdict": "nobody has answered yet",
    "skipped": "everybody who was asked skipped it",
    "flagged": "somebody flagged it",
    "gold": "it checks attention, and its answer was known",
    "not_trusted": "all who answered have trust 0",
    "disagreement": "no answer has more than half of the experts, and no senior has settled it",
    "tie": "the candidates are as good as each other",
    "none_good": "none of the candidates is good",
    "same_text": "the candidates are one text",
    "one_answer": "it is the only rated answer to its prompt, so it is better than none",
    "equal_ratings": "all answers to its prompt have one rating",
    "spans": "spans train no language model; export them",
    "no_prompt": "it has no prompt, which a row needs",
    "unknown_task": "its task is not in the config",
}


class Rules(NamedTuple):
    """What of the verdicts becomes rows."""

    flags_out: tuple[str, ...] = FLAG_TYPES  # an item with a flag of one of these types trains nothing
    edits: str = "majority"  # several edits of one answer: majority | each (a row for every different text)
    pairs_from_edits: bool = True  # the edited text over the answer that was shown
    repeat_agreed: bool = False  # a row is there once for each expert who agreed with it


class Made(NamedTuple):
    """Rows by kind; what was left out, {item, task, reason}; and every flag, {item, task, verdict, person, type, group, note}."""

    rows: dict[str, list[Row]]
    left_out: list[Row]
    flagged: list[Row]

    def counts(self) -> dict[str, dict[str, int]]:
        """How many items were left out, by task and reason."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for one in self.left_out:
            found[one["task"]][one["reason"]] += 1
        return {task: dict(counter) for task, counter in found.items()}


class _Counted(NamedTuple):
    """An item with the answers that count, each with its weight."""

    item: Item
    task: Task
    answers: list[tuple[Verdict, float]]


def rows(
    items: Iterable[Item], verdicts: Iterable[Verdict], tasks: Mapping[str, Task], people_trust: Mapping[str, float] | None = None
) -> dict[str, list[Row]]:  # fmt: skip
    """The training rows by kind: "sft", "texts", "pairs", "kto", "rewards". See `made` for what is left out."""
    return made(items, verdicts, tasks, people_trust).rows


def made(
    items: Iterable[Item],
    verdicts: Iterable[Verdict],
    tasks: Mapping[str, Task],
    people_trust: Mapping[str, float] | None = None,
    rules: Rules | None = None,
) -> Made:
    """Turns what experts said into rows, the same for the same verdicts whatever their order.

    Args:
      people_trust: weight of a person's answers by their id, 0 or more; 1 where it is not there. None: all alike.
    """
    rules, by_item = rules or Rules(), defaultdict[str, list[Verdict]](list)
    for one in counting(verdicts):
        by_item[one.item].append(one)
    result = Made({kind: [] for kind in KINDS}, [], [])
    rated: dict[str, list[_Counted]] = defaultdict(list)
    for item in items:
        mine = by_item[item.id]
        flags = [
            _flag(item, verdict, flag) for verdict in mine if verdict.kind == "flag" for flag in verdict.answer["flags"]
        ]
        result.flagged.extend(flags)
        reason, counted = _counted(item, mine, tasks, people_trust or {})
        if any(flag["type"] in rules.flags_out for flag in flags):
            reason = "flagged"
        if not reason and counted.task.kind == "rate" and _prompt(item) is not None and "answer" in item.payload:
            rated[stable([item.task, _prompt(item)])].append(counted)
        elif not reason:
            reason = _MAKERS[counted.task.kind](counted, rules, result.rows)
        if reason:
            _leave_out(result, item, reason)
    for group in rated.values():
        reason = _rate(group, result.rows)
        for counted in group if reason else ():
            _leave_out(result, counted.item, reason)
    return result._replace(rows=_repeated(result.rows)) if rules.repeat_agreed else result


def counting(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that count: none that was superseded, no retraction, and of one person on one item the last answer (flags all count)."""
    given = sorted(verdicts, key=lambda one: (one.at, one.id))
    gone = {one.supersedes for one in given if one.supersedes}
    left = [one for one in given if one.id not in gone and one.kind != "retract"]
    last = {(one.item, one.person): one.id for one in left if one.kind != "flag"}
    return [one for one in left if one.kind == "flag" or last[one.item, one.person] == one.id]


def _counted(
    item: Item, mine: Sequence[Verdict], tasks: Mapping[str, Task], trust: Mapping[str, float]
) -> tuple[str, _Counted]:
    """(why nothing of it is to be used or "", the answers that count)."""
    task = tasks.get(item.task)
    if task is None:
        return "unknown_task", _Counted(item, Task(item.task, ""), [])
    answers = [one for one in mine if one.kind == task.kind]
    answers = [one for one in answers if one.adjudicates][-1:] or answers
    weighed = [(one, float(trust.get(one.person, 1.0))) for one in answers]
    trusted = [(one, weight) for one, weight in weighed if weight > 0]
    reason = ""
    if item.gold is not None:
        reason = "gold"
    elif not answers:
        reason = "skipped" if any(one.kind == "skip" for one in mine) else "no_verdict"
    elif not trusted:
        reason = "not_trusted"
    return reason, _Counted(item, task, trusted)


def _leave_out(result: Made, item: Item, reason: str) -> None:
    result.left_out.append({"item": item.id, "task": item.task, "reason": reason})


def _flag(item: Item, verdict: Verdict, flag: Mapping[str, Any]) -> Row:
    return {"item": item.id, "task": item.task, "verdict": verdict.id, "person": verdict.person, **flag}


def _won(counted: _Counted, said: Callable[[Verdict], Hashable]) -> tuple[Any, list[Verdict]]:
    """(what more than half of the weight says, who says so); (None, []) where nothing has as much."""
    votes: dict[Hashable, float] = defaultdict(float)
    for verdict, weight in counted.answers:
        votes[said(verdict)] += weight
    best = max(votes, key=lambda key: votes[key])
    if not votes[best] > sum(votes.values()) / 2:
        return None, []
    return best, [verdict for verdict, _ in counted.answers if said(verdict) == best]


# ---- a maker for each kind of task: adds rows, returns why there are none ----


def _label(counted: _Counted, rules: Rules, into: dict[str, list[Row]]) -> str:
    labels, agreed = _won(counted, lambda verdict: tuple(verdict.answer["labels"]))
    if not agreed:
        return "disagreement"
    return _answered(counted, ", ".join(labels), agreed, into)


def _edit(counted: _Counted, rules: Rules, into: dict[str, list[Row]]) -> str:
    if rules.edits == "each":
        said = dict.fromkeys(_edited(verdict) for verdict, _ in counted.answers)
        every = [[v for v, _ in counted.answers if _edited(v) == one] for one in said]
    else:
        _, agreed = _won(counted, _edited)
        if not agreed:
            return "disagreement"
        every = [agreed]
    chosen = [(agreed[0].answer["text"].strip(), agreed) for agreed in every]  # as the first of them wrote it
    shown = str(counted.item.payload.get("answer", ""))
    for text, agreed in chosen:
        reason = _answered(counted, text, agreed, into)
        if reason:
            return reason
        if rules.pairs_from_edits and shown.strip() and shown.strip() != text:
            into["pairs"].append(_pair(counted, text, shown, agreed))
    return ""


def _edited(verdict: Verdict) -> str:
    """An edited text but for its white space, in which experts do not disagree (`settling.differ`)."""
    return " ".join(verdict.answer["text"].split())


def _accept(counted: _Counted, rules: Rules, into: dict[str, list[Row]]) -> str:
    accepted, agreed = _won(counted, lambda verdict: verdict.answer["accept"])
    if not agreed:
        return "disagreement"
    item = counted.item
    if "answer" not in item.payload:
        if accepted:
            into["texts"].append(_row("texts", counted, agreed, {"text": item.payload["text"]}))
        return ""
    if _prompt(item) is None:
        return "no_prompt"
    into["kto"].append(_row("kto", counted, agreed, {**_completed(item, item.payload["answer"]), "label": accepted}))
    return _answered(counted, item.payload["answer"], agreed, into) if accepted else ""


def _compare(counted: _Counted, rules: Rules, into: dict[str, list[Row]]) -> str:
    item = counted.item
    if _prompt(item) is None:
        return "no_prompt"
    texts = {str(one["id"]): str(one["text"]) for one in item.payload["candidates"]}
    reasons, num = Counter[str](), 0
    for first, second in combinations(sorted(texts), 2):
        said, agreed = _won(counted, lambda verdict, a=first, b=second: _preferred(verdict.answer, a, b))  # type: ignore[misc]
        if said in ("first", "second"):
            better, worse = (first, second) if said == "first" else (second, first)
            if texts[better].strip() == texts[worse].strip():
                reasons["same_text"] += 1
                continue
            into["pairs"].append(_pair(counted, texts[better], texts[worse], agreed))
            num += 1
        else:
            reasons[said or "disagreement"] += 1
    return "" if num else max(reasons, key=lambda one: (reasons[one], one), default="same_text")


def _preferred(answer: Mapping[str, Any], first: str, second: str) -> str:
    if answer.get("bad"):
        return "none_good"
    place = {str(one): rank for rank, group in enumerate(answer["order"]) for one in group}
    return "tie" if place[first] == place[second] else "first" if place[first] < place[second] else "second"


def _no_rows(counted: _Counted, rules: Rules, into: dict[str, list[Row]]) -> str:
    return "spans" if counted.task.kind == "span" else "no_prompt"


_MAKERS = {"label": _label, "edit": _edit, "accept": _accept, "compare": _compare, "rate": _no_rows, "span": _no_rows}


def _rate(group: Sequence[_Counted], into: dict[str, list[Row]]) -> str:
    """The rated answers to one prompt: a row, or why there is none."""
    by_text: dict[str, list[tuple[Verdict, float]]] = defaultdict(list)
    for counted in group:
        by_text[str(counted.item.payload["answer"])] += counted.answers
    scores = [sum(v.answer["rating"] * w for v, w in own) / sum(w for _, w in own) for own in by_text.values()]
    if len(by_text) < 2:
        return "one_answer"
    if max(scores) == min(scores):
        return "equal_ratings"
    everybody = [verdict for own in by_text.values() for verdict, _ in own]
    item = group[0].item
    prompt = _prompt(item)
    # Answers as texts: the formats' reader puts them into messages where the prompt is messages.
    answers = {"prompt": prompt, "completions": list(by_text), "scores": [round(score, 6) for score in scores]}
    row = _row("rewards", group[0], everybody, answers) | {"items": [counted.item.id for counted in group]}
    into["rewards"].append(row | {"asked": len(everybody)})
    return ""


# ---- rows ----


def _prompt(item: Item) -> Any:
    """What the answer is an answer to: as the model was asked, else as the expert saw it; None where there is none."""
    for found in (item.origin.get("prompt"), item.payload.get("prompt"), item.payload.get("text")):
        if found:
            return found
    return None


def _completed(item: Item, text: str) -> Row:
    prompt = _prompt(item)
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text,
    }


def _answered(counted: _Counted, text: str, agreed: Sequence[Verdict], into: dict[str, list[Row]]) -> str:
    if _prompt(counted.item) is None:
        return "no_prompt"
    into["sft"].append(_row("sft", counted, agreed, _completed(counted.item, text)))
    return ""


def _pair(counted: _Counted, chosen: str, rejected: str, agreed: Sequence[Verdict]) -> Row:
    return _row("pairs", counted, agreed, {"prompt": _prompt(counted.item), "chosen": chosen, "rejected": rejected})


def _row(kind: str, counted: _Counted, agreed: Sequence[Verdict], columns: Row) -> Row:
    item, named = counted.item, stable([kind, counted.item.id, columns])
    return {
        "id": f"{kind}-{hashlib.sha256(named.encode()).hexdigest()[:16]}", **columns, "item": item.id, "task": item.task,
        "round": item.round, "verdicts": sorted(one.id for one in agreed), "guideline": sorted({one.guideline for one in agreed}),
        "agreed": len(agreed), "asked": len(counted.answers),
    }  # fmt: skip


def _repeated(by_kind: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    return {kind: [row for row in own for _ in range(max(1, row["agreed"]))] for kind, own in by_kind.items()}
