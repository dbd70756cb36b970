"""Where jaxtune's step time goes on this machine's CPU, and what share of the matmul peak it reaches.

    python benchmarks/step_profile.py [--layout T256] [--dtypes float32,bfloat16] [--steps 2]

The step of `cpu_vs_trl.py` runs under `jax.profiler`. Each compiled op's time, summed over threads, goes to one kind:
matmul (weights, adapters and head), attention (its matmuls, mask and softmax), elementwise and copies, other.

FLOPs per real token, counted by what LoRA needs and no more: 4 per frozen weight (forward, and the gradient that flows
back; none for the weight itself), 6 per LoRA parameter; 4 per weight of the head for trained positions alone; attention
apart, 8 T N H per layer (causality halves forward's 4 and backward's 8, and the backward pass computes the scores again:
2 + 4 + 2). Peak is the best of square matmuls measured here, in the step's own dtype.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

KINDS = ("matmul", "attention", "elementwise and copies", "other")
_CONTAINERS = ("while", "conditional", "call")  # their time is that of the ops inside
_ELEMENTWISE = re.compile(r"add|sub|mul|div|exp|log|tanh|select|compare|broadcast|copy|bitcast|transpose|slice|concat|convert|reduce|gather|scatter|iota|pad|fusion")  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = .*?[\]})] ([a-z][a-z0-9\-]*)\((.*)$")


def kinds(hlo: str) -> dict[str, str]:
    """Every instruction of a compiled program -> its kind; containers are left out."""
    has_dot: set[str] = set()
    inside, found = "", {}
    for text in hlo.splitlines():
        opened = re.match(r"^(?:ENTRY )?%(\S+) .*\{$", text)
        if opened:
            inside = opened.group(1)
        elif " dot(" in text:
            has_dot.add(inside)
    for text in hlo.splitlines():
        match = _INSTRUCTION.match(text)
        if not match or match.group(2) in _CONTAINERS:
            continue
        name, opcode, rest = match.groups()
        called = re.search(r"calls=%([^\s,]+)", rest)
        if "bkgts" in rest or _is_score(text):
            found[name] = "attention"
        elif opcode == "dot" or (called and called.group(1) in has_dot):
            found[name] = "matmul"
        else:
            found[name] = "elementwise and copies" if _ELEMENTWISE.search(f"{opcode} {name}") else "other"
    return found


def _is_score(text: str) -> bool:
    """Whether an instruction makes something of the rank of grouped queries or scores, (B, K, G, T, S)."""
    shape = re.search(r"= \w+\[([\d,]*)\]", text)
    return bool(shape) and shape.group(1).count(",") >= 4


def seconds_by_kind(trace: Path, of: dict[str, str]) -> dict[str, float]:
    """Thread-seconds of each kind in a Perfetto trace."""
    totals: dict[str, float] = defaultdict(float)
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        op = event.get("args", {}).get("hlo_op") if event.get("ph") == "X" else None
        if op in of:
            totals[of[op]] += event["dur"] / 1e6
    return {kind: totals[kind] for kind in KINDS}


def matmul_peak(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """The best FLOP/s of square matmuls of this dtype."""
    import jax
    import jax.numpy as jnp

    x = jnp.full((size, size), 0.5, dtype)
    run = jax.jit(jnp.matmul)
    jax.block_until_ready(run(x, x))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(x, x))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def flops(program: Any, tokens: int, trained_tokens: int, length: int) -> tuple[float, float]:
    """(matmul FLOPs, attention FLOPs) of one step of LoRA training; see the top of this file."""
    c = program.model_config
    layers = {
        path: leaf.size for path, leaf in program.base.items() if path.endswith(".kernel") and "lm_head" not in path
    }
    adapters = sum(leaf.size for path, leaf in program.adapter.items())
    matmuls = tokens * (4 * sum(layers.values()) + 6 * adapters) + trained_tokens * 4 * c.dim * c.vocab_size
    return float(matmuls), float(tokens * 8 * length * c.num_heads * c.blocks[0][0].attention.head_dim * c.num_layers)


def profile(rows_path: Path, layout: str, dtype: str, num_steps: int) -> dict[str, Any]:
    """Seconds by kind, seconds and FLOPs of a step, and the peak."""
    import cpu_vs_trl
    import jax
    import numpy as np

    with np.load(rows_path) as file:
        rows = {name: file[name] for name in file.files}
    step = cpu_vs_trl.jaxtune_step(rows, layout, dtype)
    run, state, batches = step.lowered.compile(), step.state, step.batches
    state, metrics = run(state, step.frozen, next(batches))
    float(metrics["loss"])
    tokens = trained = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            began = time.perf_counter()
            for _ in range(num_steps):
                state, metrics = run(state, step.frozen, next(batches))
                tokens, trained = tokens + int(metrics["tokens"]), trained + int(metrics["trained_tokens"])
            took = time.perf_counter() - began
        by_kind = seconds_by_kind(next(Path(folder).rglob("perfetto_trace.json.gz")), kinds(run.as_text()))
    matmuls, attention = flops(step.program, tokens, trained, int(layout[1:]))
    return {
        "by_kind": by_kind, "step_seconds": took / num_steps, "matmul_flops": matmuls / num_steps,
        "attention_flops": attention / num_steps, "peak": matmul_peak(dtype), "achieved": matmuls / took,
        "thread_seconds": took * (os.cpu_count() or 1),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="T256", help="T and the tokens of a packed row")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import cpu_vs_trl

    with tempfile.TemporaryDirectory() as folder:
        rows_path = cpu_vs_trl.write_rows(cpu_vs_trl.quickstart(), Path(folder))
        for dtype in options.dtypes.split(","):
            p = profile(rows_path, options.layout, dtype, options.steps)
            counted = sum(p["by_kind"].values())
            print(f"{dtype}, {options.layout}: {p['step_seconds']:.2f} s a step under the profiler")
            for kind, seconds in p["by_kind"].items():
                print(f"  {kind:<23} {seconds / p['thread_seconds']:6.1%} of all threads' time")
            print(f"  {'idle or uncounted':<23} {1 - counted / p['thread_seconds']:6.1%}")
            print(
                f"  {p['matmul_flops'] / 1e9:.0f} GFLOP a step in matmuls + {p['attention_flops'] / 1e9:.0f} in attention; "
                f"{p['achieved'] / 1e9:.0f} of {p['peak'] / 1e9:.0f} GFLOP/s: {p['achieved'] / p['peak']:.1%} of the measured "
                f"matmul peak ({p['achieved'] * (1 + p['attention_flops'] / p['matmul_flops']) / p['peak']:.1%} with attention)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
