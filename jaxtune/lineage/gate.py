"""The promotion gate: a candidate is released where it is no worse than the released model on any set, within its margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.config import ConfigDict
from jaxtune.evals import tasks
from jaxtune.evals.protected import Protected, Verdict
from jaxtune.rewards import scoring
from jaxtune.types import UserError, nearest

Row = Mapping[str, Any]


def passes(verdict: Verdict, decide: str) -> bool:
    """Whether a worsening is within its margin: the worst that its interval allows (non-inferiority), or as it was measured.

    A worsening that is no number passes nothing.
    """
    return (verdict.worsening.high if decide == "interval" else verdict.worsening.value) <= verdict.tolerance


def told(name: str, verdict: Verdict, decide: str, num_rows: int) -> str:
    """What the gate says of a set that does not pass, in one line.

    Where the worsening itself is within the margin and only its interval is not, it says about how many rows would tell: the
    interval's half-width falls with the root of their number.
    """
    w, margin = verdict.worsening, verdict.tolerance
    line = f"{name}: {verdict.metric} {verdict.before.value:.4g} to {verdict.after.value:.4g}, worse by {w.value:.3g} [{w.low:.3g}, {w.high:.3g}], margin {margin:g}"
    if decide == "estimate" or not w.value < margin:
        return line
    half, room = w.high - w.value, margin - w.value
    needed = math.ceil(num_rows * (half / room) ** 2)
    return f"{line}; not shown to be within it by {num_rows:,} rows: about {needed:,} would tell"


_LOSSES: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("label_nll", lambda row: row["label_nll"]),
    ("num_bytes", lambda row: row["text_nll_sum"] / (math.log(2) * row["num_bytes"])),
    ("nll_sum", lambda row: row["nll_sum"] / row["num_tokens"]),
    ("pair_nll", lambda row: row["pair_nll"]),
    ("reward", lambda row: -row["reward"]),
    ("reciprocal_rank", lambda row: -row["reciprocal_rank"]),
)


def _loss(row: Row) -> float:
    """How bad a model's answer to one row is, by the finest figure that there is of it."""
    for column, loss in _LOSSES:
        if column in row:
            return float(loss(row))
    if isinstance(row.get("prediction"), int | float) and isinstance(row["answer"], int | float):
        return abs(row["prediction"] - row["answer"])
    return float(not row.get("correct", row.get("prediction") == row["answer"]))


def worse_rows(one: Protected, released: tasks.Result, candidate: tasks.Result) -> list[dict[str, Any]]:
    """The rows that the candidate answers worse, the worst first: those that it alone gets wrong, where rows are right or wrong.

    Returns:
      lines of set, row_id, prompt, answer, `worse_by`, and what each model gave.
    """
    prompts = {example.row_id: scoring.prompt_of(example) for example in one.held.examples}
    found = []
    for before, after in zip(released.rows, candidate.rows, strict=True):
        worse_by = _loss(after) - _loss(before)
        flipped = before.get("correct", False) and not after.get("correct", True)
        if not (flipped if "correct" in before else worse_by > 0):
            continue
        row_id = before["row_id"]
        sides = {
            side: {key: value for key, value in row.items() if key not in ("row_id", "answer")}
            for side, row in (("released", before), ("candidate", after))
        }
        line = {"set": one.name, "row_id": row_id, "prompt": prompts.get(row_id, ""), "answer": before["answer"]}
        found.append({**line, "worse_by": worse_by, **sides})
    return sorted(found, key=lambda line: -line["worse_by"])


def margins(sets: Sequence[Protected], margins: Sequence[tuple[str, float]]) -> list[Protected]:
    """The sets with the margins that `lineage.margins` gives by name in place of their own."""
    given = dict(margins)
    return [one._replace(tolerance=float(given.get(one.name, one.tolerance))) for one in sets]


def check_names(config: ConfigDict, stages: Sequence[str]) -> None:
    """Refuses sets that cannot be told apart, and margins of sets that there are not.

    Raises:
      UserError: with the name.
    """
    beside = [name for name, _ in config.protect.sets]
    twice = next((name for name in beside if name in stages), None)
    if twice is not None:
        raise UserError(f"config.protect.sets has {twice!r}, which is also a stage's name: give the set another")
    known = [*stages, *beside]
    wrong = next((name for name, _ in config.lineage.margins if name not in known), None)
    if wrong is not None:
        raise UserError(f"config.lineage.margins names {wrong!r}; there are {', '.join(known)}{nearest(wrong, known)}")
