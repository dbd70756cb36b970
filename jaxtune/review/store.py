"""The database behind the experts' page: SQLite in a file, or PostgreSQL by a URL. What was acknowledged is on the disk.

    with store.opened("runs/guide/review.db") as db:
        store.add_items(db, items)
        store.add_verdict(db, verdict)      # True: it is there, durably; False: it was there already

Verdicts, items, guidelines and the audit log are append-only: triggers of the database refuse to change or delete their rows,
whoever asks. People, invites, sessions and leases may change; what changes in them is in the audit log.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtune.review.record import MODEL, Item, Verdict
from jaxtune.types import UserError

try:
    import sqlalchemy as sa
    from sqlalchemy import exc
except ImportError as _error:
    raise UserError("the review database needs SQLAlchemy: pip install 'jaxtune[review]'") from _error

SCHEMA_VERSION = 1
APPEND_ONLY = ("items", "verdicts", "guidelines", "audit", "priorities")
Engine = sa.Engine
_TURN = threading.RLock()  # SQLite's own waiting is by naps, and not in turn: threads of one process queue here

_META = sa.MetaData()


def _table(name: str, *columns: Any) -> sa.Table:
    return sa.Table(name, _META, *columns)


def _col(name: str, kind: Any, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=more.pop("nullable", False), **more)


_Id = sa.String(64)
_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by INTEGER alone
about = _table("about", _col("key", _Id, primary_key=True), _col("value", sa.Text))
people = _table(
    "people", _col("id", _Id, primary_key=True), _col("name", sa.String(200), unique=True), _col("role", sa.String(16)),
    _col("skills", sa.JSON), _col("password_hash", sa.Text, nullable=True), _col("active", sa.Boolean), _col("at", sa.Float),
)  # fmt: skip
invites = _table(
    "invites", _col("token_sha256", _Id, primary_key=True), _col("person", sa.ForeignKey("people.id")), _col("at", sa.Float),
    _col("expires", sa.Float), _col("used_at", sa.Float, nullable=True),
)  # fmt: skip
sessions = _table(
    "sessions", _col("token_sha256", _Id, primary_key=True), _col("person", sa.ForeignKey("people.id")), _col("csrf", _Id),
    _col("at", sa.Float), _col("seen", sa.Float), _col("expires", sa.Float), _col("ended_at", sa.Float, nullable=True),
)  # fmt: skip
audit = _table(
    "audit", _col("number", _Number, primary_key=True, autoincrement=True), _col("at", sa.Float), _col("person", _Id, nullable=True),
    _col("action", sa.String(40)), _col("subject", sa.Text), _col("detail", sa.JSON), _col("address", sa.String(64)),
)  # fmt: skip
guidelines = _table(
    "guidelines", _col("number", _Number, primary_key=True, autoincrement=True), _col("task", sa.String(100)),
    _col("version", sa.Integer), _col("text", sa.Text), _col("at", sa.Float), sa.UniqueConstraint("task", "version"),
)  # fmt: skip
items = _table(
    "items", _col("number", _Number, primary_key=True, autoincrement=True), _col("id", _Id, unique=True), _col("round", sa.Integer),
    _col("task", sa.String(100)), _col("payload", sa.JSON), _col("origin", sa.JSON), _col("gold", sa.JSON(none_as_null=True), nullable=True),
    _col("overlap", sa.Integer), _col("skill", sa.String(100)), _col("at", sa.Float), sa.Index("items_of", "round", "task"),
)  # fmt: skip
priorities = _table(  # the order of the queue: of an item the last row counts; higher is sooner
    "priorities", _col("number", _Number, primary_key=True, autoincrement=True), _col("item", sa.ForeignKey("items.id"), index=True),
    _col("score", sa.Float), _col("reason", sa.String(200)), _col("at", sa.Float),
)  # fmt: skip
leases = _table(  # who has, or had, an item before them, and how; one row for an item and a person, renewed in its place
    "leases", _col("item", sa.ForeignKey("items.id"), primary_key=True), _col("person", sa.ForeignKey("people.id"), primary_key=True),
    _col("at", sa.Float), _col("expires", sa.Float, index=True), _col("shown", sa.JSON), _col("guideline", _Number),
    _col("adjudicates", sa.Boolean),
)  # fmt: skip
verdicts = _table(
    "verdicts", _col("number", _Number, primary_key=True, autoincrement=True), _col("id", _Id, unique=True),
    _col("item", sa.ForeignKey("items.id"), index=True), _col("person", sa.ForeignKey("people.id"), index=True),
    _col("kind", sa.String(16)), _col("answer", sa.JSON), _col("shown", sa.JSON), _col("guideline", _Number),
    _col("seconds", sa.Float), _col("at", sa.Float), _col("supersedes", _Id, index=True), _col("adjudicates", sa.Boolean),
)  # fmt: skip


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """Yields the engine of a database whose tables are there, and closes it.

    Args:
      url: a file's path (SQLite, in WAL mode, synchronous=FULL), or a URL of SQLAlchemy such as
        postgresql://user:password@host/name.

    Raises:
      UserError: it cannot be reached or written, is full, or was made by another version of jaxtune.
    """
    engine = connect(url)
    try:
        _make_tables(engine, url)
        yield engine
    finally:
        engine.dispose()


def connect(url: str) -> Engine:
    """Returns the engine; nothing is read or written yet. See `opened`. A password may be in PGPASSWORD instead of the URL."""
    if "://" not in url:
        url = f"sqlite:///{_private(Path(url).expanduser())}"
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):
        raise UserError(
            f"{_without_password(url)!r} is no database; expected a file's path or postgresql://user@host/name"
        ) from None
    if parsed.get_backend_name() == "postgresql":
        if parsed.password is None and (password := os.environ.get("PGPASSWORD")):
            parsed = parsed.set(password=password)
        parsed = parsed.set(drivername="postgresql+pg8000")
        engine = sa.create_engine(parsed, pool_size=10, max_overflow=10, pool_pre_ping=True)
        sa.event.listen(engine, "connect", _set_up_postgresql)
        return engine
    if parsed.get_backend_name() != "sqlite":
        raise UserError(f"{parsed.get_backend_name()!r} databases are not known here; expected sqlite or postgresql")
    engine = sa.create_engine(parsed, connect_args={"timeout": 30.0}, pool_size=10, max_overflow=10)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _private(path: Path) -> Path:
    """The path of a file that, where it is new, its owner alone may read: it will hold hashes of passwords."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise UserError(
            f"the review database {path} cannot be opened ({error.strerror}); expected the path of a file"
        ) from error
    return path


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, not sqlite3
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _set_up_postgresql(connection: Any, _: Any) -> None:
    """Where the server would acknowledge before it has written, it is told not to."""
    cursor, name = connection.cursor(), "synchronous_commit"
    cursor.execute(f"SELECT set_config('{name}', 'on', false) WHERE current_setting('{name}') = 'off'")
    cursor.close()
    connection.commit()


