"""The very step that trains here compiles for TPUs that are not: every generation, with its attention kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxtune import chips, launch, sharding
from jaxtune import config as config_lib
from jaxtune.plan import compile as plan_compile
from jaxtune.train import layout, step
from jaxtune.types import UserError
from jaxtune.weights.source import hf_preset


@pytest.fixture
def config() -> ConfigDict:
    config = config_lib.base()
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.data.max_length, config.train.batch_size, config.train.steps = 512, 8, 10
    config.tune.dropout = 0.0
    return config


def shallow(**changes) -> dict:
    """Two layers of a small Llama whose heads are as wide as splash attention wants them."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    return hf_preset("llama3_2_1b") | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes


@pytest.mark.parametrize(
    ("topology", "mesh", "method"),
    [
        ("v4:2x2x1", {"fsdp": -1}, "lora"),
        ("v5e:2x4", {"fsdp": 4, "tensor": 2}, "lora"),
        ("v5p-8", {"fsdp": -1}, "full"),
        ("v6e:2x2", {"fsdp": -1}, "lora"),
        ("tpu7x:2x2x1", {"fsdp": -1}, "lora"),
    ],
)
def test_the_step_compiles(config: ConfigDict, topology: str, mesh: dict[str, int], method: str) -> None:
    config.plan.topology, config.tune.method = topology, method
    config.mesh.auto = False
    for axis, size in mesh.items():
        config.mesh[axis] = size
    plan = plan_compile.compile_step(config, shallow())
    assert 0 < plan.peak_hbm_bytes < plan.hbm_bytes
    assert plan.fits
    assert plan.alias_bytes >= 0.99 * plan.output_bytes - 65536  # the state is donated, not copied
    _assert_adds_up(plan, method)


def test_the_step_compiles_with_what_holds_it_near_its_start(config: ConfigDict) -> None:
    """A copy of what trains and its Fisher information lie on the devices as the weights do; the base's pass is in the step."""
    config.plan.topology, config.tune.method, config.mesh.auto = "v5e:2x4", "full", False
    plain = plan_compile.compile_step(config, shallow())
    config.retain.penalties = (("kl_base", 0.1), ("ewc", 1.0))
    config.retain.fisher_data = (("data.train", "old.jsonl"),)
    held = plan_compile.compile_step(config, shallow())
    copy, information = plain.hbm_parts_bytes["trainable_params"], plain.num_params * 4 / plain.num_devices
    assert held.hbm_parts_bytes["frozen_params"] == pytest.approx(copy + information, rel=0.01)
    assert held.alias_bytes == plain.alias_bytes  # the state is donated as before
    assert 1.3 * plain.hardware_flops < held.hardware_flops < 1.5 * plain.hardware_flops


def _assert_adds_up(plan: plan_compile.Plan, method: str) -> None:
    """Parts make the peak; the parts that are known from shapes are what they must be; every device gathers every weight."""
    parts, frozen = plan.hbm_parts_bytes, plan.num_params - plan.num_trainable_params
    assert sum(parts.values()) == plan.peak_hbm_bytes
    assert min(parts.values()) >= 0
    assert parts["frozen_params"] == pytest.approx(2 * frozen / plan.num_devices, rel=0.01)
    assert parts["optimizer"] == pytest.approx(2 * parts["trainable_params"], rel=0.01)
    assert parts["saved_activations"] >= 512 * 8 * 512 * 2 * 2 // plan.num_devices  # the input of each block
    assert plan.model_flops < plan.hardware_flops < 2 * plan.model_flops
    sent = sum(found["bytes"] for found in plan.collectives.values())
    each = 2 * (plan.num_params - 1024 * 512) / plan.mesh["tensor"] * (1 - 1 / plan.mesh["fsdp"])
    hidden = 8 * 512 * 512 * 2 / plan.mesh["tensor"]  # of the batch: to where the vocabulary's parts lie, and back
    # Forward and backward; full fine-tuning scatters gradients too.
    assert 1.5 * each < sent < 12 * each + 4 * hidden
    assert plan.hbm_traffic_bytes > plan.argument_bytes


