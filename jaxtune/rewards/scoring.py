"""Rewards of many completions: each function in processes of their own, with a time limit, errors counted, a weighted sum."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from jaxtune import registry
from jaxtune.config import ConfigDict
from jaxtune.data.formats import Example
from jaxtune.rewards import REWARDS
from jaxtune.rewards.worker import RAISED
from jaxtune.types import UserError

TIMED_OUT = "timed_out"
_START_SECONDS = 300.0  # for a worker to import its functions, which may import much


class Scores(NamedTuple):
    """Of N completions: the weighted `total` (N,) float32, NaN where the error policy drops one; `parts` by reward's name,
    likewise; and how often what went wrong, "name: raised|timed_out|not_a_number" -> count.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    errors: dict[str, int]


class Rewarder:
    """The functions of `reward.functions`, in worker processes. Use as a context manager, or `close()`.

    A function that raises, hangs beyond `reward.timeout_seconds`, ends its process or returns no finite number costs its
    value (`reward.on_error`: zero | drop | stop), never the run. `first_errors` has the first message of each kind.

    Args:
      reward: the config's section.

    Raises:
      UserError: a function is unknown, cannot be imported, or lacks what it needs.
    """

    def __init__(self, reward: ConfigDict):
        self._options, self.names = reward, names(reward)
        self._functions = [name for name, _ in reward.functions]
        self._weights = np.asarray([weight for _, weight in reward.functions], np.float64)
        self.first_errors: dict[str, str] = {}
        self._workers: list[_Worker] = []
        try:
            for _ in range(reward.workers):
                self._workers.append(_Worker(self._functions, reward))
            for worker in self._workers:
                worker.await_ready()
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
        """The scores of `completions[i]`, an answer to `prompts[i]`, whose data row is `rows[i]`.

        Raises:
          UserError: a reward failed, and `reward.on_error` is "stop".
        """
        num, errors = len(completions), Counter[str]()
        values_NF = np.full((num, len(self.names)), np.nan)
        jobs = deque((i, f) for i in range(num) for f in range(len(self.names)))
        running: dict[_Worker, tuple[int, int]] = {}
        try:
            while jobs or running:
                for worker in self._workers:
                    if jobs and worker not in running:
                        i, f = running[worker] = jobs.popleft()
                        worker.give((f, prompts[i], completions[i], rows[i]))
                for worker, (value, kind, message) in self._finished(running):
                    i, f = running.pop(worker)
                    values_NF[i, f] = value
                    if kind:
                        self._note(f"{self.names[f]}: {kind}", message, prompts[i], errors)
        except BaseException:
            for worker in running:  # its answer would be taken for another's
                worker.restart()
            raise
        return self._summed(values_NF, errors)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finished(self, running: Iterable[_Worker]) -> list[tuple[_Worker, tuple[float, str, str]]]:
        """Waits for the next results; a worker beyond its time, or gone, is replaced."""
        running = list(running)
        due = min(worker.deadline for worker in running)
        ready = set(wait([worker.results for worker in running], max(0.0, due - time.monotonic())))
        found = []
        for worker in running:
            if worker.results in ready:
                try:
                    result = worker.results.recv()
                except (EOFError, OSError):
                    result = (np.nan, RAISED, f"ended its process (exit status {worker.status()})")
                    worker.restart()
            elif worker.deadline <= time.monotonic():
                result = (
                    np.nan,
                    TIMED_OUT,
                    f"ran longer than reward.timeout_seconds={self._options.timeout_seconds:g}",
                )
                worker.restart()
            else:
                continue
            found.append((worker, result))
        return found

    def _note(self, what: str, message: str, prompt: str, errors: Counter[str]) -> None:
        errors[what] += 1
        if self._options.on_error == "stop":
            raise UserError(
                f"reward {what} ({message}) on an answer to {prompt!r:.80}; mend it, or set reward.on_error='zero' or 'drop'"
            )
        self.first_errors.setdefault(what, message)

    def _summed(self, values_NF: np.ndarray, errors: Counter[str]) -> Scores:
        if self._options.on_error == "zero":
            values_NF = np.nan_to_num(values_NF, nan=0.0)
        total_N = (values_NF * self._weights).sum(axis=1).astype(np.float32)
        parts = {name: values_NF[:, f].astype(np.float32) for f, name in enumerate(self.names)}
        return Scores(total_N, parts, dict(errors))


