"""What every benchmark appends to docs/benchmarks.md: a dated row that names the machine and the versions.

    table.append("my_script.py", [*table.origin("jax", "flax"), "12.3", "0.8"])

The table in docs/benchmarks.md ends with the line `<!-- rows of my_script.py end here -->`, where the next row goes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def today() -> str:
    """The date of a row, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, {gib:.0f} GiB"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages; one that is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def origin(*packages: str) -> list[str]:
    """The first three cells of a row: date, machine, versions."""
    return [today(), machine(), ", ".join(f"{name} {number}" for name, number in versions(*packages).items())]


def mark(script: str) -> str:
    """The line in docs/benchmarks.md before which this script's rows go."""
    return f"<!-- rows of {script} end here -->"


def append(script: str, *rows: Sequence[str], path: Path = RECORD) -> None:
    """Adds rows of cells to this script's table in docs/benchmarks.md."""
    text, end = path.read_text(), mark(script)
    assert text.count(end) == 1, f"{path} must have the line {end} once"
    lines = "".join("| " + " | ".join(cells) + " |\n" for cells in rows)
    path.write_text(text.replace(end, lines + end))
