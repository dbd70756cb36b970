"""The account of a round: what was asked, who agreed with whom, what became of it, what was learned and what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from jaxtune import report, tracking
from jaxtune.config import ConfigDict
from jaxtune.data import privacy
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance.folder import Round
from jaxtune.guidance.measuring import HELD_OUT, Measured
from jaxtune.lineage import account as lineage_account
from jaxtune.review import insight, insight_page, rounds, store
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task

Tasks = Mapping[str, Task]
_KINDS = {
    "sft": "answers to learn (sft)", "texts": "texts to learn (texts)", "pairs": "better and worse answers (pairs)",
    "kto": "judged answers (kto)", "rewards": "rated answers (rewards)", "train": "rows of the run (train)",
}  # fmt: skip
_PAIRS = "(down)"  # in the titles of tables of two raters: many, and for the page of its own


def people(engine: Engine) -> dict[str, str]:
    """Names by id, in the order in which the accounts were made."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(store.people.c.id, store.people.c.name).order_by(store.people.c.at))
        return {str(one): str(name) for one, name in rows}


def shown_names(config: ConfigDict, engine: Engine) -> dict[str, str]:
    """How people are called by id: by their names where `guide.show_names`, else "expert 1", "expert 2", …"""
    names = people(engine)
    return names if config.guide.show_names else folder_lib.pseudonyms(list(names))


def moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")


def counted(rows: Mapping[str, int]) -> str:
    """Numbers of rows by file, in words."""
    return ", ".join(f"{num} {name.removesuffix('.jsonl')}" for name, num in rows.items() if num) or "no rows"


def missing(found: Mapping[str, tuple[int, int]]) -> str:
    """What is answered of what, in words."""
    return ", ".join(f"{name} {there} of {wanted} answers" for name, (there, wanted) in found.items())


def scores(measured: Measured | None) -> dict[str, Any]:
    """What the ledger keeps of each set."""
    return {} if measured is None else {name: lineage_account.score(one) for name, one in measured.verdicts.items()}


def seconds(one: Round, told: Mapping[str, Any]) -> dict[str, float]:
    """What the round took: of people, and of the machine."""
    run = folder_lib.read_json(one.folder / "train" / "report.json")
    return {"people": told["seconds"], "sampling": told["sampled"]["seconds"], "training": run["train"]["seconds"]}


def write(
    config: ConfigDict, one: Round, engine: Engine, tasks: Tasks, measured: Measured | None, compared: Mapping[str, Any] | None
) -> str:  # fmt: skip
    """Writes report.html and report.json into the round's folder; returns what the terminal says."""
    line = one.line("round")
    assert line is not None
    figures, agreed = _insight(config, one, engine, tasks)
    tables = [
        _became(line),
        _left_out(line),
        *_compared(compared),
        *agreed,
        _cost(line, compared),
    ]
    before, after, difference = {}, {}, {}
    if measured is not None:
        before, after = measured.before[HELD_OUT].metrics, measured.after[HELD_OUT].metrics
        difference = measured.verdicts[HELD_OUT].gaps
    else:
        run = folder_lib.read_json(one.folder / "train" / "report.json")
        before, after, difference = run["before"], run["after"], run["difference"]
    facts: dict[str, Any] = {
        "name": f"{config.name}: round {one.number}", "about": _about(config, one, line), "notices": _notices(line, compared),
        "metric": measured.sets[0].metric if measured else None, "before": before, "after": after, "difference": difference,
        "protected": _protected(measured), "tables": tables, "ledger": line, "comparison": compared, "figures": figures,
        "config": privacy.without_names(config.to_dict()),
    }  # fmt: skip
    with tracking.writing(one.folder / "report.html"):
        report.write(one.folder, {name: fact for name, fact in facts.items() if fact is not None})
    return "\n".join(_said(one, line, measured, compared))


def _about(config: ConfigDict, one: Round, line: Mapping[str, Any]) -> dict[str, str]:
    verdicts = line["verdicts"]
    return {
        "Model": config.model.source + (f" with {config.tune.adapter}" if config.tune.adapter else ""),
        "Starts from": f"the result of round {one.parent}" if one.parent else "this model",
        "Asked": ", ".join(f"{num} items of {name}" for name, num in line["items"].items()),
        "Answered": f"{verdicts['verdicts']} verdicts of {verdicts['people']} people",
        "Objective": line["objective"],
        "Weights": line["weights"],
    }


