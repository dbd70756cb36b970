"""The verb `guide`: a round of guidance, from rows or outputs to experts, their verdicts to data, training, evaluation and report.

`guide.folder` holds `ledger.jsonl`, `review.db` and a folder for each round: `config.json`, `items.jsonl` (what was asked), `sampled/`
(what models said), `data/` (verdicts and the rows made of them), `train/` (a run like any other), `results/` (scores before and
after, row by row), `comparison/` (both models' answers) and `report.html`. Each is whole or not there: the same command goes on where
it stopped, and ends with exit code 75 while people's answers are missing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sqlalchemy as sa

from jaxtune import run, sweep, tracking, validation
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals.protected import Protected
from jaxtune.guidance import account, measuring, sampling, stopping, tracing, training
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance.folder import Round
from jaxtune.lineage import chain, stages
from jaxtune.review import active, queue, store
from jaxtune.review import tasks as tasks_lib
from jaxtune.review.record import Item
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task
from jaxtune.types import UserError, Waiting, nearest

Train = Callable[[ConfigDict, Path], None]


class Known(NamedTuple):
    """What a round knows before it does anything: its tasks, the rows, the sets it is measured by."""

    asked: dict[str, Task]
    compared: Task | None
    pool: sampling.Pool
    sets: list[Any]
    tokenizer: Tokenizer


def guide(config: ConfigDict, workdir: Path, train: Train = run.train) -> None:
    """Goes on with the round `guide.round` as far as it can.

    Raises:
      UserError: tasks, data, config or verdicts are not in order.
      Waiting: people's answers are missing; says how to serve the page.
    """
    root = folder_lib.root(config, workdir)
    if config.guide.trace:
        print(tracing.told(config, root))
        return
    if jax.process_count() > 1:
        raise UserError(f"guide runs in one process, and there are {jax.process_count()}: start it on one host")
    with folder_lib.opened(root):
        one = folder_lib.read(config, root)
        one, known = _known(config, one)
        with store.opened(folder_lib.database(config, root)) as engine:
            if one.line("round") is None:
                told = _asked(config, one, known, engine)
                _train(config, one, train)
                one = one._replace(lines=folder_lib.append(one, _line(config, one, known, engine, told)))
            _compare(config, one, known, engine)


def _known(config: ConfigDict, one: Round) -> tuple[Round, Known]:
    """Reads tasks and rows, refuses what is not in order, and begins the round."""
    asked, compared = _tasks(config)
    training.check_tasks(config, asked)
    sampling.check(config, asked)
    validation.validate(training.run_config(config, one))
    show = _progress(config)
    model, tokenizer = stages.tokenizer_of(config)
    pool = sampling.read(config, tokenizer, show)
    sets = [] if training.is_reward_model(config) else measuring.sets(config, pool, tokenizer, show)
    if sets and not (one.folder / "items.jsonl").exists():
        _still_pays(config, one, sets[0])
    one = folder_lib.begin(config, one, model, pool.digest)
    return one, Known(asked, compared, pool, sets, tokenizer)


def _still_pays(config: ConfigDict, one: Round, held: Protected) -> None:
    """Refuses a round whose verdicts would gain too little (`guide.least_gain`), before anybody is asked."""
    stop = stopping.told(config, one, held)
    if stop is None:
        return
    if stop.stop:
        raise UserError(
            f"round {one.number} is not asked: {stop.why}. Set guide.least_gain=0.0 to ask all the same, or ask for something else"
        )
    sweep.say(config, f"round {one.number}: {stop.why}")


def _tasks(config: ConfigDict) -> tuple[dict[str, Task], Task | None]:
    """The tasks that the round asks, and the one in which its result is compared.

    Raises:
      UserError: there are none, or a name that review.tasks does not have.
    """
    every, guide = tasks_lib.read(config.review.tasks), config.guide
    if not every:
        raise UserError("guide needs review.tasks: what experts are to do, e.g. (('better', (('kind', 'compare'),)),)")
    for name in (*guide.tasks, *([guide.compare_task] if guide.compare_task else [])):
        if name not in every:
            raise UserError(
                f"guide names the task {name!r}{nearest(name, list(every))}; review.tasks has {', '.join(every)}"
            )
    compared = every[guide.compare_task] if guide.compare_task else None
    if compared is not None and compared.kind != "compare":
        raise UserError(
            f"guide.compare_task={compared.name!r} is of kind {compared.kind!r}; expected one of kind 'compare'"
        )
    if compared is not None and compared.name in guide.tasks:
        raise UserError(
            f"guide.tasks has {compared.name!r}, which is guide.compare_task: give one of them a task of its own"
        )
    if compared is not None and training.is_reward_model(config):
        raise UserError(
            "train.objective='reward' makes a model that scores and does not answer: set guide.compare_task=''"
        )
    names = guide.tasks or tuple(name for name in every if name != guide.compare_task)
    if not names:
        raise UserError("every task of review.tasks is guide.compare_task: there is nothing to ask; add one")
    return {name: every[name] for name in names}, compared


# ---- asking ----


def _asked(config: ConfigDict, one: Round, known: Known, engine: Engine) -> dict[str, Any]:
    """Has experts asked, and their verdicts turned into data; returns what is to be told of it."""
    sampled = sampling.items(
        config, one, known.asked, known.pool, known.tokenizer, _progress(config), partial(sweep.say, config)
    )
    _put(config, one, engine, known.asked, sampled.items)
    if not (one.folder / "data" / "data.json").exists():
        _await(config, one, engine, known.asked, "the answers of the round")
    verdicts = [v for name in known.asked for v in store.read_verdicts(engine, one.number, name)]
    items = [item for name in known.asked for item in store.read_items(engine, one.number, name)]  # imported ones too
    told = training.write(config, one, items, verdicts, known.asked, account.people(engine))
    made = {name: file["rows"] for name, file in told["files"].items() if name not in ("verdicts.jsonl", "train.jsonl")}
    sweep.say(
        config, f"round {one.number}: {told['verdicts']} verdicts of {told['people']} people; {account.counted(made)}"
    )
    return told | {"sampled": {"left_out": sampled.left_out, "seconds": sampled.seconds}}


def _put(config: ConfigDict, one: Round, engine: Engine, tasks: Mapping[str, Task], items: Sequence[Item]) -> None:
    """Puts items into the queue, with their tasks' guidelines, in the order that the tasks ask for; what is there stays."""
    for task in tasks.values():
        text = tasks_lib.guideline(task)
        if text:
            store.set_guideline(engine, task.name, text)
    store.add_items(engine, items)
    for task in tasks.values():
        if task.order == "priority":
            _rank(engine, [item for item in items if item.task == task.name and "shares" in item.origin])
    review = config.copy_and_resolve_references()
    review.workdir, review.review.round = str(one.root), one.number
    review.review.database, review.review.action = folder_lib.database(config, one.root), "serve"
    folder_lib.write_json(one.folder / "review.json", review.to_dict())


