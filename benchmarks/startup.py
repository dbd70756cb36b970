"""Time to the first step, by part: without kept programs, and with those of the run before.

    python benchmarks/startup.py [--no-record] [--config.model.param_dtype=bfloat16 …]

Runs the quickstart's `train` for one step in a process of its own, twice, with a compilation cache that is empty at first;
rows and model are on this machine already, and the measurement of the untuned model is left out. Further arguments go to
both runs. The parts are those of metrics.jsonl (`start/…`), from the start of the process to the end of its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import table

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--config.train.steps=1", "--config.train.eval_every_steps=0", "--config.eval.before_after=False",
    "--config.data.test_fraction=0", "--config.data.validation_fraction=0", "--config.tracking.report=False",
)  # fmt: skip
SHOWN = ("start", "fetch", "tokenise", "program", "load", "compile", "first_step", "whole", "compile_overlapped")


def run(config: Path, workdir: Path, cache: Path, flags: list[str]) -> dict[str, float]:
    """Seconds by part of one run in a fresh process."""
    command = [sys.executable, "-m", "jaxtune.launch", f"--config={config}", f"--workdir={workdir}", *FLAGS, *flags]
    done = subprocess.run(
        [*command, f"--config.compile_cache={cache}"], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr[-3000:]}")
    lines: list[dict[str, Any]] = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "start/whole_seconds" in line)
    return {part: found.get(f"start/{part}_seconds", 0.0) for part in SHOWN}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.py")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options, flags = parser.parse_known_args(argv)
    print(" " * 20 + "".join(f"{part.replace('_', ' '):>20}" for part in SHOWN))
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("nothing kept", "kept"):
            found[name] = run(options.config, Path(folder) / name, Path(folder) / "cache", flags)
            print(f"{name:<20}" + "".join(f"{found[name][part]:18.2f} s" for part in SHOWN), flush=True)
    cold, warm = (times["whole"] for times in found.values())
    print(f"the first step ends after {warm:.1f} s with kept programs: {warm / cold:.2f} x the time without")
    if not options.no_record:
        rows = [
            [*table.origin("jax"), name, *(f"{times[part]:.1f}" for part in SHOWN)] for name, times in found.items()
        ]
        table.append("startup.py", *rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
