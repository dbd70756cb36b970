"""The ledger: append-only, chained, whole after a crash; and who may hold it."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from jaxtune.lineage import ledger
from jaxtune.types import UserError

BASE = {"kind": "base", "release": 0, "model": "some/model", "name": "base"}


def candidate(release: int | None, parent: int, verdict: str = "released", **more: Any) -> ledger.Line:
    files = {"train": {"uri": f"rows_{release}.csv", "rows": 1200, "sha256": "ab" * 32}}
    return {
        "kind": "update", "release": release, "parent": parent, "name": f"month {release}", "verdict": verdict, "reason": "",
        "data": {"files": files}, "config": {"path": "c.json", "sha256": "cd" * 32}, "weights": f"attempts/{release}/adapter",
        "versions": {"jaxtune": "0.1"}, "replay": {"share": 0.2, "stages": ["month 1"]},
        "scores": {"month 1": {"metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}},
        "drift": {"labels": {"effect": 0.31, "p_holm": 0.004}}, **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Base, releases 1 and 2, a refused candidate, and a rollback to 1."""
    lines: list[ledger.Line] = []
    rows = [BASE, candidate(1, 0), candidate(2, 1), candidate(None, 2, "refused", reason="worse on month 1")]
    for fields in rows:
        lines = ledger.append(tmp_path / "lineage", lines, fields)
    ledger.roll_back(tmp_path / "lineage", lines, 1, "complaints")
    return tmp_path / "lineage"


def test_what_was_written_is_read_and_the_current_release_follows_the_lines(folder: Path) -> None:
    lines = ledger.read(folder)
    assert [line["kind"] for line in lines] == ["base", "update", "update", "update", "rollback"]
    assert [ledger.current(lines[:n]) for n in range(1, 6)] == [0, 1, 2, 2, 1]
    assert [line["release"] for line in ledger.ancestry(lines, 2)] == [1, 2]
    lines = ledger.append(folder, lines, candidate(3, 1))
    assert [line["release"] for line in ledger.ancestry(lines, 3)] == [1, 3], "made from 1, to which it was rolled back"
    table = (folder / "ledger.md").read_text()
    assert "**3** (current)" in table
    assert "refused: worse on month 1" in table
    assert "back to release 1: complaints" in table
    assert "month 1 accuracy 0.500 [0.400, 0.600]" in table
    assert "rows_2.csv` (1,200 rows" in table


def changed(lines: list[str]) -> list[str]:
    return [line.replace('"value": 0.5', '"value": 0.9') if at == 2 else line for at, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (changed, r"ledger\.jsonl:3 was changed"),
        (lambda lines: lines[:2] + lines[3:], r"ledger\.jsonl:3 does not follow the line before it"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], r"ledger\.jsonl:2 does not follow"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], r"ledger\.jsonl:3 does not follow"),
        (lambda lines: lines[:-1], r"lines are missing at its end"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], r"ledger\.jsonl:5 is no line of a ledger"),
        (lambda lines: ["[]", *lines[1:]], r"ledger\.jsonl:1 is no line of a ledger"),
    ],
)
def test_a_ledger_that_was_tampered_with_is_refused(folder: Path, tamper: Any, says: str) -> None:
    path = folder / ledger.FILE
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=says):
        ledger.read(folder)


def test_a_crash_between_line_and_table_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, before = ledger.read(folder), (folder / ledger.TABLE).read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "render", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.append(folder, lines, candidate(3, 1))
    assert (folder / ledger.TABLE).read_text() == before, "the table is the older one"
    assert ledger.current(ledger.read(folder)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.append(folder, ledger.read(folder), candidate(4, 3))
    assert ledger.current(ledger.read(folder)) == 3, "a line is there whole or not at all"
    assert not list(folder.glob("*.partial"))


def test_a_full_disk_is_said_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: cannot write .*ledger\.jsonl"):
        ledger.append(folder, ledger.read(folder), candidate(3, 1))


def test_what_is_no_lineage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no lineage: it has no ledger\.jsonl and holds notes\.txt"):
        ledger.read(tmp_path)
    with pytest.raises(UserError, match="is a file; expected the folder of a lineage"):
        ledger.read(tmp_path / "notes.txt")
    assert ledger.read(tmp_path / "nothing") == []


def test_only_a_release_can_be_gone_back_to(folder: Path, tmp_path: Path) -> None:
    lines = ledger.read(folder)
    with pytest.raises(UserError, match=r"has no release 7; it has 0, 1, 2"):
        ledger.roll_back(folder, lines, 7, "")
    with pytest.raises(UserError, match="release 1 is the current one"):
        ledger.roll_back(folder, lines, 1, "")
    with pytest.raises(UserError, match="has no release 1; it has none yet"):
        ledger.roll_back(tmp_path / "new", [], 1, "")
    assert ledger.current(ledger.roll_back(folder, lines, 0, "")) == 0


def _hold(folder: str, held: Any, done: Any) -> None:
    with ledger.opened(Path(folder)):
        held.set()
        done.wait(60)


def test_one_update_at_a_time(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(folder), held, done))
    other.start()
    assert held.wait(300)
    with (
        pytest.raises(UserError, match=rf"an update of .* is at work \(process {other.pid} since"),
        ledger.opened(folder),
    ):
        raise AssertionError
    done.set()
    other.join()
    with ledger.opened(folder):
        assert json.loads((folder / ledger.FILE).read_text().splitlines()[0])["kind"] == "base"