def _rank(engine: Engine, items: Sequence[Item]) -> None:
    """Has those items asked first of whose label the model is least sure; what has a place in the order keeps it."""
    with engine.connect() as connection:
        known = set(connection.scalars(sa.select(store.priorities.c.item)))
    new = [item for item in items if item.id not in known]
    if new:
        unsure_N = active.entropy(np.asarray([item.origin["shares"] for item in new]))
        active.write(engine, [item.id for item in new], unsure_N.tolist(), "entropy of the model's label")


def _await(config: ConfigDict, one: Round, engine: Engine, tasks: Mapping[str, Task], what: str) -> None:
    """Returns when enough is answered.

    Raises:
      Waiting: it is not, and this command is not to wait.
    """
    command = f"jaxtune review --config={one.folder / 'review.json'}"
    found = queue.open_items(engine, tasks, one.number)
    if _enough(config, found):
        return _say_disputed(config, one, engine, tasks)
    if not config.guide.wait:
        raise Waiting(
            f"round {one.number} waits for {what}: {account.missing(found)}. Serve the page with\n  {command}\nand run the same command again"
        )
    sweep.say(config, f"round {one.number} waits for {what}: {account.missing(found)}; the page is served meanwhile")
    flags = ["review", f"--config={one.folder / 'review.json'}", f"--workdir={one.root}"]
    process = subprocess.Popen([sys.executable, "-m", "jaxtune.launch", *flags])
    try:
        while not _enough(config, queue.open_items(engine, tasks, one.number)):
            if process.poll() is not None:
                raise UserError(
                    f"the page ended (exit code {process.returncode}) before enough was answered: {command}"
                )
            time.sleep(config.guide.poll_seconds)
    finally:
        process.terminate()
        process.wait()
    return _say_disputed(config, one, engine, tasks)