def test_a_row_in_shards_compiles_with_its_kernel(config: ConfigDict) -> None:
    """Llama-3.1-8B's shape: of a row's tokens the devices gather keys and values (8 heads of 128), and nothing else."""
    config.data.max_length, config.train.batch_size, config.mesh.context, config.mesh.fsdp = 2048, 4, 4, 4
    settings = hf_preset("llama3_1_8b") | {"num_hidden_layers": 2, "vocab_size": 4096}
    program = layout.program(config, settings, plan_compile.devices_of(chips.slice_of("v5e:4x4", chips.table())))
    abstract = (program.state, program.frozen, step.abstract_batch(config, program))
    compiled = step.make(config, program).lower(*abstract).compile()
    text = compiled.as_text()
    assert "splash" in text
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\])\S* all-gather", text)
    of_rows = {re.sub(r"\[[14],", "[", shape) for shape in gathered if re.match(r"\w+\[(1,|4,)?2048[,\]]", shape)}
    # Beside them, of each of the four rows its 512 hidden states of one device, to where a part of the vocabulary lies.
    assert of_rows - {"bf16[2048,4096]"} == {"bf16[2048,8,128]", "s32[2048]"}


def test_slices_are_joined_by_the_axes_that_say_so(config: ConfigDict) -> None:
    devices = plan_compile.devices_of(chips.slice_of("v5e:2x2", chips.table(), num_slices=2))
    chosen = layout.program(config, shallow(), devices)
    assert chosen.layout.startswith("2 slices split the rows; ")
    config.mesh.update({"dcn_fsdp": 2, "tensor": 2})
    given = sharding.make_mesh(config, devices)
    assert given.shape == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert [device.slice_index for device in given.devices[0, :, 0, 0, 0]] == [0, 0, 1, 1]
    config.mesh.dcn_fsdp = 1
    with pytest.raises(UserError, match=r"dcn_fsdp=1.* does not fit 2 slices: the sizes must multiply to 2"):
        sharding.make_mesh(config, devices)


def test_too_large_is_said(config: ConfigDict) -> None:
    config.plan.topology, config.data.max_length, config.train.batch_size = "v5e:2x2", 8192, 64
    config.train.remat, config.tune.method, config.model.param_dtype = "none", "full", "float32"
    config.tune.dtype = "float32"
    try:
        plan = plan_compile.compile_step(config, hf_preset("llama3_1_8b") | {"num_hidden_layers": 8})
    except UserError as error:
        assert "does not fit" in str(error)  # noqa: PT017  (the compiler may refuse, or report)
    else:
        assert not plan.fits


def test_plan_writes_its_file(tmp_path: Path, capsys) -> None:
    """Of two slices, whose gradients cross between them."""
    path = tmp_path / "c.py"
    path.write_text(
        "from jaxtune import config\ndef get_config():\n  c = config.base()\n  c.model.source = 'preset:llama_tiny'\n"
        "  c.data.max_length = 128\n  c.plan.topology, c.plan.num_slices, c.mesh.dcn_data = 'v6e:2x2', 2, 2\n  return c\n"
    )
    assert launch.main(["plan", f"--config={path}", f"--workdir={tmp_path / 'w'}"]) == 0
    written = json.loads((tmp_path / "w" / "plan.json").read_text())
    assert {"topology", "num_chips", "peak_hbm_bytes", "hbm_bytes", "fits", "compile_seconds"} <= set(written)
    assert written["training_usd"] == pytest.approx(written["hours"] * 8 * written["usd_per_chip_hour"])
    assert written["tokens_per_second"] == pytest.approx(written["tokens_per_step"] / written["step_seconds"])
    assert (written["num_chips"], written["num_slices"], written["mesh"]["data"]) == (8, 2, 2)
    assert sum(found["dcn_bytes"] for found in written["collectives"].values()) > 0
    assert written["seconds_by_resource"]["dcn"] > 0
    assert "peak HBM" in capsys.readouterr().out


def test_what_lies_on_the_host_is_no_hbm(config: ConfigDict) -> None:
    """Many deep rows, whose block inputs outweigh all else: offloaded, they count as the host's alone."""
    config.plan.topology, config.mesh.auto = "v5e:1x1", False
    config.data.max_length, config.train.batch_size, config.train.offload = 2048, 4, ("block_input",)
    plan = plan_compile.compile_step(config, shallow(num_hidden_layers=48))
    inputs = 48 * 4 * 2048 * 512 * 2
    assert plan.host_bytes >= inputs
    parts = plan.hbm_parts_bytes
    assert plan.peak_hbm_bytes == sum(parts.values())
    assert "unattributed" not in parts
    assert plan.peak_hbm_bytes - plan.argument_bytes - plan.temporary_bytes - plan.program_bytes < 1 << 20
