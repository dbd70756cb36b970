"""Guidelines that follow their files: a file that changes while the server runs is a new version from the next item on."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from jaxtune.review import store, tasks
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

_LOOK_SECONDS = 5.0
_log = logging.getLogger(__name__)


class Guideline(NamedTuple):
    """A version of a task's guideline; `number` is what verdicts keep."""

    number: int
    version: int
    text: str


def load(engine: store.Engine, known: dict[str, Task]) -> None:
    """Makes the texts of the files the versions in force.

    Raises:
      UserError: a file cannot be read.
    """
    for task in known.values():
        if task.guideline:
            store.set_guideline(engine, task.name, tasks.guideline(task))


class Watcher:
    """Looks for changed files, now and then, when it is asked."""

    def __init__(self, engine: store.Engine, known: dict[str, Task]) -> None:
        self._engine, self._tasks = engine, {name: one for name, one in known.items() if one.guideline}
        self._seen, self._looked, self._lock = self._stamps(), time.monotonic(), threading.Lock()

    def _stamps(self) -> dict[str, float]:
        found = {}
        for name, task in self._tasks.items():
            try:
                found[name] = Path(task.guideline).expanduser().stat().st_mtime
            except OSError:
                found[name] = 0.0
        return found

    def look(self, often_seconds: float = _LOOK_SECONDS) -> None:
        if time.monotonic() - self._looked < often_seconds or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked, now = time.monotonic(), self._stamps()
            for name in [name for name, stamp in now.items() if stamp != self._seen[name]]:
                try:
                    store.set_guideline(self._engine, name, tasks.guideline(self._tasks[name]))
                except UserError as error:  # half written, or gone: the version in force stays
                    _log.warning("%s", error)
                    continue
                self._seen[name] = now[name]
        finally:
            self._lock.release()


def in_force(engine: store.Engine, task: str) -> Guideline | None:
    query = sa.select(store.guidelines).where(store.guidelines.c.task == task)
    return _read(engine, query.order_by(store.guidelines.c.version.desc()).limit(1))


def numbered(engine: store.Engine, number: int) -> Guideline | None:
    return _read(engine, sa.select(store.guidelines).where(store.guidelines.c.number == number))


def _read(engine: store.Engine, query: Any) -> Guideline | None:
    with engine.connect() as connection:
        row = connection.execute(query).mappings().first()
    return None if row is None else Guideline(int(row["number"]), row["version"], row["text"])
