"""The verb `sweep`: one run after another, each a process and a folder of its own, over combinations of config values.

WORKDIR then holds `runs/NAME` (a run's workdir each), `configs/NAME.json`, `logs/NAME.txt`, and the comparison in `sweep.json`,
`sweep.csv` and `sweep.png`. The same command goes on where it stopped: finished runs stay, a run that was stopped resumes, and
failed ones are tried again. A failed run is a line of the table; the others go on.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import checkpoint, pictures, validation
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.evals import tradeoff
from jaxtune.train.loop import Preempted
from jaxtune.types import RESUME_EXIT_CODE, UserError
from jaxtune.validation_methods import ON_POLICY, is_range
from jaxtune.workdir import shown, write_whole

Start = Callable[[Path, Path, bool, Path], int]  # (config file, workdir, resume, log) -> exit code


class Run(NamedTuple):
    """A combination: the `values` by config key, and the whole config that has them."""

    name: str
    values: dict[str, Any]
    config: ConfigDict


def in_a_process(
    config: Path, workdir: Path, resume: bool, log: Path, verb: str = "train", environment: Mapping[str, str] | None = None,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda process: None, keep: Sequence[int] = (),
) -> int:  # fmt: skip
    """Trains, or follows another verb, in a process of its own, whose output goes to `log`; returns its exit code.

    A SIGTERM of this process is passed on, if this is its main thread; from another, `started` gets the process. `environment`
    is set beside this process's own. `keep`: file descriptors that it holds open too, such as a lock that must outlive this
    process.
    """
    command = [sys.executable, "-m", "jaxtune.launch", verb, f"--config={config}", f"--workdir={workdir}"]
    command += ["--config.checkpoint.resume=True"] if resume else []
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, pass_fds=keep
        )
    started(process)
    is_main = threading.current_thread() is threading.main_thread()  # no other may handle signals
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate()) if is_main else None
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both; the run is saving
        process.wait()
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def sweep(config: ConfigDict, workdir: Path, start: Start = in_a_process) -> None:
    """Runs every combination that has no result yet, and compares them.

    Raises:
      UserError: no axes, values that a config cannot have, a workdir of another sweep, or not one run came to its end.
      Preempted: a run was stopped, and saved.
    """
    runs = combinations(config, workdir)
    rows = known(workdir, runs, "sweep")
    for number, run in enumerate(runs, 1):
        if rows[run.name].get("status") == "done":
            continue
        say(config, f"run {number} of {len(runs)}: {run.name}")
        began, folder, log = time.monotonic(), workdir / "runs" / run.name, workdir / "logs" / f"{run.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        code = start(workdir / "configs" / f"{run.name}.json", folder, checkpoint.is_used(str(folder)), log)
        if code == RESUME_EXIT_CODE:
            raise Preempted(f"stopped in run {number} of {len(runs)}, {run.name}; saved")
        row: dict[str, Any] = {"name": run.name, "values": run.values, "seconds": round(time.monotonic() - began, 1)}
        if code:
            row |= {"status": "failed", "code": code, "error": last_words(log, code), "metrics": {}}
            say(config, f"  failed: {row['error']}")
        else:
            row |= {"status": "done", "metrics": measured(folder, config.sweep.goal, config.sweep.metric)}
            value = row["metrics"].get(config.sweep.metric)
            say(config, f"  {config.sweep.metric} {'–' if value is None else f'{value:.4f}'}")
        rows[run.name] = row
        write_whole(workdir / "sweep.json", json.dumps(_told(config, rows), indent=2) + "\n")
    _report(config, workdir, runs, rows)


def last_words(log: Path, code: int) -> str:
    """The last line that a failed run printed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else f"exit code {code}"


