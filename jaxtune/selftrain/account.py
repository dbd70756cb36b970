"""The account of self-training: what each round sampled, kept and reached, the control beside it; page and table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import pictures, report, tracking
from jaxtune.config import ConfigDict

# (config, (predictions.jsonl, side in it), the same of another) -> second minus first by metric, paired.
Compare = Callable[[ConfigDict, tuple[Path, str], tuple[Path, str]], dict[str, dict[str, Any]]]


class Ended(NamedTuple):
    """All rounds as `round.json` has them, the control, the untuned model's entropy, and why rounds ended early ("": they did not)."""

    rounds: Sequence[dict[str, Any]]
    control: dict[str, Any] | None
    entropy: float | None = None
    stopped: str = ""


def of_run(workdir: Path) -> dict[str, Any]:
    """What a finished run of `train` says of itself: estimates by metric, steps, trained tokens and seconds."""
    found = json.loads((workdir / "report.json").read_text("utf-8"))
    train = found["train"]
    return {
        "before": found["before"], "after": found["after"], "metric": found.get("metric") or next(iter(found["after"])),
        "rows": found["data"]["rows"], "steps": train["steps"], "trained_tokens": train["trained_tokens"],
        "training_seconds": train["seconds"], "protected": found.get("protected", {}),
    }  # fmt: skip


def told(one: dict[str, Any]) -> str:
    """One line on a round, for the terminal."""
    errors = "".join(f"; {kind} {num} times, first: {message}" for kind, (num, message) in one["errors"].items())
    reasons = ", ".join(f"{reason} {num}" for reason, num in one["refused"].items())
    reached = _estimate(one["after"][one["metric"]])
    alone = "" if one["kept"] or not one["sampled"] else ": none verified, and it trains on these alone"
    of_gold = f", gold answers {one['gold']}{alone}" if one["gold"] else ""
    sampled = (
        f"{one['sampled']} answers, {one['right_share']:.1%} right; kept {one['kept']}" if one["sampled"] else "taught"
    )
    cost = "".join(f"; {name} {_estimate(each['after'][each['metric']])}" for name, each in one["protected"].items())
    cost += "" if one["entropy"] is None else f"; entropy {one['entropy']:.3f} nats a token"
    return f"round {one['round']}: {sampled}{of_gold}, refused {reasons or 0}; {one['metric']} {reached}{cost}{errors}"


def write(config: ConfigDict, workdir: Path, uri: str, ended: Ended, compare: Compare) -> None:
    """Writes report.html and report.json, and prints the table."""
    rounds, control = ended.rounds, ended.control
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
    table = _table(ended, before, metric)
    plotted = [
        {"title": metric.replace("_", " "), "names": names, "estimates": estimates, "control": reached},
        *_beside(ended, names),
    ]
    result = _result(workdir, ended)
    if config.tracking.report:
        facts = {
            "name": config.name,
            "about": {"Model": uri, "Method": f"{config.self_training.method}, {len(rounds)} rounds"},
            "alerts": [f"{_stopped(ended)}."] * bool(ended.stopped),
            "notices": _notices(config, ended), "metric": metric, "before": before, "after": last["after"],
            "difference": difference, "beside": beside, "config": config.to_dict(),
            "rounds": {"table": table, "names": names, "estimates": estimates, "control": reached, "metric": metric,
                       "all": list(rounds), "gold": control, "entropy_before": ended.entropy, "stopped": ended.stopped,
                       "beside": plotted[1:]},
            "how_to": [("In the terminal", f"python -m jaxtune.launch chat --config={result}/config.json --workdir={result}")] * bool(result),
        }  # fmt: skip
        with tracking.writing(workdir / "report.html"):
            report.write(workdir, facts)
            _picture(workdir / "rounds.png", plotted, bool(before))
    print(_text(table))
    for what, gaps in {"before": difference, **{name: each["difference"] for name, each in beside.items()}}.items():
        for name, gap in gaps.items():
            change = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], p = {gap['p']:.2g} ({gap['test']})"
            print(f"{name}, last round against {what}: {change}")
    print(f"result in {result}" if result else f"no result. {_stopped(ended)}")


