"""LoRA and full fine-tuning on one GPU: jaxtune beside TRL + PEFT, in tokens/s, model FLOPs utilisation and memory.

    python benchmarks/gpu.py [--methods lora,full] [--rows 1,2,4] [--steps 10] [--trl-python PATH] [--no-record]
    python benchmarks/gpu.py --attention xla  # jaxtune by one form of `model.attention`; without it by "auto"
    python benchmarks/gpu.py --dry          # the same code on the CPU, a tiny shape and two steps; measures nothing

Llama-3-8B's shape, random weights, bfloat16, LoRA r16 on all linear layers, packed rows of 4,096 tokens in which every
token trains; AdamW, its moments in the dtype of what trains. Each measurement has a process of its own. A trial picks
every side's fastest of `--rows` a step, with and without recomputing activations. Where full fine-tuning at 8B does not
fit for one side, both do it at Llama-3.2-3B's shape, and the table says so. TRL runs flash attention 2 and Liger's
kernels where they are installed, else sdpa and its own; the table says which.

FLOPs of a token: 6 N for full fine-tuning and, with N the weights that multiply (the head, not the embedding), both 4 N
(no gradient of a frozen weight) + 6 per LoRA parameter, and 6 N, as others count; causal attention within each packed
document apart, 6 L H x the square of its length. Peak: the vendor's dense bfloat16 figure, by the device's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import table

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"jaxtune": "jaxtune", "trl": "TRL + PEFT"}
RANK, RATE, OUT_OF_MEMORY = 16, 1e-4, 3  # the last: exit code of a side that does not fit
SHARES = (8, 4, 2, 1, 1)  # a packed row holds documents of these shares of its sixteenths
# Dense bfloat16 FLOP/s, the first name that the device's begins with: NVIDIA's data sheets, read on 2026-11-24.
PEAKS = {
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A10": 125e12,
}  # fmt: skip


class Shape(NamedTuple):
    """A preset of jaxtune's Llama family, and the tokens of a packed row."""

    preset: str
    row_tokens: int


SHAPES = {"lora": (Shape("llama3_8b", 4096),), "full": (Shape("llama3_8b", 4096), Shape("llama3_2_3b", 4096))}
DRY = (Shape("llama_tiny", 128),)


class Layout(NamedTuple):
    """Rows of a step, and whether activations are recomputed in the backward pass."""

    num_rows: int
    remat: bool

    def __str__(self) -> str:
        return f"{self.num_rows} rows, {'remat' if self.remat else 'no remat'}"


class Asked(NamedTuple):
    """What a side measures in its process: `num_steps` after one of warm-up, on `device` "gpu" or "cpu"."""

    method: str
    hf_config: dict[str, Any]
    row_tokens: int
    num_rows: int
    remat: bool
    num_steps: int
    device: str
    attention: str = "auto"

    @property
    def documents(self) -> list[int]:
        """Tokens of each document of a packed row."""
        return [self.row_tokens * share // sum(SHARES) for share in SHARES]


Seconds = list[float]  # of each step; the first carries compilation and warm-up
Result = dict[str, Any]


# ---- the sides; each returns seconds by step, the peak of memory and what it ran with ----


def documents(asked: Asked, num_rows: int) -> list[list[int]]:
    """Random token ids, which fill `num_rows` packed rows without padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    vocab = asked.hf_config["vocab_size"]
    return [rng.integers(3, vocab, size).tolist() for _ in range(num_rows) for size in asked.documents]


def run_jaxtune(asked: Asked) -> Result:
    """jaxtune's own step, as its loop makes it."""
    import jax
    import numpy as np

    from jaxtune import config as config_lib
    from jaxtune import sharding
    from jaxtune.data.batches import BatchSource, Rows
    from jaxtune.train import start, step
    from jaxtune.weights import source

    config = config_lib.base()
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.tune.method, config.tune.rank, config.tune.alpha, config.tune.dropout = asked.method, RANK, 2.0 * RANK, 0.0
    config.tune.dtype = "bfloat16" if asked.method == "full" else "float32"
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_steps = RATE, "constant", 0.0
    config.data.max_length, config.train.batch_size = asked.row_tokens, asked.num_rows
    config.model.attention = asked.attention
    config.train.remat, config.train.steps = "block" if asked.remat else "none", 1000
    model = source.Model("random weights", None, asked.hf_config, None, None)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, *_: iter(items))
    texts = documents(asked, 4 * asked.num_rows)
    ends = np.cumsum([0, *map(len, texts)])
    rows = Rows(
        np.concatenate(texts).astype(np.int32), np.ones(ends[-1], np.float32), ends, list(map(str, range(len(texts))))
    )
    data = BatchSource(rows, asked.row_tokens, True, True, 0, asked.num_rows, 0)
    abstract = (program.state, program.frozen, step.abstract_batch(config, program))
    run = step.make(config, program).lower(*abstract).compile()
    seconds: Seconds = []
    tokens = 0
    for number in range(asked.num_steps + 1):
        began = time.perf_counter()
        batch = data[number]
        host = {name: batch[name] for name in step.fields(config, program)}
        state, metrics = run(state, frozen, sharding.to_global(host, program.mesh, asked.num_rows))
        tokens, loss = int(metrics["tokens"]), float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds, "tokens_per_step": tokens, "loss": loss, "device": jax.devices()[0].device_kind,
        "peak_bytes": stats.get("peak_bytes_in_use", 0), "attention": config.model.attention,
        "versions": table.versions("jaxtune", "jax", "flax"),
    }  # fmt: skip