def names(reward: ConfigDict) -> list[str]:
    """What the rewards are called in metrics: a built-in one's name, a user's function's.

    Raises:
      UserError: there is none, one is unknown, or two are called alike.
    """
    if not reward.functions:
        raise UserError(
            f"reward.functions is empty: name at least one reward and its weight, such as (('exact_answer', 1.0),); there are "
            f"{', '.join(REWARDS)}, and yours as 'module:function' or 'file.py:function'"
        )
    found: list[str] = []
    for name, _ in reward.functions:
        if ":" not in name:
            registry.load("reward", name, REWARDS)
        called = name.rpartition(":")[2]
        if called in found:
            raise UserError(f"reward.functions has {called!r} twice; give each function its own name, once")
        found.append(called)
    return found


def check(reward: ConfigDict) -> None:
    """Refuses, before anything is trained, functions that could not be run.

    Raises:
      UserError: as `Rewarder`.
    """
    Rewarder(reward).close()


def row_of(example: Example) -> dict[str, Any]:
    """The row that a reward sees: the data row, and its answer under "answer" where the row has no such column."""
    row = dict(example.row or {})
    return row if "answer" in row or example.answer is None else {**row, "answer": example.answer}


def prompt_of(example: Example) -> str:
    """The prompt that a reward sees: a chat's last user turn, or the plain text before the answer."""
    asked = [message["content"] for message in example.messages or () if message["role"] == "user"]
    return asked[-1] if asked else example.prompt or example.text or ""


def check_rows(reward: ConfigDict, row_ids: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuses, before anything is sampled, rows that a verifier cannot judge: without an answer, above all.

    Raises:
      UserError: naming the row.
    """
    modules = [registry.load("reward", name, REWARDS) for name, _ in reward.functions if ":" not in name]
    checks = [module.check for module in modules if hasattr(module, "check")]
    for row_id, row in zip(row_ids, rows, strict=True):
        for check in checks:
            try:
                check(row, reward)
            except UserError as error:
                raise UserError(f"{row_id}: {error}") from None


class _Worker:
    """One process and the pipes to it; one job at a time."""

    def __init__(self, functions: Sequence[str], reward: ConfigDict):
        self._given = (list(functions), reward.to_dict())
        self._seconds, self.deadline = reward.timeout_seconds, 0.0
        self._start()

    def await_ready(self) -> None:
        """Returns when its functions are imported.

        Raises:
          UserError: why they are not.
        """
        try:
            said = (
                self.results.recv()
                if self.results.poll(_START_SECONDS)
                else f"took over {_START_SECONDS:g} s to import"
            )
        except (EOFError, OSError):
            said = f"reward.functions: the process that imports them ended (exit status {self.status()})"
        if said:
            raise UserError(said)

    def give(self, job: tuple[int, str, str, Mapping[str, Any]]) -> None:
        """Starts one job."""
        with suppress(OSError):  # it ended between two jobs: the next look at its results says so
            self._jobs.send(job)
        self.deadline = time.monotonic() + self._seconds

    def status(self) -> int:
        """The exit status of a process that has ended."""
        return self._process.wait()

    def restart(self) -> None:
        """Another process in place of this one."""
        self.end()
        self._start()
        self.await_ready()

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._jobs.close()
        self.results.close()

    def _start(self) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        # On the parent's path; and never on its accelerator, should a reward import jax.
        environment = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "JAX_PLATFORMS": "cpu"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxtune.rewards.worker", str(theirs_in), str(theirs_out)],
                pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, env=os.environ | environment,
            )  # fmt: skip
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._jobs, self.results = Connection(ours_out, readable=False), Connection(ours_in, writable=False)
        with suppress(OSError):  # it ended at once: `await_ready` says so
            self._jobs.send(self._given)
