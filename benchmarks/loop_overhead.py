"""What share of a run's time is lost to anything but the step: jaxtune's loop beside its bare compiled step.

    python benchmarks/loop_overhead.py [--steps 200] [--no-record]

The loop is the one of `train`: real rows through the data path, metrics.jsonl, console lines and, halfway and at the end, a
checkpoint; SmolLM2-135M, LoRA r16, the quickstart's reviews, 2 x 128 tokens a step. Every 20 steps the loop stands still
while the same executable runs 5 times back to back, on a resident batch and a state of its own: so both are measured under
the same load, and a machine that becomes slower changes nothing. Lost = 1 - (steps x the bare step) / (the loop's time from
the end of its first step to the end of its last, without the pauses). The bound is 2%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loader
import table

LIMIT = 0.02
EVERY_STEPS, BARE_STEPS = 20, 5


class Bare:
    """The loop's executable, which can also be run on one resident batch while the loop stands still."""

    def __init__(self, compiled: Any, state: Any, frozen: Any, arrays: Any):
        self._compiled, self._state, self._frozen, self._arrays = compiled, state, frozen, arrays
        self._last: Any = None  # metrics of the loop's latest step
        self.step_seconds: list[float] = []
        self.paused_seconds = self.waited_seconds = 0.0  # while the bare step ran; while the loop's own ended before it

    def step(self) -> Any:
        """What the loop asks a `Compiling` for: the executable, with an eye on its latest step."""

        def run(*arguments: Any) -> Any:
            state, self._last = self._compiled.run(*arguments)
            return state, self._last

        return self._compiled._replace(run=run)

    def between(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The loop's batches; before every so many of them, never the first, the bare step runs."""
        import jax

        for number, batch in enumerate(batches):
            if number and number % EVERY_STEPS == 0:
                asked = time.perf_counter()
                jax.block_until_ready(self._last)
                began = at = time.perf_counter()
                for _ in range(BARE_STEPS):
                    self._state, metrics = self._compiled.run(self._state, self._frozen, self._arrays)
                    float(metrics["loss"])
                    self.step_seconds.append(time.perf_counter() - at)
                    at = time.perf_counter()
                self.waited_seconds += began - asked
                self.paused_seconds += at - began
            yield batch


def tracker(folder: Path, config: Any) -> Any:
    """A tracker that also notes when each step's metrics came."""
    from jaxtune import tracking

    class Noting(tracking.Tracker):
        def log(self, step: int, metrics: Any) -> None:
            if "loss" in metrics:
                self.ends.append(time.perf_counter())
            super().log(step, metrics)

    made = Noting(folder, config.tracking, total_steps=config.train.steps, log_every_steps=10)
    made.ends = []
    return made


def measure(config: Any, folder: Path) -> dict[str, Any]:
    """Seconds of the loop and of the bare step, the share lost, and what the loop itself says was lost to what."""
    import jax

    from jaxtune import checkpoint, sharding
    from jaxtune.data import pipeline
    from jaxtune.train import compiled, goodput, loop, rows, start
    from jaxtune.train import step as step_lib
    from jaxtune.weights import source

    config.workdir = str(folder)
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    read = rows.read(config, tokenizer, pipeline.silent)
    program, values = start.program(config, model)
    compiling = compiled.Compiling(config, program, evaluates=False)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    host = {name: read.batches[0][name] for name in step_lib.fields(config, program)}
    resident = sharding.to_global(host, program.mesh, config.train.batch_size)
    bare = Bare(compiling.step(), jax.tree.map(lambda leaf: leaf.copy(), state), frozen, resident)
    given = rows.for_loop(config, read, tokenizer, program)
    data = given._replace(train=lambda *asked: bare.between(given.train(*asked)), validation=None)
    wall = goodput.Wall()
    with checkpoint.Checkpoints(config.workdir, config) as checkpoints, tracker(folder, config) as noting:
        loop.train(
            config,
            program,
            state,
            frozen,
            data,
            noting,
            checkpoints,
            folder,
            loop.Progress(),
            bare,
            wall,  # type: ignore[arg-type]
        )
    took, num = noting.ends[-1] - noting.ends[0] - bare.paused_seconds, len(noting.ends) - 1
    step = sum(bare.step_seconds) / len(bare.step_seconds)
    causes = {cause: wall.seconds[cause] for cause in ("data", "bookkeeping", "checkpoint")}
    return {
        "steps": num, "seconds": took, "step_seconds": step, "lost": 1 - num * step / took,
        "causes": causes | {"data": causes["data"] - bare.paused_seconds - bare.waited_seconds},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    config = loader.quickstart()
    config.train.steps, config.train.batch_size, config.checkpoint.every_steps = options.steps, 2, options.steps // 2
    config.tracking.progress = "lines"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, Path(folder))
    causes = ", ".join(f"{cause} {seconds:.2f} s" for cause, seconds in found["causes"].items())
    print(f"{found['steps']} steps in {found['seconds']:.1f} s; the bare step {1000 * found['step_seconds']:.0f} ms")
    print(f"with no step running (start and end included): {causes}")
    print(f"lost to anything but the step: {found['lost']:.2%}; the bound is {LIMIT:.0%}")
    if not options.no_record:
        cells = [str(found["steps"]), f"{1000 * found['step_seconds']:.0f} ms", f"{found['lost']:.2%}", causes]
        table.append("loop_overhead.py", [*table.origin("jax", "grain"), *cells])
    return 0 if found["lost"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
