"""Compiles the real training step, ahead of time, for a TPU that is not here (or for this machine), and reads it.

Its memory comes from the compiler's own analysis, its FLOPs from the step's jaxpr (`flops.py`), what it moves from the
optimised program (`hlo.py`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import chips
from jaxtune.adapters import lora
from jaxtune.chips import Slice
from jaxtune.config import ConfigDict
from jaxtune.plan import cpu, flops, hlo
from jaxtune.train import layout, start, state, step
from jaxtune.types import UserError


class Plan(NamedTuple):
    """What the compiled step needs. Bytes are of one device unless they say otherwise; `hbm_bytes` is what the device has.

    `hbm_parts_bytes` sum to `peak_hbm_bytes`. `host_bytes` is what the step keeps in the host's memory. FLOPs are of a whole
    step over all devices: `hardware_flops` as executed, `model_flops` without what is computed twice (see `flops.py`).
    """

    topology: str
    num_slices: int
    num_chips: int
    num_devices: int
    mesh: dict[str, int]
    accumulation: int
    remat: str
    tokens_per_step: int
    peak_hbm_bytes: int
    hbm_bytes: int
    fits: bool
    hbm_parts_bytes: dict[str, int]
    host_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    program_bytes: int
    hardware_flops: float
    hardware_flops_by_dtype: dict[str, float]
    model_flops: float
    compiled_dot_flops: float
    hbm_traffic_bytes: float
    dot_traffic_bytes: float
    collectives: dict[str, dict[str, float]]
    lower_seconds: float
    compile_seconds: float
    num_params: int
    num_trainable_params: int


def where(config: ConfigDict) -> Slice:
    """The slice that `plan.topology` and `plan.num_slices` name; this machine for "cpu" and "cpu:N".

    Raises:
      UserError: there is no such topology, or no topology at all.
    """
    topology = config.plan.topology
    if not topology:
        raise UserError(
            "plan.topology is empty: name a slice such as v5e:4x4 or v5e-16, or cpu for this machine; --topologies compares one "
            "slice of each generation"
        )
    if cpu.is_cpu(topology):
        return cpu.machine(topology)
    return chips.slice_of(topology, chips.table(config.plan.prices), config.plan.num_slices)


def devices_of(place: Slice) -> list[Any]:
    """The devices of a slice, described by libtpu; no TPU is needed. Those of this machine for "cpu".

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    if cpu.is_cpu(place.name):
        return cpu.devices(place)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a Cloud TPU's metadata server
    # Compiling touches no chip, so it need not have libtpu alone.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": place.chip.chip_config} if place.chip.chip_config else {}
    if place.num_slices > 1:
        options["num_slices"] = place.num_slices
    try:
        found = list(topologies.get_topology_desc(platform="tpu", topology_name=place.name, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("plan needs libtpu, which compiles for TPUs anywhere: pip install 'jaxtune[tpu]'") from None
        raise UserError(
            f"plan.topology={place.name!r} is not one that libtpu knows: {str(error).splitlines()[0]}"
        ) from None
    if len(found) != place.num_devices:
        raise UserError(
            f"plan.topology={place.name!r}: this libtpu describes its {place.num_chips} chips as {len(found)} devices, and "
            f"jaxtune expects {place.num_devices}; choose another generation, such as v5p"
        )
    return found


def program_of(
    config: ConfigDict, hf_config: dict[str, Any], adapter: lora.Options | None, devices: list[Any]
) -> state.Program:
    """The training program of this config on these devices, as shapes: all that counting and compiling need."""
    program = layout.program(config, hf_config, devices, adapter)
    start.check_length(config, program)
    return program


def counted(config: ConfigDict, program: state.Program) -> tuple[Any, flops.Dots, flops.Dots]:
    """(the traced step, what it multiplies, what the mathematics asks for), over all devices."""
    batch = step.abstract_batch(config, program)
    traced = step.make(config, program).trace(program.state, program.frozen, batch)
    forward = step.make_eval(config, program).trace(program.state.params, program.frozen, batch)
    return traced, flops.hardware(traced), flops.model(forward, len(jax.tree.leaves(program.state.params)))


def compile_step(config: ConfigDict, hf_config: dict[str, Any], adapter: lora.Options | None = None) -> Plan:
    """The plan of `compiled`."""
    return compiled(config, hf_config, adapter)[0]


def compiled(
    config: ConfigDict, hf_config: dict[str, Any], adapter: lora.Options | None = None
) -> tuple[Plan, flops.Dots]:
    """Compiles this config's step for `config.plan.topology`: what it needs, and what it multiplies; no weights, no network.

    `adapter` holds the options of the PEFT folder that training starts from, if it does.

    Peak HBM = arguments + temporaries + outputs that are not donated arguments + the program itself.
    """
    place = where(config)
    program = program_of(config, hf_config, adapter, devices_of(place))
    started = time.perf_counter()
    traced, hardware, model = counted(config, program)
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    try:
        executable, text = _compiled(lowered, on_tpu=not cpu.is_cpu(place.name))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{place.name}: the step does not fit: {_first_size(str(error))}. Use more chips, a smaller batch per chip, "
            f"train.remat='block', or a bfloat16 base (plan --search looks for what fits)"
        ) from None
    compile_seconds = time.perf_counter() - lowered_at
    memory = executable.memory_analysis()
    moved = hlo.traffic(text, [getattr(d, "slice_index", 0) or 0 for d in program.mesh.devices.flat])
    around = cpu.resident_bytes() // place.num_devices if cpu.is_cpu(place.name) else 0
    peak = _peak(memory) + around
    plan = Plan(
        topology=place.name,
        num_slices=place.num_slices,
        num_chips=place.num_chips,
        num_devices=place.num_devices,
        mesh=dict(program.mesh.shape),
        accumulation=config.train.accumulation,
        remat=config.train.remat,
        tokens_per_step=step.capacity_tokens(config, program),
        peak_hbm_bytes=peak,
        hbm_bytes=place.hbm_bytes,
        fits=peak <= place.hbm_bytes,
        hbm_parts_bytes=_parts(memory, argument_parts(config, program), moved, around, peak),
        host_bytes=sum(getattr(memory, f"host_{kind}_size_in_bytes", 0) for kind in ("argument", "temp")),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        hardware_flops=flops.total(hardware),
        hardware_flops_by_dtype=flops.by_dtype(hardware),
        model_flops=flops.total(model),
        compiled_dot_flops=moved.dot_flops * place.num_devices,
        hbm_traffic_bytes=moved.hbm_bytes,
        dot_traffic_bytes=moved.dot_bytes,
        collectives={kind: found._asdict() for kind, found in moved.collectives.items()},
        lower_seconds=round(lowered_at - started, 2),
        compile_seconds=round(compile_seconds, 2),
        num_params=state.num_base_params(program) + state.num_params(program.adapter),
        num_trainable_params=state.num_params(program.state.params),
    )
    return plan, hardware


def _compiled(lowered: Any, on_tpu: bool) -> tuple[Any, str]:
    """The compiled step and its optimised program as text.

    A TPU's program is written by libtpu itself: a newer libtpu's may have instructions that this jaxlib cannot print.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if on_tpu else None
        compiled = lowered.compile(compiler_options=options)
        dumped = sorted(Path(folder).glob("*.after_optimizations.txt"))
        return compiled, dumped[-1].read_text(encoding="utf-8") if dumped else compiled.as_text()


def argument_parts(config: ConfigDict, program: state.Program) -> dict[str, int]:
    """Bytes per device of what the step is given, by what it is, from shapes and shardings; without a layout's padding."""
    trees = {
        "trainable_params": program.state.params,
        "frozen_params": program.frozen,
        "optimizer": program.state.opt_state,
        "batch": step.abstract_batch(config, program),
    }
    return {name: shard_bytes(jax.tree.leaves(tree)) for name, tree in trees.items()}


def shard_bytes(leaves: Iterable[Any]) -> int:
    """Bytes that one device holds of these arrays."""
    total = 0
    for leaf in leaves:
        if (
            leaf.sharding.memory_kind in ("pinned_host", "unpinned_host")
            and leaf.sharding.mesh.devices.flat[0].platform != "cpu"
        ):
            continue
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        bits = jnp.iinfo(leaf.dtype).bits if integer else leaf.dtype.itemsize * 8
        total += -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8)
    return total