def combinations(config: ConfigDict, workdir: Path) -> list[Run]:
    """The runs, by their names, each a config that was checked.

    Raises:
      UserError: there are no axes, or a value is not one that its key can have.
    """
    sweep, keys = config.sweep, [key for key, _ in config.sweep.axes]
    if not keys:
        raise UserError(
            "sweep needs config.sweep.axes: ((key, (value, …)), …), e.g. (('optim.learning_rate', (1e-4, 3e-4)),)"
        )
    if sweep.method == "grid":
        chosen = list(itertools.product(*(values for _, values in sweep.axes)))[: sweep.num_runs or None]
    else:
        drawn = np.random.Philox(key=[sweep.seed, 0]).random_raw(sweep.num_runs * len(keys))
        shares = ((drawn >> np.uint64(11)) * 2.0**-53).reshape(sweep.num_runs, len(keys))
        pick = zip(
            *(
                [_picked(config, axis[0], axis[1], x) for x in column]
                for axis, column in zip(sweep.axes, shares.T, strict=True)
            ),
            strict=True,
        )
        chosen = list(dict.fromkeys(pick))
    runs = [_run(config, workdir, dict(zip(keys, values, strict=True))) for values in chosen]
    rewarded = next((run.config.train.objective for run in runs if run.config.train.objective in ON_POLICY), None)
    if rewarded and sweep.metric.startswith("eval/"):
        raise UserError(
            f"sweep.metric={sweep.metric!r}: train.objective={rewarded!r} has no validation loss; set sweep.metric='reward' and "
            "sweep.goal='max', or a metric that is measured after training"
        )
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"config.sweep.axes makes {twice!r} twice; expected values that differ")
    return runs


def _picked(config: ConfigDict, key: str, values: Sequence[Any], share: float) -> Any:
    """The value at a share, 0 to 1, of a list or a range; numbers of a range have four digits that count."""
    if not is_range(values):
        return values[int(share * len(values))]
    low, high = values[1:]
    found = low * (high / low) ** share if values[0] == "log" else low + (high - low) * share
    whole = isinstance(config_lib.lookup(config, key), int)
    return round(found) if whole else float(f"{found:.4g}")


def _run(config: ConfigDict, workdir: Path, values: dict[str, Any]) -> Run:
    tails = [key.rpartition(".")[2] for key in values]
    told = [tail if tails.count(tail) == 1 else key for key, tail in zip(values, tails, strict=True)]
    name = ",".join(f"{key}={brief(value)}" for key, value in zip(told, values.values(), strict=True))
    return made(config, workdir, name, values, "config.sweep.axes", "sweep")


def made(config: ConfigDict, workdir: Path, name: str, values: Mapping[str, Any], where: str, what: str) -> Run:
    """A run of this name: the config, without a comparison of its own, with `values` by key, checked.

    Args:
      where: the config key that says so, for errors.
      what: it makes a run of.

    Raises:
      UserError: a value that its key cannot have.
    """
    one, plain = config.copy_and_resolve_references(), config_lib.base()
    one.sweep, one.frontier, one.checkpoint.resume = plain.sweep, plain.frontier, False
    for key, value in values.items():
        section, _, field = key.rpartition(".")
        try:
            (config_lib.lookup(one, section) if section else one)[field] = value
        except (TypeError, ValueError):
            now = config_lib.lookup(config, key)
            raise UserError(f"{where}: {key} takes a {type(now).__name__} (now {now!r}), not {value!r}") from None
    try:
        validation.validate(one)
    except UserError as error:
        raise UserError(f"run {name} of the {what}: {error}") from None
    one.name, one.workdir = f"{config.name} {name}", str(workdir / "runs" / name)
    return Run(name, dict(values), one)


def brief(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)[:60].strip("_") or "none"


