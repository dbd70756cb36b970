"""What the runs of a frontier amount to: points, which of them others dominate, whether base_kl tells forgetting; table and plots."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import pictures
from jaxtune.config import ConfigDict
from jaxtune.evals import tradeoff
from jaxtune.statistics import Estimate
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

_KEPT = ("metric", "before", "after", "difference", "protected", "base_kl")  # of a report
_FEWEST = 4  # points of which an order says anything


def read(folder: Path, method: str, strength: str, run: Any) -> list[dict[str, Any]]:
    """A finished run's points: one, by its report.json, or one for each share of its merge.json.

    Raises:
      UserError: it has neither.
    """
    penalties = {one[0] for one in run.config.retain.penalties}
    of_run = {"method": method, "run": run.name, "holds_base_kl": "kl_base" in penalties}
    if (folder / "merge.json").exists():
        told = json.loads((folder / "merge.json").read_text("utf-8")).get("shares", ())
        return [
            {**of_run, "name": f"{method},share={one['share']:g}", "strength": one["share"], **_part(one)}
            for one in told
        ]
    file = folder / "report.json"
    if not file.exists():
        raise UserError(f"{run.name} has no report.json: set tracking.report=True")
    return [
        {**of_run, "name": run.name, "strength": _told(run, strength), **_part(json.loads(file.read_text("utf-8")))}
    ]


def _told(run: Any, strength: str) -> float | int | str:
    """A run's strength: a number, or what its name says."""
    value = run.values[strength]
    return value if isinstance(value, int | float) else run.name.rpartition("=")[2]


def _part(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in _KEPT if report.get(key) is not None}


