"""The report's plots: SVG that stands in the page, in its colours, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

# Plots are drawn in colours that stand for these CSS variables, so that one SVG follows light and dark.
INK, _MUTED, _LINE, BEFORE, AFTER = (f"#0a0b0{i}" for i in range(1, 6))
_VARIABLES = {INK: "ink", _MUTED: "muted", _LINE: "line", BEFORE: "before", AFTER: "after"}
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "text.parse_math": False,
    "axes.edgecolor": _LINE, "axes.labelcolor": _MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": _LINE, "ytick.color": _LINE, "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": _LINE, "grid.linewidth": 0.6, "axes.linewidth": 0.8,
    "lines.solid_capstyle": "round", "lines.linewidth": 1.8,
}  # fmt: skip


def training(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Draws loss, learning rate and speed over the steps of a metrics.jsonl; rewards first, where there are any."""
    plots = _rewards(lines)
    steps, losses = _series(lines, "loss")
    eval_steps, eval_losses = _series(lines, "eval/loss")
    if len(steps) or len(eval_steps):
        canvas, (axes,) = figure(8, 3)
        if len(steps):
            axes.plot(steps, losses, color=BEFORE, linewidth=0.7, alpha=0.45)
            axes.plot(steps, _smooth(losses), color=BEFORE, label="training, smoothed", marker=_dot(steps))
        if len(eval_steps):
            axes.plot(eval_steps, eval_losses, color=AFTER, marker="o", markersize=4, label="validation")
        if len(losses) > 10:  # the first steps' heights would flatten all the rest
            axes.set_ylim(top=max([*np.quantile(losses, [0.99]), *eval_losses]) * 1.08)
        axes.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=9)
        axes.set_xlabel("step")
        final = "; ".join(
            f"{n} ends at {v[-1]:.4g}" for n, v in (("training", losses), ("validation", eval_losses)) if len(v)
        )
        plots.append(svg(canvas, "Loss", f"Loss over steps: {final}", wide=True))
    for key, title in (("learning_rate", "Learning rate"), ("tokens_per_second", "Tokens per second")):
        steps, values = _series(lines, key)
        if len(steps):
            canvas, (axes,) = figure(4.2, 2.1)
            axes.plot(steps, values, color=BEFORE, linewidth=1.4, marker=_dot(steps))
            axes.set_ylim(bottom=0)
            if key == "tokens_per_second":
                axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("step")
            plots.append(svg(canvas, title, f"{title} over steps, from {min(values):.3g} to {max(values):.3g}"))
    return plots


def rounds(
    names: Sequence[str], estimates: Sequence[Mapping[str, float]], control: Mapping[str, float] | None, title: str
) -> Markup:
    """Draws one metric over the rounds of a run, with its intervals, and the control's as a band."""
    canvas, (axes,) = figure(8, 2.8)
    at = range(len(names))
    if control:
        axes.axhspan(control["low"], control["high"], color=BEFORE, alpha=0.2, linewidth=0)
        axes.axhline(control["value"], color=BEFORE, linewidth=1.4, label="control on gold answers")
    values = [estimate["value"] for estimate in estimates]
    for x, estimate in zip(at, estimates, strict=True):
        axes.plot([x, x], [estimate["low"], estimate["high"]], color=AFTER, linewidth=1.2, alpha=0.6)
    axes.plot(at, values, color=AFTER, marker="o", markersize=5, label="rounds")
    axes.set_xticks(at, names)
    axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=9)
    listed = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True))
    beside = f"; control {control['value']:.4g}" if control else ""
    return svg(canvas, f"{title} by round", f"{title} by round: {listed}{beside}", wide=True)


