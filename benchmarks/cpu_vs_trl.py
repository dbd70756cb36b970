"""LoRA fine-tuning on this machine's CPU: jaxtune beside TRL + PEFT and beside a bare PyTorch + PEFT loop.

    python benchmarks/cpu_vs_trl.py [--steps 10] [--seconds 45] [--quick] [--no-record]
    python benchmarks/cpu_vs_trl.py --profile          # where jaxtune's step time goes: step_profile.py

SmolLM2-135M-Instruct, LoRA r16 on all linear layers, float32 and bfloat16, on the quickstart's reviews: jaxtune's data
room tokenises them once, and every side trains on those same rows, about as many per optimizer step. Each measurement
has a process of its own, one at a time. A short trial picks every side's best layout of the rows; then each side runs
`--steps` steps after a warm-up, or as many as `--seconds` allow. The result goes as a row into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import table

ROOT = Path(__file__).resolve().parents[1]
BATCH_TOKENS, MAX_ROW_TOKENS = 1024, 128  # slots of a jaxtune batch; rows longer than this (0.2%) stay out everywhere
RATE, RANK, ALPHA = 1e-3, 16, 32.0
LAYOUTS = {"jaxtune": ("T128", "T256"), "trl": ("grouped", "packed"), "bare": ("grouped",)}
DTYPES = ("float32", "bfloat16")
NAMES = {"jaxtune": "jaxtune", "trl": "TRL + PEFT", "bare": "PyTorch + PEFT loop"}


class Step(NamedTuple):
    """One measured optimizer step; tokens are real ones, never padding."""

    seconds: float
    loss: float
    tokens: int
    trained_tokens: int


Enough = Callable[[list[Step]], bool]  # asked after each step, whether to stop


# ---- the sides; each returns its steps, of which the first carries compilation and warm-up ----


def quickstart(model: Any = None) -> Any:
    """The quickstart's config, with a constant learning rate; `model` replaces its source."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.tune.rank, config.tune.alpha, config.tune.dropout = RANK, ALPHA, 0.0
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_steps = RATE, "constant", 0.0
    config.model.source = model or config.model.source
    config.train.steps = 1000
    return config


def write_rows(config: Any, folder: Path) -> Path:
    """Writes what every side reads: the config's training rows, tokenised once, and the model as a Hugging Face folder.

    (transformers reads a GGUF file too, but then its Trainer takes the model for a quantised one and refuses.)
    """
    import numpy as np

    from jaxtune import fetch
    from jaxtune.data import pipeline
    from jaxtune.weights import hf, source

    model = source.find(config)
    assert model.tensors is not None, "a preset has no weights to compare with"
    hf.save(folder / "model", model.hf_config, ((name, model.tensors.read(name)) for name in model.tensors.names()))
    tokenizer = source.find_tokenizer(config, model)
    examples = pipeline.load(config.data, {"train": fetch.local(config.data.train)}, tokenizer).train
    config.data.max_length, config.data.too_long = MAX_ROW_TOKENS, "drop"
    rows = pipeline.tokenize(examples, tokenizer, config.data)
    num_bins = pipeline.BatchSource(rows, 256, True, True, 0, 4, tokenizer.pad_id).num_bins
    tokenizer.save(folder / "model")
    np.savez(
        folder / "rows.npz", tokens=rows.tokens, weights=rows.weights, offsets=rows.offsets, model=str(folder / "model"),
        pad_id=tokenizer.pad_id, rows_per_step=round(len(rows) * BATCH_TOKENS / 256 / num_bins),
    )  # fmt: skip
    return folder / "rows.npz"


class Jaxtune(NamedTuple):
    """jaxtune's program and lowered step, its arrays, and batches on the device without end."""

    program: Any
    lowered: Any
    state: Any
    frozen: Any
    batches: Iterator[Any]


