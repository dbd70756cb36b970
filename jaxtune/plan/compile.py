"""Compiles the real training step, ahead of time, for a TPU that is not here, and reads its memory off the program."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from typing import Any, NamedTuple

import jax

from jaxtune import sharding
from jaxtune.adapters import lora
from jaxtune.config import ConfigDict
from jaxtune.plan.chips import chip_of
from jaxtune.train import start, state, step
from jaxtune.types import UserError


class Plan(NamedTuple):
    """Bytes are per device, of the compiled step; `hbm_bytes` is what the device has."""

    topology: str
    num_chips: int
    num_devices: int
    mesh: dict[str, int]
    peak_hbm_bytes: int
    hbm_bytes: int
    fits: bool
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    program_bytes: int
    lower_seconds: float
    compile_seconds: float
    num_params: int
    num_trainable_params: int


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology, described by libtpu; no TPU is needed.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    chip_of(name)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a Cloud TPU's metadata server
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # compiling touches no chip, so it need not have libtpu alone
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("plan needs libtpu, which compiles for TPUs anywhere: pip install 'jaxtune[tpu]'") from None
        raise UserError(f"plan.topology={name!r} is not one that libtpu knows: {str(error).splitlines()[0]}") from None
    num_chips = math.prod(int(side) for side in name.partition(":")[2].split("x"))
    if (
        len(devices) != num_chips * chip_of(name).devices
    ):  # v4's two cores, which JAX on a real v4 joins into one device
        raise UserError(
            f"plan.topology={name!r}: this libtpu describes its {num_chips} chips as {len(devices)} devices, which JAX makes no "
            "mesh of; choose a newer generation, such as v5p"
        )
    return devices


def compile_step(config: ConfigDict, hf_config: dict[str, Any], adapter: lora.Options | None = None) -> Plan:
    """Compiles this config's step for `config.plan.topology`; no weights, no network, no devices.

    `adapter` holds the options of the PEFT folder that training starts from, if it does.

    Peak HBM = arguments + temporaries + outputs that are not donated arguments + the program itself.
    """
    devices, chip = topology_devices(config.plan.topology), chip_of(config.plan.topology)
    mesh = sharding.make_mesh(config, devices)
    sharding.check_batch(mesh, config.train.batch_size, config.train.accumulation)
    program = state.abstract(config, hf_config, mesh, max(1, config.train.steps), adapter)
    start.check_length(config, program)
    started = time.perf_counter()
    lowered = step.make(config, program).lower(program.state, program.frozen, step.abstract_batch(config, program))
    lowered_at = time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
        peak = _peak(memory)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{config.plan.topology}: the step does not fit: {_first_size(str(error))}. Use more chips, a smaller batch per chip, "
            f"train.remat='block', or a bfloat16 base"
        ) from None
    hbm = chip.hbm_bytes // chip.devices
    return Plan(
        topology=config.plan.topology,
        num_chips=len(devices) // chip.devices,
        num_devices=len(devices),
        mesh=dict(mesh.shape),
        peak_hbm_bytes=peak,
        hbm_bytes=hbm,
        fits=peak <= hbm,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        lower_seconds=round(lowered_at - started, 2),
        compile_seconds=round(time.perf_counter() - lowered_at, 2),
        num_params=state.num_base_params(program) + state.num_params(program.adapter),
        num_trainable_params=state.num_params(program.state.params),
    )


def _peak(memory: Any) -> int:
    summed = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return int(max(summed + memory.generated_code_size_in_bytes, getattr(memory, "peak_memory_in_bytes", 0)))


def _first_size(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if "hbm" in line.lower()]
    return (lines or message.splitlines())[0][:200]


def table(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    gib = 1 << 30
    rows = [
        (
            "topology",
            f"{plan.topology}: {plan.num_chips} chips, mesh " + " x ".join(f"{k}={v}" for k, v in plan.mesh.items()),
        ),
        ("parameters", f"{plan.num_params:,}, of which {plan.num_trainable_params:,} train"),
        ("arguments", f"{plan.argument_bytes / gib:.2f} GiB  (weights, optimizer state, batch)"),
        ("temporaries", f"{plan.temporary_bytes / gib:.2f} GiB  (activations, gradients, gathered weights)"),
        ("program", f"{plan.program_bytes / gib:.2f} GiB"),
        (
            "peak HBM",
            f"{plan.peak_hbm_bytes / gib:.2f} of {plan.hbm_bytes / gib:.0f} GiB per device: {'fits' if plan.fits else 'DOES NOT FIT'}",
        ),
        ("compiled in", f"{plan.compile_seconds:.0f} s"),
    ]
    return "\n".join(f"{name:>12}  {value}" for name, value in rows)
