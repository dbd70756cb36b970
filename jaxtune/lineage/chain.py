"""Ledgers as files: JSON lines that are added and never changed, each with the hash of the one before and its own; and one writer.

A line that was changed, taken out, put in or moved breaks the chain, and is refused by its number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jaxtune
from jaxtune.types import UserError
from jaxtune.workdir import write_lines

Line = dict[str, Any]
_BEFORE_ALL = "0" * 64


def read(path: Path) -> list[Line]:
    """Returns the lines of a ledger, the first one first.

    Raises:
      UserError: a line is none of a ledger, or the chain of hashes is broken.
    """
    lines: list[Line] = []
    for number, text in enumerate(
        path.read_text("utf-8").split("\n"), 1
    ):  # not `splitlines`: U+2028 ends no line of JSON
        if not text:
            continue
        where, previous = f"{path}:{number}", lines[-1]["hash"] if lines else _BEFORE_ALL
        try:
            line = json.loads(text)
            right = line["hash"] == _hash(line), line["previous"] == previous
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where} is no line of a ledger: {text[:60]!r}; put the file back as it was") from None
        if not all(right):
            what = "was changed" if not right[0] else "does not follow the line before it"
            raise UserError(
                f"{where} {what}: the ledger's chain of hashes is broken there; put the file back as it was"
            )
        lines.append(line)
    return lines


def append(path: Path, lines: Sequence[Line], fields: Line) -> list[Line]:
    """Adds a line; returns all lines. A crash leaves the ledger with the line or without.

    Raises:
      UserError: the disk is full.
    """
    line = {"line": len(lines), "date": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
    line["previous"] = lines[-1]["hash"] if lines else _BEFORE_ALL
    line["hash"] = _hash(line)
    every = [*lines, line]
    write_lines(path, every)
    return every


def versions() -> dict[str, str]:
    """What a ledger's line says of the programs that made it."""
    return {"jaxtune": jaxtune.__version__, "jax": importlib.metadata.version("jax")}


def _hash(line: Line) -> str:
    body = {key: value for key, value in line.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def held(lock: Path, busy: str) -> Iterator[int]:
    """Holds a lock file; yields its descriptor, which a child that works on keeps open too.

    Args:
      busy: what to say where another holds it, with {who} for its process.

    Raises:
      UserError: another process holds it.
    """
    with lock.open("a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(busy.format(who=file.read().strip() or "another process")) from None
        except (ImportError, OSError):  # no locks here (Windows, some network disks)
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now(UTC).isoformat(timespec='seconds')}")
        file.flush()
        yield file.fileno()
