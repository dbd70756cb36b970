"""Peak HBM per chip of the compiled training step: jaxtune's beside Tunix's and MaxText's, on the same work.

    python benchmarks/hbm_vs_peers.py [--only lora:v5e:4x4:16x2048] [--sides jaxtune,tunix] [--again] [--no-record]

Llama-3.1-8B, pure FSDP, ahead of time for TPUs that are not here. Each step is its own trainer's, built and compiled by
a program in benchmarks/peers/ under its own interpreter: the peers' is a virtual environment made once from
peers/requirements.txt (Python 3.12, 2 GB, under --cache), ours --ours-python. Peers' results are kept beside their
environment and compiled again by --again alone. libtpu's version moves all figures by up to 30%: only figures of one
libtpu compare, and the table says which.

Exits with 1 where ours needs more than a peer's. "longest" searches the longest row that one v5e chip holds with QLoRA,
over powers of two and one step between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import table

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxtune-benchmarks"
SIDES = ("jaxtune", "tunix", "maxtext")
GIB, RANK, NUM_LAYERS = 1 << 30, 16, 32
V5E_BYTES = int(15.75 * GIB)  # of a v5e chip's 16 GiB, what libtpu leaves to a program
LENGTHS = tuple(size for power in range(8, 18) for size in (1 << power, 3 << (power - 1)))  # 256, 384, 512, 768 …
Found = dict[str, Any]


class Work(NamedTuple):
    """One compiled step: `method` is lora, qlora or full (for MaxText also full_sft, its other trainer)."""

    method: str
    topology: str
    num_rows: int
    row_tokens: int

    def __str__(self) -> str:
        return f"{self.method}:{self.topology}:{self.num_rows}x{self.row_tokens}"

    @classmethod
    def parse(cls, text: str) -> Work:
        method, chip, sides, shape = text.split(":")
        rows, length = shape.split("x")
        return cls(method, f"{chip}:{sides}", int(rows), int(length))


WORKS = (
    Work("lora", "v5e:2x4", 8, 2048),
    Work("lora", "v5e:4x4", 16, 2048),
    Work("lora", "v5e:4x4", 16, 8192),
    Work("full", "v5p:2x2x4", 16, 4096),
)
LONGEST = "longest"


# ---- the peers' environment ----


def peers_python(cache: Path, python: str) -> Path:
    """The peers' interpreter; makes their environment where it is missing or its requirements have changed."""
    pins = HERE / "requirements.txt"
    folder, stamp = cache / "peers", hashlib.sha256(pins.read_bytes()).hexdigest()
    made, ready = folder / "bin" / "python", folder / "made-from"
    if ready.is_file() and ready.read_text() == stamp:
        return made
    print(f"making the peers' environment in {folder} (2 GB)", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(made), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)], check=True)
    ready.write_text(stamp)
    return made


def has(python: str, code: str) -> bool:
    """Whether this interpreter is there and runs `code` without an error."""
    return bool(shutil.which(python)) and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


# ---- one compilation ----


