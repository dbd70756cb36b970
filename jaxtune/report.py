"""One page per run: `write` turns facts and metrics.jsonl into report.json and a self-contained report.html."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

_SHARES = {
    "accuracy": "Accuracy", "macro_f1": "Macro-F1", "exact_match": "Exact match", "label_macro_f1": "Macro-F1 of labels",
    "label_micro_f1": "Micro-F1 of labels", "subset_accuracy": "All labels right", "entity_micro_f1": "Micro-F1 of entities",
    "entity_macro_f1": "Macro-F1 of entities", "tag_accuracy": "Words tagged right", "masked_accuracy": "Masked words guessed",
    "recall_at_1": "Recall@1", "recall_at_5": "Recall@5",
}  # fmt: skip
_NAMES = _SHARES | {
    "label_nll": "Label NLL (nats)", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte", "rmse": "RMSE", "mrr_at_10": "MRR@10",
}  # fmt: skip

# Plots are drawn in colours that stand for these CSS variables, so that one SVG follows light and dark.
_INK, _MUTED, _LINE, _BEFORE, _AFTER = (f"#0a0b0{i}" for i in range(1, 6))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _BEFORE: "before", _AFTER: "after"}
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "text.parse_math": False,
    "axes.edgecolor": _LINE, "axes.labelcolor": _MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlecolor": _INK, "text.color": _INK,
    "xtick.color": _LINE, "ytick.color": _LINE, "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": _LINE, "grid.linewidth": 0.6, "axes.linewidth": 0.8,
    "lines.solid_capstyle": "round", "lines.linewidth": 1.8,
}  # fmt: skip


def write(workdir: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Writes report.json and report.html into `workdir`; curves come from its metrics.jsonl.

    Args:
      workdir: folder of the run.
      facts: any of the following; a part that is missing is left out of the page. An estimate is a dictionary or
        named tuple with `value, low, high`.
        `name` of the run; `headline`, one sentence (made from `difference` if missing); `about`: {what: text};
        `notices`: texts; `metric`, the one that the headline names (the first if missing);
        `before`, `after`: {metric: estimate}; `difference`: {metric: estimate with p, test, higher_is_better};
        `beside`: {whose: {metrics, difference of after}}, of others on the same rows;
        `confusion`: {labels, before, after}, counts with answers down; `examples`: rows with `prompt, answer, before,
        after`; `train`: {steps, trained_tokens, tokens_per_second, seconds, peak_memory_bytes}; `data`: {count: number,
        dropped: {reason: rows}}, where names that end in `_share` are shown as percent; `seconds`: {part: seconds};
        `how_to`: (title, code) pairs; `config`: the resolved config.
    """
    folder = Path(workdir)
    plain = _plain(facts)
    keys: dict[str, Any] = {"before": {}, "after": {}, "difference": {}, "train": {}, "data": {}}
    _replace(folder / "report.json", json.dumps(keys | plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    template = resources.files("jaxtune").joinpath("report_template.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    _replace(folder / "report.html", environment.from_string(template).render(_page(plain, folder / "metrics.jsonl")))


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
        "notices": facts.get("notices", []),
        "results": _results(facts),
        "beside": [
            (name, _results({"before": other["metrics"], "after": sides["after"], "difference": other["difference"]}))
            for name, other in facts.get("beside", {}).items()
        ],
        "has_plots": has_plots,
        "result_plots": _result_plots(facts) if has_plots else [],
        "training_plots": _training_plots(_read(metrics_path)) if has_plots else [],
        "confusions": [] if has_plots else _confusion_tables(facts),
        "examples": facts.get("examples", []),
        "training": _training(facts.get("train", {})),
        "data": [(_words(key), f"{v:.1%}" if key.endswith("_share") else _number(v)) for key, v in data.items()],
        "dropped": [(reason, _number(num)) for reason, num in dropped.items()],
        "seconds": _seconds(facts.get("seconds", {})),
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


def _training(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    forms = {
        "steps": ("Steps", _number),
        "trained_tokens": ("Trained tokens", _number),
        "tokens_per_second": ("Tokens per second", _number),
        "seconds": ("Time", _duration),
        "peak_memory_bytes": ("Peak memory", _size),
    }
    return [(name, form(train[key])) for key, (name, form) in forms.items() if train.get(key) is not None]


def _seconds(parts: Mapping[str, float]) -> list[tuple[str, str, float]]:
    most = max(parts.values(), default=0) or 1
    return [(_words(part), _duration(seconds), round(100 * seconds / most, 1)) for part, seconds in parts.items()]


def _confusion_tables(facts: Mapping[str, Any]) -> list[tuple[str, list[str], list[tuple[str, list[int]]]]]:
    """Returns (title, labels, rows) of each side, for the page without plots."""
    confusion = facts.get("confusion") or {}
    labels = confusion.get("labels", [])
    sides = [side for side in ("before", "after") if confusion.get(side)]
    return [(side.title(), labels, list(zip(labels, confusion[side], strict=True))) for side in sides]


# Plots


def _training_plots(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    plots = []
    steps, losses = _series(lines, "loss")
    eval_steps, eval_losses = _series(lines, "eval/loss")
    if len(steps) or len(eval_steps):
        figure, (axes,) = _figure(8, 3)
        if len(steps):
            axes.plot(steps, losses, color=_BEFORE, linewidth=0.7, alpha=0.45)
            axes.plot(steps, _smooth(losses), color=_BEFORE, label="training, smoothed", marker=_dot(steps))
        if len(eval_steps):
            axes.plot(eval_steps, eval_losses, color=_AFTER, marker="o", markersize=4, label="validation")
        if len(losses) > 10:  # the first steps' heights would flatten all the rest
            axes.set_ylim(top=max([*np.quantile(losses, [0.99]), *eval_losses]) * 1.08)
        axes.legend(loc="upper right", frameon=False, labelcolor=_INK, fontsize=9)
        axes.set_xlabel("step")
        final = "; ".join(
            f"{n} ends at {v[-1]:.4g}" for n, v in (("training", losses), ("validation", eval_losses)) if len(v)
        )
        plots.append(_svg(figure, "Loss", f"Loss over steps: {final}", wide=True))
    for key, title in (("learning_rate", "Learning rate"), ("tokens_per_second", "Tokens per second")):
        steps, values = _series(lines, key)
        if len(steps):
            figure, (axes,) = _figure(4.2, 2.1)
            axes.plot(steps, values, color=_BEFORE, linewidth=1.4, marker=_dot(steps))
            axes.set_ylim(bottom=0)
            if key == "tokens_per_second":
                axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("step")
            plots.append(_svg(figure, title, f"{title} over steps, from {min(values):.3g} to {max(values):.3g}"))
    return plots


def _result_plots(facts: Mapping[str, Any]) -> list[Markup]:
    sides = {side: facts.get(side, {}) for side in ("before", "after")}
    metrics = list(dict.fromkeys([*sides["before"], *sides["after"]]))
    plots = []
    if metrics:
        figure, all_axes = _figure(8, 0.3 + 0.72 * len(metrics), rows=len(metrics))
        for axes, metric in zip(all_axes, metrics, strict=True):
            shown = [side for side in ("after", "before") if metric in sides[side]]
            for y, side in enumerate(shown):
                e, color = sides[side][metric], _AFTER if side == "after" else _BEFORE
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
        plots.append(_svg(figure, "Metrics with intervals", text, wide=True))
    confusion = facts.get("confusion") or {}
    for side in ("before", "after"):
        if confusion.get(side):
            plots.append(_heat_map(np.asarray(confusion[side]), confusion["labels"], side))
    return plots


def _heat_map(counts_CC: np.ndarray, labels: Sequence[str], side: str) -> Markup:
    """Draws a confusion matrix; a cell is as dark as its share of its row, so that rare answers show too."""
    num = len(labels)
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    size = min(6.0, max(4.2, 0.5 * num + 1.2))
    figure, (axes,) = _figure(size, size * 0.85)
    for i, j in np.ndindex(num, num):
        shade = 0.04 + 0.56 * share_CC[i, j]  # never so dark that the count on it is hard to read
        axes.add_patch(_rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=_AFTER, edgecolor="none", alpha=shade))
        if num <= 12:
            weight = "bold" if i == j else "normal"
            axes.text(j, i, f"{counts_CC[i, j]:,}", ha="center", va="center", color=_INK, fontweight=weight)
    names = [label if len(label) <= 16 else f"{label[:8]}…{label[-7:]}" for label in map(str, labels)]
    turn: dict[str, Any] = {"rotation": 90} if num > 8 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    turn = turn if max(map(len, names)) * num > 30 else {}
    axes.set(xlim=(-0.5, num - 0.5), ylim=(num - 0.5, -0.5), aspect="equal", xlabel="prediction", ylabel="answer")
    axes.set_xticks(range(num), names, **turn)
    axes.set_yticks(range(num), names)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    right = f"{np.trace(counts_CC):,} of {counts_CC.sum():,} right"
    return _svg(
        figure, f"Confusion {side}: {right}", f"Confusion matrix {side}, answers down, predictions across: {right}"
    )


def _figure(width_inches: float, height_inches: float, rows: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no state that outlives the page

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="none")
        all_axes = list(figure.subplots(rows, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.set_facecolor("none")
    return figure, all_axes


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)


def _svg(figure: Any, title: str, text: str, wide: bool = False) -> Markup:
    """Returns an HTML figure with the plot inline: text as text, colours as CSS variables, ids its own."""
    import matplotlib

    key = re.sub(r"\W+", "-", title.lower())
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's fonts draw it; ours only measures it
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font: (?:(bold|700) )?([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", svg)
    head, body = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 :]
    view_box = re.search(r'viewBox="([^"]*)"', head)
    assert view_box, head
    return Markup(
        '<figure class="{}"><figcaption>{}</figcaption><svg viewBox="{}" role="img" aria-labelledby="{key}-title">'
        '<title id="{key}-title">{}</title>{}</figure>\n'
    ).format("wide" if wide else "", title, view_box[1], text, Markup(body), key=key)


# Numbers


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Returns the centred mean over about a twentieth of the points, so that the curve does not lag."""
    num, half = len(values), len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    start, stop = np.maximum(np.arange(num) - half, 0), np.minimum(np.arange(num) + half + 1, num)
    return (total[stop] - total[start]) / (stop - start)


def _dot(points: Sequence[float]) -> str | None:
    return "o" if len(points) == 1 else None  # one point makes no line


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
