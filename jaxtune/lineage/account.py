"""The account of an update: what the candidate scores beside the released model, the stage matrix, drift; page and terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune import report, report_plots, tracking
from jaxtune.config import ConfigDict
from jaxtune.evals.protected import Verdict
from jaxtune.lineage import drift as drift_lib
from jaxtune.lineage import gate
from jaxtune.lineage import matrix as matrix_lib
from jaxtune.lineage.comparing import Drift
from jaxtune.lineage.ledger import Line
from jaxtune.lineage.matrix import Matrix

_TRANSFER = {
    "forgetting": "Forgetting F", "backward_transfer": "Backward transfer BWT", "forward_transfer": "Forward transfer FWT",
}  # fmt: skip


def score(verdict: Verdict) -> dict[str, Any]:
    """What the ledger keeps of a set: the candidate's score, and how much worse it is than the released model's."""
    return {
        "metric": verdict.metric, "higher_is_better": verdict.higher_is_better, **verdict.after._asdict(),
        "released": verdict.before._asdict(), "worsening": verdict.worsening._asdict(), "margin": verdict.tolerance,
    }  # fmt: skip


def write(
    config: ConfigDict, attempt: Path, lines: Sequence[Line], matrix: Matrix, drift: Drift, verdicts: dict[str, Verdict]
) -> None:
    """Writes report.html and report.json into the attempt's folder, and prints the tables."""
    line, transfer = lines[-1], matrix_lib.transfer(matrix)
    held = _held_to(verdicts, config.lineage.decide)
    tables = [("Held to the released model", *held), ("Stage matrix", *matrix_lib.table(matrix))]
    if transfer:
        rows = [[_TRANSFER[name], f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"] for name, e in transfer.items()]
        tables.append(("Across stages", ["Figure", "Value"], rows))
    if drift.shifts:
        tables.append(("New data beside old", *drift_lib.table(drift.shifts, config.lineage.drift_alpha)))
        unlike = [[row["row_id"], f"{row['likeness']:.3f}", row["prompt"][:200]] for row in drift.unlike[:8]]
        tables.append(("New rows most unlike the old", ["Row", "Likeness", "Prompt"], unlike))
    print(
        "\n\n".join(
            f"{title}\n{_text(header, rows)}"
            for title, header, rows in tables
            if title != "New rows most unlike the old"
        )
    )
    facts = {
        "name": f"{config.name}: update of {Path(config.lineage.folder).name}",
        "headline": _headline(line),
        "about": _about(line, attempt),
        "notices": line["notes"] + [f"Drift: {name} has shifted ({s.told or 'embeddings'})." for name, s in drift.shifts.items() if s.p_holm < config.lineage.drift_alpha],
        "tables": [{"title": title, "header": header, "rows": rows, "plots": _plots(title, matrix)} for title, header, rows in tables],
        "matrix": {"models": matrix.models, "stages": [one.name for one in matrix.stages], "values": matrix.values},
        "transfer": transfer,
        "ledger": line,
        "config": config.to_dict(),
    }  # fmt: skip
    with tracking.writing(attempt / "report.html"):
        report.write(attempt, facts)
    print(f"\nreport in {attempt / 'report.html'}, ledger in {Path(config.lineage.folder) / 'ledger.md'}")


def _headline(line: Line) -> str:
    if line["verdict"] == "released":
        return f"Release {line['release']}: no worse than release {line['parent']} on any set, within its margin."
    if line["verdict"] == "forced":
        return f"Release {line['release']} was forced: {line['reason']}."
    return f"Refused, release {line['parent']} stays: {line['reason']}."


def _about(line: Line, attempt: Path) -> dict[str, str]:
    files = line["data"]["files"].values()
    replay = line["replay"]
    return {
        "Parent": f"release {line['parent']}",
        "Data": "; ".join(f"{one['uri']}, {one['rows']:,} rows, SHA-256 {one['sha256'][:12]}…" for one in files),
        "Replay": f"{replay['share']:.0%} of each batch, from {', '.join(replay['stages'])}" if replay else "none",
        "Weights": line["weights"],
    }


def _held_to(verdicts: dict[str, Verdict], decide: str) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, v in verdicts.items():
        w = v.worsening
        passed = "within" if gate.passes(v, decide) else "NOT within"
        cells = [f"{v.before.value:.4g}", f"{v.after.value:.4g}", f"{w.value:+.4f} [{w.low:+.4f}, {w.high:+.4f}]"]
        rows.append([name, v.metric, *cells, f"{v.tolerance:g}", passed])
    return ["Set", "Metric", "Released", "Candidate", "Worse by", "Margin", "Verdict"], rows


def _plots(title: str, matrix: Matrix) -> list[Any]:
    if title != "Stage matrix" or importlib.util.find_spec("matplotlib") is None:
        return []
    higher = [one.higher_is_better for one in matrix.stages]
    return [report_plots.stages(matrix.values, matrix.models, [one.name for one in matrix.stages], higher)]


def _text(header: list[str], table: list[list[Any]]) -> str:
    """Columns, aligned."""
    lines = [header, *([str(cell) for cell in row] for row in table)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
