"""Programs compiled: by a thread, while the weights load; and kept in a folder, so that the next run need not."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtune import workdir
from jaxtune.config import ConfigDict
from jaxtune.train import step as step_lib
from jaxtune.train.state import Program
from jaxtune.types import UserError

_HIT = "/jax/compilation_cache/cache_hits"
_THREAD = "jaxtune-compile"
_WORTH_KEEPING_SECONDS = 0.2  # of compiling


class Compiled(NamedTuple):
    """An executable, how long it took to come by (tracing included), and whether it was kept from an earlier run."""

    run: Callable[..., Any]
    seconds: float
    from_cache: bool


class Compiling:
    """The training step, then the evaluation of validation rows, on their way in a thread of their own.

    XLA releases the interpreter lock, so that the caller can read weights meanwhile. What goes wrong is raised where the
    result is asked for, or by `watching` before. A process waits for the
    thread before it ends, for XLA cannot be interrupted; `leave` does not.
    """

    def __init__(self, config: ConfigDict, program: Program, evaluates: bool = True):
        """`evaluates` says whether there are validation rows."""
        self._step: Future[Compiled] = Future()
        self._evaluate: Future[Compiled] = Future()
        threading.Thread(target=self._compile, args=(config, program, evaluates), name=_THREAD).start()

    def step(self) -> Compiled:
        """The step of `step.make`, once it is there; raises what compiling raised."""
        return self._step.result()

    def evaluate(self) -> Compiled:
        """The evaluation of `step.make_eval`, likewise."""
        return self._evaluate.result()

    def watching(self, progress: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """`progress`, which stops at the next item when compiling has failed: nobody waits for weights in vain."""

        def watched(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
            for item in progress(items, total, label):
                if self._step.done():
                    self._step.result()
                yield item

        return watched

    def _compile(self, config: ConfigDict, program: Program, evaluates: bool) -> None:
        try:
            batch = step_lib.abstract_batch(config, program)
            self._step.set_result(_timed(step_lib.make(config, program), program.state, program.frozen, batch))
            if evaluates:
                evaluate = step_lib.make_eval(config, program)
                self._evaluate.set_result(_timed(evaluate, program.state.params, program.frozen, batch))
        except BaseException as error:  # whatever it is, the one who waits is to know
            for future in (self._step, self._evaluate):
                if not future.done():
                    future.set_exception(error)


def leave(code: int) -> None:
    """Ends the process with `code`, if a program is being compiled whose result nobody will ask for."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _timed(jitted: Any, *shapes: Any) -> Compiled:
    began = time.perf_counter()
    lowered = jitted.lower(*shapes)
    with _hits() as hits:
        run = lowered.compile()
    return Compiled(run, time.perf_counter() - began, bool(hits))


@contextmanager
def _hits() -> Iterator[list[str]]:
    """Collects the programs that this thread finds in the cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def note(event: str, **_: Any) -> None:
        if event == _HIT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(note)


@contextmanager
def kept(config: ConfigDict) -> Iterator[None]:
    """While open, compiled programs are kept in, and taken from, the folder of `config.compile_cache`.

    What JAX was told before (JAX_COMPILATION_CACHE_DIR) wins over "". On a CPU each kind of processor has a folder of its
    own, for XLA compiles for the very instructions that it has, and does not say so in a program's name.

    Raises:
      UserError: the folder cannot be written, or the bucket not be reached. (The default one is then done without.)
    """
    name = config.compile_cache
    if name == "" and jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    folder, remote = _folder(name), "://" in name
    options: dict[str, Any] = {"jax_enable_compilation_cache": folder is not None}
    if folder is not None:
        options |= {
            "jax_compilation_cache_dir": folder,
            "jax_compilation_cache_max_size": -1 if remote else int(config.compile_cache_gib * (1 << 30)),
            "jax_persistent_cache_min_compile_time_secs": _WORTH_KEEPING_SECONDS,
        }
        if remote:  # XLA writes these by itself, and to this machine alone
            options["jax_persistent_cache_enable_xla_caches"] = ""
    before = {option: jax.config.values[option] for option in options}
    _set(options)
    try:
        yield
    finally:
        _set(before)


def _folder(name: str) -> str | None:
    """Where programs are kept; None = nowhere."""
    if name == "off":
        return None
    own = [_processor()] if jax.default_backend() == "cpu" else []
    if "://" in name:
        workdir.check("compile_cache", name)
        return "/".join([name.rstrip("/"), *own])
    default = Path(os.environ.get("JAXTUNE_CACHE") or "~/.cache/jaxtune") / "compiled"
    folder = Path(name or default).expanduser().joinpath(*own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if not name:
            return None
        raise UserError(
            f"compile_cache={name!r}: cannot write there ({error}); choose another folder, or 'off'"
        ) from error
    return str(folder)


def _set(options: dict[str, Any]) -> None:
    for option, value in options.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()  # JAX looks at them once


def _processor() -> str:
    """A name for this kind of processor, of what it is and what instructions it has."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    told = "\n".join(sorted(set(known))) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
