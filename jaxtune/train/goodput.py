"""Where a process's wall time goes: one stopwatch, whose laps add up to the whole, and the share of it that trained."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

STEP = ""  # the cause of a lap in which a step ran; `Wall.count` says later what the step was good for


class Start(NamedTuple):
    """The time from the process's start to the end of its first step, by part; `compile` holds the wait for it alone."""

    seconds: dict[str, float]
    compile_seconds: float  # of the thread that compiled
    from_cache: bool


class Wall:
    """A stopwatch over one process. Each second of it has one cause, the first that it is given:

    start (Python and JAX), fetch, tokenise, program, load, compile (waiting for it), evaluation, data (waiting for a batch
    while no step ran), bookkeeping (metrics written while no step ran), validation, checkpoint, profile, export; training
    (steps that counted), skipped (steps that changed nothing), redone (steps that an earlier process had taken, but not
    saved); other.
    """

    def __init__(self, began: float | None = None):
        """`began` is `time.perf_counter()` when the process started; None = now."""
        self._began = self._at = time.perf_counter() if began is None else began
        self.seconds: dict[str, float] = defaultdict(float)
        self.started: Start | None = None
        self.redone_before = 0  # steps below this were taken before, by a process that did not save them
        if began is not None:
            self.lap("start")

    def lap(self, cause: str) -> float:
        """Gives the time since the last lap to `cause`; returns it, in seconds."""
        now = time.perf_counter()
        took, self._at = now - self._at, now
        self.seconds[cause] += took
        return took

    @contextmanager
    def __call__(self, cause: str) -> Iterator[None]:
        """Gives what happens inside to `cause`, and what came before it to "other"."""
        self.lap("other")
        yield
        self.lap(cause)

    def count(self, step: int, ok: bool) -> None:
        """Says what the laps of `STEP` since the last call were: step number `step`, which changed the weights or not."""
        cause = "skipped" if not ok else "redone" if step < self.redone_before else "training"
        self.seconds[cause] += self.seconds.pop(STEP, 0.0)

    def first_step(self, compile_seconds: float, from_cache: bool) -> Start:
        """Notes that the first step has ended."""
        parts = dict(self.seconds)
        parts["first_step"] = sum(parts.pop(cause, 0.0) for cause in (STEP, "training", "redone", "skipped"))
        self.started = Start(parts, compile_seconds, from_cache)
        return self.started

    def account(self) -> dict[str, float]:
        """Seconds by cause until now, the largest first after training; they add up to the wall time."""
        self.lap("other")
        rest = {cause: took for cause, took in self.seconds.items() if cause != "training" and took > 0}
        return {"training": self.seconds["training"], **dict(sorted(rest.items(), key=lambda item: -item[1]))}

    def metrics(self) -> dict[str, float]:
        """The account as metrics: `goodput/share` is training's share of the wall time."""
        found = self.account()
        whole = sum(found.values())
        shares = {"goodput/share": found["training"] / whole, "goodput/wall_seconds": whole}
        return shares | {f"goodput/{cause}_seconds": took for cause, took in found.items()}


def start_metrics(start: Start) -> dict[str, Any]:
    """The time to the first step as metrics."""
    parts = {f"start/{part}_seconds": took for part, took in start.seconds.items()}
    whole, overlapped = sum(start.seconds.values()), overlapped_seconds(start)
    return parts | {"start/whole_seconds": whole, "start/compile_overlapped_seconds": overlapped}


def overlapped_seconds(start: Start) -> float:
    """How much of compiling went on while the process did something else."""
    return max(0.0, start.compile_seconds - start.seconds.get("compile", 0.0))


def told(start: Start) -> str:
    """One line on the time to the first step, for the terminal."""
    parts = {part: took for part, took in start.seconds.items() if part != "compile" and took >= 0.05}
    listed = ", ".join(f"{part.replace('_', ' ')} {took:.1f}" for part, took in parts.items())
    waited, where = start.seconds.get("compile", 0.0), " (from the cache)" if start.from_cache else ""
    return (
        f"first step done after {sum(start.seconds.values()):.1f} s: {listed}; step compiled in {start.compile_seconds:.1f} s"
        f"{where}, {overlapped_seconds(start):.1f} s of it meanwhile, {waited:.1f} s waited for"
    )


def process_began() -> float | None:
    """`time.perf_counter()` when this process started; None where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):  # not Linux
        return None
    return time.perf_counter() - age if 0 <= age < 86400 else None
