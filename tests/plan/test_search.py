"""The search takes the fastest that a real compilation fits, and writes a config that runs; topologies are ranked by price."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from jaxtune import chips, launch, validation
from jaxtune import config as config_lib
from jaxtune.models import llama, mixtral
from jaxtune.plan import account, cpu, estimate, search
from jaxtune.plan import compile as plan_compile
from jaxtune.sharding import AXES
from jaxtune.types import SAVED_NAMES, UserError
from jaxtune.weights.source import hf_preset
from tests.families import CASES

FILE = (
    "from jaxtune import config\ndef get_config():\n  c = config.base()\n  c.model.source = 'preset:llama_tiny'\n"
    "  c.data.max_length, c.train.batch_size, c.train.steps = 128, 8, 10\n  c.plan.topology = 'v6e-4'\n  return c\n"
)


def quiet(items, total, label):
    yield from items


@pytest.fixture
def config() -> ConfigDict:
    config = config_lib.base()
    config.data.max_length, config.train.batch_size, config.train.steps = 2048, 64, 100
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.tune.dropout = 0.0
    return config


def test_meshes_fill_the_slice_and_divide_the_model(config: ConfigDict) -> None:
    place = chips.slice_of("v5e:8x8", chips.table())
    found = list(search.meshes(config, llama.from_hf(hf_preset("llama3_1_70b")), place))
    assert {mesh["tensor"] for mesh in found} == {1, 2, 4, 8}  # of 8 key/value heads
    assert {mesh["expert"] for mesh in found} == {1}
    mixture = list(search.meshes(config, mixtral.from_hf(hf_preset("mixtral_8x7b")), place))
    assert {mesh["expert"] for mesh in mixture} == {1, 2, 4, 8}
    for mesh in found + mixture:
        sizes = list(mesh.values())
        assert math.prod(sizes) == 64


def test_estimates_put_what_fits_and_is_fast_first(config: ConfigDict) -> None:
    """Sixteen chips of 16 GiB cannot hold an 8B model replicated; saving every activation does not fit either."""
    place = chips.slice_of("v5e:4x4", chips.table())
    config.data.max_length = 4096
    table = search.Table(config, hf_preset("llama3_1_8b"), None, place, quiet)
    ranked = table.ranked(1.0)
    fitting = [e for e in ranked if e.fits]
    assert ranked[: len(fitting)] == fitting
    assert fitting[0].mesh["fsdp"] > 1
    assert not any(e.fits for e in ranked if e.mesh["data"] == 16)
    assert not any(e.fits for e in ranked if e.remat == "none" and e.accumulation == 1)
    times = [e.forecast.step_seconds for e in fitting]
    assert times == sorted(times)
    assert sum(e.fits for e in table.ranked(2.0)) < len(fitting)  # had a compiled step needed twice the estimate


@pytest.mark.parametrize("family", ["llama_tiny", "deepseek_v3"])
def test_every_name_saves_something(config: ConfigDict, family: str) -> None:
    """A name that no layer bears would be a switch that does nothing; by both attention forms, and latent attention too."""
    settings = CASES[family] if family in CASES else hf_preset(family)
    config.data.max_length, config.train.batch_size = 128 if family == "llama_tiny" else 64, 2
    device = plan_compile.devices_of(chips.slice_of("v5e:1x1", chips.table()))[0]
    for attention in ("xla", "splash") if family == "llama_tiny" else ("xla",):
        config.model.attention, config.train.save = attention, ()
        least = estimate.traced(config, settings, None, device).saved_bytes
        for name in set(SAVED_NAMES) - {"block_input"}:
            config.train.save = (name,)
            assert estimate.traced(config, settings, None, device).saved_bytes > least, (attention, name)


def test_what_is_to_be_kept_by_name_is_not_all_kept(config: ConfigDict) -> None:
    """A planned config that keeps all, and names what to keep, would be refused."""
    assert search.remats(config) == ["none", "dots", "block"]
    config.train.save = ("attention",)
    assert search.remats(config) == ["dots", "block"]
    for remat in search.remats(config):
        config.train.remat = remat
        validation.validate(config)


def test_what_is_kept_lies_in_one_place(config: ConfigDict) -> None:
    """JAX's policy for offloading ends in a traceback where a name is in both; on a CPU nothing would be said."""
    config.train.save, config.train.offload = ("qkv", "mlp"), ("mlp",)
    with pytest.raises(UserError, match="both have 'mlp'"):
        validation.validate(config)