def _rewards(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Draws the mean reward of each round and its parts, and beside it what else a round tells."""
    steps, rewards = _series(lines, "reward")
    if not steps:
        return []
    canvas, (axes,) = figure(8, 3)
    parts = sorted({key for line in lines for key in line if key.startswith("rewards/") and key != "rewards/margins"})
    for number, key in enumerate(parts if len(parts) > 1 else []):
        axes.plot(
            *_series(lines, key), color=BEFORE, linewidth=1.1, linestyle=_DASHES[number % len(_DASHES)], label=key[8:]
        )
    axes.plot(steps, rewards, color=AFTER, linewidth=0.7, alpha=0.45)
    axes.plot(steps, _smooth(rewards), color=AFTER, label="reward, smoothed", marker=_dot(steps))
    axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=9)
    axes.set_xlabel("step")
    plots = [svg(canvas, "Reward", f"Mean reward of each round, from {rewards[0]:.4g} to {rewards[-1]:.4g}", wide=True)]
    for key, title in _OF_ROUNDS.items():
        at, values = _series(lines, key)
        if at:
            canvas, (axes,) = figure(4.2, 2.1)
            axes.plot(at, values, color=BEFORE, linewidth=1.4, marker=_dot(at))
            axes.set_ylim(bottom=0)
            axes.set_xlabel("step")
            plots.append(svg(canvas, title, f"{title} over steps, from {min(values):.3g} to {max(values):.3g}"))
    return plots


def retention(
    lines: Sequence[Mapping[str, Any]], protected: Mapping[str, Mapping[str, Any]], name_of: Callable[[str], str]
) -> list[Markup]:
    """Draws what a run gained and what it cost: validation loss, the protected sets' metrics and base_kl by step, and gain
    against retention, where both were measured at one step.

    `protected` is report.json's; a set's metric may go as far as the dashed line. `name_of` says a metric in words.
    """
    rows = [("eval/loss", "Validation loss", None)] + [
        (f"protected/{name}/{one['metric']}", f"{name}: {name_of(one['metric'])}", _limit(one))
        for name, one in protected.items()
    ]
    rows = [
        row
        for row in [*rows, ("base_kl", "KL from the base (nats a token)", None)]
        if len(_series(lines, row[0])[0]) > 1
    ]
    if not protected and not any(key == "base_kl" for key, *_ in rows):
        return []
    plots = []
    if rows:
        canvas, all_axes = figure(8, 0.4 + 1.5 * len(rows), rows=len(rows))
        for axes, (key, title, limit) in zip(all_axes, rows, strict=True):
            steps, values = _series(lines, key)
            axes.plot([step + 1 for step in steps], values, color=AFTER, marker="o", markersize=4)
            if limit is not None:
                axes.axhline(limit, color=BEFORE, linewidth=1.2, linestyle="--")
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=2)
        all_axes[-1].set_xlabel("steps done")
        told = "; ".join(
            f"{title} {_series(lines, key)[1][0]:.4g} to {_series(lines, key)[1][-1]:.4g}" for key, title, _ in rows
        )
        plots.append(svg(canvas, "Gain and retention by step", told, wide=True))
    gain = dict(zip(*_series(lines, "eval/loss"), strict=True))
    for name, one in protected.items():
        at = dict(zip(*_series(lines, f"protected/{name}/{one['metric']}"), strict=True))
        both = [step for step in gain if step in at]
        if len(both) > 1:
            plots.append(
                _trade(name, name_of(one["metric"]), _limit(one), [(step, gain[step], at[step]) for step in both])
            )
    return plots


def _limit(one: Mapping[str, Any]) -> float | None:
    """How far a set's metric may go."""
    before = one["before"][one["metric"]]["value"]
    sign = -1 if one["higher_is_better"] else 1
    return None if before is None else float(before + sign * one["tolerance"])


def _trade(name: str, metric: str, limit: float | None, points: Sequence[tuple[int, float, float]]) -> Markup:
    """Draws a set's metric against validation loss, a point a step, joined in their order; loss falls to the right."""
    canvas, (axes,) = figure(4.2, 2.6)
    axes.plot([loss for _, loss, _ in points], [value for *_, value in points], color=AFTER, marker="o", markersize=4)
    for step, loss, value in points:
        axes.annotate(str(step + 1), (loss, value), xytext=(4, 4), textcoords="offset points", fontsize=7, color=_MUTED)
    if limit is not None:
        axes.axhline(limit, color=BEFORE, linewidth=1.2, linestyle="--")
    axes.invert_xaxis()
    axes.set(xlabel="validation loss", ylabel=metric)
    told = "; ".join(f"step {step + 1}: {loss:.4g}, {value:.4g}" for step, loss, value in points)
    return svg(canvas, f"Gain against retention: {name}", f"{metric} against validation loss: {told}")


_DASHES = ("--", ":", "-.")
_OF_ROUNDS = {
    "kl": "KL to the base (nats a token)", "entropy": "Entropy (nats a token)", "clip_share": "Share of tokens clipped",
    "completion_tokens": "Tokens of a completion", "zero_advantage_share": "Share of groups with one reward",
}  # fmt: skip


def heat_map(counts_CC: np.ndarray, labels: Sequence[str], side: str) -> Markup:
    """Draws a confusion matrix; a cell is as dark as its share of its row, so that rare answers show too."""
    num = len(labels)
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    size = min(6.0, max(4.2, 0.5 * num + 1.2))
    canvas, (axes,) = figure(size, size * 0.85)
    for i, j in np.ndindex(num, num):
        shade = 0.04 + 0.56 * share_CC[i, j]  # never so dark that the count on it is hard to read
        axes.add_patch(_rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=AFTER, edgecolor="none", alpha=shade))
        if num <= 12:
            weight = "bold" if i == j else "normal"
            axes.text(j, i, f"{counts_CC[i, j]:,}", ha="center", va="center", color=INK, fontweight=weight)
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
    return svg(
        canvas, f"Confusion {side}: {right}", f"Confusion matrix {side}, answers down, predictions across: {right}"
    )


