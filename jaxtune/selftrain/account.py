"""The account of self-training: what each round sampled, kept and reached, the control beside it; page and table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtune import report, tracking
from jaxtune.config import ConfigDict

# (config, (predictions.jsonl, side in it), the same of another) -> second minus first by metric, paired.
Compare = Callable[[ConfigDict, tuple[Path, str], tuple[Path, str]], dict[str, dict[str, Any]]]


def of_run(workdir: Path) -> dict[str, Any]:
    """What a finished run of `train` says of itself: estimates by metric, steps, trained tokens and seconds."""
    found = json.loads((workdir / "report.json").read_text("utf-8"))
    train = found["train"]
    return {
        "before": found["before"], "after": found["after"], "metric": found.get("metric") or next(iter(found["after"])),
        "rows": found["data"]["rows"], "steps": train["steps"], "trained_tokens": train["trained_tokens"],
        "training_seconds": train["seconds"],
    }  # fmt: skip


def told(one: dict[str, Any]) -> str:
    """One line on a round, for the terminal."""
    errors = "".join(f"; {kind} {num} times, first: {message}" for kind, (num, message) in one["errors"].items())
    reasons = ", ".join(f"{reason} {num}" for reason, num in one["refused"].items())
    reached = _estimate(one["after"][one["metric"]])
    return (
        f"round {one['round']}: {one['sampled']} answers, {one['right_share']:.1%} right; kept {one['kept']}, refused {reasons or 0}; "
        f"{one['metric']} {reached}{errors}"
    )


def write(
    config: ConfigDict, workdir: Path, uri: str, rounds: Sequence[dict[str, Any]], control: dict[str, Any] | None, compare: Compare
) -> None:  # fmt: skip
    """Writes report.html and report.json, and prints the table."""
    last, metric = rounds[-1], rounds[-1]["metric"]
    place = workdir / f"round_{last['round']:02d}" / "train"
    after, before = (place / "predictions.jsonl", "after"), rounds[0]["before"]
    difference, beside = {}, {}
    if before:
        difference = compare(config, (workdir / "round_01" / "train" / "predictions.jsonl", "before"), after)
    if control:
        beside_it = workdir / f"control_{last['round']:02d}" / "train" / "predictions.jsonl"
        gap = compare(config, (beside_it, "after"), after)
        beside = {"gold answers": {"metrics": control["after"], "difference": gap}}
    names = ["before"] * bool(before) + [f"round {one['round']}" for one in rounds]
    estimates = [before[metric]] * bool(before) + [one["after"][metric] for one in rounds]
    reached = control["after"][metric] if control else None
    table = _table(rounds, control, before, metric)
    if config.tracking.report:
        facts = {
            "name": config.name,
            "about": {"Model": uri, "Method": f"{config.self_training.method}, {len(rounds)} rounds"},
            "notices": _notices(config, rounds, control), "metric": metric, "before": before, "after": last["after"],
            "difference": difference, "beside": beside, "config": config.to_dict(),
            "rounds": {"table": table, "names": names, "estimates": estimates, "control": reached, "metric": metric,
                       "all": list(rounds), "gold": control},
            "how_to": [("In the terminal", f"python -m jaxtune.launch chat --config={place}/config.json --workdir={place}")],
        }  # fmt: skip
        with tracking.writing(workdir / "report.html"):
            report.write(workdir, facts)
    print(_text(table))
    for what, gaps in {"before": difference, **{name: each["difference"] for name, each in beside.items()}}.items():
        for name, gap in gaps.items():
            change = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], p = {gap['p']:.2g} ({gap['test']})"
            print(f"{name}, last round against {what}: {change}")
    print(f"result in {place}")


def _table(
    rounds: Sequence[dict[str, Any]], control: dict[str, Any] | None, before: dict[str, Any], metric: str
) -> dict[str, list[Any]]:
    """Columns by name; a row for the untuned model where it was measured, for each round, and for the control."""
    lines = [["before", "", "", "", "", "", "", _estimate(before[metric])]] if before else []
    for one in rounds:
        hinted = f" ({one['hinted']} by a hint)" if one["hinted"] else ""
        lines.append([
            f"round {one['round']}", one["sampled"], f"{one['right_share']:.1%}", f"{one['solved_share']:.1%}",
            f"{one['kept']}{hinted}", one["rows"], one["steps"], _estimate(one["after"][metric]),
        ])  # fmt: skip
    if control:
        lines.append(
            ["gold answers", "", "", "", "", control["rows"], control["steps"], _estimate(control["after"][metric])]
        )
    columns = (
        "",
        "Answers sampled",
        "Right",
        "Prompts solved",
        "Kept",
        "Rows trained",
        "Steps",
        metric.replace("_", " "),
    )
    return {name: list(cells) for name, cells in zip(columns, zip(*lines, strict=True), strict=True)}


def _notices(config: ConfigDict, rounds: Sequence[dict[str, Any]], control: dict[str, Any] | None) -> list[str]:
    notices = [
        f"Round {one['round']}: reward {kind} {num} times; first: {message}"
        for one in rounds
        for kind, (num, message) in one["errors"].items()
    ]
    if control and control["gold"] < control["wanted"]:
        notices.append(
            f"The control has {control['gold']} gold answers, all there are, against {control['wanted']} rows of the last round; "
            "it takes as many steps."
        )
    if config.self_training.control and not control:
        notices.append("The rows have no answers, so there is no control.")
    return notices


def _estimate(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _text(table: dict[str, list[Any]]) -> str:
    columns = [[name, *map(str, cells)] for name, cells in table.items()]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )
