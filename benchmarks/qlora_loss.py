"""What a quantised base costs in loss: LoRA on SmolLM2-135M-Instruct over a bfloat16, int8, int4 and nf4 base.

    python benchmarks/qlora_loss.py [--steps 100] [--kinds bfloat16,int8,int4,nf4] [--no-record]

Rank 16 on all linear layers, the quickstart's reviews, 4 x 128 packed tokens a step, the same rows and seed for each. Losses
are those of training tokens; the validation rows are held out. The base is the published Q4_1 file: "bfloat16" is that file
dequantised, and codes of ours lose what they lose of it once more. The result goes as a row into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, MARK = ROOT / "docs" / "benchmarks.md", "<!-- rows of qlora_loss.py end here -->"
KINDS = ("bfloat16", "int8", "int4", "nf4")
LAST = 20  # steps whose mean is "at the end": one batch's loss is noise


def config_of(kind: str, steps: int, workdir: Path) -> Any:
    """The quickstart on a base that is kept as `kind` says."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.workdir, config.train.steps, config.train.batch_size = str(workdir), steps, 4
    config.model.param_dtype, config.model.quantize = "bfloat16", "" if kind == "bfloat16" else kind
    config.train.eval_every_steps, config.eval.before_after, config.eval.limit = 0, False, 1
    config.data.test_fraction, config.tracking.report, config.tracking.progress = 0.0, False, "off"
    return config


def measure(kind: str, steps: int, **changes: Any) -> dict[str, float]:
    """Trains; returns losses of the first step, of the last ones, and of the validation rows after all."""
    from jaxtune import run

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(kind, steps, Path(folder))
        config.update_from_flattened_dict(changes)
        run.train(config, Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = next(line["eval/loss"] for line in reversed(lines) if "eval/loss" in line)
    last = losses[-LAST:]
    return {"first": losses[0], "last": sum(last) / len(last), "validation": validation, "steps": len(losses)}


def record(found: dict[str, dict[str, float]], path: Path = RECORD) -> None:
    """Adds the results as one row of the table in docs/benchmarks.md."""
    cells = [datetime.now(UTC).strftime("%Y-%m-%d"), f"{os.cpu_count()} x {platform.machine()}, jax {version('jax')}"]
    cells.append(f"{next(iter(found.values()))['steps']:.0f}")
    for kind in KINDS:
        one = found.get(kind)
        cells.append(f"{one['first']:.3f}, {one['last']:.4f}, {one['validation']:.4f}" if one else "")
    text = path.read_text()
    assert MARK in text, f"{path} lost the line {MARK}"
    path.write_text(text.replace(MARK, "| " + " | ".join(cells) + " |\n" + MARK))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found: dict[str, dict[str, float]] = {}
    print("base      first loss  last steps  validation  validation / bfloat16", flush=True)
    for kind in options.kinds.split(","):
        found[kind] = one = measure(kind, options.steps)
        against = one["validation"] / found.get("bfloat16", one)["validation"]
        print(
            f"{kind:<9} {one['first']:10.4f}  {one['last']:10.4f}  {one['validation']:10.4f}  {against:10.4f}",
            flush=True,
        )
    if not options.no_record:
        record(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