def known(workdir: Path, runs: list[Run], what: str) -> dict[str, dict[str, Any]]:
    """What an earlier start of this `what` ("sweep") found, by name; writes the configs.

    Raises:
      UserError: the workdir's runs are of another config.
    """
    file = workdir / f"{what}.json"
    told = json.loads(file.read_text())["runs"] if file.exists() else []
    found: dict[str, dict[str, Any]] = {row["name"]: row for row in told}
    for run in runs:
        path, text = workdir / "configs" / f"{run.name}.json", config_lib.to_json(run.config) + "\n"
        if path.exists() and json.loads(path.read_text()) | {"workdir": ""} != json.loads(text) | {"workdir": ""}:
            raise UserError(
                f"workdir {workdir} holds a {what} whose run {run.name} has another config: choose another --workdir"
            )
        write_whole(path, text)
    return {run.name: found.get(run.name, {}) for run in runs}


def measured(folder: Path, goal: str, metric: str) -> dict[str, float]:
    """A finished run's figures: the best of each `eval/…` by `goal` (losses: the lowest), its training loss and `metric`, where
    that is of the steps too (as `reward` is), over the last tenth of them, and what was measured after training, by name.
    """
    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []:
        lines.append(json.loads(line))
    found: dict[str, float] = {}
    for name in ("loss", metric):
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if values:
            found[name] = float(np.mean(values[-max(1, len(values) // 10) :]))
    for name in sorted({key for line in lines for key in line if key.startswith("eval/")}):
        values = [line[name] for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
        if values:
            found[name] = min(values) if goal == "min" or "loss" in name else max(values)
    report = folder / "report.json"
    after = json.loads(report.read_text()).get("after", {}) if report.exists() else {}
    return found | {name: estimate["value"] for name, estimate in after.items()}


def _told(config: ConfigDict, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The comparison, best runs first, failed ones last."""
    metric, sign = config.sweep.metric, 1 if config.sweep.goal == "min" else -1

    def place(row: dict[str, Any]) -> tuple[bool, bool, float]:
        value = row["metrics"].get(metric)
        return row["status"] != "done", value is None, 0.0 if value is None else sign * value

    ended = sorted((row for row in rows.values() if row), key=place)
    return {"metric": metric, "goal": config.sweep.goal, "runs": ended}


def _report(config: ConfigDict, workdir: Path, runs: list[Run], rows: dict[str, dict[str, Any]]) -> None:
    """Writes the table and the plot, and prints the table."""
    told, keys, metric = _told(config, rows)["runs"], list(runs[0].values), config.sweep.metric
    done = [row for row in told if row["status"] == "done"]
    names = [metric] + sorted({name for row in done for name in row["metrics"]} - {metric})
    header = [*keys, "status", *names, "seconds"]
    table = [
        [
            *(row["values"][key] for key in keys),
            row["status"],
            *(row["metrics"].get(name) for name in names),
            row["seconds"],
        ]
        for row in told
    ]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *table])
    write_whole(workdir / "sweep.csv", buffer.getvalue())
    print(tradeoff.columns(header, table))
    for row in told:
        if row["status"] != "done":
            print(f"failed: {row['name']}: {row['error']} (logs/{row['name']}.txt)")
    points = [row for row in done if row["metrics"].get(metric) is not None]
    if not done:
        raise UserError(f"all {len(told)} runs of the sweep failed; the first: {told[0]['error']}")
    if not points:
        raise UserError(f"no run has sweep.metric={metric!r}; they have {', '.join(names[1:])}")
    plain = [
        [value if isinstance(value, int | float) else str(value) for value in row["values"].values()] for row in points
    ]
    heights = [row["metrics"][metric] for row in points]
    panels = [pictures.Panel("", key, metric, [x[at] for x in plain], heights) for at, key in enumerate(keys)]
    drawn = pictures.png(workdir / "sweep.png", panels)
    where = shown(config.workdir, workdir, workdir / "sweep.csv")
    print(f"best: {points[0]['name']}; table in {where}" + (", plot beside it" if drawn else ""))


def say(config: ConfigDict, text: str) -> None:
    if config.tracking.progress != "off":
        print(text, file=sys.stderr, flush=True)