def tokenizer(vocab_size: int) -> Any:
    """A tokenizer of as many words, for TRL asks for one; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, vocab_size)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def run_trl(asked: Asked) -> Result:
    """TRL's SFTTrainer, packed (best fit, padding-free), with PEFT for LoRA."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    gpu = asked.device == "gpu"
    flash = gpu and importlib.util.find_spec("flash_attn") is not None
    liger = gpu and importlib.util.find_spec("liger_kernel") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**asked.hf_config), dtype=torch.bfloat16, attn_implementation=attention
        )
    seconds: Seconds = []
    seen: dict[str, Any] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - seen["began"])
            seen["began"], control.should_training_stop = now, len(seconds) > asked.num_steps

    peft = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, use_cpu=not gpu, bf16=gpu, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, gradient_checkpointing=asked.remat, learning_rate=RATE, lr_scheduler_type="constant",
            optim="adamw_torch_fused", max_steps=100_000, seed=0, use_liger_kernel=liger, packing=True,
            max_length=asked.row_tokens, per_device_train_batch_size=asked.num_rows,
        )  # fmt: skip
        texts = documents(asked, 4 * asked.num_rows)
        trainer = SFTTrainer(
            model, arguments, peft_config=peft if asked.method == "lora" else None, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": texts, "labels": texts}),
            processing_class=tokenizer(asked.hf_config["vocab_size"]),
        )  # fmt: skip
        train = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            seen["tokens"] = int(inputs["input_ids"].numel())
            seen["loss"] = train(model, inputs, *rest, **more)
            return seen["loss"]

        trainer.training_step = training_step
        seen["began"] = time.perf_counter()
        trainer.train()
    return {
        "seconds": seconds, "tokens_per_step": seen["tokens"], "loss": float(seen["loss"]),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
        "attention": f"{attention}{', liger' if liger else ''}",
        "versions": table.versions("torch", "transformers", "trl", "peft", "flash-attn", "liger-kernel"),
    }  # fmt: skip


RUN: dict[str, Callable[[Asked], Result]] = {"jaxtune": run_jaxtune, "trl": run_trl}


def child(side: str, asked: Asked) -> Result:
    """Measures one side in this process; exits with OUT_OF_MEMORY where it does not fit."""
    try:
        result = RUN[side](asked)
    except Exception as error:  # jax and torch raise classes of their own, which only one of them could name
        if any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")):
            print(str(error)[:300], file=sys.stderr)
            sys.exit(OUT_OF_MEMORY)
        raise
    timed = result["seconds"][1:]
    took = sum(timed) / len(timed)
    return result | {"step_seconds": took, "tokens_per_second": result["tokens_per_step"] / took}


# ---- what it comes to ----