def _table(ended: Ended, before: dict[str, Any], metric: str) -> dict[str, list[Any]]:
    """Columns by name; a row for the untuned model where it was measured, for each round, and for the control."""
    rounds, control = ended.rounds, ended.control
    lines = [["before", "", "", "", "", "", "", _estimate(before[metric])]] if before else []
    for one in rounds:
        hinted = f" ({one['hinted']} by a hint)" if one["hinted"] else ""
        lines.append([
            f"round {one['round']}", one["sampled"], *(_share(one[key]) for key in ("right_share", "solved_share")),
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
    found = {name: list(cells) for name, cells in zip(columns, zip(*lines, strict=True), strict=True)}
    for kept in _beside(ended, ["before"] * bool(before) + [f"round {one['round']}" for one in rounds]):
        told = [_estimate(each) if each["low"] < each["high"] else f"{each['value']:.3f}" for each in kept["estimates"]]
        own = kept["control"]
        told += [_estimate(own) if own["low"] < own["high"] else f"{own['value']:.3f}"] if own else [""] * bool(control)
        found[kept["title"]] = told
    return found


def _beside(ended: Ended, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each round cost, for a plot each: protected sets' metrics, and the entropy; as many estimates as `names`."""
    rounds, control = ended.rounds, ended.control
    found = []
    for name, first in rounds[0]["protected"].items():
        metric = first["metric"]
        estimates = [first["before"][metric]] * (len(names) - len(rounds)) + [
            one["protected"][name]["after"][metric] for one in rounds
        ]
        its = control["protected"][name]["after"][metric] if control else None
        found.append(
            {"title": f"{name}, {metric.replace('_', ' ')}", "names": names, "estimates": estimates, "control": its}
        )
    if ended.entropy is not None:
        values = [ended.entropy] * (len(names) - len(rounds)) + [one["entropy"] for one in rounds]
        its = _point(control["entropy"]) if control else None
        found.append(
            {"title": "Entropy, nats a token", "names": names, "estimates": list(map(_point, values)), "control": its}
        )
    return found


def _picture(path: Path, plotted: list[dict[str, Any]], has_before: bool) -> None:
    """Draws what is told by round, side by side, over the number of the round."""
    panels = [
        pictures.Panel(
            one["title"], "round", "", list(range(1 - has_before, len(one["names"]) + 1 - has_before)),
            [each["value"] for each in one["estimates"]], joined=True,
            intervals=[(each["low"], each["high"]) for each in one["estimates"]],
            levels=[(one["control"]["value"], "gold answers alone")] if one["control"] else [],
        )
        for one in plotted
    ]  # fmt: skip
    pictures.png(path, panels)


def _point(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _result(workdir: Path, ended: Ended) -> Path | None:
    """The run that is the result: the last round's, or the one before where that cost too much; None where there is none."""
    number = ended.rounds[-1]["round"] - bool(ended.stopped)
    return workdir / f"round_{number:02d}" / "train" if number else None


def _stopped(ended: Ended) -> str:
    """Why rounds ended early, and what of them is to be used."""
    number = ended.rounds[-1]["round"]
    use = f"the result is that of round {number - 1}" if number > 1 else "the model as it was is the better one"
    return f"Round {number} is the last, and {use}: {ended.stopped}"


def _notices(config: ConfigDict, ended: Ended) -> list[str]:
    rounds, control = ended.rounds, ended.control
    notices = [
        f"Round {one['round']}: none of {one['sampled']} rewrites verified; it was trained on gold answers alone."
        for one in rounds
        if one["sampled"] and not one["kept"]
    ]
    notices += [
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
