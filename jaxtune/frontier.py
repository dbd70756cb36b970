"""The verb `frontier`: what each way of tuning gains, at each strength, against what it costs the base model.

Each run is a process and a folder of its own, as in `sweep`: WORKDIR then holds `runs/NAME`, `configs/NAME.json`, `logs/NAME.txt`,
and the comparison in `frontier.json`, `frontier.csv`, `frontier.png` and `base_kl.png`; `picked.json` is the config of the run that
`frontier.pick` takes. The same command goes on where it stopped. A failed run is a line of the table. What is measured before
training is measured once: later runs are given it, and take it where they would have measured the same.
"""

from __future__ import annotations

import json
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import checkpoint, sweep
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.evals import frontier_account
from jaxtune.train.loop import Preempted
from jaxtune.types import RESUME_EXIT_CODE, UserError, nearest
from jaxtune.workdir import write_whole

Start = Callable[..., int]  # `sweep.in_a_process`
INTERPOLATION = "merge.sweep"  # the strength of a method that trains nothing
_BEFORE = ("before.json", "protected_before.json")  # what a run measured before it trained


class Job(NamedTuple):
    """A process to run: one point of a method, or of an interpolation all of them. `source` is the run that one takes."""

    run: sweep.Run
    method: str
    strength: str
    source: str = ""

    @property
    def verb(self) -> str:
        return "merge" if self.strength == INTERPOLATION else "train"


def frontier(config: ConfigDict, workdir: Path, start: Start = sweep.in_a_process) -> None:
    """Runs what has no result yet, and compares all.

    Raises:
      UserError: no methods, no protected sets, values that a config cannot have, a workdir of another frontier, or not one run
        came to its end.
      Preempted: a run was stopped, and saved.
    """
    jobs = planned(config, workdir)
    rows = sweep.known(workdir, [job.run for job in jobs], "frontier")
    todo = [job for job in jobs if rows[job.run.name].get("status") != "done"]
    done = threading.Lock()

    def ended(job: Job, row: dict[str, Any]) -> None:
        with done:
            rows[job.run.name] = row
            told = [row for row in rows.values() if row]
            write_whole(workdir / "frontier.json", json.dumps({"runs": told}, indent=2) + "\n")

    for verb in ("train", "merge"):  # interpolations take what trained
        _all(config, workdir, [job for job in todo if job.verb == verb], start, ended)
    _report(config, workdir, jobs, rows)


def planned(config: ConfigDict, workdir: Path) -> list[Job]:
    """The processes to run, each with a config that was checked.

    Raises:
      UserError: there are none, or a value is not one that its key can have.
    """
    options = config.frontier
    if not options.methods:
        raise UserError(
            "frontier needs config.frontier.methods: ((name, ((config key, value), …), (strength key, (value, …))), …), e.g. "
            "(('plain', (), ('optim.learning_rate', (1e-4, 3e-4))),)"
        )
    if not config.protect.sets:
        raise UserError("frontier draws gain against what it costs: name what is to be kept in config.protect.sets")
    jobs: list[Job] = []
    for name, settings, (strength, values) in options.methods:
        if strength == INTERPOLATION:
            continue
        tail = strength.rpartition(".")[2]
        for value, told in zip(values, labels(values), strict=True):
            full = f"{name},{tail}={told}"
            jobs.append(Job(_run(config, workdir, full, {**dict(settings), strength: value}), name, strength))
    names = [job.run.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"config.frontier.methods makes {twice!r} twice; expected values that differ")
    for name, settings, (strength, values) in options.methods:
        if strength == INTERPOLATION:
            jobs.append(_interpolation(config, workdir, jobs, name, {**dict(settings), strength: tuple(values)}))
    return jobs


def labels(values: Sequence[Any]) -> list[str]:
    """What to call each strength: of nested values, what is not in all of them; "0-9" for numbers in a row."""
    leaves = [_leaves(value) for value in values]
    alike = {len(one) for one in leaves} == {1} or len({len(one) for one in leaves}) > 1
    if not alike:
        varying = [at for at, column in enumerate(zip(*leaves, strict=True)) if len(set(column)) > 1]
        leaves = [[one[at] for at in varying] or one for one in leaves]
    return [_range(one) or sweep.brief(one[0] if len(one) == 1 else tuple(one)) for one in leaves]


def _leaves(value: Any) -> list[Any]:
    if not isinstance(value, tuple | list):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)]


def _range(numbers: list[Any]) -> str:
    whole = len(numbers) > 2 and all(isinstance(one, int) for one in numbers)
    return f"{numbers[0]}-{numbers[-1]}" if whole and numbers == list(range(numbers[0], numbers[-1] + 1)) else ""


def _run(config: ConfigDict, workdir: Path, name: str, values: Mapping[str, Any]) -> sweep.Run:
    return sweep.made(config, workdir, name, values, "config.frontier.methods", "frontier")


def _interpolation(config: ConfigDict, workdir: Path, jobs: list[Job], name: str, values: dict[str, Any]) -> Job:
    """Shares of what another run learnt: `frontier.interpolates`, or the last of the first method."""
    trained = {job.run.name: job for job in jobs if job.verb == "train"}
    given = values.get("merge.adapters")
    if given:
        return Job(_run(config, workdir, name, {"merge.pick": "gain", **values}), name, INTERPOLATION)
    wanted = config.frontier.interpolates
    if not trained or (wanted and wanted not in trained):
        raise UserError(
            f"config.frontier.methods, {name!r}: frontier.interpolates={wanted!r} is no run that trains; expected one of "
            f"{', '.join(trained) or 'the others, of which there are none'}{nearest(wanted, list(trained))}"
        )
    first = next(iter(trained.values()), None)
    assert first is not None
    source = trained[wanted or [n for n, job in trained.items() if job.method == first.method][-1]]
    one = source.run.config
    whole = one.export.merge or one.tune.method not in ("lora", "prompt")
    folder = Path(one.workdir) / ("model" if whole else "adapter")
    values = {
        "merge.pick": "gain", "merge.adapters": ((str(folder), 1.0),), "export.merge": bool(one.export.merge or one.tune.use_dora),
        **values,
    }  # fmt: skip
    return Job(_run(config, workdir, name, values), name, INTERPOLATION, source.run.name)


