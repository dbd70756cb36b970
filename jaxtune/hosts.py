"""Several processes that run as one: how they find each other, and how the others end when one of them is lost.

A collective waits for all processes, so one that is gone would leave the others waiting. Each process says every few moments
that it is alive, in the key-value store that JAX's coordination service keeps, and looks whether the others did; who finds
one silent for `mesh.heartbeat_seconds` ends its own process, with a line that names the lost one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from functools import partial
from typing import Any

from jaxtune.types import RESUME_EXIT_CODE, UserError

_LOOKS = 10  # within `heartbeat_seconds`
_ALIVE, _DONE, _FAILED = "jaxtune/alive/", "done", "failed"
_TAIL = "the same command with --config.checkpoint.resume=True, on all hosts, goes on from the last checkpoint"
_stopped = threading.Event()
_looking: threading.Thread | None = None
_pause_seconds = 0.0
_keep: list[Any] = []  # what C code may call must not be collected


def join(coordinator: str, num_processes: int, process_id: int, heartbeat_seconds: int) -> None:
    """Joins the other processes: by `coordinator` (HOST:PORT of process 0), or by what Cloud TPU tells each host.

    Raises:
      UserError: numbers that do not fit together.
    """
    global _looking, _pause_seconds
    import jax

    # JAX's own watch ends a process too, without a word on what to do: it is the second to notice.
    initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=2 * heartbeat_seconds + 10)
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator needs --num_processes=N and --process_id=0..N-1; got {num_processes} and {process_id}"
            )
        initialize(coordinator, num_processes, process_id)
    elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        initialize()
    else:
        return
    _catch_abort()
    _pause_seconds = heartbeat_seconds / _LOOKS
    _looking = threading.Thread(target=_watch, daemon=True)
    _looking.start()


def joined() -> bool:
    """Whether this process is one of several."""
    return _looking is not None


def await_loss(error: BaseException) -> None:
    """After an error of the runtime, which a collective ends in when the process at its other end is gone: gives the watch
    the time in which it finds a loss, and so ends this process. Returns where there is none, or where the error is another."""
    import jax

    if _looking is not None and isinstance(error, jax.errors.JaxRuntimeError):
        _looking.join((_LOOKS + 3) * _pause_seconds)


def leave(code: int) -> None:
    """Tells the others that this process is done, with an exit code; after an error it ends here, without waiting for them."""
    if _looking is None:
        return
    failed = code not in (0, RESUME_EXIT_CODE)
    _stopped.set()
    _looking.join()
    _say(_FAILED if failed else _DONE)
    if not failed:
        return
    for _ in range(
        _LOOKS * (_me() == 0)
    ):  # the service ends with process 0: time for the others to say what they have found
        if all(value in (_DONE, _FAILED) for value in _said().values()):
            break
        time.sleep(_pause_seconds)
    _end(code)


def _state() -> Any:
    from jax._src import distributed  # JAX has no public door to its key-value store

    return distributed.global_state


def _me() -> int:
    return int(_state().process_id)


def _say(word: str) -> None:
    with contextlib.suppress(RuntimeError):  # the service is gone, and with it whoever would have read this
        _state().client.key_value_set(f"{_ALIVE}{_me()}", word, allow_overwrite=True)


def _said() -> dict[int, str]:
    """What each process said last."""
    with contextlib.suppress(RuntimeError):
        return {int(key.rsplit("/", 1)[1]): value for key, value in _state().client.key_value_dir_get(_ALIVE)}
    return {}


def _watch() -> None:
    """Says that this process is alive and looks at the others, until the end. Looks are counted, not seconds: a process that
    was itself held up for a while has not been looking."""
    beat, last, silent = 0, dict[int, str](), dict[int, int]()
    while not _stopped.wait(_pause_seconds):
        beat += 1
        _say(str(beat))
        for other, word in _said().items():
            changed = other == _me() or word == _DONE or word != last.get(other)
            last[other], silent[other] = word, 0 if changed else silent[other] + 1
            if word == _FAILED and silent[other] > 1:  # time enough to find the same error oneself
                _lost(f"process {other} ended with an error (its own log says which)")
            if silent[other] >= _LOOKS:
                _lost(f"process {other} was lost: nothing heard of it for {_LOOKS * _pause_seconds:.0f} s")


def _catch_abort() -> None:
    """Puts a line of ours where JAX's C++ aborts this process, as it does at once when process 0 is gone, and with it the
    coordination service: from there no Python handler would run."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        _tell("process 0, by which the others find each other, was lost" if _me() else "another process was lost")
        os._exit(RESUME_EXIT_CODE)

    _keep.append(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)


def _lost(what: str) -> None:
    _tell(what)
    _say(_FAILED)
    if _me() == 0:
        time.sleep(2 * _pause_seconds)  # the service ends with process 0: time for the others to see the same
    _end(RESUME_EXIT_CODE)


def _tell(what: str) -> None:
    os.write(2, f"\nerror: {what}, so this process ends too; {_TAIL}\n".encode())


def _end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)  # an orderly end would wait for the process that is gone