def flops(asked: Asked) -> dict[str, float]:
    """FLOPs of one token: as counted for LoRA ("4N") and for full fine-tuning ("6N"), both with attention."""
    c = asked.hf_config
    dim, layers, ffn = c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"]
    head = c.get("head_dim", dim // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    linear = [(dim, q), (dim, kv), (dim, kv), (q, dim), (dim, ffn), (dim, ffn), (ffn, dim)]
    weights = layers * sum(a * b for a, b in linear) + dim * c["vocab_size"]
    lora = layers * sum(RANK * (a + b) for a, b in linear)
    attention = 6 * layers * q * sum(size**2 for size in asked.documents) / sum(asked.documents)
    six = 6 * weights + attention
    return {"6N": six} if asked.method == "full" else {"4N": 4 * weights + 6 * lora + attention, "6N": six}


def peak(device: str) -> float | None:
    """The device's dense bfloat16 FLOP/s; None where the table does not have it."""
    return next((figure for name, figure in PEAKS.items() if device.startswith(name)), None)


def utilisation(asked: Asked, result: Result) -> dict[str, float]:
    """Model FLOPs utilisation by way of counting; empty where the device's peak is unknown."""
    most = peak(result["device"])
    return {name: count * result["tokens_per_second"] / most for name, count in flops(asked).items()} if most else {}


def measure(python: str, side: str, asked: Asked) -> Result | None:
    """`child` in a fresh process; None where it does not fit."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    run = subprocess.run(
        [python, __file__, "--child", side, json.dumps(asked._asdict())],
        env=env | ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} if asked.device == "cpu" else {}),
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode == OUT_OF_MEMORY:
        return None
    if run.returncode:
        raise RuntimeError(f"{NAMES[side]}, {asked.method} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def best(python: str, side: str, asked: Asked, layouts: list[Layout]) -> tuple[Asked, Result] | None:
    """The side at its fastest layout, which a trial of three steps picks; None where none fits."""
    trials = []
    for layout in layouts:
        tried = asked._replace(num_rows=layout.num_rows, remat=layout.remat)
        if len(layouts) > 1:
            found = measure(python, side, tried._replace(num_steps=3))
            shown = f"{found['tokens_per_second']:,.0f} tok/s" if found else "does not fit"
            print(f"{NAMES[side]}, {asked.method}, {layout}: {shown}", flush=True)
            if found is None:
                continue
            trials.append((found["tokens_per_second"], tried))
        else:
            trials.append((0.0, tried))
    if not trials:
        return None
    chosen = max(trials, key=lambda trial: trial[0])[1]
    found = measure(python, side, chosen)
    return (chosen, found) if found else None


def compare(
    pythons: dict[str, str], method: str, shapes: tuple[Shape, ...], layouts: list[Layout], asked: Asked
) -> tuple[Shape, dict[str, Any]]:
    """Side → (asked, result) at the first of the shapes that fits every side, else at the last: None where it does not."""
    from jaxtune.weights.source import hf_preset

    for shape in shapes:
        at = asked._replace(method=method, hf_config=hf_preset(shape.preset), row_tokens=shape.row_tokens)
        found = {side: best(python, side, at, layouts) for side, python in pythons.items()}
        if all(found.values()):
            break
        print(f"{method}, {shape.preset}: does not fit for {', '.join(s for s in found if not found[s])}", flush=True)
    return shape, found


def cells(found: dict[str, Any], side: str) -> str:
    """One side for the table."""
    if not found.get(side):
        return "does not fit" if side in found else ""
    asked, r = found[side]
    used = ", ".join(f"{share:.1%} ({name})" for name, share in utilisation(asked, r).items())
    return (
        f"{r['tokens_per_second']:,.0f} tok/s, {used or 'device unknown'}, {r['peak_bytes'] / (1 << 30):.1f} GiB "
        f"({Layout(asked.num_rows, asked.remat)}; {r['attention']})"
    )


def row(method: str, shape: Shape, found: dict[str, Any]) -> list[str]:
    """One row of the table in docs/benchmarks.md."""
    results = [found[side][1] for side in NAMES if found.get(side)]
    versions = {name: number for r in results for name, number in r["versions"].items()}
    ratio = results[0]["tokens_per_second"] / results[1]["tokens_per_second"] if len(results) == 2 else None
    return [
        table.today(), " and ".join(sorted({r["device"] for r in results})), ", ".join(f"{n} {v}" for n, v in versions.items()),
        f"{shape.preset}, {method}", *[cells(found, side) for side in NAMES], f"{ratio:.2f}" if ratio else "",
    ]  # fmt: skip


def dry_line(method: str, side: str, asked: Asked, result: Result) -> str:
    """What a dry run shows of a side: that it took its steps, on how many tokens, and to what loss."""
    return f"dry {method} {NAMES[side]}: {asked.num_steps} steps of {result['tokens_per_step']} tokens, loss {result['loss']:.2f}"


def main(argv: list[str] | None = None) -> int:
    if argv is None and sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Asked(**json.loads(sys.argv[3])))))
        return 0
    options = _options(argv)
    pythons = {s: p for s, p in (("jaxtune", options.ours_python), ("trl", options.trl_python)) if s in options.sides}
    if not options.dry and not any(Path("/dev").glob("nvidia[0-9]*")):
        print("gpu.py needs an NVIDIA GPU; `--dry` runs the same code on the CPU and measures nothing", file=sys.stderr)
        return 2
    asked = Asked(
        "", {}, 0, 0, False, 2 if options.dry else options.steps, "cpu" if options.dry else "gpu", options.attention
    )
    rows = (2,) if options.dry else tuple(map(int, options.rows.split(",")))
    remats = (True,) if options.dry else (False, True)
    layouts = [Layout(number, remat) for number in rows for remat in remats]
    if options.dry:
        print("dry: a tiny shape on the CPU, to see that the code runs; no speed is measured", flush=True)
    for method in options.methods.split(","):
        shape, found = compare(pythons, method, DRY if options.dry else SHAPES[method], layouts, asked)
        if options.dry:
            print("\n".join(dry_line(method, side, *found[side]) for side in found), flush=True)
            continue
        made = row(method, shape, found)
        print(" | ".join(made), flush=True)
        if not options.no_record:
            table.append("gpu.py", made)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny shape, two steps, on the CPU; records nothing")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--sides", default="jaxtune,trl")
    parser.add_argument("--rows", default="1,2,4", help="packed rows of a step that a trial chooses from")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side")
    parser.add_argument(
        "--attention", default="auto", choices=("auto", "xla", "flash"), help="jaxtune's `model.attention`"
    )
    parser.add_argument("--ours-python", default=sys.executable, help="the interpreter with jax[cuda] and jaxtune")
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter with torch, TRL and PEFT")
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