# ---- processes ----


def _all(
    config: ConfigDict, workdir: Path, jobs: list[Job], start: Start, ended: Callable[[Job, dict[str, Any]], None]
) -> None:
    """Runs the jobs, `frontier.workers` at a time.

    Raises:
      Preempted: one was stopped.
    """
    workers = min(config.frontier.workers, len(jobs))
    if workers <= 1:
        environment = dict(config.frontier.environments[0]) if config.frontier.environments else {}
        for job in jobs:
            ended(job, _one(config, workdir, job, partial(start, environment=environment)))
        return
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(workers):
        places.put(place)
    environments = config.frontier.environments or ((),) * workers

    def work(job: Job, started: Callable[[Any], None], stopping: threading.Event) -> None:
        if stopping.is_set():
            raise Preempted(f"stopped before run {job.run.name}")
        place = places.get()
        try:
            begin = partial(start, environment=dict(environments[place]), started=started)
            ended(job, _one(config, workdir, job, begin))
        except Preempted:
            stopping.set()
            raise
        finally:
            places.put(place)

    with _passing_on() as (started, stopping), ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(work, job, started, stopping) for job in jobs]
    for each in running:
        each.result()


@contextmanager
def _passing_on() -> Iterator[tuple[Callable[[Any], None], threading.Event]]:
    """Passes a SIGTERM of this process on to those that threads have started, and tells threads to start no more."""
    processes: list[Any] = []
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()
        for process in processes:
            if process.poll() is None:
                process.terminate()

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield processes.append, stopping
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _one(config: ConfigDict, workdir: Path, job: Job, start: Start) -> dict[str, Any]:
    """Runs one job to its end; its line of the table.

    Raises:
      Preempted: it was stopped, and saved.
    """
    name = job.run.name
    sweep.say(config, f"run {name}")
    began, folder, log = time.monotonic(), workdir / "runs" / name, workdir / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"name": name, "method": job.method, "values": job.run.values}
    used = checkpoint.is_used(str(folder))
    known = job.verb == "train" and (used or _give_before(workdir, folder))
    code = start(workdir / "configs" / f"{name}.json", folder, known, log, verb=job.verb)
    row["seconds"] = round(time.monotonic() - began, 1)
    if code == RESUME_EXIT_CODE:
        raise Preempted(f"stopped in run {name}; saved")
    if code:
        row |= {"status": "failed", "code": code, "error": sweep.last_words(log, code)}
    else:
        try:
            row |= {"status": "done", "points": frontier_account.read(folder, job.method, job.strength, job.run)}
        except UserError as error:
            row |= {"status": "failed", "code": 0, "error": str(error)}
    if row["status"] == "failed":
        sweep.say(config, f"  failed: {row['error']}")
    return row


def _give_before(workdir: Path, folder: Path) -> bool:
    """Gives a new run what another measured before training; it takes that, resuming at nothing, if it would measure the same."""
    for name in _BEFORE:
        measured = sorted(workdir.glob(f"runs/*/{name}"))
        if measured and not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(measured[0], folder / f"{name}.partial")
            (folder / f"{name}.partial").replace(folder / name)
    return any((folder / name).exists() for name in _BEFORE)


# ---- the comparison ----


def _report(config: ConfigDict, workdir: Path, jobs: list[Job], rows: dict[str, dict[str, Any]]) -> None:
    """Writes the comparison and the picked config; prints the table."""
    told = [row for row in rows.values() if row]
    failed = [row for row in told if row["status"] != "done"]
    for row in failed:
        print(f"failed: {row['name']}: {row['error']} (logs/{row['name']}.txt)")
    if len(failed) == len(told):
        raise UserError(f"all {len(told)} runs of the frontier failed; the first: {told[0]['error']}")
    found = frontier_account.compare(config, [point for row in told for point in row.get("points", ())])
    write_whole(workdir / "frontier.json", json.dumps({**found, "runs": told}, indent=2) + "\n")
    frontier_account.show(config, workdir, found)
    if found["picked"] is None:
        print(f"no run qualifies by frontier.pick={config.frontier.pick!r}: nothing is picked")
        return
    point = next(one for one in found["points"] if one["name"] == found["picked"])
    job = next(job for job in jobs if job.run.name == point["run"])
    write_whole(workdir / "picked.json", config_lib.to_json(_picked(config, job, point)) + "\n")
    print(f"picked by {config.frontier.pick!r}: {found['picked']}, its config in picked.json ({job.verb})")


def _picked(config: ConfigDict, job: Job, point: Mapping[str, Any]) -> ConfigDict:
    """The config of a point, to be run by itself: of an interpolation, the merge of its share."""
    one = job.run.config.copy_and_resolve_references()
    one.name, one.workdir = f"{config.name} picked", ""
    if job.verb == "merge":
        one.merge.adapters = tuple((uri, weight * point["strength"]) for uri, weight in one.merge.adapters)
        one.merge.sweep = ()
    return one