def test_what_is_planned_for_slices_says_so(config: ConfigDict) -> None:
    config.plan.num_slices = 2
    choice = SimpleNamespace(mesh=dict.fromkeys(AXES, 1) | {"data": 4, "fsdp": 2}, accumulation=1, remat="block")
    chosen = search.changed(config, choice)
    assert (chosen.mesh.data, chosen.mesh.dcn_data, chosen.mesh.fsdp) == (2, 2, 2)
    plan = SimpleNamespace(mesh=choice.mesh, topology="v5e:2x2")
    text = account.planned(config, SimpleNamespace(config=chosen, plan=plan, why=""))
    assert "config.mesh.dcn_data = 2\n" in text
    assert "config.mesh.data = 2\n" in text


def test_search_writes_a_config_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, workdir = tmp_path / "c.py", tmp_path / "w"
    path.write_text(FILE)
    flags = [f"--config={path}", f"--workdir={workdir}", "--config.plan.confirm=1", "--config.tune.rank=8"]
    assert launch.main(["plan", "--search", *flags]) == 0
    written = json.loads((workdir / "plan.json").read_text())
    planned = launch._config_file([f"--config={workdir / 'planned.py'}"])
    validation.validate(planned)
    assert dict(planned.mesh)["fsdp"] == written["mesh"]["fsdp"]
    assert (planned.train.accumulation, planned.train.remat) == (written["accumulation"], written["remat"])
    assert (planned.tune.rank, planned.plan.search) == (8, False)
    assert written["fits"]
    assert written["search"]["why"] in capsys.readouterr().out
    assert [each["fits"] for each in written["search"]["compiled"]] == [True]
    assert written["search"]["considered"] >= len(written["search"]["candidates"]) > 1


def test_a_search_of_this_machine_measures_as_a_plan_does(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = chips.Chip("cpu", 1 << 34, 1e10, {"float32": 1e11, "bfloat16": 1e11}, overlaps=False)
    place = chips.Slice("cpu:1", chip, (1,))
    monkeypatch.setattr(cpu, "machine", lambda topology: place)
    monkeypatch.setattr(cpu, "measured_bandwidth", lambda size_bytes: 2e10)
    monkeypatch.setattr(cpu, "dot_seconds", lambda dots: 7.0)
    config.data.max_length, config.train.batch_size = 64, 1
    config.plan.topology = "cpu:1"
    one = SimpleNamespace(mesh=dict.fromkeys(AXES, 1), accumulation=1, remat="block")
    tried = search._compiled(config, hf_preset("llama_tiny"), None, one, place)
    assert tried.forecast.seconds_by_resource["compute"] == 7.0
    moved = tried.plan.hbm_traffic_bytes - tried.plan.dot_traffic_bytes  # what multiplications move is in their time
    assert tried.forecast.seconds_by_resource["hbm"] == pytest.approx(moved / 2e10)


def test_topologies_are_ranked_by_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, prices = tmp_path / "c.py", tmp_path / "mine.toml"
    path.write_text(FILE)
    prices.write_text("[v5p]\nusd_per_chip_hour = 0.01\n")
    flags = [
        f"--config={path}",
        f"--workdir={tmp_path / 'w'}",
        "--config.plan.confirm=0",
        f"--config.plan.prices={prices}",
    ]
    assert launch.main(["plan", "--topologies=v5e:2x2,v5p:2x2x1", *flags]) == 0
    written = json.loads((tmp_path / "w" / "plan.json").read_text())
    rows = written["topologies"]
    assert rows[0]["topology"] == written["cheapest"] == "v5p:2x2x1"
    assert [row["usd_per_million_tokens"] for row in rows] == sorted(row["usd_per_million_tokens"] for row in rows)
    assert not any(row["confirmed"] for row in rows)
    assert "list prices" in capsys.readouterr().out


def test_every_generation_has_a_slice_of_sixteen_devices() -> None:
    table = chips.table()
    names = search._one_each(table)
    assert [chips.slice_of(name, table).num_devices for name in names] == [16] * 5


def test_what_fits_nowhere_says_what_comes_nearest(config: ConfigDict) -> None:
    config.plan.topology, config.plan.confirm, config.train.batch_size = "v5e:2x2", 1, 4
    with pytest.raises(UserError, match=r"no candidate fits .* the smallest needs about [\d.]+ of 16 GiB"):
        search.search(config, hf_preset("llama3_1_70b"), None, quiet, print)
    config.train.batch_size = 3
    config.plan.topology = "v5e:4x4"
    with pytest.raises(UserError, match="no mesh takes this batch"):
        search.search(config, hf_preset("llama3_1_8b"), None, quiet, print)


def test_flags_of_plan_go_with_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(FILE)
    assert launch.main(["train", "--search", f"--config={path}"]) == 2
    assert "goes with plan" in capsys.readouterr().err
    assert launch._parse(["plan", f"--config={path}", "--topologies", "v5e:2x2,v4:2x2x1"])[1].plan.topologies == (
        "v5e:2x2",
        "v4:2x2x1",
    )
    assert launch._parse(["--topologies", "plan", f"--config={path}"])[1].plan.topologies == ("all",)
