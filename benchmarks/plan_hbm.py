"""Peak HBM per chip of the compiled training step for Llama-3.1-8B, LoRA r16, on a v5e slice that is not here.

    python benchmarks/plan_hbm.py [--limit 6.0] [--topology v5e:4x4] [--shapes 16x8192,16x2048]

Compiles what `jaxtune plan` compiles, ahead of time, under the libtpu installed here; needs no TPU. The peers' figures
are their own steps compiled for the same topology, under libtpu 0.0.52. libtpu's version moves all of them by up to
30%, so only figures of one libtpu compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llama3_8b_lora.py"
GIB = 1 << 30
LIMIT_GIB = 6.0  # of 16 x 8192 on v5e:4x4
# (topology, rows, tokens of a row) -> GiB per chip of Tunix 0.1.7 and MaxText 0.2.5; None = does not fit
PEERS: dict[tuple[str, int, int], tuple[float | None, float | None]] = {
    ("v5e:4x4", 16, 2048): (7.00, 3.71),
    ("v5e:4x4", 16, 8192): (None, 6.36),
    ("v5e:2x4", 8, 2048): (9.53, 5.58),
}


def load_config(topology: str, rows: int, length: int) -> Any:
    """`configs/llama3_8b_lora.py` at another topology and batch."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.plan.topology, config.train.batch_size, config.data.max_length = topology, rows, length
    return config


def plan(topology: str, rows: int, length: int) -> Any:
    """The plan of one shape."""
    from jaxtune.plan import compile as plan_compile
    from jaxtune.weights import source

    config = load_config(topology, rows, length)
    return plan_compile.compile_step(config, source.find(config).hf_config)


def line(topology: str, rows: int, length: int, made: Any) -> str:
    """One row of the table."""
    peers = PEERS.get((topology, rows, length), ())
    tunix, maxtext = [f"{p:.2f}" if p else "no fit" for p in peers] or ["", ""]
    over = f"{made.peak_hbm_bytes / GIB / peers[1]:.2f}" if peers and peers[1] else ""
    parts = [made.peak_hbm_bytes, made.argument_bytes, made.temporary_bytes, made.program_bytes]
    numbers = "  ".join(f"{part / GIB:9.2f}" for part in parts)
    return f"{topology:<8}  {rows:3d} x {length:<5d}  {numbers}  {made.compile_seconds:9.0f}  {tunix:>6}  {maxtext:>7}  {over:>9}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT_GIB, help="GiB that the first shape may need")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--shapes", default="16x8192,16x2048", help="batch rows x tokens of a row, comma-separated")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        print("plan_hbm.py needs libtpu, which compiles for TPUs anywhere: pip install 'jaxtune[tpu]'", file=sys.stderr)
        return 2
    os.environ["JAX_PLATFORMS"] = "cpu"  # an installed libtpu would look for a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may be compiling too
    print(f"{CONFIG.name}, GiB per chip; jax {version('jax')}, libtpu {version('libtpu')}")
    print("topology  rows x len   peak HBM  arguments       temp    program  compile s   Tunix  MaxText  x MaxText")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    peaks = []
    for rows, length in shapes:
        made = plan(options.topology, rows, length)
        peaks.append(made.peak_hbm_bytes / GIB)
        print(line(options.topology, rows, length, made), flush=True)
    rows, length = shapes[0]
    print(
        f"{rows} x {length}: {peaks[0]:.2f} GiB = {peaks[0] / options.limit:.2f} x the limit of {options.limit:g} GiB"
    )
    return 0 if peaks[0] <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