def jaxtune_step(rows: Any, layout: str, dtype: str) -> Jaxtune:
    """The training step as jaxtune's loop makes it, for packed rows of `layout` tokens, over `write_rows`' data."""
    from jaxtune import sharding
    from jaxtune.data.batches import BatchSource, Rows
    from jaxtune.train import start
    from jaxtune.train import step as step_lib
    from jaxtune.weights import source

    config = quickstart(str(rows["model"]))
    config.data.max_length = int(layout.removeprefix("T"))
    config.train.batch_size = BATCH_TOKENS // config.data.max_length
    config.model.param_dtype = config.model.compute_dtype = dtype
    model = source.find(config)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    names = [str(i) for i in range(len(rows["offsets"]) - 1)]
    data = BatchSource(
        Rows(rows["tokens"], rows["weights"], rows["offsets"], names),
        config.data.max_length, True, True, 0, config.train.batch_size, int(rows["pad_id"]),
    )  # fmt: skip
    abstract = (program.state, program.frozen, step_lib.abstract_batch(config, program))

    def batches() -> Iterator[Any]:
        for number in range(sys.maxsize):
            batch = data[number]
            host = {name: batch[name] for name in step_lib.fields(config, program)}
            yield sharding.to_global(host, program.mesh, config.train.batch_size)

    return Jaxtune(program, step_lib.make(config, program).lower(*abstract), state, frozen, batches())


def run_jaxtune(rows: Any, layout: str, dtype: str, enough: Enough) -> list[Step]:
    """jaxtune's own step on packed rows of `layout` tokens."""
    _, lowered, state, frozen, batches = jaxtune_step(rows, layout, dtype)
    steps: list[Step] = []
    began = time.perf_counter()
    run = lowered.compile()
    while not enough(steps):
        state, metrics = run(state, frozen, next(batches))
        loss = float(metrics["loss"])
        now = time.perf_counter()
        steps.append(Step(now - began, loss, int(metrics["tokens"]), int(metrics["trained_tokens"])))
        began = now
    return steps


def torch_model(rows: Any, dtype: str) -> Any:
    """The same weights in transformers, all of `dtype`; the adapter is PEFT's to add."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    return AutoModelForCausalLM.from_pretrained(
        str(rows["model"]), dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )


def peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def examples(rows: Any) -> list[list[list[int]]]:
    """Token ids and labels of each row; -100 is not trained, nor is a first token, which nothing precedes."""
    import numpy as np

    offsets = rows["offsets"]
    labels = np.where(rows["weights"] != 0, rows["tokens"], -100)
    labels[offsets[:-1]] = -100
    return [[part.tolist() for part in np.split(array, offsets[1:-1])] for array in (rows["tokens"], labels)]


def run_trl(rows: Any, layout: str, dtype: str, enough: Enough) -> list[Step]:
    """TRL's SFTTrainer: "grouped" pads rows of like length to the longest; "packed" is best fit without padding."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    ids, labels = examples(rows)
    if layout == "packed":
        options = {"packing": True, "max_length": 256, "per_device_train_batch_size": BATCH_TOKENS // 256}
    else:
        options = {
            "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": int(rows["rows_per_step"]),
        }  # fmt: skip
    steps: list[Step] = []
    seen: dict[str, Any] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            steps.append(Step(now - seen["began"], seen["loss"], seen["tokens"], seen["trained"]))
            seen["began"], control.should_training_stop = now, enough(steps)

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, learning_rate=RATE, lr_scheduler_type="constant", max_steps=100_000,
            bf16=False, seed=0, **options,
        )  # fmt: skip
        trainer = SFTTrainer(
            torch_model(rows, dtype), arguments, peft_config=peft_config(), callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}),
            processing_class=AutoTokenizer.from_pretrained(str(rows["model"])),
        )  # fmt: skip
        train = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] = int(inputs["input_ids"].numel() if mask is None else mask.sum())
            seen["trained"] = int((inputs["labels"] != -100).sum())
            loss = train(model, inputs, *rest, **more)
            seen["loss"] = float(loss)
            return loss

        trainer.training_step = training_step
        seen["began"] = time.perf_counter()
        trainer.train()
    return steps