def stages(values_MC: np.ndarray, models: Sequence[str], names: Sequence[str], higher: Sequence[bool]) -> Markup:
    """Draws a stage matrix: models down, stages across; a cell is as dark as it is good among those of its column; NaN is left out."""
    num_models, num_stages = values_MC.shape
    canvas, (axes,) = figure(min(8.0, 2.4 + 1.5 * num_stages), 1.0 + 0.5 * num_models)
    good_MC = np.where(higher, values_MC, -values_MC)
    for i, j in np.ndindex(num_models, num_stages):
        if np.isnan(values_MC[i, j]):
            continue
        low, high = np.nanmin(good_MC[:, j]), np.nanmax(good_MC[:, j])
        shade = 0.06 + 0.5 * ((good_MC[i, j] - low) / (high - low) if high > low else 1.0)
        axes.add_patch(_rectangle((j - 0.48, i - 0.46), 0.96, 0.92, facecolor=AFTER, edgecolor="none", alpha=shade))
        weight = "bold" if i == j + 1 else "normal"  # what the model has just learnt
        axes.text(j, i, f"{values_MC[i, j]:.3f}", ha="center", va="center", color=INK, fontweight=weight)
    axes.set(xlim=(-0.5, num_stages - 0.5), ylim=(num_models - 0.5, -0.5), xlabel="held-out rows of", ylabel="after")
    axes.set_xticks(range(num_stages), names)
    axes.set_yticks(range(num_models), models)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    last = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values_MC[-1], strict=True))
    return svg(canvas, "Scores by stage", f"Stage matrix; after {models[-1]}: {last}", wide=num_stages > 3)


def figure(width_inches: float, height_inches: float, rows: int = 1) -> tuple[Any, list[Any]]:
    """Returns an empty figure and its axes, one below another."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no state that outlives the page

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="none")
        all_axes = list(made.subplots(rows, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.set_facecolor("none")
    return made, all_axes


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)


def svg(drawn: Any, title: str, text: str, wide: bool = False) -> Markup:
    """Returns an HTML figure with the plot inline: text as text, colours as CSS variables, ids its own."""
    import matplotlib

    key = re.sub(r"\W+", "-", title.lower())
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's fonts draw it; ours only measures it
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    picture = buffer.getvalue()
    picture = re.sub(r"<metadata>.*?</metadata>", "", picture[picture.index("<svg") :], flags=re.DOTALL)
    picture = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", picture)
    for color, variable in _VARIABLES.items():
        picture = picture.replace(color, f"var(--{variable})")
    picture = re.sub(r"font: (?:(bold|700) )?([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", picture)
    head, body = picture[: picture.index(">") + 1], picture[picture.index(">") + 1 :]
    view_box = re.search(r'viewBox="([^"]*)"', head)
    assert view_box, head
    return Markup(
        '<figure class="{}"><figcaption>{}</figcaption><svg viewBox="{}" role="img" aria-labelledby="{key}-title">'
        '<title id="{key}-title">{}</title>{}</figure>\n'
    ).format("wide" if wide else "", title, view_box[1], text, Markup(body), key=key)


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
