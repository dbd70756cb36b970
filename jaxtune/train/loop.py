"""Training, told as a story: batches in, metrics out, evaluation, checkpoints, and every way that it can end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune import optim, sharding
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import ConfigDict
from jaxtune.train import goodput, guard, profiling
from jaxtune.train import step as step_lib
from jaxtune.train.compiled import Compiling
from jaxtune.train.goodput import STEP, Wall
from jaxtune.train.signals import Signals
from jaxtune.train.state import Params, Program, State
from jaxtune.types import Batch, UserError

_OVERFIT_EVALS = 2  # evaluations in a row with training loss down and validation loss up, before a notice


class Preempted(Exception):
    """SIGTERM or Ctrl-C came; the state is saved. Running the same command again with `checkpoint.resume` goes on."""


class Data(NamedTuple):
    """`train(start_step, num_steps, current)` and `validation()` yield host batches; `row_id` names a row by its number.

    `current()` gives all parameters as they are, to batches that the model writes itself. `told(step)` is what the data have
    to say of a step, logged with it.
    """

    train: Callable[[int, int, Callable[[], Params]], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]] | None
    row_id: Callable[[int], str]
    told: Callable[[int], dict[str, float]] = lambda step: {}


@dataclasses.dataclass
class Progress:
    """What the loop remembers beyond the state; saved with every checkpoint."""

    best_loss: float | None = None
    best_step: int = 0
    evals_without_better: int = 0
    evals_apart: int = 0  # in a row, training loss down and validation loss up
    last_train_loss: float | None = None
    last_eval_loss: float | None = None
    train_loss_at_eval: float = float("inf")  # the running training loss when validation was last measured
    trained_tokens: int = 0
    tokens: int = 0
    capacity_tokens: int = 0  # tokens that the batches had room for
    timed_tokens: int = 0  # tokens of the steps that seconds["training"] counts
    timed_steps: int = 0  # those steps
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # of this run and those that it goes on from
    skipped_steps: int = 0
    skipped_in_row: int = 0
    notices: list[str] = dataclasses.field(default_factory=list)
    within_step: int = 0  # the last at which every protected set was measured within its tolerance
    broken_step: int = 0  # the first at which one was not, and which
    broken_sets: list[str] = dataclasses.field(default_factory=list)


class Outcome(NamedTuple):
    """Of the whole run, what it was resumed from included.

    `seconds` holds compile, first_step, training and validation; training excludes the first three.
    """

    state: State
    progress: Progress
    steps: int
    tokens_per_second: float
    padding_share: float
    seconds: dict[str, float]
    mfu: float | None  # model FLOPs utilisation; None where FLOPs or the devices' peak are not known


class Flops(NamedTuple):
    """What model FLOPs utilisation is made of; None = not known.

    `per_step` is the model's own arithmetic in one optimizer step, over all devices; `peak` what they could do in a second.
    """

    per_step: float | None = None
    peak: float | None = None

    def utilisation(self, seconds: float) -> dict[str, float]:
        """The share of the peak that a step of so many seconds reached, as a metric."""
        return {"mfu": self.per_step / seconds / self.peak} if self.per_step and self.peak else {}


_UNKNOWN, _UNGUARDED = Flops(), guard.Guard()


class _Pending(NamedTuple):
    step: int
    metrics: dict[str, jax.Array]
    batch: Batch


def _idle(pending: _Pending | None) -> bool:
    """Whether the device has nothing to do: no step was dispatched, or it has ended."""
    return pending is None or bool(pending.metrics["loss"].is_ready())  # type: ignore[attr-defined]


def train(
    config: ConfigDict,
    program: Program,
    state: State,
    frozen: Params,
    data: Data,
    tracker: Any,
    checkpoints: Checkpoints,
    workdir: Path,
    progress: Progress,
    compiling: Compiling | None = None,
    wall: Wall | None = None,
    flops: Flops = _UNKNOWN,
    guarded: guard.Guard = _UNGUARDED,
) -> Outcome:
    """Trains from `state.step` to `config.train.steps`; a run that had stopped early stays as it is.

    The metrics of a step are fetched after the next one was dispatched, so the device never waits for the host.

    Args:
      compiling: the step on its way, if that has begun.
      wall: the stopwatch of the process; what follows goes to it.
      flops: of a step, and of the devices.
      guarded: what else the weights are measured by on the way.

    Raises:
      UserError: a step's loss or gradient was not finite, or its loss exploded (with `on_nonfinite="stop"`; with "skip",
        too many of them in a row).
      Preempted: SIGTERM or Ctrl-C came and the state was saved.
    """
    first, last = int(state.step), config.train.steps
    for part in ("compile", "first_step", "training", "validation"):
        progress.seconds.setdefault(part, 0.0)
    seconds, done, wall = progress.seconds, first, wall or Wall()
    if _stops_early(config, progress):
        return _outcome(state, progress, first, flops)
    fields, batch_size = step_lib.fields(config, program), config.train.batch_size
    capacity = step_lib.capacity_tokens(config, program)
    compiling = compiling or Compiling(config, program, data.validation is not None)
    with wall("compile"):
        run_step, took_compiling, from_cache = compiling.step()
    seconds["compile"] += took_compiling
    evaluate = _evaluator(config, program, data, compiling)
    stop_asked, saver, profile = Signals(), _Saver(config), profiling.Profile(config, workdir, tracker.say, first)
    pending: _Pending | None = None
    clock, stopped_early = time.perf_counter(), False

    def settle() -> None:
        """Fetches the pending step's metrics, records them, and judges them."""
        nonlocal pending, clock
        if pending is None:
            return
        record, pending = pending, None
        values = {name: np.asarray(value).item() for name, value in record.metrics.items()}
        now = time.perf_counter()
        took, clock = now - clock, now
        wall.lap(STEP)
        more = flops.utilisation(took) | data.told(record.step)
        if record.step == first:
            seconds["first_step"] += took
            started = wall.first_step(took_compiling, from_cache)
            more |= goodput.start_metrics(started)
            tracker.say(goodput.told(started))
        else:
            seconds["training"] += took
            progress.timed_tokens += values["tokens"]
            progress.timed_steps += 1
        wall.count(record.step, bool(values["ok"]))
        _record(config, tracker, progress, record, values | more, took, capacity, workdir, data.row_id)

    def current() -> Params:
        """All parameters as they are now, once the step that makes them has ended."""
        settle()
        wall.lap("bookkeeping")
        return {**frozen, **state.params}

    with stop_asked, profile:
        for batch in data.train(first, last - first, current):
            step = done
            clock = time.perf_counter() if pending is None else clock  # with no step on its way, this one begins now
            if profile.is_due(step):
                settle()
                wall.lap("bookkeeping")
                profile.turn()
                wall.lap("profile")
                clock = time.perf_counter()
            arrays = sharding.to_global({name: batch[name] for name in fields}, program.mesh, batch_size)
            wall.lap("data" if _idle(pending) else STEP)
            with profile.marked(step):
                state, metrics = run_step(state, frozen, arrays)
            settle()  # step n - 1, while step n runs
            pending = _Pending(step, metrics, batch)
            done = step + 1
            eval_loss = None
            if evaluate and (
                done == last or (config.train.eval_every_steps and done % config.train.eval_every_steps == 0)
            ):
                settle()
                wall.lap("bookkeeping")
                eval_loss = _validate(config, evaluate, state, frozen, tracker, progress, done)
                seconds["validation"] += wall.lap("validation")
                clock = time.perf_counter()
                stopped_early = _stops_early(config, progress)
                if stopped_early:
                    progress.notices.append(_early(config, progress, done))
            if any(due := guarded.due(config, done, eval_loss is not None)):
                settle()
                wall.lap("bookkeeping")
                guarded.look(due, done, {**frozen, **optim.in_use(config.optim, state)}, tracker, progress)
                wall.lap("evaluation")
                clock = time.perf_counter()
                if not stopped_early and guard.stops(config, progress):
                    stopped_early = True
                    progress.notices.append(guard.stopped(config, progress, done))
            interrupted = stop_asked.now(done)
            worth = done in (progress.best_step, guard.kept(config, progress))
            if saver.due(done, final=done == last or stopped_early or interrupted, worth=worth):
                settle()
                wall.lap("bookkeeping")
                # One that is not a number would compare as the best.
                loss = eval_loss if eval_loss is not None and np.isfinite(eval_loss) else None
                checkpoints.save(done, state, dataclasses.asdict(progress), loss)
                wall.lap("checkpoint")
                clock = time.perf_counter()
            if interrupted and done < last:
                checkpoints.wait()
                wall.lap("checkpoint")
                tracker.log(done - 1, wall.metrics())
                raise Preempted(f"stopped by {stop_asked.by} after step {done} of {last}; saved")
            if stopped_early:
                break
            wall.lap("bookkeeping" if _idle(pending) else STEP)
        settle()
    with wall("checkpoint"):
        checkpoints.wait()
    return _outcome(state, progress, done, flops)


