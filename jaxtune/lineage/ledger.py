"""The ledger of a lineage: what was released, from what, by which data and with what scores, and what was refused.

`ledger.jsonl` has a line for the base, for each candidate that was judged, and for each rollback. A line carries the hash of
the one before and its own, so that a line that was changed, taken out or put in breaks the chain; `ledger.md` shows the same
as a table and names the last hash, so that lines taken off the end are missed too. Lines are added, never changed.

A release's number counts the released candidates from 1; release 0 is the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtune.lineage import chain
from jaxtune.lineage.chain import Line
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

FILE, TABLE, _LOCK = "ledger.jsonl", "ledger.md", ".lock"
RELEASED = ("released", "forced")  # verdicts of candidates that became releases
_HEAD = "Last hash: "


def read(folder: Path) -> list[Line]:
    """Returns the ledger's lines, the base's first; [] where the folder is not there or is empty.

    Raises:
      UserError: the folder holds other things than a lineage, a line is not one, or the chain of hashes is broken.
    """
    path = folder / FILE
    if folder.is_file():
        raise UserError(
            f"lineage.folder={str(folder)!r} is a file; expected the folder of a lineage, or a path where there is nothing"
        )
    if not path.exists():
        others = sorted(p.name for p in folder.iterdir() if p.name != _LOCK) if folder.is_dir() else []
        if others:
            raise UserError(
                f"lineage.folder={str(folder)!r} is no lineage: it has no {FILE} and holds {', '.join(others[:3])}; name a "
                "lineage's folder, or a path where there is nothing"
            )
        return []
    lines = chain.read(path)
    _check_end(folder, lines)
    return lines


def _check_end(folder: Path, lines: Sequence[Line]) -> None:
    """The table is written after the lines, so what it names as the last hash must be among them."""
    table = folder / TABLE
    last = table.read_text("utf-8").rstrip().rpartition(_HEAD)[2].strip("`") if table.exists() else ""
    if last and last not in [line["hash"] for line in lines]:
        raise UserError(
            f"{folder / FILE} ends before the line that {TABLE} names as its last ({last[:12]}…): lines are missing at its end; put "
            "the file back as it was"
        )


def append(folder: Path, lines: Sequence[Line], fields: Line) -> list[Line]:
    """Adds a line to the ledger and renders the table; returns all lines. A crash leaves the ledger with the line or without.

    Raises:
      UserError: the disk is full.
    """
    every = chain.append(folder / FILE, lines, fields)
    render(folder, every)
    return every


# ---- what the lines say ----


def current(lines: Sequence[Line]) -> int:
    """The number of the release that is current: the last that was released or gone back to; 0 is the base."""
    told = [line["release"] for line in lines if line["kind"] == "rollback" or line.get("verdict") in RELEASED]
    return told[-1] if told else 0


def releases(lines: Sequence[Line]) -> dict[int, Line]:
    """The line of each release, by its number; the base's is 0."""
    return {line["release"]: line for line in lines if line["kind"] == "base" or line.get("verdict") in RELEASED}


def ancestry(lines: Sequence[Line], release: int) -> list[Line]:
    """The lines of a release and those that it was made from, the first one's first; without the base."""
    known, found = releases(lines), []
    while release:
        found.append(known[release])
        release = known[release]["parent"]
    return found[::-1]


def roll_back(folder: Path, lines: Sequence[Line], release: int, reason: str) -> list[Line]:
    """Makes an earlier release the current one, by a line of its own.

    Raises:
      UserError: there is no such release, or it is current.
    """
    known = releases(lines)
    if release not in known:
        listed = ", ".join(map(str, known)) or "none yet"
        raise UserError(f"lineage.rollback={release}: {folder} has no release {release}; it has {listed}")
    if release == current(lines):
        raise UserError(
            f"lineage.rollback={release}: release {release} is the current one of {folder}; there is nothing to do"
        )
    return append(folder, lines, {"kind": "rollback", "release": release, "from": current(lines), "reason": reason})


# ---- one update at a time ----


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """Holds the lineage against other updates; yields the lock's file descriptor, which a child that trains keeps open too.

    Raises:
      UserError: another update, or the training that a killed one left behind, is at work.
    """
    read(folder)  # nothing is written into a folder that is no lineage
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"an update of {folder} is at work ({{who}}, or the training that it started): wait for its end"
    with chain.held(folder / _LOCK, busy) as lock:
        yield lock


# ---- the table ----


def render(folder: Path, lines: Sequence[Line]) -> None:
    """Writes `ledger.md`."""
    write_whole(folder / TABLE, table(lines))


def table(lines: Sequence[Line]) -> str:
    """The ledger as Markdown: a row a line, newest last, and what each was made of below."""
    now = current(lines)
    head = ["| release | parent | date | name | verdict | replay | scores | drift |", "|---" * 8 + "|"]
    rows, details = [], []
    for line in lines:
        mark = f"**{line['release']}** (current)" if line["release"] == now and _is_release(line) else line["release"]
        cells = [
            mark if _is_release(line) else "–",
            line.get("parent", "–"),
            line["date"],
            line.get("name", ""),
            _verdict(line),
        ]
        cells += [_replay(line), _scores(line), _drift(line)]
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        details += _details(line)
    base = lines[0]
    return "\n".join(
        [f"# Releases of {base['model']}", "", *head, *rows, "", *details, "", f"{_HEAD}`{lines[-1]['hash']}`", ""]
    )


def _is_release(line: Line) -> bool:
    return line["kind"] == "base" or line.get("verdict") in RELEASED


def _verdict(line: Line) -> str:
    if line["kind"] == "rollback":
        return f"back to release {line['release']}" + (f": {line['reason']}" if line["reason"] else "")
    said = line.get("verdict", "")
    return f"{said}: {line['reason']}" if line.get("reason") else said


def _replay(line: Line) -> str:
    replay = line.get("replay")
    return f"{replay['share']:.0%} of {', '.join(replay['stages'])}" if replay else ""


def _scores(line: Line) -> str:
    return "; ".join(
        f"{name} {e['metric']} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
        for name, e in line.get("scores", {}).items()
    )


def _drift(line: Line) -> str:
    return "; ".join(
        f"{name} {test['effect']:.2g} (p {test['p_holm']:.2g})" for name, test in line.get("drift", {}).items()
    )


def _details(line: Line) -> list[str]:
    """A list entry on the data, the config and the weights of a candidate."""
    if line["kind"] != "update":
        return []
    files = "; ".join(
        f"`{one['uri']}` ({one['rows']:,} rows, SHA-256 {one['sha256'][:12]}…)"
        for one in line["data"]["files"].values()
    )
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    return [
        f"- line {line['line']}, {line['name']}: data {files}; config `{line['config']['path']}` (SHA-256 "
        f"{line['config']['sha256'][:12]}…); weights `{line['weights']}`; {versions}"
    ]
