"""Picture files: plots of several runs beside each other, to look at or to put into a page of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Panel(NamedTuple):
    """One plot of points: joined by a line, or not; `marks` are vertical lines and `levels` horizontal ones, with what they stand for;
    `intervals` are (low, high) of each point."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[Any]  # numbers, or names in their order
    y: Sequence[float]
    joined: bool = False
    marks: Sequence[tuple[float, str]] = ()
    levels: Sequence[tuple[float, str]] = ()
    intervals: Sequence[tuple[float, float]] = ()


def png(path: Path, panels: Sequence[Panel]) -> bool:
    """Draws the panels in two columns into a picture file; returns False, and draws nothing, without matplotlib (extra: report)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawn = Figure(figsize=(1.5 + 4 * len(panels), 3.6), dpi=130, layout="constrained")
    for axes, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = sorted({str(x) for x in panel.x}) if any(not isinstance(x, int | float) for x in panel.x) else []
        x = [names.index(str(one)) for one in panel.x] if names else list(panel.x)
        axes.plot(x, panel.y, "-" if panel.joined else "o", alpha=1 if panel.joined else 0.7)
        if names:
            axes.set_xticks(range(len(names)), names, rotation=30 if len("".join(names)) > 40 else 0)
        elif x and min(x) > 0 and max(x) >= 8 * min(x):
            axes.set_xscale("log")
        elif all(isinstance(one, int) for one in x):
            axes.locator_params(axis="x", integer=True)
        if panel.intervals:
            axes.vlines(x, *zip(*panel.intervals, strict=True), linewidth=1.2, alpha=0.6)
        for at, meaning in panel.marks:
            axes.axvline(at, color="0.4", linestyle="--", linewidth=0.9)
            axes.annotate(
                meaning, (at, 0.97), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=8
            )
        for at, meaning in panel.levels:
            axes.axhline(at, color="0.4", linestyle="--", linewidth=0.9, label=meaning)
            axes.legend(loc="best", frameon=False, fontsize=8)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(visible=True, linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return True


class Dot(NamedTuple):
    """A point with its intervals, (value, low, high) each; `series` gives its colour and shape, a faded one is grey, a marked one ringed and named."""

    x: tuple[float, float, float]
    y: tuple[float, float, float]
    series: str
    name: str = ""
    faded: bool = False
    marked: bool = False


class Cloud(NamedTuple):
    """A plot of points between the ends of their intervals."""

    title: str
    x_label: str
    y_label: str
    dots: Sequence[Dot]


def clouds(path: Path, drawings: Sequence[Cloud]) -> bool:
    """Draws the clouds side by side into a picture file; returns False, and draws nothing, without matplotlib (extra: report)."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = list(dict.fromkeys(dot.series for cloud in drawings for dot in cloud.dots))
    colors = {name: colormaps["tab10"](number % 10) for number, name in enumerate(series)}
    shapes = {name: "osD^vP*X<>"[number % 10] for number, name in enumerate(series)}  # which a faded one keeps
    columns = 1 if len(drawings) == 1 else 2
    lines = -(-len(drawings) // columns)
    drawn = Figure(figsize=(6.2 * columns, 4.2 * lines + 0.6), dpi=110, layout="constrained")
    every = drawn.subplots(lines, columns, squeeze=False).flat
    for axes in list(every)[len(drawings) :]:
        axes.set_axis_off()
    for axes, cloud in zip(drawn.axes, drawings, strict=False):
        for dot in cloud.dots:
            color = "0.75" if dot.faded else colors[dot.series]
            spans = [[[max(0.0, value - low)], [max(0.0, high - value)]] for value, low, high in (dot.x, dot.y)]
            axes.errorbar(
                dot.x[0],
                dot.y[0],
                spans[1],
                spans[0],
                fmt=shapes[dot.series],
                color=color,
                markersize=5,
                linewidth=0.8,
                zorder=1 if dot.faded else 2,
            )
            if dot.marked:
                axes.plot(dot.x[0], dot.y[0], "o", color="none", markeredgecolor="black", markersize=11, zorder=3)
            if dot.name:
                axes.annotate(
                    dot.name, (dot.x[0], dot.y[0]), xytext=(5, 4), textcoords="offset points", fontsize=6.5, color=color
                )
        axes.axhline(0, color="0.6", linewidth=0.7)
        axes.set(title=cloud.title, xlabel=cloud.x_label, ylabel=cloud.y_label)
        axes.grid(visible=True, linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    for name, color in colors.items():
        axes.plot([], [], shapes[name], color=color, label=name)
    drawn.legend(loc="outside lower center", ncols=min(len(series), 4 * columns), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return True


class Forest(NamedTuple):
    """A plot of estimates, (value, low, high) each, by name down the page; `series` are models, drawn beside each other in each name."""

    title: str
    x_label: str
    names: Sequence[str]
    series: Mapping[str, Sequence[tuple[float, float, float] | None]]  # of each name, or None where there is none
    nothing: float | None = None  # a vertical line: the value at which nothing is shown


def forests(path: Path, drawings: Sequence[Forest]) -> bool:
    """Draws the forests side by side into a picture file; returns False, and draws nothing, without matplotlib (extra: report)."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = list(dict.fromkeys(name for one in drawings for name in one.series))
    most = max(len(one.names) for one in drawings)
    height = 1.3 + most * (0.16 + 0.14 * len(series))
    drawn = Figure(figsize=(1.2 + 4.6 * len(drawings), max(2.6, height)), dpi=130, layout="constrained")
    for axes, one in zip(drawn.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        for number, name in enumerate(series):
            for row, estimate in enumerate(one.series.get(name, ())):
                if estimate is None:
                    continue
                y = row + (number - (len(series) - 1) / 2) * 0.7 / len(series)
                color = colormaps["tab10"](number % 10)
                axes.plot(estimate[1:], [y, y], color=color, linewidth=1.4)
                axes.plot([estimate[0]], [y], "osD^vP*X"[number % 8], color=color, markersize=4.5)
        if one.nothing is not None:
            axes.axvline(one.nothing, color="0.4", linestyle="--", linewidth=0.9)
        axes.set_yticks(range(len(one.names)), one.names, fontsize=8)
        axes.set_ylim(len(one.names) - 0.4, -0.6)
        axes.set(title=one.title, xlabel=one.x_label)
        axes.grid(visible=True, axis="x", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        for number, name in enumerate(series):
            axes.plot([], [], "osD^vP*X"[number % 8], color=colormaps["tab10"](number % 10), label=name)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(series), 8), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return True