def _early(config: ConfigDict, progress: Progress, done: int) -> str:
    best = "" if progress.best_loss is None else f" on step {progress.best_step}'s {progress.best_loss:.4f}"
    return f"Stopped early after step {done}: validation loss had not improved{best} for {config.train.patience} evaluations."


def _stops_early(config: ConfigDict, progress: Progress) -> bool:
    impatient = bool(config.train.patience) and progress.evals_without_better >= config.train.patience
    return impatient or guard.stops(config, progress)


def _outcome(state: State, progress: Progress, steps: int, flops: Flops) -> Outcome:
    timed, capacity = progress.seconds["training"], progress.capacity_tokens
    rate = progress.timed_tokens / timed if timed else 0.0
    mfu = flops.utilisation(timed / progress.timed_steps).get("mfu") if progress.timed_steps else None
    return Outcome(state, progress, steps, rate, 1 - progress.tokens / max(1, capacity), progress.seconds, mfu)


def _record(
    config: ConfigDict, tracker: Any, progress: Progress, record: _Pending, values: dict[str, Any], took: float, capacity: int,
    workdir: Path, row_id: Callable[[int], str],
) -> None:  # fmt: skip
    ok = bool(values.pop("ok"))
    trained, tokens = int(values.pop("trained_tokens")), int(values.pop("tokens"))
    progress.trained_tokens, progress.tokens = progress.trained_tokens + trained * ok, progress.tokens + tokens
    if ok and np.isfinite(values["loss"]):
        previous = progress.last_train_loss
        progress.last_train_loss = values["loss"] if previous is None else 0.9 * previous + 0.1 * values["loss"]
    progress.capacity_tokens += capacity
    tracker.log(
        record.step,
        {
            **values,
            "trained_tokens": progress.trained_tokens,
            "tokens_per_second": tokens / took,
            "step_seconds": took,
            "padding_share": 1 - tokens / capacity,
            **({} if ok else {"skipped": 1}),
        },
    )
    if ok:
        progress.skipped_in_row = 0
        return
    rows = [row_id(row) for row in np.unique(record.batch["row_ids_BT"]) if row >= 0]
    what = f"step {record.step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
    if config.train.on_nonfinite == "skip":
        progress.skipped_steps, progress.skipped_in_row = progress.skipped_steps + 1, progress.skipped_in_row + 1
        progress.notices.append(f"Skipped {what}; rows {', '.join(rows[:8])}{' …' if len(rows) > 8 else ''}.")
        tracker.say(f"WARNING: {progress.notices[-1]}")
        if config.train.max_skipped_steps and progress.skipped_in_row >= config.train.max_skipped_steps:
            raise UserError(
                f"{what}: skipped, the last of {progress.skipped_in_row} in a row (train.max_skipped_steps), so training stopped; "
                "lower optim.learning_rate or mend the data, and train in another --workdir"
            )
        return
    host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
    dump = workdir / f"bad_step_{record.step:06d}{host}"
    np.savez_compressed(dump.with_suffix(".npz"), **record.batch)  # type: ignore[arg-type]
    dump.with_suffix(".json").write_text(
        json.dumps({"step": record.step, **values, "rows": rows}, indent=2, default=str)
    )
    raise UserError(
        f"{what}: training stopped, the weights stay as they were before it. Its batch and the ids of its {len(rows)} rows "
        f"({', '.join(rows[:5])}{' …' if len(rows) > 5 else ''}) are in {dump}.npz and .json; "
        f"lower optim.learning_rate or mend those rows, and train in another --workdir; or set train.on_nonfinite='skip'"
    )


