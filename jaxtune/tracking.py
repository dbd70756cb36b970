"""Where a run's numbers go: metrics.jsonl always; TensorBoard and W&B if asked; a bar or plain lines for people."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO, TypeVar

from ml_collections import ConfigDict
from tqdm import tqdm

from jaxtune.types import UserError
from jaxtune.workdir import writing as writing

T = TypeVar("T")
Clock = Callable[[], float]

_TENSORBOARD = ("tensorboard", "tracking.tensorboard=True", "tracking.tensorboard=False")  # extra, asked, instead
_LINE_SECONDS = 10.0  # between two plain lines of `progress`


class _Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes the metrics of a run, a line a step, to every sink that `config.tracking` chooses; only process 0 writes.

    Use it as a context manager, or call `close()`. Values may be Python, NumPy or JAX scalars; reading a JAX scalar
    waits for the device. The console shows `loss, learning_rate, tokens_per_second, padding_share` where present, and
    counts steps that are done: step 0 of the files is its 1.

    Args:
      workdir: folder of the run.
      tracking: `config.tracking`.
      total_steps: the run's last step, for the time left.
      first_step: the first step this process will log. Lines of it and later ones, left by a run that was cut off,
        are removed, so that each step appears once; 0 starts an empty file.
      log_every_steps: a console line every so many steps where there is no bar.
      is_main: whether this is process 0; elsewhere every method does nothing.
      config: the resolved config as a dictionary, shown by W&B.
      stream, clock: the console and its seconds.

    Raises:
      UserError: an extra is missing, or (from `log` too) the disk is full.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tracking: ConfigDict,
        *,
        total_steps: int,
        first_step: int = 0,
        log_every_steps: int = 1,
        is_main: bool = True,
        config: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ):
        self._sinks: list[_Sink] = []
        self._console: _Bar | _Lines | None = None
        if not is_main:
            return
        folder, stream = Path(workdir), stream or sys.stderr
        folder.mkdir(parents=True, exist_ok=True)
        if tracking.tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", first_step))
        if tracking.wandb:
            self._sinks.append(_WandB(folder, tracking.wandb, first_step, config))
        if tracking.progress != "off":
            if _wants_bar(tracking.progress, stream):
                self._console = _Bar(total_steps, first_step, stream)
            else:
                self._console = _Lines(total_steps, log_every_steps, stream, clock)
            self._sinks.append(self._console)
        # Opened last, for a missing extra must not cost an older run its lines; written first, for it is the record.
        self._sinks.insert(0, _Jsonl(folder / "metrics.jsonl", first_step))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records a step's metrics; keys of evaluations start with `eval/`."""
        if self._sinks:
            plain = {key: _plain(value) for key, value in metrics.items()}
            for sink in self._sinks:
                sink.write(step, plain)

    def say(self, text: str) -> None:
        """Shows a line to the user without breaking the bar."""
        if self._console:
            self._console.say(text)

    def close_console(self) -> None:
        """Ends the bar or the lines; what is logged later goes to files alone."""
        if self._console:
            self._sinks.remove(self._console)
            self._console.close()
            self._console = None

    def close(self) -> None:
        """Closes every sink; later calls do nothing."""
        sinks, self._sinks, self._console = self._sinks, [], None
        for sink in sinks:
            sink.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(tracking: ConfigDict) -> None:
    """Refuses what needs an extra that is not installed, before any work is done.

    Raises:
      UserError: saying what to install.
    """
    if tracking.tensorboard:
        _extra("tensorboardX", *_TENSORBOARD)
    if tracking.wandb:
        _extra("wandb", "wandb", f"tracking.wandb={tracking.wandb!r}", "tracking.wandb=''")


