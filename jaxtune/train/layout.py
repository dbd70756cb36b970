"""Which mesh a run gets where its config names none: from the model's size, the batch and the devices, and why, in words.

The rules, in order. Slices split the rows, and the weights too where one slice cannot hold them. Each device gets rows;
where there are fewer rows than devices, the tokens of a row go over "context" if there are many of them, else the model's
heads over "tensor". Weights, optimizer state and gradients that leave room on a device are replicated ("data"): nothing has
to be gathered. Else a mixture's experts go over "expert", and everything over "fsdp".
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import chips, sharding
from jaxtune.adapters import kinds
from jaxtune.config import ConfigDict, base
from jaxtune.models import spec
from jaxtune.train import meta, state
from jaxtune.train.state import Program

_GIB = 1 << 30
_ROOM = 0.5  # share of a device's memory that replicas of weights and optimizer state may take
_LONG_TOKENS = 2048  # of a device: from here on a row is split by its tokens rather than the model by its heads


class Need(NamedTuple):
    """What decides. `state_bytes`: weights, optimizer state and gradients, all together. `rows`: of a micro-batch. Tensor must
    divide `head_divisor`; `splits_rows` says whether tokens of a row may lie apart.
    """

    state_bytes: int
    rows: int
    row_tokens: int
    num_experts: int
    head_divisor: int
    splits_rows: bool


def program(
    config: ConfigDict, hf_config: dict[str, Any], devices: Sequence[jax.Device] | None = None,
    adapter: kinds.Options | None = None, pooling: str = "",
) -> Program:  # fmt: skip
    """The training program on a mesh of `devices` (default: all): that of `config.mesh`, or the one chosen here.

    Raises:
      UserError: as `sharding.make_mesh`, `sharding.check_batch` and `state.abstract`.
    """
    devices = list(jax.devices() if devices is None else devices)
    why, config = "", config.copy_and_resolve_references()
    make = (max(1, config.train.steps), adapter, pooling)
    if len(devices) > 1 and is_open(config):
        one = config.copy_and_resolve_references()
        one.mesh.fsdp = 1
        need = measure(config, state.abstract(one, hf_config, sharding.make_mesh(one, devices[:1]), *make))
        slices = sharding.num_slices(devices)
        sizes, why = choose(need, len(devices) // slices, slices, memory_bytes(devices))
        config.mesh.update(dict.fromkeys(sharding.AXES, 1) | sizes)
    mesh = sharding.make_mesh(config, devices)
    meta.check(config, mesh)
    made = state.abstract(config, hf_config, mesh, *make)
    return made._replace(layout="; ".join(part for part in (why, made.layout) if part))


def is_open(config: ConfigDict) -> bool:
    """Whether the config leaves the mesh to us: no size was changed."""
    names = [*sharding.AXES, *(f"dcn_{axis}" for axis in sharding.AXES)]
    return bool(config.mesh.auto) and all(config.mesh[name] == base().mesh[name] for name in names)


def measure(config: ConfigDict, program: Program) -> Need:
    """What a program needs, read off its shapes."""
    model, train = program.model_config, config.train
    gradients = sum(leaf.size * 4 for leaf in program.state.params.values())  # float32
    arrays = (program.state.params, program.state.opt_state, program.frozen)
    blocks = [block for block, _ in model.blocks]
    heads = [number for block in blocks for number in (block.attention.num_heads, block.attention.num_kv_heads)]
    return Need(
        state_bytes=gradients + sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays)),
        rows=train.batch_size // meta.num_parts(config),
        row_tokens=config.data.max_length,
        num_experts=math.gcd(*(block.experts.num_experts for block in blocks if block.experts)),
        head_divisor=math.gcd(*heads, *(block.ffn.dim for block in blocks)),
        splits_rows=not program.run.branches and not any(isinstance(block.attention, spec.Delta) for block in blocks),
    )


def choose(need: Need, num_devices: int, num_slices: int, memory_bytes: int) -> tuple[dict[str, int], str]:
    """Sizes for `num_slices` slices of `num_devices`, each with `memory_bytes`: (those that are not 1, why, in words)."""
    said: list[str] = []
    sizes: dict[str, int] = {}
    rows, share_bytes = need.rows, _ROOM * memory_bytes
    if num_slices > 1:
        apart = need.state_bytes > share_bytes * num_devices
        sizes["dcn_fsdp" if apart else "dcn_data"] = num_slices
        said.append(f"{num_slices} slices split the {'rows and the weights' if apart else 'rows'}")
        rows, share_bytes = max(1, rows // num_slices), share_bytes * (num_slices if apart else 1)
    spread = math.gcd(num_devices, rows)
    more = num_devices // spread
    if more > 1:
        tokens, rest = divmod(need.row_tokens, more)
        axis = "context" if need.splits_rows and not rest and tokens >= _LONG_TOKENS else "tensor"
        if axis == "context" or need.head_divisor % more == 0:
            sizes[axis], share_bytes = more, share_bytes * more
            said.append(f"{rows} rows of {need.row_tokens:,} tokens for {num_devices} devices")
        else:  # nothing fits: `sharding.check_batch` says what would
            spread = num_devices
    held = f"{_size(need.state_bytes)} of weights, optimizer state and gradients"
    device = f"{_size(memory_bytes)} of a device"
    if need.state_bytes <= share_bytes:
        sizes |= {"data": spread}
        said.append(f"{held} leave room in {device}")
    else:
        experts = math.gcd(spread, need.num_experts) if need.num_experts else 1
        sizes |= {"expert": experts, "fsdp": spread // experts}
        said.append(f"{held} are too much for replicas in {device}")
    return {axis: size for axis, size in sizes.items() if size > 1}, "; ".join(said)


def memory_bytes(devices: Sequence[jax.Device]) -> int:
    """Memory of one device, the same on every process: by its kind, by what it says, or (CPU) the host's shared among its own."""
    chip = chips.of_kind(devices[0].device_kind)  # what plan compiles for is not here to be asked
    if chip:
        return chip.hbm_bytes // chip.devices
    mine = [device for device in devices if device.process_index == jax.process_index()]
    stats = mine[0].memory_stats() if mine else None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = int((stats or {}).get("bytes_limit", 0)) or whole // max(1, len(mine))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = int(multihost_utils.process_allgather(np.int32(found >> 20)).min()) << 20
    return found


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes >> 20} MiB"