def _evaluator(
    config: ConfigDict, program: Program, data: Data, compiling: Compiling
) -> Callable[[Params, Params], dict[str, float]] | None:
    """Returns a function of (params, frozen) -> validation metrics, or None without validation rows."""
    if data.validation is None:
        return None
    fields, batches = step_lib.fields(config, program), data.validation

    def evaluate(params: Params, frozen: Params) -> dict[str, float]:
        sums: list[Any] = []
        run = compiling.evaluate().run
        for batch in batches():
            arrays = sharding.to_global({name: batch[name] for name in fields}, program.mesh, config.train.batch_size)
            sums.append(run(params, frozen, arrays))
        totals = jax.tree.map(lambda *xs: np.sum([np.asarray(x) for x in xs], axis=0, dtype=np.float64), *sums)
        loss, weight, extra = totals
        return {
            "loss": step_lib.mean(config, loss, weight),
            **{name: float(value / (w if w > 0 else 1.0)) for name, (value, w) in extra.items()},
        }

    return evaluate


def _validate(
    config: ConfigDict,
    evaluate: Callable[..., dict[str, float]],
    state: State,
    frozen: Params,
    tracker: Any,
    progress: Progress,
    done: int,
) -> float:
    """Measures validation loss after `done` steps; keeps the best, counts towards early stopping, and says when it overfits."""
    values = evaluate(optim.in_use(config.optim, state), frozen)
    tracker.log(done - 1, {f"eval/{name}": value for name, value in values.items()})
    loss, train_loss = values["loss"], progress.last_train_loss
    if not np.isfinite(loss):
        said = f"Validation loss after step {done} is {loss}."
        if done == config.train.steps:
            progress.notices.append(f"ERROR: {said} What was trained last is broken.")
        tracker.say(f"WARNING: {said}")
    if np.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step, progress.evals_without_better = loss, done, 0
    else:
        progress.evals_without_better += 1
    if progress.last_eval_loss is not None and train_loss is not None:
        apart = loss > progress.last_eval_loss and train_loss < progress.train_loss_at_eval
        progress.evals_apart = progress.evals_apart + 1 if apart else 0
        if progress.evals_apart == _OVERFIT_EVALS:
            progress.notices.append(
                f"Overfitting: validation loss rose to {loss:.4f} after step {done} (best {progress.best_loss:.4f}, step "
                f"{progress.best_step}) while training loss fell to {train_loss:.4f}. The best checkpoint is kept; "
                f"fewer steps, a lower learning rate or more varied data would help."
            )
            tracker.say(f"NOTICE: {progress.notices[-1]}")
    progress.last_eval_loss, progress.train_loss_at_eval = loss, train_loss if train_loss is not None else float("inf")
    return loss


class _Saver:
    """Decides when to save: every so many steps, every so many seconds, at a new best or one to roll back to, at the end."""

    def __init__(self, config: ConfigDict):
        self._every_steps, self._every_seconds = config.checkpoint.every_steps, config.checkpoint.every_seconds
        self._last = time.monotonic()

    def due(self, done: int, *, final: bool, worth: bool) -> bool:
        by_time = time.monotonic() - self._last >= self._every_seconds
        if jax.process_count() > 1:  # clocks differ: the first process decides, now and then
            by_time = done % 10 == 0 and bool(multihost_utils.broadcast_one_to_all(np.asarray(by_time)))
        if not (final or worth or by_time or (self._every_steps and done % self._every_steps == 0)):
            return False
        self._last = time.monotonic()
        return True
