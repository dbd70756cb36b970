"""The GPU benchmark's dry form, and what it counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # as when they run: a script's own folder is on the path


def _dry(capsys, methods, side):
    import gpu

    assert gpu.main(["--dry", "--methods", ",".join(methods), "--sides", side]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("dry: ")
    assert len(lines) == len(methods)
    for method, line in zip(methods, lines, strict=True):
        assert line.startswith(f"dry {method} {gpu.NAMES[side]}: 2 steps of 256 tokens")  # documents fill both rows
        assert abs(float(line.split()[-1]) - math.log(256)) < 1  # random weights: about chance


def test_gpu_dry_form_of_jaxtune(capsys):
    _dry(capsys, ["lora", "full"], "jaxtune")


@pytest.mark.oracle
def test_gpu_dry_form_of_trl(capsys):
    _dry(capsys, ["lora"], "trl")


def test_flops_of_llama3_8b():
    import gpu

    from jaxtune.weights.source import hf_preset

    asked = gpu.Asked("full", hf_preset("llama3_8b"), 4096, 1, True, 1, "gpu")
    weights = 8_030_261_248 - 128_256 * 4096 - (32 * 2 + 1) * 4096  # published parameters, less embedding and norms
    attention = 6 * 32 * 4096 * (2048**2 + 1024**2 + 512**2 + 2 * 256**2) / 4096
    assert gpu.flops(asked) == {"6N": 6 * weights + attention}
    lora = gpu.flops(asked._replace(method="lora"))
    assert lora["6N"] == 6 * weights + attention
    assert lora["4N"] == 4 * weights + attention + 6 * 41_943_040  # LoRA r16 on all linear layers of Llama-3-8B


def test_utilisation_is_of_the_devices_peak():
    import gpu

    from jaxtune.weights.source import hf_preset

    asked = gpu.Asked("full", hf_preset("llama3_8b"), 4096, 1, True, 1, "gpu")
    speed = 0.5 * 989e12 / gpu.flops(asked)["6N"]
    used = gpu.utilisation(asked, {"device": "NVIDIA H100 80GB HBM3", "tokens_per_second": speed})
    assert used["6N"] == pytest.approx(0.5)
    assert gpu.peak("NVIDIA H100 PCIe") == 756e12
    assert gpu.utilisation(asked, {"device": "cpu", "tokens_per_second": 1.0}) == {}


def test_the_fastest_layout_that_fits_is_measured(monkeypatch):
    import gpu

    speeds = {1: 100, 2: 200, 4: None}

    def measure(python, side, asked):
        speed = speeds[asked.num_rows]
        return {"tokens_per_second": speed * (1 if asked.remat else 1.5)} if speed else None

    monkeypatch.setattr(gpu, "measure", measure)
    asked = gpu.Asked("lora", {}, 4096, 0, False, 10, "gpu")
    layouts = [gpu.Layout(rows, remat) for rows in (1, 2, 4) for remat in (False, True)]
    chosen, _ = gpu.best("python", "jaxtune", asked, layouts)
    assert (chosen.num_rows, chosen.remat, chosen.num_steps) == (2, False, 10)
    assert gpu.best("python", "jaxtune", asked, layouts[-2:]) is None


def test_gpu_row_has_the_tables_columns(tmp_path):
    import gpu
    import table

    asked = gpu.Asked("lora", {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}, 4096, 2, False, 1, "gpu")  # fmt: skip
    result = {"tokens_per_second": 2.0, "peak_bytes": 1 << 30, "device": "NVIDIA H200", "attention": "sdpa", "versions": {"jax": "1"}}  # fmt: skip
    made = gpu.row("lora", gpu.SHAPES["lora"][0], {"jaxtune": (asked, result), "trl": (asked, result | {"tokens_per_second": 1.0})})  # fmt: skip
    assert made[-1] == "2.00"
    path = tmp_path / "benchmarks.md"
    path.write_text(table.RECORD.read_text())
    table.append("gpu.py", made, path=path)
    above, new = path.read_text().split(table.mark("gpu.py"))[0].splitlines()[-2:]
    assert above.count("|") == new.count("|")


def test_without_a_gpu_it_offers_the_dry_form(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err
