"""What experts flagged: counted by kind and group, and made preferences of where they also said what would be better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtune.review.record import Item, Verdict


def gathered(items: Iterable[Item], verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Returns `groups` (by type of flag and group: how many flags, on how many items, by how many people; the most first), and
    `flagged` (each flag with its item's text and note; people's names are not in it).
    """
    known = {item.id: item for item in items}
    sums: dict[tuple[str, str], tuple[list[str], set[str], set[str]]] = {}
    flagged = []
    for verdict in verdicts:
        if verdict.kind != "flag" or verdict.item not in known:
            continue
        for flag in verdict.answer["flags"]:
            of_kind = sums.setdefault((flag["type"], flag["group"].strip().lower()), ([], set(), set()))
            of_kind[0].append(verdict.id)
            of_kind[1].add(verdict.item)
            of_kind[2].add(verdict.person)
            flagged.append({"item": verdict.item, "verdict": verdict.id, **flag, "text": text_of(known[verdict.item])})
    groups = [
        {"type": kind, "group": group, "flags": len(flags), "items": len(of), "people": len(people)}
        for (kind, group), (flags, of, people) in sums.items()
    ]
    return {"groups": sorted(groups, key=lambda one: (-one["flags"], one["type"], one["group"])), "flagged": flagged}


def preferences(
    items: Iterable[Item], verdicts: Sequence[Verdict], kind: str = "bias"
) -> tuple[list[dict[str, Any]], int]:
    """Rows of prompt, chosen, rejected (format preference) from items with a flag of this kind; and how many of these had no better answer.

    An edit is chosen over what it corrects; the best group of a comparison over each candidate ranked below it. An adjudication
    counts before other verdicts, a later one before an earlier. Each row knows its item and verdicts.
    """
    flags: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.kind == "flag" and any(flag["type"] == kind for flag in verdict.answer["flags"]):
            flags.setdefault(verdict.item, []).append(verdict.id)
    rows: list[dict[str, Any]] = []
    without = 0
    for item in items:
        if item.id not in flags:
            continue
        better = [one for one in verdicts if one.item == item.id and one.kind in ("edit", "compare")]
        last = max(better, key=lambda one: (one.adjudicates, one.at), default=None)
        pairs = _pairs(item, last) if last else []
        without += not pairs
        for chosen, rejected in pairs:
            assert last is not None
            row = {"prompt": item.payload.get("prompt", ""), "chosen": chosen, "rejected": rejected}
            rows.append({**row, "item": item.id, "verdicts": [last.id, *flags[item.id]]})
    return rows, without


def _pairs(item: Item, verdict: Verdict) -> list[tuple[str, str]]:
    if verdict.kind == "edit":
        before, after = str(item.payload.get("answer", "")), verdict.answer["text"]
        return [(after, before)] if after.strip() != before.strip() else []
    texts = {str(one["id"]): str(one["text"]) for one in item.payload.get("candidates", ())}
    order = verdict.answer["order"]
    if verdict.answer.get("bad") or len(order) < 2:  # none is good, or all alike
        return []
    return [(texts[best], texts[worse]) for best in order[0][:1] for group in order[1:] for worse in group]


def text_of(item: Item) -> str:
    """What an item showed, in one text."""
    payload = item.payload
    prompt = payload.get("prompt", "")
    said = prompt if isinstance(prompt, str) else " / ".join(str(turn.get("content", "")) for turn in prompt)
    parts = [
        payload.get("text", ""),
        said,
        payload.get("answer", ""),
        *(one["text"] for one in payload.get("candidates", ())),
    ]
    return "\n".join(str(part) for part in parts if part)