def red(text: str, stream: TextIO) -> str:
    """The text in red, where `stream` is a terminal that shows colours; as it is where not, or NO_COLOR is set (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[31m{text}\x1b[0m"


def set_aside(path: Path) -> Path | None:
    """Renames a file with anything in it, `metrics.jsonl` to `metrics.1.jsonl`; returns its new path, or None."""
    if not path.exists() or not path.stat().st_size:
        return None
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(other for other in numbered if not other.exists()))


def steps_logged(path: Path) -> int:
    """How many steps a run has taken by its `metrics.jsonl`: its highest step and one; 0 where there is none."""
    num = 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last, torn by a crash
            num = max(num, json.loads(line)["step"] + 1)
    return num


def progress(
    iterable: Iterable[T],
    total: int | None,
    label: str,
    *,
    mode: str = "auto",
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[T]:
    """Yields the items of long work and shows how far it is: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
      iterable: the items.
      total: how many; None = unknown, so no time left is shown.
      label: what is being done, e.g. "tokenise".
      mode: `config.tracking.progress`; "off" for processes other than 0.
      stream, clock: the console (None = stderr) and its seconds.
    """
    stream = stream or sys.stderr
    if mode == "off":
        yield from iterable
    elif _wants_bar(mode, stream):
        yield from tqdm(iterable, total=total, desc=label, file=stream, dynamic_ncols=True, leave=False)
    else:
        start = shown = clock()
        num = 0
        for num, item in enumerate(iterable, 1):
            yield item
            now = clock()
            if now - shown >= _LINE_SECONDS and num != total:
                shown = now
                left = _duration((now - start) * (total / num - 1)) if total else ""
                of = f"/{total} ({num / total:.0%})  {left} left" if total else ""
                print(f"{label} {num}{of}", file=stream, flush=True)
        if shown > start:  # work that was quick leaves no trace
            print(f"{label} {num} done in {_duration(clock() - start)}", file=stream, flush=True)


def quiet_libraries() -> None:
    """Keeps libraries' chatter off the console: people are to see jaxtune's own words."""
    import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("absl", "jax._src.xla_bridge", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints each retry's traceback, and raises at the end
    # A program that cannot be kept, or read again, is compiled anew: nobody has to do anything about it.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if not getattr(sys.excepthook, "quiet", False):
        _without_closed_loops()


def _without_closed_loops() -> None:
    """Mutes one complaint: writes of a save that failed end after orbax has closed the loop that waited for them."""
    shown, unraisable = sys.excepthook, sys.unraisablehook

    def harmless(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        if not harmless(error):
            shown(kind, error, trace)

    excepthook.quiet = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
    sys.unraisablehook = lambda problem: None if harmless(problem.exc_value) else unraisable(problem)


class _Jsonl:
    """A JSON object a line: `step`, then the metrics. A number that is not finite is null and named in `nonfinite`."""

    def __init__(self, path: Path, first_step: int):
        self._path = path
        with writing(path):
            if first_step and path.exists():
                _keep_before(path, first_step)
            # Unbuffered, so that a line is on its way to the disk when `write` returns, and nothing fails on close.
            self._file = open(path, "ab" if first_step else "wb", buffering=0)  # noqa: SIM115

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        nonfinite = [key for key, value in metrics.items() if not _is_finite(value)]
        line = {"step": step} | {key: None if key in nonfinite else value for key, value in metrics.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        with writing(self._path):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


def _keep_before(path: Path, first_step: int) -> None:
    """Cuts the lines of `first_step` and later, and a last line torn by a crash."""
    partial = path.with_name(path.name + ".partial")
    with open(path, "rb") as old, open(partial, "wb") as new:
        for line in old:
            try:
                keep = line.endswith(b"\n") and json.loads(line)["step"] < first_step
            except ValueError:
                keep = False
            if keep:
                new.write(line)
    os.replace(partial, path)


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        module = _extra("tensorboardX", *_TENSORBOARD)
        self._writer = module.SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float) and _is_finite(value):
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str, first_step: int, config: Mapping[str, Any] | None):
        module = _extra("wandb", "wandb", f"tracking.wandb={project!r}", "tracking.wandb=''")
        name_file = folder / "wandb_run_id.txt"  # so that a resumed run goes on in the same W&B run
        known = name_file.read_text().strip() if first_step and name_file.exists() else None
        self._run = module.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config or {}), id=known, resume="allow"
        )
        name_file.write_text(self._run.id)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=max(0, step))  # what was measured before the first step is of step -1

    def close(self) -> None:
        self._run.finish()


class _Bar:
    """tqdm's bar, with the facts behind it; evaluations scroll by above it."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO):
        form = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix} [{elapsed} < {remaining}]"
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc="train", file=stream, dynamic_ncols=True, bar_format=form
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if evaluated := _eval_facts(metrics):
            self.say(f"step {step + 1}  {evaluated}")
        if facts := _facts(metrics):
            self._bar.set_postfix_str("  ".join(facts), refresh=False)
        self._bar.update(step + 1 - self._bar.n)

    def say(self, text: str) -> None:
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """The bar's facts as plain lines, for logs."""

    def __init__(self, total_steps: int, every_steps: int, stream: TextIO, clock: Clock):
        self._total, self._every, self._stream, self._clock = total_steps, every_steps, stream, clock
        self._began: tuple[int, float] | None = None  # the end of the first step: it compiles, and the rest does not

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        facts, evaluated = _facts(metrics), _eval_facts(metrics)
        left, done = "", step + 1
        if facts:
            now = self._clock()
            first, start = self._began = self._began or (done, now)
            if first < done < self._total:
                left = f"{_duration((now - start) / (done - first) * (self._total - done))} left"
            if done % self._every and done not in (first, self._total):
                facts = []
        if facts or evaluated:
            self.say("  ".join(filter(None, [f"step {done}/{self._total}", *facts, evaluated, left if facts else ""])))

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


def _facts(metrics: Mapping[str, Any]) -> list[str]:
    forms = {
        "loss": "loss {:.4f}",
        "learning_rate": "rate {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "padding_share": "padding {:.0%}",
    }
    return [form.format(metrics[key]) for key, form in forms.items() if key in metrics]


def _eval_facts(metrics: Mapping[str, Any]) -> str:
    evaluated = [(key, value) for key, value in metrics.items() if key.startswith("eval/")]
    return "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in evaluated)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _plain(value: Any) -> Any:
    """Returns a Python number for a NumPy or JAX scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _wants_bar(mode: str, stream: TextIO) -> bool:
    return mode == "bar" or (mode == "auto" and stream.isatty())


def _extra(module: str, extra: str, asked: str, instead: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{asked} needs the package {module}, which is missing: pip install 'jaxtune[{extra}]', or set {instead}"
        ) from error
