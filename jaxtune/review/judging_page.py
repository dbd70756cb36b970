"""What the verb `judge` found, in words: terminal, judging.json and the page."""

from __future__ import annotations

from typing import Any

from jaxtune import statistics
from jaxtune.config import ConfigDict
from jaxtune.review import insight
from jaxtune.review.sequential import BETTER, OPEN, SAME, Decision
from jaxtune.review.tasks import Task


def facts(config: ConfigDict, task: Task, found: Any, judge: str) -> dict[str, Any]:
    """Facts for `report.write`; `lines` are the terminal's."""
    options, rows = config.judging, []
    rows.append(["people", *_row(found.people, found.decision)])
    if judge:
        rows.append([judge, *_row(found.judged, None)])
    if found.together:
        rows.append(["people, and the judge where there are none", *_row(None, found.together)])
    lines = [f"{row[0]}: {row[5]} over {row[1]} items ({row[2]} better, {row[3]} ties, {row[4]} worse)" if row[2] != "" else f"{row[0]}: {row[5]} over {row[1]} items" for row in rows]  # fmt: skip
    left = len(found.items) - len(found.people)
    lines.append(f"{left} items still to be judged by people; {found.alike} outputs are alike and are not asked about")
    notices = []
    if judge:
        trust = found.trust
        notices.append(f"{judge} is {'trusted' if trust.trusted else f'not counted: {trust.why}'}.")
        if trust.contradictions == trust.contradictions:
            notices.append(
                f"Asked in both orders it chose the same place in {trust.contradictions:.0%} of its comparisons."
            )
        if found.corrected and trust.trusted:
            c = found.corrected
            notices.append(
                f"People's win rate with the judge's help, its bias taken out (for one look): {c.value:.3f} [{c.low:.3f}, {c.high:.3f}]."
            )
        lines += notices
    header = ["Who", "Items", "Better", "Ties", "Worse", f"Win rate of {options.names[1]}", "Decision"]
    figures: dict[str, Any] = {
        "task": task.name, "names": list(options.names), "items": len(found.items), "alike": found.alike, "alpha": options.alpha,
        "margin": options.margin, "people": {"people": found.num_people, "items": len(found.people), **found.decision._asdict()},
    }  # fmt: skip
    if judge:
        rate = statistics.wilson(_mean(found.judged), len(found.judged))
        told = {"name": judge, "items": len(found.judged), "win_rate": rate, "corrected": found.corrected}
        figures["judge"] = told | {"trust": found.trust, "together": found.together}
    return {
        "name": f"{config.name}: {options.names[1]} against {options.names[0]}",
        "headline": headline(options, found),
        "about": {"Intervals": f"hold at any time, with probability {1 - options.alpha:g}; the judge's is Wilson's, for one look"},
        "notices": notices,
        "tables": [{"title": "Comparisons", "header": header, "rows": rows, "plots": []}],
        "figures": insight.plain(figures),
        "lines": lines,
        "config": config.to_dict(),
    }  # fmt: skip


def headline(options: ConfigDict, found: Any) -> str:
    """One sentence: the decision, by whom, and after how many items."""
    first, second = options.names
    one, by = found.decision, "people"
    if one.decision == OPEN and found.together:
        one, by = found.together, "people and a trusted judge"
    if one.decision == OPEN:
        return f"No decision yet between {first} and {second}: win rate of {second} {_rate(one)}."
    if one.decision == SAME:
        return f"No difference larger than {options.margin:g} between {first} and {second}, by {by}, known after {one.stopped_at} items: win rate {_rate(one)}."
    better = second if one.decision == BETTER else first
    return f"{better} is better, by {by}, known after {one.stopped_at} items: win rate of {second} {_rate(one)}."


def _mean(outcomes: dict[str, float]) -> float:
    return sum(outcomes.values()) / len(outcomes) if outcomes else float("nan")


def _rate(one: Decision) -> str:
    return f"{one.rate:.3f} [{one.low:.3f}, {one.high:.3f}]" if one.num else "unknown"


def _row(outcomes: dict[str, float] | None, decision: Decision | None) -> list[Any]:
    if outcomes is None:
        assert decision is not None
        return [decision.num, "", "", "", _rate(decision), decision.decision]
    counts = [
        sum(test(x) for x in outcomes.values()) for test in (lambda x: x > 0.5, lambda x: x == 0.5, lambda x: x < 0.5)
    ]
    if decision is None:
        rate = statistics.wilson(_mean(outcomes), len(outcomes))
        told = f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]" if outcomes else "unknown"
        return [len(outcomes), *counts, told, ""]
    return [len(outcomes), *counts, _rate(decision), decision.decision]