def compile_side(python: Path, side: str, work: Work, more: Found) -> Found:
    """What one side's step needs, compiled in a process of its own.

    Raises:
      RuntimeError: the side's program failed for another reason than memory.
    """
    asked = work._asdict() | {"rank": RANK, "num_layers": NUM_LAYERS} | more
    run = subprocess.run(
        [str(python), str(HERE / f"{side}_step.py"), json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": str(ROOT) if side == "jaxtune" else ""}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{side}, {work}: its program failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


class Results:
    """The peers' results, kept in one file so that each is compiled once."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path, self.again = path, again
        self.held: dict[str, Found] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, make: Callable[[], Found]) -> Found:
        if self.again or key not in self.held:
            found = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.held |= (json.loads(self.path.read_text()) if self.path.is_file() else {}) | {key: found}
            self.path.write_text(json.dumps(self.held, indent=1))
        return self.held[key]


def longest(fits: Callable[[int], bool], lengths: tuple[int, ...] = LENGTHS) -> int:
    """The longest of the ascending `lengths` that fits, by bisection; 0 if none does."""
    low, high = 0, len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(lengths[middle]) else (low, middle)
    return lengths[low - 1] if low else 0


# ---- the table ----


def cell(found: Found | None) -> str:
    """One result for the table, in GiB, or tokens where the longest row was sought."""
    if found is None:
        return ""
    if "longest_tokens" in found:
        return f"{found['longest_tokens']:,} tokens"
    return f"{found['peak_bytes'] / GIB:.2f}" if "peak_bytes" in found else "does not fit"


def against(found: dict[str, Found]) -> float | None:
    """Ours over the best peer's: of bytes the fewest, of the longest rows the longest; None with nothing to compare."""
    ours, name = found.get("jaxtune", {}), "peak_bytes"
    best: Callable[..., int] = min
    if "longest_tokens" in ours:
        name, best = "longest_tokens", max
    values = [found[side][name] for side in SIDES[1:] if found.get(side, {}).get(name)]
    return ours[name] / best(values) if values and name in ours else None


def versions(found: dict[str, Found]) -> str:
    """Every version that the results were compiled with, once."""
    seen: dict[str, list[str]] = {}
    for result in found.values():
        for name, number in result.get("versions", {}).items():
            if number not in seen.setdefault(name, []):
                seen[name].append(number)
    return ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in seen.items())


def row(work: Work | str, found: dict[str, Found], settings: list[str]) -> list[str]:
    """One row of the table in docs/benchmarks.md."""
    sides = [cell(found.get(side)) for side in SIDES]
    ours = " ".join(settings) or "as the config has it"
    ratio = against(found)
    return [*table.origin()[:2], versions(found), f"`{work}`", *sides, f"{ratio:.2f}" if ratio else "", ours]


# ---- the run ----


class Run(NamedTuple):
    """Where each side's program runs, what ours is set to, and what is known already."""

    ours_python: Path
    peers_python: Path | None
    ours: Found
    results: Results

    def measure(self, side: str, work: Work) -> Found:
        """One side's result for this work; prints it by part."""
        if side == "jaxtune":
            found = compile_side(self.ours_python, side, work, self.ours)
        else:
            assert self.peers_python is not None
            python = self.peers_python
            found = self.results.get(f"{side}:{work}", lambda: compile_side(python, side, work, {}))
        parts = [f"{name.removesuffix('_bytes')} {found[name] / GIB:.2f}" for name in found if name.endswith("_bytes")]
        print(f"{work} {side:<8} {', '.join(parts) or found['says']} ({found['seconds']} s)", flush=True)
        return found

    def find(self, side: str, work: Work | str) -> Found:
        """As `measure`; for "longest" the number of tokens."""
        if isinstance(work, Work):
            return self.measure(side, work)
        ask = Work("qlora", "v5e:1x1", 1, 0)
        known = {size: self.results.held.get(f"{side}:{ask._replace(row_tokens=size)}") for size in LENGTHS}
        tried = {size: found for size, found in known.items() if found and not self.results.again}

        def holds(found: Found) -> bool:
            return found["fits"] and found["peak_bytes"] <= V5E_BYTES

        def fits(length: int) -> bool:
            if any(size <= length and not holds(found) for size, found in tried.items()):
                return False  # nor does a shorter row
            tried[length] = self.measure(side, ask._replace(row_tokens=length))
            return holds(tried[length])

        return {"longest_tokens": longest(fits), "versions": next(iter(tried.values()))["versions"]}


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    sides, python = options.sides.split(","), None
    if "jaxtune" in sides and not has(options.ours_python, "import libtpu"):
        print(
            f"{options.ours_python} has no libtpu, which compiles for TPUs: pip install 'jaxtune[tpu]'", file=sys.stderr
        )
        return 2
    if sides != ["jaxtune"]:
        if not has(options.python, "import sys; sys.exit(sys.version_info[:2] != (3, 12))"):
            print("hbm_vs_peers.py needs a Python 3.12 for the peers: --python PATH", file=sys.stderr)
            return 2
        python = peers_python(options.cache, options.python)
    settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    results = Results(options.cache / "hbm_vs_peers.json", options.again)
    run = Run(Path(options.ours_python), python, {"settings": settings, "quantize": options.quantize}, results)
    failed = False
    for text in options.only.split(","):
        work, found = LONGEST if text == LONGEST else Work.parse(text), {}
        for side in sides:
            try:
                found[side] = run.find(side, work)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed = True
        shown = ", ".join(f"{side} {cell(found.get(side)) or 'failed'}" for side in sides)
        ratio = against(found)
        print(f"{work}: {shown}; {f'{ratio:.2f} x the best peer' if ratio else 'nothing to compare'}", flush=True)
        failed |= work != LONGEST and ratio is not None and ratio > 1
        if found and not options.no_record:
            table.append("hbm_vs_peers.py", row(work, found, options.set))
    return 1 if failed else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    works = ",".join([*map(str, WORKS), LONGEST])
    parser.add_argument("--only", default=works, help=f"of {works}, or others of the form METHOD:TOPOLOGY:ROWSxTOKENS")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="a config field of ours, repeatable"
    )
    parser.add_argument("--quantize", default="nf4", help="model.quantize of ours where the work is QLoRA")
    parser.add_argument("--ours-python", default=sys.executable, help="the interpreter of our step")
    parser.add_argument("--python", default="python3.12", help="a Python 3.12, for the peers' environment")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers' environment and results are kept")
    parser.add_argument("--again", action="store_true", help="compile the peers' steps again")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
