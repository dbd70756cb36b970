"""`plan`'s forecast for this machine's CPU beside a real run: FLOPs, memory and time of a SmolLM2-135M LoRA step.

    python benchmarks/plan_vs_run.py [--steps 8] [--preset llama_tiny] [--no-record]

One process plans the quickstart (topology "cpu"): it measures the machine's matmuls at the step's shapes and how fast it
moves arrays, compiles, and forecasts. A second, fresh process trains real steps of it on the quickstart's reviews: mean
seconds of a step after the first, and the most memory that it held while it stepped. FLOPs are checked against the
multiplications in the program that the run compiled. Exit code 1 where FLOPs differ at all, memory by more than 15% or
time by more than 25%. The result goes as a row into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, MARK = ROOT / "docs" / "benchmarks.md", "<!-- rows of plan_vs_run.py end here -->"
LIMITS = {"FLOPs": 0.0, "memory": 0.15, "time": 0.25}
GIB = 1 << 30


def load_config(preset: str) -> Any:
    """The quickstart's config for one CPU device; with `preset`, random weights of those shapes and random tokens."""
    import runpy

    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.train.steps, config.plan.topology, config.tracking.progress = 40, "cpu", "off"
    if preset:
        config.model.source = f"preset:{preset}"
    return config


def plan(preset: str) -> dict[str, Any]:
    """The forecast, as the verb `plan` makes it."""
    import contextlib
    import tempfile

    from jaxtune import run

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run.plan(load_config(preset), Path(folder))
        return json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))


def run(preset: str, num_steps: int) -> dict[str, Any]:
    """Real steps: their seconds, the most memory held while stepping, the multiplications of the compiled program."""
    import jax

    from jaxtune.plan import cpu, hlo
    from jaxtune.train import start
    from jaxtune.train import step as step_lib
    from jaxtune.weights import source

    config = load_config(preset)
    model = source.find(config)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    abstract = (program.state, program.frozen, step_lib.abstract_batch(config, program))
    compiled = step_lib.make(config, program).lower(*abstract).compile()
    batches = _batches(config, model, program)
    jax.block_until_ready((state, frozen))
    cpu.resident_bytes()  # gives back what loading freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds = []
    for _ in range(num_steps + 1):
        batch = next(batches)
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    flops = hlo.traffic(compiled.as_text()).dot_flops
    return {"peak_bytes": peak, "step_seconds": sum(seconds[1:]) / num_steps, "flops": flops}


def _batches(config: Any, model: Any, program: Any) -> Any:
    """Batches without end: the quickstart's reviews, or random tokens for a preset, which has no tokenizer."""
    import numpy as np

    from jaxtune import sharding
    from jaxtune.train import rows, start
    from jaxtune.train import step as step_lib
    from jaxtune.weights import source

    fields, size = step_lib.fields(config, program), config.train.batch_size
    if model.tensors is None:
        shapes = step_lib.abstract_batch(config, program)
        batch = {name: np.ones(like.shape, like.dtype) for name, like in shapes.items()}
        while True:
            yield sharding.to_global(batch, program.mesh, size)
    tokenizer = source.find_tokenizer(config, model)
    data = rows.read(config, tokenizer, lambda items, *_, **__: iter(items), start.reader(config, model, tokenizer))
    for number in range(sys.maxsize):
        batch = data.batches[number]
        yield sharding.to_global({name: batch[name] for name in fields}, program.mesh, size)


def apart(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(options.steps), "--preset", options.preset]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(planned: dict[str, Any], ran: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """(forecast, measured, their ratio) of each figure."""
    pairs = {
        "FLOPs": (planned["hardware_flops"], ran["flops"]),
        "memory": (planned["peak_hbm_bytes"], ran["peak_bytes"]),
        "time": (planned["step_seconds"], ran["step_seconds"]),
    }
    return {name: (forecast, measured, forecast / measured) for name, (forecast, measured) in pairs.items()}


def record(found: dict[str, tuple[float, float, float]], planned: dict[str, Any]) -> None:
    """Adds a row to the table in docs/benchmarks.md."""
    text = RECORD.read_text(encoding="utf-8")
    by = planned["seconds_by_resource"]
    cells = [
        datetime.now(UTC).strftime("%Y-%m-%d"),
        f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        f"jax {version('jax')}",
        f"{found['FLOPs'][0] / 1e9:.1f} / {found['FLOPs'][1] / 1e9:.1f} GFLOP ({found['FLOPs'][2]:.3f})",
        f"{found['memory'][0] / GIB:.2f} / {found['memory'][1] / GIB:.2f} GiB ({found['memory'][2]:.2f})",
        f"{found['time'][0]:.2f} / {found['time'][1]:.2f} s ({found['time'][2]:.2f})",
        f"{by['compute']:.2f} + {by['hbm']:.2f} s",
    ]
    RECORD.write_text(text.replace(MARK, "| " + " | ".join(cells) + " |\n" + MARK), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--preset", default="", help="shapes with random weights instead of the quickstart's model")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--side", choices=("plan", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        print(json.dumps(plan(options.preset) if options.side == "plan" else run(options.preset, options.steps)))
        return 0
    planned, ran = apart("plan", options), apart("run", options)
    found = compare(planned, ran)
    for name, (forecast, measured, ratio) in found.items():
        print(
            f"{name:>7}  forecast {forecast:.4g}, measured {measured:.4g}: {ratio:.3f} x (within {LIMITS[name]:.0%} is asked)"
        )
    if not options.no_record:
        record(found, planned)
    return 0 if all(abs(ratio - 1) <= LIMITS[name] for name, (_, _, ratio) in found.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
