"""The benchmarks at tiny size: every side runs and counts the same tokens; the loader's memory bound, for real."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

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


# ---- loader, loop_overhead ----


def test_rows_are_joined_end_to_end():
    import loader

    from jaxtune.data.batches import Rows

    rows = Rows(np.arange(10, dtype=np.int32), np.ones(10, "f4"), np.array([0, 3, 4, 8, 9, 10]), list("abcde"))
    joined = loader.joined(rows, 2)
    assert joined.offsets.tolist() == [0, 4, 9]
    assert (joined.tokens.tolist(), len(joined)) == (list(range(9)), 2)


def test_the_bare_step_runs_between_steps_of_the_loop_and_not_before_the_first(monkeypatch):
    import loop_overhead

    from jaxtune.train.compiled import Compiled

    ran: list[str] = []

    def run(state, frozen, batch):
        ran.append(batch)
        return state + 1, {"loss": jnp.float32(0)}

    monkeypatch.setattr(loop_overhead, "EVERY_STEPS", 2)
    monkeypatch.setattr(loop_overhead, "BARE_STEPS", 1)
    bare, state = loop_overhead.Bare(Compiled(run, 0.0, False), 0, {}, "resident"), 0
    for batch in bare.between(iter("abcd")):
        state, _ = bare.step().run(state, {}, batch)
    assert ran == ["a", "b", "resident", "c", "d"]
    assert (len(bare.step_seconds), state) == (1, 4)
    assert bare.paused_seconds >= sum(bare.step_seconds) > 0


def test_startup_reads_the_parts_of_a_run(tiny_config, tmp_path):
    import startup

    from jaxtune import config as config_lib

    tiny_config.workdir = ""
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_config))
    found = startup.run(tmp_path / "config.json", tmp_path / "run", tmp_path / "cache", [])
    assert list(found) == list(startup.SHOWN)
    assert found["whole"] == pytest.approx(sum(found.values()) - found["whole"] - found["compile_overlapped"], rel=0.2)
    assert any((tmp_path / "cache").rglob("*-cache"))


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


# ---- hbm_vs_peers ----


def test_a_work_reads_as_it_is_written():
    import hbm_vs_peers

    for work in hbm_vs_peers.WORKS:
        assert hbm_vs_peers.Work.parse(str(work)) == work


def test_the_longest_row_is_found_by_few_compilations():
    import hbm_vs_peers

    for limit in (0, 256, 1500, 3072, 100_000, 1 << 30):
        asked = []
        found = hbm_vs_peers.longest(lambda length, limit=limit, asked=asked: asked.append(length) or length <= limit)
        assert found == max((length for length in hbm_vs_peers.LENGTHS if length <= limit), default=0)
        assert len(asked) <= 5


def test_a_row_that_compiles_but_exceeds_the_chip_does_not_fit(monkeypatch, tmp_path):
    import hbm_vs_peers

    asked = []

    def measure(self, side, work):
        asked.append(work.row_tokens)
        return {"fits": True, "peak_bytes": work.row_tokens * hbm_vs_peers.GIB // 256, "versions": {}}

    monkeypatch.setattr(hbm_vs_peers.Run, "measure", measure)
    results = hbm_vs_peers.Results(tmp_path / "results.json", False)
    results.held = {"tunix:qlora:v5e:1x1:1x6144": {"fits": False, "says": "RESOURCE_EXHAUSTED", "versions": {}}}
    run = hbm_vs_peers.Run(Path("python"), None, {}, results)
    assert run.find("tunix", "longest")["longest_tokens"] == 3072  # 12 GiB; 4096 would be 16 of 15.75
    assert max(asked) == 4096  # known: 6144 does not fit
    asked.clear()
    assert run.find("jaxtune", "longest")["longest_tokens"] == 3072
    assert max(asked) == 8192


def test_peers_results_are_compiled_once(tmp_path):
    import hbm_vs_peers

    path, made = tmp_path / "new" / "results.json", []

    def get(again):
        return hbm_vs_peers.Results(path, again).get("tunix:work", lambda: made.append(1) or {"peak_bytes": len(made)})

    assert [get(False), get(False), get(True), get(False)] == [{"peak_bytes": n} for n in (1, 1, 2, 2)]


def test_a_row_of_hbm_compares_with_the_leanest_peer(tmp_path):
    import hbm_vs_peers
    import table

    gib = hbm_vs_peers.GIB
    found = {
        "jaxtune": {"peak_bytes": 2 * gib, "versions": {"jax": "2", "libtpu": "1"}},
        "tunix": {"fits": False, "says": "Used 20G of 15.75G hbm", "versions": {"jax": "1", "libtpu": "1"}},
        "maxtext": {"peak_bytes": 4 * gib},
    }
    row = hbm_vs_peers.row(hbm_vs_peers.WORKS[0], found, ["train.remat='none'"])
    assert row[2:] == ["jax 2 and 1, libtpu 1", "`lora:v5e:2x4:8x2048`", "2.00", "does not fit", "4.00", "0.50", "train.remat='none'"]  # fmt: skip
    tokens = {"jaxtune": {"longest_tokens": 6144}, "tunix": {"longest_tokens": 0}, "maxtext": {"longest_tokens": 2048}}
    assert hbm_vs_peers.row("longest", tokens, [])[4:] == ["6,144 tokens", "0 tokens", "2,048 tokens", "3.00", "as the config has it"]  # fmt: skip
    path = tmp_path / "benchmarks.md"
    path.write_text(table.RECORD.read_text())
    table.append("hbm_vs_peers.py", row, path=path)
    above, new = path.read_text().split(table.mark("hbm_vs_peers.py"))[0].splitlines()[-2:]
    assert above.count("|") == new.count("|")


def test_our_step_is_asked_for_by_work(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    import jaxtune_step

    work = {"topology": "v5p:2x2x4", "num_rows": 16, "row_tokens": 4096, "rank": 16, "quantize": "nf4"}
    config = jaxtune_step.config_of(work | {"method": "full", "settings": {"train.remat": "none"}})
    assert (config.plan.topology, config.train.batch_size, config.data.max_length) == ("v5p:2x2x4", 16, 4096)
    assert (config.tune.method, config.tune.dtype, config.train.remat) == ("full", "bfloat16", "none")
    assert jaxtune_step.config_of(work | {"method": "lora", "settings": {}}).tune.method == "lora"


def test_peers_need_a_python_of_their_own(capsys):
    import hbm_vs_peers

    assert hbm_vs_peers.main(["--python", sys.executable + "-not", "--sides", "tunix"]) == 2
    assert "--python" in capsys.readouterr().err
    assert not hbm_vs_peers.has(sys.executable, "import sys; sys.exit(1)")


def test_without_libtpu_it_says_so(monkeypatch, capsys):
    import hbm_vs_peers

    monkeypatch.setattr(hbm_vs_peers, "has", lambda python, code: False)
    assert hbm_vs_peers.main(["--sides", "jaxtune"]) == 2
    assert "jaxtune[tpu]" in capsys.readouterr().err


# ---- plan_vs_run ----


def test_a_plan_for_this_cpu_beside_a_run(monkeypatch):
    """At tiny size: FLOPs are exact; memory is of the same size, for almost all of it is the process."""
    import plan_vs_run

    monkeypatch.setattr(jax, "local_devices", lambda *_, of=jax.local_devices, **__: of()[:1])
    monkeypatch.setattr(jax, "devices", lambda *_, of=jax.devices, **__: of()[:1])
    planned, ran = plan_vs_run.plan("llama_tiny"), plan_vs_run.run("llama_tiny", 1)
    found = plan_vs_run.compare(planned, ran)
    assert found["FLOPs"][2] == 1
    assert 0.5 < found["memory"][2] < 2
    assert found["time"][1] > 0
    assert planned["num_devices"] == 1
    assert planned["seconds_by_resource"]["compute"] > 0


def test_more_than_a_peer_needs_is_a_failure(monkeypatch):
    import hbm_vs_peers

    peaks = {"jaxtune": 5, "tunix": 7, "maxtext": 4}
    monkeypatch.setattr(hbm_vs_peers, "has", lambda python, code: True)
    monkeypatch.setattr(hbm_vs_peers, "peers_python", lambda cache, python: Path(python))
    monkeypatch.setattr(hbm_vs_peers.Run, "find", lambda self, side, work: {"peak_bytes": peaks[side]})
    asked = ["--no-record", "--python", "python", "--only", "lora:v5e:4x4:16x2048", "--sides"]
    assert hbm_vs_peers.main([*asked, "jaxtune,tunix"]) == 0
    assert hbm_vs_peers.main([*asked, "jaxtune,tunix,maxtext"]) == 1