def _parts(memory: Any, arguments: dict[str, int], moved: hlo.Traffic, around: int, peak: int) -> dict[str, int]:
    """The peak by part. `other_arguments` are counters, keys and what layouts pad; `working` is what is left of the
    temporaries: gathered weights, one layer's activations and gradients, a chunk of logits (their peaks overlap, so the compiler
    does not say them apart). `process`, on a CPU alone, is what else this process holds: Python, libraries, compiled code."""
    temporary = memory.temp_size_in_bytes
    saved = min(moved.saved_bytes, temporary)
    gradients = min(moved.gradient_bytes, temporary - saved)
    parts = {
        **arguments,
        "other_arguments": memory.argument_size_in_bytes - sum(arguments.values()),
        "saved_activations": saved,
        "stacked_gradients": gradients,
        "working": temporary - saved - gradients,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    parts |= {"process": around} if around else {}
    beyond = peak - sum(parts.values())
    return {**parts, "unattributed": beyond} if beyond else parts


def _peak(memory: Any) -> int:
    """The sum of the parts, or XLA's own figure where that is more: it counts what lies in the host's memory, which is not here."""
    summed = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    own = getattr(memory, "peak_memory_in_bytes", 0) - getattr(memory, "host_temp_size_in_bytes", 0)
    return int(max(summed + memory.generated_code_size_in_bytes, own))


def _first_size(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if "hbm" in line.lower()]
    return (lines or message.splitlines())[0][:200]
