"""How well MiniLM takes up tasks that it was never trained on, from 0 to 16 rows: Reptile against multi-task training.

    python benchmarks/few_shot.py [--arms untuned,multi,reptile,fomaml] [--steps 40] [--folder runs/few_shot] [--no-record]

Tasks and rows are those of configs/reptile_few_shot.py. Every arm takes the same number of steps of as many tokens of the same
training tasks, from the same weights and by the same optimizer, and then meets the same questions and the same draws of rows,
adapted to by 8 steps of Adam at `--rate`. The table goes to docs/few_shot.md, the plot to docs/few_shot.png. An arm whose
result lies in `--folder` is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT, MARK = ROOT / "docs" / "few_shot.md", ROOT / "docs" / "few_shot.png", "<!-- few_shot.py writes below -->"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "untuned": ("untuned", {"meta.algorithm": ""}),
    "multi": ("multi-task training", {"meta.algorithm": ""}),
    "reptile": ("Reptile", {}),
    "fomaml": ("first-order MAML", {"meta.algorithm": "fomaml", "meta.inner_steps": 3}),  # and a query batch
}
MULTI = "multi"


def config_of(arm: str, options: argparse.Namespace, workdir: Path) -> Any:
    config = runpy.run_path(str(ROOT / "configs" / "reptile_few_shot.py"))["get_config"]()
    config.update_from_flattened_dict(ARMS[arm][1])
    config.workdir, config.train.steps, config.train.seed = str(workdir), options.steps, options.seed
    config.meta.adapt_rate, config.meta.draws, config.eval.limit = options.rate, options.draws, options.questions
    config.tracking.report, config.tracking.progress = False, "lines"
    return config


def result_of(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures an arm, unless its result is there; what `evaluate` writes."""
    from jaxtune import run, validation

    workdir = options.folder / arm
    file = workdir / "fewshot.json"
    if not file.exists():
        config = config_of(arm, options, workdir)
        validation.validate(config)
        if arm != "untuned" and not (workdir / "adapter").exists():
            run.train(config, workdir)
        run.evaluate(config, workdir)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def right(found: dict[str, Any], shots: str) -> dict[str, np.ndarray]:
    return {task: np.asarray(rows) for task, rows in found["right"]["adapted"][shots].items()}


def page(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The table, and what each arm gains on multi-task training, question by question."""
    from jaxtune.evals import fewshot

    config = config_of(MULTI, options, Path("unused"))
    lines = ["| rows | " + " | ".join(ARMS[arm][0] for arm in found) + " |", "|---" * (1 + len(found)) + "|"]
    for k in map(str, config.meta.shots):
        cells = [_cell(found[arm]["accuracy"]["adapted"][k], "") for arm in found]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    others = [arm for arm in found if arm != MULTI] if MULTI in found else []
    if others:
        named = " | ".join(ARMS[arm][0] for arm in others)
        lines += ["", "Less multi-task training, on the same draws and questions:", ""]
        lines += [f"| rows | {named} |", "|---" * (1 + len(others)) + "|"]
        for k in map(str, config.meta.shots):
            gaps = [fewshot.gap(config, right(found[arm], k), right(found[MULTI], k)) for arm in others]
            lines.append(f"| {k} | " + " | ".join(_cell(gap._asdict(), "+") for gap in gaps) + " |")
    return "\n".join(lines) + "\n"


def _cell(e: dict[str, float], sign: str) -> str:
    return f"{e['value']:{sign}.3f} [{e['low']:{sign}.3f}, {e['high']:{sign}.3f}]"


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy over rows, intervals shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (arm, result) in enumerate(found.items()):
        curve = result["accuracy"]["adapted"]
        shots = np.arange(len(curve))  # numbers that double: evenly apart
        low, high = ([cell[end] for cell in curve.values()] for end in ("low", "high"))
        axes.plot(shots, [c["value"] for c in curve.values()], marker="o", color=f"C{number}", label=ARMS[arm][0])
        axes.fill_between(shots, low, high, color=f"C{number}", alpha=0.12)
        axes.set_xticks(shots, list(curve))
    axes.set(xlabel="rows of a task never trained on, adapted to", ylabel="accuracy")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="untuned,multi,reptile", help="of these and fomaml")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each arm")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of adapting")
    parser.add_argument("--draws", type=int, default=2, help="times that the rows of a task are drawn")
    parser.add_argument("--questions", type=int, default=160, help="over all held-out tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "few_shot")
    parser.add_argument("--no-record", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = {arm: result_of(arm, options) for arm in options.arms.split(",")}
    text = page(found, options)
    print(text)
    if not options.no_record:
        before, mark, _ = PAGE.read_text().partition(MARK)
        assert mark, f"{PAGE} lost the line {MARK}"
        PAGE.write_text(f"{before}{MARK}\n\n{text}")
        plot(found, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