def compare(config: ConfigDict, told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what `frontier.json` says: points, the picked one's name, and base_kl's rank correlation with forgetting.

    Raises:
      UserError: a run was not measured before and after, or not by `frontier.metric`.
    """
    options = config.frontier
    points = [tradeoff.point(one["name"], one, options.metric) for one in told]
    lost = tradeoff.dominated(points)
    picked = tradeoff.pick(points, options.pick)
    rows = []
    for point, one, is_lost in zip(points, told, lost, strict=True):
        sets = one.get("protected", {})
        rows.append(
            {
                "name": point.name,
                "method": one["method"],
                "strength": one["strength"],
                "run": one["run"],
                "gain": point.gain._asdict(),
                "retention": point.retention._asdict() if point.retention else None,
                "changes": {name: tradeoff.change(each)._asdict() for name, each in sets.items()},
                "broken": list(point.broken),
                "dominated": is_lost,
                "base_kl": one.get("base_kl"),
                "holds_base_kl": one.get("holds_base_kl", False),
            }
        )
    metric = options.metric or told[0].get("metric") or tradeoff.headline(told[0]["difference"])
    return {
        "metric": metric,
        "pick": options.pick,
        "picked": picked.name if picked else None,
        "points": rows,
        "base_kl": _correlations(config, rows),
        "base_kl_not_held": _correlations(config, free) if 0 < len(free := _not_held(rows)) < len(rows) else {},
    }


def _not_held(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs whose loss has no `kl_base`: what a loss holds down is no measure of anything else any more."""
    return [row for row in rows if not row["holds_base_kl"]]


def _correlations(config: ConfigDict, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation of base_kl with forgetting, the change turned round: of the mean over sets, and of each set."""
    known = [row for row in rows if row["base_kl"] is not None and math.isfinite(row["base_kl"]) and row["retention"]]
    if len(known) < _FEWEST:
        return {}
    e, kl = config.eval, [row["base_kl"] for row in known]
    found = {}
    for name in ("retention", *known[0]["changes"]):
        forgotten = [-(row["retention"] if name == "retention" else row["changes"][name])["value"] for row in known]
        found[name] = tradeoff.rank_correlation(kl, forgotten, e.bootstrap_samples, e.confidence, config.train.seed)
    return found


def show(config: ConfigDict, workdir: Path, found: Mapping[str, Any]) -> None:
    """Prints the table, and writes it as `frontier.csv` with `frontier.png` and `base_kl.png` beside it."""
    rows = sorted(found["points"], key=lambda row: -row["gain"]["value"])
    sets = list(rows[0]["changes"])

    def estimate(told: Mapping[str, float] | None) -> str:
        return tradeoff.shown(Estimate(**told) if told else None)

    header = ["run", f"gain in {found['metric']}", *sets, "retention", "base_kl", "broken", ""]
    table = [
        [
            row["name"],
            estimate(row["gain"]),
            *(estimate(row["changes"].get(name)) for name in sets),
            estimate(row["retention"]),
            row["base_kl"],
            ", ".join(row["broken"]) or None,
            "picked" if row["name"] == found["picked"] else "dominated" if row["dominated"] else "",
        ]
        for row in rows
    ]
    print(tradeoff.columns(header, table))
    print("sets and retention: change relative to the base, below 0 is forgotten; retention is the mean over sets")
    for which, runs in (("base_kl", "runs"), ("base_kl_not_held", "runs without kl_base in the loss")):
        for name, told in found[which].items():
            print(
                f"base_kl against forgetting ({name}): Spearman {told['value']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}], "
                f"p = {told['p']:.2g} over {told['points']} {runs}"
            )
    _csv(workdir / "frontier.csv", rows, sets)
    _draw(workdir, found, rows, sets)


def _csv(path: Path, rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> None:
    header = ["run", "method", "strength"]
    header += [f"{name}_{end}" for name in ("gain", "retention", *sets) for end in ("value", "low", "high")]
    lines = []
    for row in rows:
        estimates = [row["gain"], row["retention"] or {}, *(row["changes"].get(name, {}) for name in sets)]
        values = [told.get(end) for told in estimates for end in ("value", "low", "high")]
        lines.append(
            [
                row["name"],
                row["method"],
                row["strength"],
                *values,
                row["base_kl"],
                " ".join(row["broken"]),
                row["dominated"],
            ]
        )
    buffer = io.StringIO()
    csv.writer(buffer).writerows([[*header, "base_kl", "broken", "dominated"], *lines])
    write_whole(path, buffer.getvalue())


def _draw(workdir: Path, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> None:
    def span(told: Mapping[str, float] | None) -> tuple[float, float, float]:
        return (told["value"], told["low"], told["high"]) if told else (0.0, 0.0, 0.0)

    def cloud(title: str, label: str, of: Any) -> pictures.Cloud:
        dots = [
            pictures.Dot(
                span(of(row)), span(row["gain"]), row["method"], f"{row['strength']:g}" if isinstance(row["strength"], float) else str(row["strength"]),
                row["dominated"], row["name"] == found["picked"],
            )
            for row in rows
        ]  # fmt: skip
        return pictures.Cloud(title, label, f"gain in {found['metric']}", dots)

    panels = [cloud("All protected sets", "retention: mean relative change", lambda row: row["retention"])]
    for name in sets:
        panels.append(cloud(name, "relative change", lambda row, name=name: row["changes"].get(name)))
    pictures.clouds(workdir / "frontier.png", panels)
    known = [row for row in rows if row["base_kl"] is not None and row["retention"]]
    if known:
        panels = []
        for name in ("retention", *sets):
            dots = [
                pictures.Dot((row["base_kl"],) * 3, span(row["retention"] if name == "retention" else row["changes"].get(name)),
                             row["method"], faded=row["holds_base_kl"], marked=row["name"] == found["picked"])
                for row in known
            ]  # fmt: skip
            told = (found["base_kl_not_held"] or found["base_kl"]).get(name)
            title = ("all protected sets" if name == "retention" else name) + (
                f": Spearman {told['value']:+.2f}" if told else ""
            )
            panels.append(pictures.Cloud(title, "base_kl, nats per token", "relative change", dots))
        pictures.clouds(workdir / "base_kl.png", panels)
