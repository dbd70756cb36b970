"""Host memory and speed of loading a model: how far the peak rises above the loaded arrays, in largest tensors.

    python benchmarks/load_memory.py [--gigabytes 1.06] [--devices 1,8] [--dtypes bfloat16,float32] [--keep DIR]

Writes a random Llama (untied head, 128,256 tokens) as sharded bfloat16 safetensors, then loads it with
`jaxtune.weights.hf.load` in a fresh process for each number of CPU devices (a mesh of fsdp alone) and param_dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.5  # largest tensors, above (memory before the load + the loaded arrays)
MIB = 1 << 20
_VOCAB, _DIM, _FFN, _HEADS, _KV_HEADS = 128_256, 1024, 4096, 16, 8
_SHARD_BYTES = 200_000_000


def hf_config(gigabytes: float, file_dtype: str = "bfloat16") -> dict[str, Any]:
    """A Llama whose bfloat16 tensors come to at least `gigabytes` (10^9 bytes): two vocabulary tables, then layers."""
    layer = _DIM * (_DIM * 2 + _DIM // _HEADS * _KV_HEADS * 2 + 3 * _FFN + 2)
    num_layers = max(1, -(-int(gigabytes * 1e9 / 2 - 2 * _VOCAB * _DIM) // layer))
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": _DIM, "intermediate_size": _FFN,
        "num_hidden_layers": num_layers, "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS,
        "head_dim": _DIM // _HEADS, "vocab_size": _VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": file_dtype,
    }  # fmt: skip


def write_model(folder: Path, gigabytes: float) -> int:
    """Writes the model, one shard in memory at a time; returns the bytes of its tensors."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxtune.models import naming

    folder.mkdir(parents=True, exist_ok=True)
    config, program, rng = hf_config(gigabytes), _program(hf_config(gigabytes), "bfloat16"), np.random.default_rng(0)
    table = naming.hf_names(program.family.weights(program.model_config))
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    total = held = number = 0
    for index, (name, (weight, place)) in enumerate(table.items(), 1):
        ours = program.base[weight.ours].shape[len(place) :]
        value = rng.random(ours[::-1] if weight.transpose else ours, np.float32) - np.float32(0.5)
        shard[name] = value.astype(ml_dtypes.bfloat16)
        total, held = total + shard[name].nbytes, held + shard[name].nbytes
        if held >= _SHARD_BYTES or index == len(table):
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def _program(config_json: dict[str, Any], param_dtype: str) -> Any:
    import jax

    from jaxtune import config as config_lib
    from jaxtune import sharding
    from jaxtune.train import state

    config = config_lib.base()
    config.model.param_dtype = param_dtype
    config.train.batch_size = jax.device_count()
    return state.abstract(config, config_json, sharding.make_mesh(config), 1)


class _Sampler:
    """The highest resident memory of this process while open, in bytes; looks every millisecond."""

    def __enter__(self) -> _Sampler:
        self.peak_bytes, self._stop = rss_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, rss_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest_rss_bytes() -> int:
    """The highest resident memory that the kernel has seen in this process (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_here(folder: Path, param_dtype: str) -> dict[str, Any]:
    """Loads the model in this process, once, onto all its devices; call it in a fresh process."""
    import jax

    from jaxtune.weights import hf

    source = hf.Folder(folder)
    program = _program(source.hf_config, param_dtype)
    shapes = [shape.shape[path.startswith("layers.") :] for path, shape in program.base.items()]
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the backend is up before the first reading
    before = rss_bytes()
    with _Sampler() as sampler:
        started = time.perf_counter()
        arrays = jax.block_until_ready(hf.load(source, program.family, program.model_config, program.base))
        seconds = time.perf_counter() - started
    array_bytes = sum(array.nbytes for array in arrays.values())
    num_numbers = max(_product(shape) for shape in shapes)
    peak = max(sampler.peak_bytes, highest_rss_bytes())
    largest = num_numbers * 2  # as the file holds it: the stricter measure where param_dtype is wider
    return {
        "devices": jax.device_count(),
        "param_dtype": param_dtype,
        "array_bytes": array_bytes,
        "largest_tensor_bytes": largest,
        "before_bytes": before,
        "sampled_peak_bytes": sampler.peak_bytes,
        "vmhwm_bytes": highest_rss_bytes(),
        "above_bytes": peak - before - array_bytes,
        "ratio": (peak - before - array_bytes) / largest,
        "seconds": seconds,
        "gb_per_second": sum(map(os.path.getsize, folder.glob("*.safetensors"))) / 1e9 / seconds,
    }


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def measure(folder: Path, devices: int, param_dtype: str) -> dict[str, Any]:
    """`measure_here` in a fresh process with `devices` CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, __file__, "--child", str(folder), param_dtype],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"the loading process failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    if sys.argv[1:2] == ["--child"] and argv is None:
        print(json.dumps(measure_here(Path(sys.argv[2]), sys.argv[3])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.06, help="size of the model's files, 10^9 bytes")
    parser.add_argument("--devices", default="1,8", help="numbers of CPU devices")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="param_dtypes; the files are bfloat16")
    parser.add_argument("--keep", type=Path, help="write the model here, or use the one that is here")
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "model"
        if not (folder / "config.json").is_file():
            print(f"{write_model(folder, options.gigabytes) / 1e9:.2f} GB of tensors in {folder}", flush=True)
        print("devices  param_dtype  arrays MiB  largest MiB  above MiB  x largest  seconds  GB/s of file", flush=True)
        worst = 0.0
        for devices in map(int, options.devices.split(",")):
            for dtype in options.dtypes.split(","):
                r = measure(folder, devices, dtype)
                worst = max(worst, r["ratio"])
                print(
                    f"{devices:7d}  {dtype:<11}  {r['array_bytes'] / MIB:10.0f}  {r['largest_tensor_bytes'] / MIB:11.0f}  "
                    f"{r['above_bytes'] / MIB:9.0f}  {r['ratio']:9.2f}  {r['seconds']:7.1f}  {r['gb_per_second']:12.2f}",
                    flush=True,
                )
    print(f"peak above the loaded arrays: {worst:.2f} x the largest tensor at worst; the limit is {LIMIT}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
