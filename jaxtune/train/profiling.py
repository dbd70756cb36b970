"""A trace of a few steps, for xprof: what the devices did, op by op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from jaxtune.config import ConfigDict
from jaxtune.workdir import shown


class Profile:
    """Traces `tracking.profile_steps` steps from `tracking.profile_start_step` on into WORKDIR/profile.

    Use it as a context manager, so that a run that ends inside the window keeps its trace. Steps are whole where the loop
    has waited for the one before whenever `is_due`. Processes other than the first trace only if all are to.
    """

    def __init__(self, config: ConfigDict, workdir: Path, say: Callable[[str], None], first: int):
        """`first` is the first step that this process takes; `say` shows a line to the user."""
        options, self._folder, self._say = config.tracking, workdir / "profile", say
        self._shown, self._tracing = shown(config.workdir, workdir, self._folder), False
        asked = range(options.profile_start_step, options.profile_start_step + options.profile_steps)
        mine = jax.process_index() == 0 or options.profile_all_processes
        self._steps = range(max(first, asked.start), asked.stop) if mine else range(0)
        if mine and asked and not self._steps:
            say(f"{_told(asked)} were taken before this run went on at step {first}: nothing is traced")

    def is_due(self, step: int) -> bool:
        """Whether tracing begins or ends before this step."""
        return self._tracing != (step in self._steps)

    def turn(self) -> None:
        """Begins tracing, or ends it."""
        if self._tracing:
            self._stop()
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a Python function would slow the steps, and fill the trace
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._tracing = True

    def marked(self, step: int) -> AbstractContextManager[object]:
        """While open, what is dispatched belongs to this step in the trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._tracing else nullcontext()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        where = f"gcloud storage cp -r {self._shown} . && xprof --logdir=profile" if "://" in self._shown else (
            f"xprof --logdir={self._shown}"
        )  # fmt: skip
        self._say(f"{_told(self._steps)} traced in {self._shown}; to look at it: pip install xprof && {where}")


def _told(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