def _enough(config: ConfigDict, found: Mapping[str, tuple[int, int]]) -> bool:
    there, wanted = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    return there >= config.guide.enough * wanted


def _say_disputed(config: ConfigDict, one: Round, engine: Engine, tasks: Mapping[str, Task]) -> None:
    disputed = len(queue.disagreements(engine, tasks, one.number))
    if disputed:
        sweep.say(
            config,
            f"note: experts disagree about {disputed} items that no senior has settled; those without a majority are left out",
        )


# ---- training and measuring ----


def _train(config: ConfigDict, one: Round, train: Train) -> None:
    """Trains on the round's rows, or what is missing of it."""
    done = one.folder / "trained.json"
    if done.exists():
        return
    made = training.run_config(config, one)
    training.claim(config, one, made)
    sweep.say(config, f"round {one.number}: training ({config.train.objective}) from round {one.parent}'s result")
    train(made, Path(made.workdir))
    weights = training.result(one)
    if weights is None:
        raise UserError(
            f"the run in {made.workdir} exported nothing (see its report): round {one.number} has no result"
        )
    told = {"kind": "round", "round": one.number, "weights": str(weights.relative_to(one.root))}
    folder_lib.write_json(done, told)


def _measured(config: ConfigDict, one: Round, known: Known) -> measuring.Measured | None:
    if training.is_reward_model(config):
        return None
    asked = measuring.asked(config, known.pool)
    return measuring.measured(
        config, one, known.sets, asked, known.tokenizer, _progress(config), partial(sweep.say, config)
    )


def _line(config: ConfigDict, one: Round, known: Known, engine: Engine, told: dict[str, Any]) -> dict[str, Any]:
    """The ledger's line of a round that is trained; measures it first."""
    measured = _measured(config, one, known)
    text = (one.folder / "config.json").read_text("utf-8")
    return {
        "kind": "round", "round": one.number, "parent": one.parent, "name": config.name,
        "objective": config.train.objective, "starts_others": not training.is_reward_model(config),
        "config": {"path": str((one.folder / "config.json").relative_to(one.root)), "sha256": folder_lib.sha256(text)},
        "train_config_sha256": folder_lib.sha256(one.folder / "train.json"),
        "items": {name: len(store.read_items(engine, one.number, name)) for name in known.asked},
        "verdicts": {key: told[key] for key in ("verdicts", "people", "seconds")}, "data": told["files"],
        "left_out": told["left_out"], "flagged": told["flagged"], "not_asked": told["sampled"]["left_out"],
        "weights": folder_lib.read_json(one.folder / "trained.json")["weights"],
        "scores": account.scores(measured), "seconds": account.seconds(one, told), "versions": chain.versions(),
    }  # fmt: skip


def _compare(config: ConfigDict, one: Round, known: Known, engine: Engine) -> None:
    """Puts the comparison of old and new before people; reports what there is, and the comparison once it is answered."""
    measured = _measured(config, one, known)
    task, asked = known.compared, measuring.asked(config, known.pool)
    found = None
    if task is not None and asked:
        items = measuring.comparison_items(one, task, asked)
        _put(config, one, engine, {task.name: task}, items)
        verdicts = store.read_verdicts(engine, one.number, task.name)
        found = measuring.won(items, verdicts, task, len(asked))
        if one.line("comparison") is None and items:
            account.write(config, one, engine, {**known.asked, task.name: task}, measured, found)
            _await(config, one, engine, {task.name: task}, "the blind comparison of its model with the one before")
            verdicts = store.read_verdicts(engine, one.number, task.name)
            found = measuring.won(items, verdicts, task, len(asked))
        if one.line("comparison") is None:
            told = {"kind": "comparison", "round": one.number, "parent": one.parent, "task": task.name, **found}
            one = one._replace(lines=folder_lib.append(one, told))
    tasks = known.asked | ({task.name: task} if task is not None else {})
    print(account.write(config, one, engine, tasks, measured, found))


def _progress(config: ConfigDict) -> Any:
    return partial(tracking.progress, mode=config.tracking.progress)
