"""A process of its own that runs reward functions: `python -m jaxtune.rewards.worker IN OUT`, two file descriptors of pipes.

What it is told first is (functions, options); it answers None, or a line that says why not. Then each job
(function number, prompt, completion, row) is answered with (value, "") or (NaN, why). It never imports jax by itself.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from jaxtune import registry
from jaxtune.config import ConfigDict
from jaxtune.rewards import REWARDS
from jaxtune.types import UserError

RAISED, NOT_A_NUMBER = "raised", "not_a_number"
_GRACE_SECONDS = 10  # beyond its time limit a job's process ends by itself: whoever would have ended it is gone


def function(name: str, options: ConfigDict) -> Callable[[str, str, Mapping[str, Any]], float]:
    """The reward function of a name of `REWARDS`, or the user's own.

    Raises:
      UserError: there is none, it cannot be imported, or it does not take three arguments.
    """
    if ":" not in name:
        made: Callable[..., float] = registry.load("reward", name, REWARDS).make(options)
        return made
    found = registry.function(name, "reward.functions")
    try:
        inspect.signature(found).bind("prompt", "completion", {})
    except TypeError as error:
        raise UserError(f"reward.functions has {name!r}: {error}; expected f(prompt, completion, row)") from None
    except ValueError:  # a function written in C has no signature
        pass
    return found


def judge(reward: Callable[..., Any], prompt: str, completion: str, row: Mapping[str, Any]) -> tuple[float, str, str]:
    """(value, "", "") of one completion; or (NaN, kind of error, what was said)."""
    try:
        given = reward(prompt, completion, row)
    except Exception as error:  # the user's own code
        return math.nan, RAISED, f"{type(error).__name__}: {error}"
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        return math.nan, NOT_A_NUMBER, f"returned {given!r:.60}"
    return (value, "", "") if math.isfinite(value) else (math.nan, NOT_A_NUMBER, f"returned {value}")


def serve(jobs: Connection, results: Connection) -> None:
    """Answers until nobody asks any more."""
    names, values = jobs.recv()
    options = ConfigDict(values)
    try:
        rewards = [function(name, options) for name in names]
    except UserError as error:
        results.send(str(error))
        return
    results.send(None)
    while True:
        try:
            number, prompt, completion, row = jobs.recv()
        except (EOFError, OSError):
            return
        signal.alarm(math.ceil(options.timeout_seconds) + _GRACE_SECONDS)
        result = judge(rewards[number], prompt, completion, row)
        signal.alarm(0)
        results.send(result)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which saves first
    os.dup2(2, 1)  # what a reward prints is no result of the verb
    sys.argv, ends = sys.argv[:1], [int(end) for end in sys.argv[1:]]
    serve(Connection(ends[0], writable=False), Connection(ends[1], readable=False))