def _notices(line: Mapping[str, Any], compared: Mapping[str, Any] | None) -> list[str]:
    found = [
        f"{num} rows of {task} were not asked about: {reason.replace('_', ' ')}."
        for task, reasons in line["not_asked"].items()
        for reason, num in reasons.items()
    ]
    if line["flagged"]:
        found.append(
            f"{line['flagged']} flags: see data/flagged.jsonl. Flagged items train nothing unless guide.keep_flagged says so."
        )
    if compared is not None and compared["unanswered"]:
        found.append(f"The comparison of old and new is not over: {compared['unanswered']} items have no answer.")
    return found


def _protected(measured: Measured | None) -> dict[str, Any]:
    from jaxtune.evals import protected

    if measured is None:
        return {}
    verdicts = {name: one for name, one in measured.verdicts.items() if name != HELD_OUT}
    return protected.account(verdicts, measured.before, measured.after)


# ---- tables ----


def _table(title: str, header: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "header": header, "rows": rows, "plots": []}


def _became(line: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [_KINDS[name.removesuffix(".jsonl")], file["rows"], f"data/{name}", f"{file['sha256'][:12]}…"]
        for name, file in line["data"].items()
        if name.removesuffix(".jsonl") in _KINDS
    ]
    return _table("What became of the verdicts", ["Rows", "Number", "File", "SHA-256"], rows)


def _left_out(line: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [task, num, rounds.REASONS[reason]]
        for task, reasons in line["left_out"].items()
        for reason, num in sorted(reasons.items(), key=lambda pair: -pair[1])
    ]
    return _table("Items left out", ["Task", "Items", "Because"], rows)


def _compared(compared: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if compared is None:
        return []
    rate, first = compared["rate"], compared["shown_first"]
    rows = [[
        compared["wins"], compared["ties"], compared["losses"], compared["unanswered"], _estimate(rate), f"{compared['p']:.2g}",
        _estimate(first["share"]) if first["decided"] else "",
    ]]  # fmt: skip
    header = ["New is better", "Ties", "Old is better", "Unanswered", "Win rate", "p", "Shown first won"]
    return [_table("Blind comparison of the new model with the old", header, rows)]


def _insight(
    config: ConfigDict, one: Round, engine: Engine, tasks: Tasks
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Who agreed with whom, as `review/insight.py` has it; all of it in a page of its own, `agreement/report.html`."""
    figures = insight.figures(engine, tasks, one.number)
    if not config.guide.show_names:
        names, shown = people(engine), shown_names(config, engine)
        figures = _renamed(figures, {name: shown[person] for person, name in names.items()} | shown)
    page = insight_page.facts(figures)
    with tracking.writing(one.folder / "agreement" / "report.html"):
        (one.folder / "agreement").mkdir(exist_ok=True)
        report.write(one.folder / "agreement", page)
    return figures, [table for table in page["tables"] if _PAIRS not in table["title"]]


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(one, names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


def _cost(line: Mapping[str, Any], compared: Mapping[str, Any] | None) -> dict[str, Any]:
    took = defaultdict(float, line["seconds"])
    trained = line["data"]["train.jsonl"]["rows"]
    rows = [
        [
            "people, for the rows",
            _duration(took["people"]),
            f"{took['people'] / trained:.1f} s for each row trained on",
        ],
        ["people, for the comparison", _duration(compared["seconds"] if compared else 0.0), ""],
        ["machine, outputs", _duration(took["sampling"]), ""],
        ["machine, training", _duration(took["training"]), ""],
    ]
    return _table("What it took", ["Of", "Time", ""], rows)


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def _estimate(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


# ---- the terminal ----


def _said(
    one: Round, line: Mapping[str, Any], measured: Measured | None, compared: Mapping[str, Any] | None
) -> list[str]:
    rows = {name: file["rows"] for name, file in line["data"].items() if name.removesuffix(".jsonl") in _KINDS}
    said = [
        f"round {one.number}: {line['verdicts']['verdicts']} verdicts of {line['verdicts']['people']} people became {counted(rows)}"
    ]
    for task, reasons in line["left_out"].items():
        said.append(f"  {task}: left out {', '.join(f'{num} {reason}' for reason, num in reasons.items())}")
    for name, verdict in measured.verdicts.items() if measured else ():
        said.append(
            f"{name}: {verdict.told()}" if name != HELD_OUT else f"{name}: {verdict.told().rsplit(', tolerance', 1)[0]}"
        )
    if compared is not None:
        said.append(
            f"new against old, blind: {compared['wins']} better, {compared['ties']} ties, {compared['losses']} worse, {compared['unanswered']} "
            f"unanswered; win rate {_estimate(compared['rate'])}, p = {compared['p']:.2g}"
        )
    said.append(
        f"result in {one.root / line['weights']}, report in {one.folder / 'report.html'}; next: guide.round={one.number + 1}"
    )
    return said
