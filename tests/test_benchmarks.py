"""The benchmarks at tiny size: every side runs and counts the same tokens; the loader's memory bound, for real."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import llama
from jaxtune.train import state

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # as when they run: a script's own folder is on the path


@pytest.fixture
def rows(tiny_config, tmp_path):
    import cpu_vs_trl

    return cpu_vs_trl.write_rows(tiny_config, tmp_path)


# ---- load_memory ----


def test_loading_a_gigabyte_stays_within_one_and_a_half_tensors(tmp_path):
    import load_memory

    total = load_memory.write_model(tmp_path / "model", 1.0)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert total >= 1e9
    assert len(shards) > 2
    found = load_memory.measure(tmp_path / "model", 1, "bfloat16")
    assert found["array_bytes"] == total
    assert found["largest_tensor_bytes"] == 128_256 * 1024 * 2
    assert found["sampled_peak_bytes"] >= found["before_bytes"] + total  # the arrays are really there
    assert found["vmhwm_bytes"] >= found["before_bytes"] + total
    assert found["ratio"] <= load_memory.LIMIT


def test_a_loading_process_that_fails_says_why(tmp_path):
    import load_memory

    with pytest.raises(RuntimeError, match="is not a model folder"):
        load_memory.measure(tmp_path, 1, "bfloat16")


# ---- cpu_vs_trl ----


def test_labels_are_the_trained_tokens(rows):
    import cpu_vs_trl

    with np.load(rows) as file:
        ids, labels = cpu_vs_trl.examples(file)
        offsets, weights = file["offsets"], file["weights"]
    assert [len(row) for row in ids] == np.diff(offsets).tolist()
    for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
        trains = weights[offsets[i] : offsets[i + 1]] != 0
        trains[0] = False
        assert [token for token in label if token != -100] == np.array(row)[trains].tolist()
        assert trains.any()


def test_jaxtune_side(rows):
    import cpu_vs_trl

    _check(cpu_vs_trl.measure(rows, "jaxtune", "T256", "bfloat16", 2, 60), vocab_size=320)


@pytest.mark.oracle
@pytest.mark.parametrize(("side", "layout"), [("trl", "grouped"), ("trl", "packed"), ("bare", "grouped")])
def test_torch_sides(rows, side, layout):
    import cpu_vs_trl

    _check(cpu_vs_trl.measure(rows, side, layout, "float32", 2, 60), vocab_size=320)


def _check(result, vocab_size):
    assert result["steps"] == 2
    assert 300 < result["tokens_per_step"] <= 1024 * 1.2  # the tiny data has few rows: the last batch is not full
    assert 0 < result["trained_per_second"] < result["tokens_per_second"]
    assert abs(result["first_loss"] - math.log(vocab_size)) < 2.5  # random weights: about chance
    assert result["peak_rss_bytes"] > 100 << 20


def _results():
    def one(side, dtype, speed):
        return {"side": side, "dtype": dtype, "tokens_per_second": speed, "peak_rss_bytes": 1 << 30}

    speeds = {"jaxtune": (150, 300), "trl": (100, 10), "bare": (120, 20)}
    return [
        one(side, dtype, speed)
        for side, both in speeds.items()
        for dtype, speed in zip(("float32", "bfloat16"), both, strict=True)
    ]


def test_ratios_are_to_the_faster_peer():
    import cpu_vs_trl

    float32, bfloat16, best = cpu_vs_trl.ratios(_results())
    assert "= 1.25 x PyTorch + PEFT loop (float32)" in float32
    assert "= 15.00 x PyTorch + PEFT loop (bfloat16)" in bfloat16
    assert "= 2.50 x PyTorch + PEFT loop (float32)" in best


def test_a_row_is_recorded_under_its_table(tmp_path):
    import cpu_vs_trl
    import table

    path = tmp_path / "benchmarks.md"
    path.write_text(table.RECORD.read_text())
    cpu_vs_trl.record(_results(), path)
    above, row = path.read_text().split(table.mark("cpu_vs_trl.py"))[0].splitlines()[-2:]
    assert row.endswith("| 150 (1.0 GiB) | 300 (1.0 GiB) | 100 (1.0 GiB) | 10 (1.0 GiB) | 120 (1.0 GiB) | 20 (1.0 GiB) | 2.50 |")  # fmt: skip
    assert above.count("|") == row.count("|")


def test_without_torch_it_says_what_to_install(monkeypatch, capsys):
    import cpu_vs_trl

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert cpu_vs_trl.main(["--quick"]) == 2
    message = capsys.readouterr().err
    assert "needs torch" in message
    assert "requirements-oracle.lock" in message


# ---- step_profile ----


def test_ops_fall_into_kinds():
    import step_profile

    def f(x, w):
        scores = jnp.einsum("btkgh,bskh->bkgts", x, x[:, :, :, 0])
        return jnp.tanh(x.reshape(16, 32) @ w).sum() + jax.nn.softmax(scores).sum()

    text = jax.jit(f).lower(jnp.ones((2, 4, 2, 2, 16)), jnp.ones((32, 32))).compile().as_text()
    assert {"matmul", "attention", "elementwise and copies"} <= set(step_profile.kinds(text).values())


def test_flops_of_a_lora_step(tiny_config, tiny_model):
    import step_profile

    from jaxtune import sharding

    hf = json.loads((tiny_model / "config.json").read_text())
    mesh = sharding.make_mesh(tiny_config, jax.devices()[:1])
    program, c = state.abstract(tiny_config, hf, mesh, 6), llama.from_hf(hf)
    block = c.blocks[0][0]
    q, kv = c.num_heads * block.attention.head_dim, c.num_kv_heads * block.attention.head_dim
    shapes = [(c.dim, q), (c.dim, kv), (c.dim, kv), (q, c.dim), *[(c.dim, block.ffn.dim)] * 3]
    weights = c.num_layers * sum(a * b for a, b in shapes)
    lora = c.num_layers * sum(4 * (a + b) for a, b in shapes)  # tune.rank is 4
    matmuls, attention = step_profile.flops(program, 100, 7, 64)
    assert matmuls == 100 * (4 * weights + 6 * lora) + 7 * 4 * c.dim * c.vocab_size
    assert attention == 100 * 8 * 64 * q * c.num_layers


def test_profile_of_a_step(rows):
    code = "import json, sys, step_profile; print(json.dumps(step_profile.profile(sys.argv[1], 'T256', 'float32', 1)))"
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    run = subprocess.run(
        [sys.executable, "-c", code, str(rows)], capture_output=True, text=True, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": path},
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["by_kind"]["matmul"] > 0
    assert found["by_kind"]["attention"] > 0
    assert sum(found["by_kind"].values()) < 1.1 * found["thread_seconds"]
    assert 0 < found["achieved"] < found["peak"]


# ---- plan_hbm ----


def test_plan_shapes_and_line():
    import plan_hbm

    config = plan_hbm.load_config("v5e:4x4", 16, 2048)
    assert (config.train.batch_size, config.data.max_length, config.tune.rank) == (16, 2048, 16)
    made = SimpleNamespace(
        peak_hbm_bytes=int(3.18 * plan_hbm.GIB), argument_bytes=0, temporary_bytes=0, program_bytes=0, compile_seconds=1
    )
    assert plan_hbm.line("v5e:4x4", 16, 8192, made).split()[-3:] == ["fit", "6.36", "0.50"]
    assert plan_hbm.line("v5p:2x2x4", 16, 64, made).split()[4] == "3.18"


def test_without_libtpu_it_says_so(monkeypatch, capsys):
    import plan_hbm

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan_hbm.main([]) == 2
    assert "jaxtune[tpu]" in capsys.readouterr().err
