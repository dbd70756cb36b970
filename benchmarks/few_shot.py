"""How well SmolLM2 takes up tasks that it was never trained on, after 0 to 8 rows: Reptile and MetaICL against multi-task SFT.

    python benchmarks/few_shot.py [--arms sft,reptile,metaicl] [--steps 120] [--folder runs/few_shot] [--no-record]

Tasks and rows are those of configs/reptile_few_shot.py. Every arm takes the same number of steps of 1,024 tokens of the same
training tasks, from the same weights, and then meets the same questions and the same draws of rows, which are shown before
the question or adapted to (8 steps of Adam at `--rate`, for each arm the same). The table goes to docs/few_shot.md, the plot
to docs/few_shot.png. An arm whose result lies in `--folder` is not run again.
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
_SFT = {
    "meta.algorithm": "", "optim.name": "adamw", "optim.learning_rate": 1e-3, "optim.schedule": "cosine", "optim.clip_norm": 1.0,
}  # fmt: skip
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "untuned": ("the untuned model", {"meta.algorithm": ""}),
    "sft": ("multi-task SFT", _SFT),
    "reptile": ("Reptile", {}),
    "metaicl": ("MetaICL, 5 shown", _SFT | {"meta.demonstrations": 5, "data.max_length": 256, "train.batch_size": 4}),
}


def config_of(arm: str, options: argparse.Namespace, workdir: Path) -> Any:
    config = runpy.run_path(str(ROOT / "configs" / "reptile_few_shot.py"))["get_config"]()
    config.update_from_flattened_dict(ARMS[arm][1])
    config.workdir, config.train.steps, config.train.seed = str(workdir), options.steps, options.seed
    config.meta.adapt_rate, config.meta.draws, config.eval.limit = options.rate, options.draws, options.questions
    config.tracking.report, config.tracking.progress = False, "lines"
    config.meta.ways = ("shown",) if arm == "metaicl" else tuple(options.ways.split(","))
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


def arrays(found: dict[str, Any], way: str, shots: str) -> dict[str, np.ndarray]:
    return {task: np.asarray(rows) for task, rows in found["right"][way][shots].items()}


def page(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The table, and what each arm gains on multi-task SFT, question by question."""
    from jaxtune.evals import fewshot

    config = config_of("sft", options, Path("unused"))
    columns = [(arm, way) for arm in found for way in found[arm]["accuracy"]]
    head = [f"{ARMS[arm][0]}, {way}" for arm, way in columns]
    lines = ["| rows | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for k in map(str, config.meta.shots):
        cells = [found[arm]["accuracy"][way][k] for arm, way in columns]
        lines.append(
            f"| {k} | " + " | ".join(f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells) + " |"
        )
    gaps = []
    for arm, way in columns:
        if arm == "sft" or "sft" not in found or way not in found["sft"]["right"]:
            continue
        for k in map(str, config.meta.shots):
            gap = fewshot.gap(config, arrays(found[arm], way, k), arrays(found["sft"], way, k))
            gaps.append(f"| {ARMS[arm][0]}, {way} | {k} | {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] |")
    if gaps:
        lines += ["", "Less multi-task SFT, the same way:", "", "| arm | rows | difference |", "|---|---|---|", *gaps]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy over rows, a panel for each way, intervals shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (way, title) in zip(
        panels, (("adapted", "rows adapted to"), ("shown", "rows shown before the question")), strict=True
    ):
        for number, (arm, result) in enumerate(found.items()):
            if way not in result["accuracy"]:
                continue
            shots = list(result["accuracy"][way])
            cells = [result["accuracy"][way][k] for k in shots]
            panel.plot(shots, [c["value"] for c in cells], marker="o", color=f"C{number}", label=ARMS[arm][0])
            panel.fill_between(
                shots, [c["low"] for c in cells], [c["high"] for c in cells], color=f"C{number}", alpha=0.12
            )
        panel.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        panel.set_xlabel("rows of a task never trained on")
        panel.set_title(title)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="untuned,sft,reptile,metaicl")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each arm")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of adapting")
    parser.add_argument("--draws", type=int, default=3, help="times that the rows of a task are drawn")
    parser.add_argument("--ways", default="shown,adapted", help="what is done with the rows; MetaICL is shown them")
    parser.add_argument("--questions", type=int, default=75, help="over all held-out tasks")
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
