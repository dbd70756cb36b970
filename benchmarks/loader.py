"""How fast the data path makes batches, beside what the training step takes: tokens per second of each.

    python benchmarks/loader.py [--seconds 5] [--no-record]

The rows are the quickstart's reviews, tokenised by jaxtune: packed into rows of 128 and 1,024 tokens, and joined end to
end into long rows (1,000 to 2,000 tokens) in rows of 2,048. The data path is all that the loop does before a step: bins,
shuffling, grain's reader threads, and arrays on the device. The step is the quickstart's (SmolLM2-135M, LoRA r16, 8 x 128),
run back to back on one resident batch: its best case. Tokens are real ones, never padding. The bound is 20 times.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import table

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 20.0  # times the step's appetite
LAYOUTS = {"128": (128, 8, 1), "1024": (1024, 8, 1), "2048, long rows": (2048, 8, 32)}  # tokens, rows, reviews joined


def quickstart() -> Any:
    """The quickstart's config."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.tracking.progress = "off"
    return config


def joined(rows: Any, num: int) -> Any:
    """Each `num` rows in a row as one."""
    from jaxtune.data.batches import Rows

    offsets = rows.offsets[::num]
    return Rows(rows.tokens[: offsets[-1]], rows.weights[: offsets[-1]], offsets, rows.row_ids[: len(offsets) - 1])


def data_path(config: Any, rows: Any, pad_id: int, layout: tuple[int, int, int], seconds: float) -> dict[str, float]:
    """Real tokens and batches per second of batches as the loop gets them, over about so many seconds."""
    import jax

    from jaxtune import sharding
    from jaxtune.data import pipeline

    length, batch_size, together = layout
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    taken = joined(rows, together) if together > 1 else rows
    source = pipeline.BatchSource(taken, length, True, True, 0, batch_size, pad_id)
    tokens = num = 0
    began = time.perf_counter()
    for batch in pipeline.iterate(source, 0, sys.maxsize, None, config.data.prefetch_batches):
        arrays = sharding.to_global({n: batch[n] for n in batch if n != "row_ids_BT"}, mesh, batch_size)
        jax.block_until_ready(arrays)
        tokens, num = tokens + int((batch["segment_ids_BT"] != 0).sum()), num + 1
        took = time.perf_counter() - began
        if took > seconds:
            break
    return {"tokens_per_second": tokens / took, "batches_per_second": num / took}


def appetite(config: Any, model: Any, rows: Any, pad_id: int, seconds: float) -> float:
    """Real tokens per second of the config's compiled step on one resident batch."""
    from jaxtune import sharding
    from jaxtune.data import pipeline
    from jaxtune.train import compiled, start
    from jaxtune.train import step as step_lib

    config.train.steps = 1000
    program, values = start.program(config, model)
    compiling = compiled.Compiling(config, program, evaluates=False)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    data, size = config.data, config.train.batch_size
    batch = pipeline.BatchSource(rows, data.max_length, True, True, 0, size, pad_id)[0]
    arrays = sharding.to_global({name: batch[name] for name in step_lib.fields(config, program)}, program.mesh, size)
    run, num = compiling.step().run, 0
    state, metrics = run(state, frozen, arrays)
    float(metrics["loss"])
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or num < 3:
        state, metrics = run(state, frozen, arrays)
        float(metrics["loss"])
        num += 1
    return num * int((batch["segment_ids_BT"] != 0).sum()) / (time.perf_counter() - began)


def measure(config: Any, seconds: float) -> dict[str, Any]:
    """Tokens per second of tokenising, of the data path for each layout, and of the step."""
    from jaxtune import fetch
    from jaxtune.data import pipeline
    from jaxtune.weights import source

    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    examples = pipeline.load(config.data, {"train": fetch.local(config.data.train)}, tokenizer).train
    began = time.perf_counter()
    rows = pipeline.tokenize(examples, tokenizer, config.data)
    tokenised = len(rows.tokens) / (time.perf_counter() - began)
    paths = {
        name: data_path(config, rows, tokenizer.pad_id, layout, seconds)["tokens_per_second"]
        for name, layout in LAYOUTS.items()
    }
    return {
        "tokenise": tokenised,
        "paths": paths,
        "step": appetite(config, model, rows, tokenizer.pad_id, seconds),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = measure(quickstart(), options.seconds)
    step, worst = found["step"], min(found["paths"].values())
    for name, rate in found["paths"].items():
        print(f"batches of {name:<16} {rate:12,.0f} tokens/s = {rate / step:8,.0f} x the step")
    print(f"tokenising, once {'':10} {found['tokenise']:12,.0f} tokens/s = {found['tokenise'] / step:8,.0f} x the step")
    print(
        f"the step {'':18} {step:12,.0f} tokens/s; the slowest batches are {worst / step:,.0f} x, the bound is {LIMIT:g} x"
    )
    if not options.no_record:
        cells = [f"{rate:,.0f}" for rate in (*found["paths"].values(), found["tokenise"], step)]
        table.append("loader.py", [*table.origin("jax", "grain", "numpy"), *cells, f"{worst / step:,.0f}"])
    return 0 if worst >= LIMIT * step else 1


if __name__ == "__main__":
    sys.exit(main())