def run_bare(rows: Any, layout: str, dtype: str, enough: Enough) -> list[Step]:
    """PyTorch and PEFT at their leanest: rows sorted by length (least padding), the head at trained positions alone."""
    import torch
    from peft import get_peft_model
    from torch.nn.functional import cross_entropy

    ids, labels = examples(rows)
    size = int(rows["rows_per_step"])
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    groups = [by_length[at : at + size] for at in range(0, len(by_length) - size + 1, size)]
    model = get_peft_model(torch_model(rows, dtype), peft_config()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    base = model.get_base_model()
    order = torch.randperm(len(groups)).tolist()
    steps: list[Step] = []
    began = time.perf_counter()
    while not enough(steps):
        chosen = groups[order[len(steps) % len(order)]]
        length = max(len(ids[row]) for row in chosen)
        tokens, targets = (
            torch.tensor([part[row] + [fill] * (length - len(part[row])) for row in chosen])
            for part, fill in ((ids, int(rows["pad_id"])), (labels, -100))
        )
        mask = torch.tensor([[1] * len(ids[row]) + [0] * (length - len(ids[row])) for row in chosen])
        hidden = base.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        at = targets[:, 1:] != -100
        loss = cross_entropy(base.lm_head(hidden[:, :-1][at]).float(), targets[:, 1:][at])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        now = time.perf_counter()
        steps.append(Step(now - began, loss.item(), int(mask.sum()), int(at.sum())))
        began = now
    return steps


RUN = {"jaxtune": run_jaxtune, "trl": run_trl, "bare": run_bare}


def child(rows_path: str, side: str, layout: str, dtype: str, num_steps: int, seconds: float) -> dict[str, Any]:
    """Runs one side in this process: one step to warm up, then `num_steps`, or fewer once `seconds` have passed."""
    import numpy as np

    def enough(steps: list[Step]) -> bool:
        return len(steps) > num_steps or sum(step.seconds for step in steps[1:]) > seconds

    with np.load(rows_path) as file:
        steps = RUN[side]({name: file[name] for name in file.files}, layout, dtype, enough)
    timed = steps[1:]
    took = sum(step.seconds for step in timed)
    tail = timed[len(timed) // 2 :]
    status = Path("/proc/self/status").read_text().splitlines()  # VmHWM: unlike ru_maxrss, never the parent's
    return {
        "steps": len(timed),
        "first_seconds": steps[0].seconds,
        "step_seconds": took / len(timed),
        "tokens_per_second": sum(step.tokens for step in timed) / took,
        "trained_per_second": sum(step.trained_tokens for step in timed) / took,
        "tokens_per_step": sum(step.tokens for step in timed) / len(timed),
        "first_loss": steps[0].loss,
        "loss": sum(s.loss * s.trained_tokens for s in tail) / sum(s.trained_tokens for s in tail),
        "peak_rss_bytes": next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")),
    }


# ---- the comparison ----


def measure(rows_path: Path, side: str, layout: str, dtype: str, num_steps: int, seconds: float) -> dict[str, Any]:
    """`child` in a fresh process."""
    arguments = [str(rows_path), side, layout, dtype, str(num_steps), str(seconds)]
    run = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{NAMES[side]}, {dtype}, {layout} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1]) | {"side": side, "layout": layout, "dtype": dtype}


