"""What was acknowledged is there, and stays as it was: full disks, killed processes, many at once, hands on the database."""

from __future__ import annotations

import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from jaxtune.review import people, store
from jaxtune.review.record import Verdict, make_item
from jaxtune.types import UserError

ITEM = make_item(1, "tone", {"text": "fine"}, {"source": "x", "row": 1})
KILLS = 10
WRITER = """
import itertools, os, sys
from jaxtune.review import store
from jaxtune.review.record import Verdict
url, item, person, name = sys.argv[1:]
with store.opened(url) as db:
    for number in itertools.count():
        one = Verdict(f"{name}-{number}", item, person, "label", {"labels": ["good"]}, {}, 0, 1.0)
        assert store.add_verdict(db, one)
        os.write(1, f"{one.id}\\n".encode())
"""


@pytest.fixture
def db(url: str):
    with store.opened(url) as engine:
        yield engine


def _ready(db: store.Engine) -> str:
    store.add_items(db, [ITEM])
    return people.add(db, "Anna", "expert").id


def _verdict(id: str, person: str) -> Verdict:
    return Verdict(id, ITEM.id, person, "label", {"labels": ["good"]}, {"order": []}, 0, 1.5, 1.7e9)


def _added(db: store.Engine, verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Adds verdicts, and yields each that is acknowledged."""
    return (one for one in verdicts if store.add_verdict(db, one))


def test_killed_writers_lose_nothing_that_was_acknowledged(url: str, tmp_path: Path) -> None:
    """Ten processes write at once, and one after another is killed in the midst of it."""
    with store.opened(url) as db:
        person = _ready(db)
    rng, logs, writers = random.Random(0), [], []
    for number in range(KILLS):
        logs.append(tmp_path / f"{number}.txt")
        command = [sys.executable, "-c", WRITER, url, ITEM.id, person, f"w{number}"]
        with logs[-1].open("w") as log:
            writers.append(subprocess.Popen(command, stdout=log))
    try:
        until = time.monotonic() + 120
        while any("\n" not in log.read_text() for log in logs):
            assert all(writer.poll() is None for writer in writers)
            assert time.monotonic() < until
            time.sleep(0.05)
        for writer in writers:
            time.sleep(rng.uniform(0.0, 0.1))
            writer.send_signal(signal.SIGKILL)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [-signal.SIGKILL] * KILLS
    acknowledged = [line for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    with store.opened(url) as db:
        there = {one.id for one in store.read_verdicts(db, all_of_them=True)}
        assert {line.strip() for line in acknowledged} <= there
        assert len(there) <= len(acknowledged) + KILLS  # one each that was written and not yet told
        assert store.add_verdict(db, _verdict("after", person))
        if db.dialect.name == "sqlite":
            with db.connect() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_commits_wait_for_the_disk(db: store.Engine) -> None:
    asked = "PRAGMA synchronous" if db.dialect.name == "sqlite" else "SHOW synchronous_commit"
    with db.connect() as connection:
        assert connection.exec_driver_sql(asked).scalar() in (2, "on")
    if db.dialect.name == "postgresql":  # a server that is set not to wait is told to
        url = db.url.update_query_dict({}).set(drivername="postgresql").render_as_string(hide_password=False)
        with store.writing(db) as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{db.url.database}" SET synchronous_commit = off')
        with store.opened(url) as other, other.connect() as connection:
            assert connection.exec_driver_sql(asked).scalar() == "on"


def test_many_at_once_write_each_verdict_once(db: store.Engine) -> None:
    """Each of 40 verdicts is sent four times at once, as by an impatient browser: one of them is told that it is new."""
    person = _ready(db)
    ids = [f"v{number}" for number in range(40) for _ in range(4)]
    with ThreadPoolExecutor(12) as pool:
        new = list(pool.map(lambda id: store.add_verdict(db, _verdict(id, person)), ids))
    assert sum(new) == 40
    assert sorted(one.id for one in store.read_verdicts(db)) == sorted(set(ids))


def test_rows_are_never_changed_or_deleted(db: store.Engine, url: str) -> None:
    person = _ready(db)
    store.add_verdict(db, _verdict("v", person))
    store.set_guideline(db, "tone", "Be strict.")
    with store.writing(db) as connection:
        row = {"item": ITEM.id, "score": 1.0, "reason": "", "at": 0.0}
        connection.execute(store.priorities.insert().values(row))
    whole = {name: store._META.tables[name] for name in store.APPEND_ONLY}
    with db.connect() as connection:
        before = {name: connection.execute(sa.select(table)).all() for name, table in whole.items()}
    assert all(before.values())
    for name, table in whole.items():
        statements = [f"UPDATE {name} SET number = number + 1", f"DELETE FROM {name}"]
        statements += [f"TRUNCATE {name} CASCADE"] if db.dialect.name == "postgresql" else []
        for statement in statements:
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), db.begin() as connection:
                connection.exec_driver_sql(statement)
        if db.dialect.name == "sqlite":  # by a program that is none of ours, which does not set what we set
            columns = ", ".join("'changed'" if c.name == "task" or c.name == "kind" else c.name for c in table.c)
            other = sqlite3.connect(url)
            other.execute(f"INSERT OR REPLACE INTO {name} SELECT {columns} FROM {name}")
            other.commit()
            other.close()
    with db.connect() as connection:
        assert {name: connection.execute(sa.select(table)).all() for name, table in whole.items()} == before


def test_full_disk_is_said_and_costs_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SQLite, which is given no more pages; as its error on a full disk. When there is room again, all goes on."""
    path = str(tmp_path / "review.db")
    with store.opened(path) as db:
        person = _ready(db)
        token, _ = people.start_session(db, people.everyone(db)[0])
        limit = {"pages": 0}
        sa.event.listen(
            db,
            "begin",
            lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={limit['pages'] or 1 << 30}"),
        )
        with db.connect() as connection:
            limit["pages"] = connection.exec_driver_sql("PRAGMA page_count").scalar() + 12
        kept = []
        padded = {"labels": ["good"], "more": "x" * 500}
        with pytest.raises(UserError, match="disk that holds the review database is full; nothing of this was written"):
            kept.extend(
                one.id
                for one in _added(db, (_verdict(f"v{at}", person)._replace(answer=padded) for at in range(10_000)))
            )
        assert kept
        assert [one.id for one in store.read_verdicts(db)] == kept
        with store.writing(db) as connection:  # the session was last seen long ago, which a request would note
            connection.execute(store.sessions.update().values(seen=time.time() - 600))
        assert people.session(db, token) is not None
        limit["pages"] = 0
        assert store.add_verdict(db, _verdict("later", person))
    with store.opened(path) as db:
        assert [one.id for one in store.read_verdicts(db)] == [*kept, "later"]


def test_full_disk_of_a_server_is_known_by_its_code(postgresql: str) -> None:
    from tests.review.conftest import drop_database, make_database

    url = make_database(postgresql)
    said = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{}', MESSAGE = 'der Datenträger ist full'; END $$"
    try:
        with store.opened(url) as db:
            with pytest.raises(UserError, match="is full"), store.writing(db) as connection:
                connection.exec_driver_sql(said.format("53100"))
            with pytest.raises(sa.exc.DBAPIError), store.writing(db) as connection:
                connection.exec_driver_sql(said.format("22000"))
    finally:
        drop_database(url)


def test_database_of_another_version_or_kind_is_left_alone(url: str, db: store.Engine) -> None:
    with store.writing(db) as connection:
        connection.execute(store.about.update().where(store.about.c.key == "schema").values(value="99"))
        connection.exec_driver_sql("DROP TABLE leases")
    with pytest.raises(UserError, match=r"has schema 99; this jaxtune knows \d+"), store.opened(url):
        pass
    assert "leases" not in sa.inspect(db).get_table_names()  # nothing was made in it
    with store.writing(db) as connection:
        connection.exec_driver_sql("DROP TABLE about")
    with pytest.raises(UserError, match="of something else"), store.opened(url):
        pass


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://ann:s3cr3t@127.0.0.1:1/reviews", "cannot be opened"),
        ("postgresql://ann:s3cr3t@nowhere.invalid/reviews", "cannot be opened"),
        ("postgresql://ann:s3cr3t@127.0.0.1:port/reviews", "is no database"),
        ("mysql://ann:s3cr3t@127.0.0.1/reviews", "not known here"),
    ],
)
def test_unreachable_database_is_said_without_its_password(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught, store.opened(url):
        pass
    assert "s3cr3t" not in str(caught.value)


def test_password_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "s3cr3t")
    assert store.connect("postgresql://ann@127.0.0.1/reviews").url.password == "s3cr3t"
    assert store.connect("postgresql://ann:own@127.0.0.1/reviews").url.password == "own"


def test_wrong_password_is_said_in_words(postgresql: str) -> None:
    url = f"{postgresql}/no_such_database"
    with (
        pytest.raises(UserError, match='cannot be opened: database "no_such_database" does not exist'),
        store.opened(url),
    ):
        pass


def test_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes " * 200)
    with pytest.raises(UserError, match="not a database"), store.opened(str(tmp_path / "notes.txt")):
        pass
    assert (tmp_path / "notes.txt").read_text() == "my notes " * 200
    with pytest.raises(UserError, match="cannot be opened"), store.opened(str(tmp_path)):
        pass


def test_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "review.db"
    with store.opened(str(path)) as db:
        _ready(db)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes) == {"review.db", "review.db-wal", "review.db-shm"}
    assert set(modes.values()) == {0o600}


def test_two_that_start_at_once_make_one_database(url: str) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            with store.opened(url) as db:
                store.add_items(db, [ITEM])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors
    with store.opened(url) as db:
        assert store.read_items(db) == [ITEM]
