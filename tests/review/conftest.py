"""Databases for the tests of `review`: an empty SQLite file, and an empty database of a PostgreSQL server.

The server is that of JAXTUNE_TEST_POSTGRESQL=postgresql://user@host/, where a database is made for each test; else one that
starts here, in a temporary folder, from the binaries on PATH or those of Debian's package, on a socket and port of its own.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = "JAXTUNE_TEST_POSTGRESQL"
pytest.importorskip("sqlalchemy", reason="needs SQLAlchemy: pip install 'jaxtune[review]'")


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs, the newest version's; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[4]))
    if not found and (named := shutil.which("initdb")):
        found = [Path(named)]
    return next((p.parent for p in reversed(found) if (p.parent / "postgres").exists()), None)


def unprivileged() -> dict[str, int]:
    """What makes subprocess start a program as somebody else than root, which PostgreSQL refuses to be."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid}
    pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody'")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a server, without a database's name; it is started where no running one is named."""
    if named := os.environ.get(SERVER):
        yield named.rstrip("/")
        return
    programs = binaries()
    if programs is None:
        pytest.skip(
            f"PostgreSQL is not here: install Debian's package postgresql, or set {SERVER}=postgresql://user@host/"
        )
    folder, port, who = Path(tempfile.mkdtemp(prefix="jaxtune-pg-", dir="/tmp")), free_port(), unprivileged()
    os.chown(folder, who.get("user", -1), who.get("group", -1))
    log = (folder / "log.txt").open("w")
    quiet = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
    made = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, check=True, **quiet, **who)  # type: ignore[call-overload]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c max_connections=200"
    options += (
        " -c fsync=off -c full_page_writes=off"  # nobody here pulls the plug, and databases are made in half the time
    )
    control = [programs / "pg_ctl", "-D", folder / "data", "-w", "-o", options]
    try:
        subprocess.run([*control, "start"], check=True, timeout=60, **quiet, **who)  # type: ignore[call-overload]
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet, **who)  # type: ignore[call-overload]
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def make_database(server: str) -> str:
    """The URL of a new, empty database."""
    import sqlalchemy as sa

    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(
        sa.make_url(f"{server}/postgres").set(drivername="postgresql+pg8000"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


def drop_database(url: str) -> None:
    import sqlalchemy as sa

    server, name = url.rsplit("/", 1)
    engine = sa.create_engine(
        sa.make_url(f"{server}/postgres").set(drivername="postgresql+pg8000"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where an empty review database is to be, in each of the two kinds."""
    if request.param == "sqlite":
        yield str(tmp_path / "review.db")
        return
    made = make_database(request.getfixturevalue("postgresql"))
    yield made
    drop_database(made)