@contextmanager
def writing(engine: Engine) -> Iterator[sa.Connection]:
    """A transaction that writes: all of it or nothing, on the disk when the block ends. On SQLite it waits for its turn at once.

    Raises:
      UserError: the disk is full.
    """
    try:
        if engine.dialect.name == "sqlite":
            with _TURN, engine.connect() as connection, connection.begin():
                connection.exec_driver_sql("COMMIT")
                # A reader that turns writer could not wait: it would fail.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
        else:
            with engine.begin() as connection:
                yield connection
    except exc.DBAPIError as error:
        if is_full(error):
            raise UserError("the disk that holds the review database is full; nothing of this was written") from error
        raise


def is_full(error: exc.DBAPIError) -> bool:
    """Whether the disk is full, whatever language the database says it in."""
    import sqlite3

    given = error.orig.args[0] if error.orig is not None and error.orig.args else None
    postgresql = isinstance(given, dict) and given.get("C") == "53100"
    return postgresql or getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def _make_tables(engine: Engine, url: str) -> None:
    told = f"the review database {_without_password(url)}"
    try:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7421)"))  # two that start at once
            there = set(sa.inspect(connection).get_table_names())
            if about.name not in there and (others := sorted(there & set(_META.tables))):
                raise UserError(
                    f"{told} has a table {others[0]!r} of something else; give review a database of its own"
                )
            if about.name in there:
                found = connection.scalar(sa.select(about.c.value).where(about.c.key == "schema"))
                if found != str(SCHEMA_VERSION):
                    raise UserError(f"{told} has schema {found}; this jaxtune knows {SCHEMA_VERSION}")
                return
            _META.create_all(connection)
            connection.execute(about.insert().values(key="schema", value=str(SCHEMA_VERSION)))
            for statement in _triggers(engine.dialect.name):
                connection.execute(sa.text(statement))
    except exc.DBAPIError as error:
        given = error.orig.args[0] if error.orig is not None and error.orig.args else error.orig
        why = given.get("M", given) if isinstance(given, dict) else given
        raise UserError(f"{told} cannot be opened: {why}") from error


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _triggers(dialect: str) -> Iterator[str]:
    if dialect == "postgresql":
        yield (
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
    for table in APPEND_ONLY:
        if dialect == "postgresql":
            yield (
                f"CREATE TRIGGER {table}_stay BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()"
            )
            yield f"CREATE TRIGGER {table}_all_stay BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()"
        else:
            for action in ("UPDATE", "DELETE"):
                yield (
                    f"CREATE TRIGGER {table}_stay_{action.lower()} BEFORE {action} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
            # INSERT OR REPLACE deletes without a word to the trigger above; what is there by its id stays as it is
            same = "number = NEW.number" + (" OR id = NEW.id" if "id" in _META.tables[table].c else "")
            yield (
                f"CREATE TRIGGER {table}_stay_replace BEFORE INSERT ON {table} "
                f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) BEGIN SELECT RAISE(IGNORE); END"
            )


def insert_new(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
    """Inserts rows but for those whose unique keys are there; returns how many were new."""
    if not rows:
        return 0
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    return sum(connection.execute(insert(table).values(row).on_conflict_do_nothing()).rowcount for row in rows)


def add_items(engine: Engine, new: Iterable[Item]) -> int:
    """Adds items that are not there yet, in their order; returns how many those were."""
    now = time.time()
    with writing(engine) as connection:
        return insert_new(connection, items, [one._asdict() | {"at": now} for one in new])


def add_verdict(engine: Engine, verdict: Verdict) -> bool:
    """Adds a verdict; when this returns it is on the disk. False: one of this id was there. See `queue.submit` for what is checked."""
    with writing(engine) as connection:
        return insert_verdict(connection, verdict)


def insert_verdict(connection: sa.Connection, verdict: Verdict) -> bool:
    """`add_verdict` within a transaction of the caller's."""
    return bool(insert_new(connection, verdicts, [verdict._asdict() | {"at": verdict.at or time.time()}]))


def read_items(engine: Engine, round: int | None = None, task: str | None = None) -> list[Item]:
    """The items of a round, of a task, or all, in the order in which they were added."""
    query = sa.select(*(items.c[name] for name in Item._fields)).order_by(items.c.number)
    query = query if round is None else query.where(items.c.round == round)
    query = query if task is None else query.where(items.c.task == task)
    with engine.connect() as connection:
        return [Item(**row) for row in connection.execute(query).mappings()]


def read_verdicts(
    engine: Engine, round: int | None = None, task: str | None = None, all_of_them: bool = False, models: bool = False
) -> list[Verdict]:
    """People's verdicts that count, in the order in which they were given; with `all_of_them` also those superseded, and retractions.

    With `models` those of model judges alone, whose persons' ids start with `record.MODEL`.
    """
    query = sa.select(*(verdicts.c[name] for name in Verdict._fields)).join(items, items.c.id == verdicts.c.item)
    query = query.order_by(verdicts.c.number)
    query = query if round is None else query.where(items.c.round == round)
    query = query if task is None else query.where(items.c.task == task)
    by_model = verdicts.c.person.startswith(MODEL)
    query = query.where(by_model if models else ~by_model)
    if not all_of_them:
        later = verdicts.alias()
        query = query.where(verdicts.c.kind != "retract", ~sa.exists().where(later.c.supersedes == verdicts.c.id))
    with engine.connect() as connection:
        return [Verdict(**row) for row in connection.execute(query).mappings()]


def note(
    connection: sa.Connection, action: str, subject: str, person: str | None = None, address: str = "", **detail: Any
) -> None:
    """Adds a line to the audit log, within a transaction of the caller's."""
    row = {
        "at": time.time(),
        "person": person,
        "action": action,
        "subject": subject,
        "detail": detail,
        "address": address,
    }
    connection.execute(audit.insert().values(**row))


def set_guideline(engine: Engine, task: str, text: str) -> int:
    """Returns the number of a task's guideline; a text that differs from the last is a new version."""
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7422)"))
        query = sa.select(guidelines).where(guidelines.c.task == task).order_by(guidelines.c.version.desc()).limit(1)
        last = connection.execute(query).mappings().first()
        if last is not None and last["text"] == text:
            return int(last["number"])
        version = 1 if last is None else last["version"] + 1
        made = connection.execute(guidelines.insert().values(task=task, version=version, text=text, at=time.time()))
        assert made.inserted_primary_key is not None
        note(connection, "guideline", task, version=version)
        return int(made.inserted_primary_key[0])
