"""Draws what a run learned over its steps, from its metrics.jsonl, as a picture for the docs.

    python benchmarks/learning_curve.py WORKDIR PICTURE.png METRIC [METRIC …]

A metric that is logged at every step is smoothed over a twentieth of them; one that is measured now and then ("eval/…") is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from jaxtune import pictures
from jaxtune.pictures import Panel


def panel(lines: list[dict[str, float]], metric: str) -> Panel:
    """One metric over the steps of a run."""
    points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    if not points:
        known = sorted({key for line in lines for key in line} - {"step"})
        sys.exit(f"no {metric!r} in metrics.jsonl; there is {', '.join(known)}")
    steps, values = zip(*points, strict=True)
    half = 0 if metric.startswith("eval/") else len(values) // 40
    smooth = [float(np.mean(values[max(0, at - half) : at + half + 1])) for at in range(len(values))]
    return Panel(metric, "optimizer step", "", steps, smooth, joined=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("metrics", nargs="+")
    options = parser.parse_args(argv)
    lines = [json.loads(line) for line in (options.workdir / "metrics.jsonl").read_text().splitlines()]
    last = {line["step"]: {} for line in lines}
    for line in lines:  # a step that a resumed run took again counts as it was taken last
        last[line["step"]] |= line
    drawn = pictures.png(options.picture, [panel(list(last.values()), metric) for metric in options.metrics])
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(main())
