"""One page per run: `write` turns facts and metrics.jsonl into report.json and a self-contained report.html."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from jaxtune import report_plots
from jaxtune.data import privacy

_SHARES = {
    "accuracy": "Accuracy", "macro_f1": "Macro-F1", "exact_match": "Exact match", "label_macro_f1": "Macro-F1 of labels",
    "label_micro_f1": "Micro-F1 of labels", "subset_accuracy": "All labels right", "entity_micro_f1": "Micro-F1 of entities",
    "entity_macro_f1": "Macro-F1 of entities", "tag_accuracy": "Words tagged right", "masked_accuracy": "Masked words guessed",
    "recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "pass_rate": "Pass rate",
}  # fmt: skip
_NAMES = _SHARES | {
    "label_nll": "Label NLL (nats)", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte", "rmse": "RMSE", "mrr_at_10": "MRR@10",
}  # fmt: skip


def write(workdir: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Writes report.json and report.html into `workdir`; curves come from its metrics.jsonl.

    Args:
      workdir: folder of the run.
      facts: any of the following; a part that is missing is left out of the page. An estimate is a dictionary or
        named tuple with `value, low, high`.
        `name` of the run; `headline`, one sentence (made from `difference` if missing); `about`: {what: text};
        `alerts`, `notices`: texts, the first in red; `protected`: {set: {metric, higher_is_better, tolerance, before, after,
        difference, broken}}, each of the last but one as below, and `base_kl` in nats per token; `metric`, the one that the headline names (the first if missing);
        `before`, `after`: {metric: estimate}; `difference`: {metric: estimate with p, test, higher_is_better};
        `beside`: {whose: {metrics, difference of after}}, of others on the same rows;
        `confusion`: {labels, before, after}, counts with answers down; `examples`: rows with `prompt, answer, before,
        after`; `train`: {steps, trained_tokens, tokens_per_second, mfu, seconds, peak_memory_bytes}; `data`: {count: number,
        dropped: {reason: rows}}, where names that end in `_share` are shown as percent; `seconds`: {part: seconds};
        `start`: {seconds: {part: seconds to the first step}, compile_seconds, compile_overlapped_seconds, from_cache};
        `wall`: {cause: seconds of the process}, "training" the productive ones; shown in place of `seconds`;
        `rounds`: {table: {column: cells}, names, estimates, control, metric, beside} of rounds, the metric's estimates by name, and
        the control's or None; `tables`: [{title, header, rows, plots}], cells in words, plots as `report_plots` draws them; `how_to`: (title, code) pairs; `config`: the resolved config.
    """
    folder = Path(workdir)
    plain = _plain(facts)
    if "config" in plain:
        plain["config"] = privacy.without_names(plain["config"])
    keys: dict[str, Any] = {"before": {}, "after": {}, "difference": {}, "train": {}, "data": {}}
    told = keys | {name: fact for name, fact in plain.items() if name != "tables"}  # which are the page's alone
    _replace(folder / "report.json", json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    template = resources.files("jaxtune").joinpath("report_template.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    _replace(folder / "report.html", environment.from_string(template).render(_page(plain, folder / "metrics.jsonl")))


def in_words(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page says of results, every number in words: headline, confidence, results, protected, training; and `plain` facts."""
    plain = _plain(facts)
    whole = {"train": {}, **plain} | {key: _known(plain.get(key, {})) for key in ("before", "after", "difference")}
    return {
        "plain": plain,
        "headline": plain.get("headline") or _headline(whole),
        "confidence": _confidence(whole),
        "results": _results(whole),
        "protected": [_protected(name, one) for name, one in whole.get("protected", {}).items()],
        "training": _training(whole["train"]),
    }


def _page(facts: dict[str, Any], metrics_path: Path) -> dict[str, Any]:
    """Returns the template's variables, every number already in words."""
    sides = {key: _known(facts.get(key, {})) for key in ("before", "after", "difference")}
    facts = facts | sides
    has_plots = importlib.util.find_spec("matplotlib") is not None
    data = dict(facts.get("data", {}))
    dropped = data.pop("dropped", {})
    return {
        "name": facts.get("name", "run"),
        "headline": facts.get("headline") or _headline(facts),
        "about": facts.get("about", {}),
        "confidence": _confidence(facts),
        "alerts": facts.get("alerts", []),
        "notices": facts.get("notices", []),
        "protected": [_protected(name, one) for name, one in facts.get("protected", {}).items()],
        "base_kl": f"{facts['base_kl']:.3g}" if facts.get("base_kl") is not None else "",
        "retention_plots": report_plots.retention(_read(metrics_path), facts.get("protected", {}), _name)
        if has_plots
        else [],
        "results": _results(facts),
        "beside": [
            (name, _results({"before": other["metrics"], "after": sides["after"], "difference": other["difference"]}))
            for name, other in facts.get("beside", {}).items()
        ],
        "has_plots": has_plots,
        "result_plots": _result_plots(facts) if has_plots else [],
        "training_plots": report_plots.training(_read(metrics_path)) if has_plots else [],
        "confusions": [] if has_plots else _confusion_tables(facts),
        "examples": facts.get("examples", []),
        "training": _training(facts.get("train", {})),
        "data": [(_words(key), f"{v:.1%}" if key.endswith("_share") else _number(v)) for key, v in data.items()],
        "dropped": [(reason, _number(num)) for reason, num in dropped.items()],
        "seconds": [] if "wall" in facts else _seconds(facts.get("seconds", {})),
        "start": _start(facts.get("start")),
        "wall": _wall(facts.get("wall", {})),
        "goodput": _goodput(facts.get("wall", {})),
        "rounds": _rounds(facts.get("rounds")),
        "round_plots": _round_plots(facts["rounds"]) if has_plots and "rounds" in facts else [],
        "tables": facts.get("tables", []),
        "how_to": facts.get("how_to", []),
        "config": json.dumps(facts["config"], indent=2, ensure_ascii=False) if "config" in facts else "",
    }


def _headline(facts: Mapping[str, Any]) -> str:
    differences = facts["difference"]
    compared = [metric for metric in differences if metric in facts["before"] and metric in facts["after"]]
    measured = compared or [*facts["after"], *facts["before"]]
    if not measured:
        return ""
    metric = facts["metric"] if facts.get("metric") in measured else measured[0]
    if not compared:
        alone = facts["after"].get(metric) or facts["before"][metric]
        low, high = _value(metric, alone["low"]), _value(metric, alone["high"])
        return f"{_name(metric)} is {_value(metric, alone['value'])} ({_confidence(facts)}interval {low} to {high})."
    gap = differences[metric]
    before, after = (_value(metric, facts[side][metric]["value"]) for side in ("before", "after"))
    if gap["low"] <= 0 <= gap["high"]:
        return f"{_name(metric)} went from {before} to {after}: a change this size may be chance ({_p(gap)})."
    verb = "improved" if (gap["value"] > 0) == gap["higher_is_better"] else "got worse"
    unit = " points" if metric in _SHARES else ""
    change = f"{_signed(metric, gap['value'])}{unit}, {_confidence(facts)}interval {_range(metric, gap)}"
    return f"{_name(metric)} {verb} from {before} to {after} ({change}; {_p(gap)})."


def _results(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    sides = {side: facts.get(side, {}) for side in ("before", "after")}
    rows = []
    for metric in dict.fromkeys([*sides["before"], *sides["after"]]):
        row: dict[str, Any] = {"name": _name(metric), "difference": None}
        for side, estimates in sides.items():
            e = estimates.get(metric)
            row[side] = e and (_value(metric, e["value"]), f"{_value(metric, e['low'])} to {_value(metric, e['high'])}")
        if gap := facts.get("difference", {}).get(metric):
            better = (gap["value"] > 0) == gap["higher_is_better"]
            unsure = gap["low"] <= 0 <= gap["high"]
            row["difference"] = (_signed(metric, gap["value"]), _range(metric, gap))
            row["verdict"] = "unsure" if unsure else "better" if better else "worse"
            row["p"], row["test"] = _p(gap), gap["test"]
        rows.append(row)
    return rows


def _protected(name: str, one: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of protected sets, by the metric that each is judged by."""
    metric, gap = one["metric"], one["difference"][one["metric"]]
    sides = {side: {metric: one[side][metric]} for side in ("before", "after")}
    known = {side: _known(estimates) for side, estimates in sides.items()} | {"difference": _known({metric: gap})}
    row = (_results(known) or [{"before": None, "after": None, "difference": None}])[0]
    tolerance = f"{100 * one['tolerance']:.3g}" if metric in _SHARES else f"{one['tolerance']:.3g}"
    return row | {"name": name, "metric": _name(metric), "tolerance": tolerance, "broken": one["broken"]}


def _training(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    forms = {
        "steps": ("Steps", _number),
        "trained_tokens": ("Trained tokens", _number),
        "tokens_per_second": ("Tokens per second", _number),
        "seconds": ("Time", _duration),
        "mfu": ("Model FLOPs utilisation", "{:.1%}".format),
        "peak_memory_bytes": ("Peak memory", _size),
    }
    return [(name, form(train[key])) for key, (name, form) in forms.items() if train.get(key) is not None]


def _seconds(parts: Mapping[str, float]) -> list[tuple[str, str, float]]:
    most = max(parts.values(), default=0) or 1
    return [(_words(part), _duration(seconds), round(100 * seconds / most, 1)) for part, seconds in parts.items()]


def _start(start: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows on the time to the first step: what passed on the clock, then what went on beside it."""
    if not start:
        return []
    parts = {part: took for part, took in start["seconds"].items() if took >= 0.005}
    rows = [(_CAUSES.get(part, _words(part)), _duration(took)) for part, took in parts.items()]
    cached = ", from the cache" if start["from_cache"] else ""
    compiling = (
        f"{_duration(start['compile_seconds'])}, {_duration(start['compile_overlapped_seconds'])} of it meanwhile"
    )
    whole = sum(start["seconds"].values())
    return [*rows, ("To the end of the first step", _duration(whole)), (f"The step compiled{cached}, in", compiling)]


_CAUSES = {
    "training": "Training, steps that counted", "data": "Waiting for data", "bookkeeping": "Metrics, while no step ran",
    "checkpoint": "Checkpoints", "redone": "Steps taken again after a resume", "skipped": "Skipped steps",
    "start": "Python and JAX", "compile": "Waiting for the compiler", "load": "Loading weights", "program": "Laying out the program",
}  # fmt: skip


def _wall(wall: Mapping[str, float]) -> list[tuple[str, str, str, float]]:
    """Rows of (cause, time, share in words, share in percent); they add up to the wall time."""
    whole = sum(wall.values()) or 1.0
    rows = [(_CAUSES.get(cause, _words(cause)), took) for cause, took in wall.items()]
    return [(name, _duration(took), f"{took / whole:.1%}", round(100 * took / whole, 2)) for name, took in rows]


def _rounds(rounds: Mapping[str, Any] | None) -> tuple[list[str], list[list[str]]] | None:
    """The header and the rows of the table of rounds."""
    if rounds is None:
        return None
    cells = [[_number(cell) for cell in column] for column in rounds["table"].values()]
    return list(rounds["table"]), [list(row) for row in zip(*cells, strict=True)]


def _round_plots(rounds: Mapping[str, Any]) -> list[Markup]:
    """What rounds reached, and what they cost."""
    reached = {**rounds, "title": _name(rounds["metric"])}
    return [
        report_plots.rounds(one["names"], one["estimates"], one["control"], one["title"])
        for one in (reached, *rounds.get("beside", ()))
    ]


def _goodput(wall: Mapping[str, float]) -> str:
    whole = sum(wall.values())
    return f"Goodput {wall.get('training', 0) / whole:.1%} of {_duration(whole)}" if whole else ""


def _confusion_tables(facts: Mapping[str, Any]) -> list[tuple[str, list[str], list[tuple[str, list[int]]]]]:
    """Returns (title, labels, rows) of each side, for the page without plots."""
    confusion = facts.get("confusion") or {}
    labels = confusion.get("labels", [])
    sides = [side for side in ("before", "after") if confusion.get(side)]
    return [(side.title(), labels, list(zip(labels, confusion[side], strict=True))) for side in sides]


# Plots


def _result_plots(facts: Mapping[str, Any]) -> list[Markup]:
    sides = {side: facts.get(side, {}) for side in ("before", "after")}
    metrics = list(dict.fromkeys([*sides["before"], *sides["after"]]))
    plots = []
    if metrics:
        figure, all_axes = report_plots.figure(8, 0.3 + 0.72 * len(metrics), rows=len(metrics))
        for axes, metric in zip(all_axes, metrics, strict=True):
            shown = [side for side in ("after", "before") if metric in sides[side]]
            for y, side in enumerate(shown):
                e, color = sides[side][metric], report_plots.AFTER if side == "after" else report_plots.BEFORE
                axes.plot([e["low"], e["high"]], [y, y], color=color, linewidth=2.2)
                axes.plot([e["value"]], [y], "o", color=color, markersize=6.5)
            axes.set_ylim(-0.7, len(shown) - 0.3)
            axes.set_yticks(range(len(shown)), shown)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(_name(metric), loc="left", fontsize=9, fontweight="bold", pad=2)
            if metric in _SHARES:
                axes.set_xlim(0, 1.01)
                axes.set_xticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
        text = "; ".join(
            f"{row['name']} " + ", ".join(f"{s} {row[s][0]}" for s in sides if row[s]) for row in _results(facts)
        )
        plots.append(report_plots.svg(figure, "Metrics with intervals", text, wide=True))
    confusion = facts.get("confusion") or {}
    for side in ("before", "after"):
        if confusion.get(side):
            plots.append(report_plots.heat_map(np.asarray(confusion[side]), confusion["labels"], side))
    return plots


# Numbers


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]


def _name(metric: str) -> str:
    return _NAMES.get(metric, _words(metric))


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _known(estimates: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the estimates whose three numbers are all finite: a diverged model must not cost the run its page."""
    return {metric: e for metric, e in estimates.items() if None not in (e["value"], e["low"], e["high"])}


def _value(metric: str, value: float) -> str:
    return f"{100 * value:.1f}%" if metric in _SHARES else f"{value:.4g}"


def _signed(metric: str, value: float) -> str:
    text = f"{100 * value:+.1f}" if metric in _SHARES else f"{value:+.3g}"
    return text.replace("-", "−")


def _range(metric: str, gap: Mapping[str, Any]) -> str:
    return f"{_signed(metric, gap['low'])} to {_signed(metric, gap['high'])}"


def _confidence(facts: Mapping[str, Any]) -> str:
    confidence = facts.get("config", {}).get("eval", {}).get("confidence")
    return f"{confidence:.0%} " if confidence else ""


def _p(gap: Mapping[str, Any]) -> str:
    return "p < 0.0001" if gap["p"] < 1e-4 else f"p = {gap['p']:.2g}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{int(hours)} h {round(minutes) % 60:02} min" if hours >= 1 else f"{int(minutes)} min {int(seconds % 60):02} s"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _plain(value: Any) -> Any:
    """Returns the value in JSON's types; a number that is not finite becomes null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
