"""Rollouts of SmolLM2-135M-Instruct on this machine's CPU: jaxtune beside transformers' `generate` at its best.

    python benchmarks/rollout.py [--slots 64] [--max-new-tokens 256] [--dtypes float32] [--quick] [--no-record]

64 real review sentences, as chat prompts of ragged length, sampled at temperature 1: completions end where the model ends
them, or at the limit. Each side has a process of its own, one at a time; jaxtune goes through the work once before, for what
it compiles serves every later round of rollouts. transformers gets its best of batch sizes (rows sorted by length, padded on
the left) and of its static and dynamic caches, by a short trial. Counted are tokens up to and with the stop token; the ratio
goes as a row into docs/benchmarks.md. The two draw other random numbers, so lengths differ a little: speed is per token.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import table

NUM_PROMPTS, TRIAL_TOKENS = 64, 6
SETTINGS = [(rows, cache) for rows in (64, 32, 16) for cache in ("static", "dynamic")]


def write_work(folder: Path, config: Any, num_prompts: int) -> Path:
    """Writes the model as a Hugging Face folder, and the prompts' tokens beside it."""
    from jaxtune import fetch
    from jaxtune.data import pipeline, templates
    from jaxtune.weights import hf, source

    model = source.find(config)
    assert model.tensors is not None, "a preset has no weights to compare with"
    hf.save(folder / "model", model.hf_config, ((name, model.tensors.read(name)) for name in model.tensors.names()))
    tokenizer = source.find_tokenizer(config, model)
    tokenizer.save(folder / "model")
    examples = pipeline.load(config.data, {"train": fetch.local(config.data.train)}, tokenizer).train[:num_prompts]
    work = {
        "model": str(folder / "model"), "prompts": [templates.prompt_ids(example, tokenizer) for example in examples],
        "stop_ids": list(tokenizer.stop_ids), "pad_id": tokenizer.pad_id, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work))
    return folder / "work.json"


class Clock:
    """Seconds by the wall and of this process's threads: on a machine with other work only the second tells."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def result(self, rows: list[Any], setting: str) -> dict[str, Any]:
        wall, cpu, lengths = time.perf_counter() - self.wall, self._cpu() - self.cpu, sorted(map(len, rows))
        return {
            "tokens": sum(lengths), "seconds": wall, "cpu_seconds": cpu, "setting": setting, "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        }  # fmt: skip


def run_jaxtune(work: dict[str, Any], dtype: str, slots: int, most: int) -> dict[str, Any]:
    """The roller over a LoRA training state's parameters, as reinforcement uses it."""
    import cpu_vs_trl

    from jaxtune.generate.logits import Sampling
    from jaxtune.generate.rollout import Roller
    from jaxtune.train import start
    from jaxtune.weights import source

    config = cpu_vs_trl.quickstart(work["model"])
    config.model.param_dtype = config.model.compute_dtype = dtype
    model = source.find(config)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    roller = Roller(
        program.inference, work["stop_ids"], work["pad_id"], work["vocab_size"], program.model_config.max_positions, slots,
        program.mesh,
    )  # fmt: skip
    given = ({**frozen, **state.params}, work["prompts"], 1, Sampling(1.0))
    roller(*given, most, seed=0)  # the same draws, so the same shapes: all is compiled
    clock = Clock()
    made = roller(*given, most, seed=0)
    return clock.result([one.tokens for one in made], f"{slots} rows")


def run_transformers(work: dict[str, Any], dtype: str, slots: int, most: int) -> dict[str, Any]:
    """`generate` in batches of rows of like length; the trial takes the longest prompts, a few tokens each."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = model.eval()
    ordered = sorted(work["prompts"], key=len, reverse=True)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], cache: str, new_tokens: int, least: int = 0) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[work["pad_id"]] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, min_new_tokens=least,
            eos_token_id=work["stop_ids"], pad_token_id=work["pad_id"], cache_implementation=cache if cache == "static" else None,
        )[:, width:].tolist()  # fmt: skip
        ends = [next((i for i, token in enumerate(row) if token in work["stop_ids"]), len(row) - 1) for row in out]
        return [row[: end + 1] for row, end in zip(out, ends, strict=True)]

    trials = {}
    for rows, cache in SETTINGS:
        if rows <= len(ordered):
            times = []
            for tokens in (1, 1 + TRIAL_TOKENS):
                began = time.perf_counter()
                generate(ordered[:rows], cache, tokens, tokens)
                times.append(time.perf_counter() - began)
            trials[rows, cache] = (times[1] - times[0]) / rows
    rows, cache = min(trials, key=lambda setting: trials[setting]) if trials else (len(ordered), "dynamic")
    clock = Clock()
    made = [one for at in range(0, len(ordered), rows) for one in generate(ordered[at : at + rows], cache, most)]
    return clock.result(made, f"{cache} cache, {rows} rows")


RUN = {"jaxtune": run_jaxtune, "transformers": run_transformers}


def measure(path: Path, side: str, dtype: str, slots: int, most: int) -> dict[str, Any]:
    """Runs one side in a fresh process."""
    command = [sys.executable, __file__, "--child", str(path), side, dtype, str(slots), str(most)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"side": side, "dtype": dtype, "speed": found["tokens"] / found["seconds"]}


def main(argv: list[str] | None = None) -> int:
    if argv is None and sys.argv[1:2] == ["--child"]:
        path, side, dtype, slots, most = sys.argv[2:]
        print(json.dumps(RUN[side](json.loads(Path(path).read_text()), dtype, int(slots), int(most))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=64, help="jaxtune's rows side by side")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], help="each of both sides; the fastest of a side counts"
    )
    parser.add_argument("--quick", action="store_true", help="8 prompts, 8 tokens each; nothing is recorded")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    import cpu_vs_trl

    os.environ["JAX_PLATFORMS"] = "cpu"
    config = cpu_vs_trl.quickstart()
    config.data.system = "Answer the customer's review in one sentence."
    most = 8 if options.quick else options.max_new_tokens
    with tempfile.TemporaryDirectory() as folder:
        path = write_work(Path(folder), config, 8 if options.quick else NUM_PROMPTS)
        found = []
        for side in RUN:
            for dtype in options.dtypes:
                found.append(r := measure(path, side, dtype, options.slots, most))
                print(f"{side:<13} {dtype:<9} {r['setting']:<24} {r['tokens']:6d} tokens in {r['seconds']:6.1f} s: {r['speed']:7.1f} tok/s, "
                    f"{r['tokens'] / r['cpu_seconds']:.1f} by a second of its threads; "
                      f"lengths: median {r['median']}, longest {r['longest']}", flush=True)  # fmt: skip
    ours, theirs = (max((r for r in found if r["side"] == side), key=lambda r: r["speed"]) for side in RUN)
    by_cpu = ours["tokens"] / ours["cpu_seconds"] / (theirs["tokens"] / theirs["cpu_seconds"])
    print(
        f"jaxtune = {ours['speed'] / theirs['speed']:.2f} x transformers by the clock, {by_cpu:.2f} x by seconds of threads"
    )
    if not (options.quick or options.no_record):
        cells = [
            f"{r['speed']:.0f} tok/s ({r['dtype']}, {r['setting']}; median {r['median']} tokens)"
            for r in (ours, theirs)
        ]
        table.append(
            "rollout.py",
            [*table.origin("jax", "torch", "transformers"), *cells, f"{ours['speed'] / theirs['speed']:.2f}"],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