def compare(rows_path: Path, num_steps: int, seconds: float, sides: tuple[str, ...] = tuple(NAMES)) -> list[Any]:
    """Each side and dtype at the side's best layout, which a trial of two float32 steps picks; prints as it goes."""
    print(f"{'side':<20} {'dtype':<9} {'layout':<8} {'real tok/s':>10} {'trained/s':>9} {'s/step':>7} {'tok/step':>8} "
          f"{'first s':>7} {'steps':>5} {'peak RSS':>9} {'loss, first → last':>19}")  # fmt: skip
    results = []
    for side in sides:
        best = LAYOUTS[side][0]
        if len(LAYOUTS[side]) > 1:
            trials = [measure(rows_path, side, layout, DTYPES[0], 2, seconds) for layout in LAYOUTS[side]]
            best = max(trials, key=lambda trial: trial["tokens_per_second"])["layout"]
            tried = ", ".join(f"{t['layout']} {t['tokens_per_second']:.0f} tok/s" for t in trials)
            print(f"{NAMES[side]}: trial {tried}", flush=True)
        for dtype in DTYPES:
            results.append(r := measure(rows_path, side, best, dtype, num_steps, seconds))
            print(f"{NAMES[side]:<20} {dtype:<9} {best:<8} {r['tokens_per_second']:10.1f} {r['trained_per_second']:9.2f} "
                  f"{r['step_seconds']:7.2f} {r['tokens_per_step']:8.0f} {r['first_seconds']:7.1f} {r['steps']:5d} "
                  f"{r['peak_rss_bytes'] / (1 << 30):5.2f} GiB {r['first_loss']:9.3f} → {r['loss']:.3f}", flush=True)  # fmt: skip
    return results


def fastest(results: list[Any], sides: tuple[str, ...], dtypes: tuple[str, ...] = DTYPES) -> Any:
    among = [r for r in results if r["side"] in sides and r["dtype"] in dtypes]
    return max(among, key=lambda r: r["tokens_per_second"])


def ratios(results: list[Any]) -> list[str]:
    """jaxtune over the faster peer, per dtype and best against best, in real tokens per second and in peak memory."""
    lines = []
    for name, dtypes in (("float32", DTYPES[:1]), ("bfloat16", DTYPES[1:]), ("best", DTYPES)):
        ours, peer = fastest(results, ("jaxtune",), dtypes), fastest(results, ("trl", "bare"), dtypes)
        lines.append(
            f"{name}: jaxtune {ours['tokens_per_second']:.0f} tok/s ({ours['dtype']}) = "
            f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f} x {NAMES[peer['side']]} ({peer['dtype']}), "
            f"peak memory {ours['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f} x"
        )
    return lines


def record(results: list[Any], path: Path = table.RECORD) -> None:
    """Adds the results as one row of the table in docs/benchmarks.md."""
    cells = table.origin("jax", "torch", "trl", "peft", "transformers")
    for side in NAMES:
        for r in (r for r in results if r["side"] == side):
            cells.append(f"{r['tokens_per_second']:.0f} ({r['peak_rss_bytes'] / (1 << 30):.1f} GiB)")
    ours, peer = fastest(results, ("jaxtune",)), fastest(results, ("trl", "bare"))
    cells.append(f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}")
    table.append("cpu_vs_trl.py", cells, path=path)


def main(argv: list[str] | None = None) -> int:
    if argv is None and sys.argv[1:2] == ["--child"]:
        *names, num_steps, seconds = sys.argv[2:]
        print(json.dumps(child(*names, int(num_steps), float(seconds))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side")
    parser.add_argument("--seconds", type=float, default=45, help="measured seconds of each side at most")
    parser.add_argument("--quick", action="store_true", help="two steps each; nothing is recorded")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--profile", action="store_true", help="only show where jaxtune's step time goes")
    options = parser.parse_args(argv)
    if options.profile:
        import step_profile

        return step_profile.main([])
    missing = [name for name in ("torch", "trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"cpu_vs_trl.py needs {', '.join(missing)}: `make test` under Python 3.11 installs requirements-oracle.lock", file=sys.stderr)  # fmt: skip
        return 2
    num_steps, seconds = (2, 1.0) if options.quick else (options.steps, options.seconds)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        print(f"SmolLM2-135M-Instruct, LoRA r{RANK}, about {BATCH_TOKENS} tokens a step; {table.machine()}", flush=True)
        results = compare(write_rows(quickstart(), Path(folder)), num_steps, seconds)
    print("\n".join(ratios(results)))
    if not (options.quick or options.no_record):
        record(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
