"""What a mesh, a micro-batch and a remat choice would need, estimated without a compiler: for pruning, never for the answer.

Exact here are the arguments (shapes and shardings of the real program), the FLOPs, and what each remat choice saves for the
backward pass (the stacks that the traced step's scans make). Estimated are the rest of the temporaries and what is sent.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jaxtune import sharding
from jaxtune.chips import Slice
from jaxtune.config import ConfigDict
from jaxtune.plan import flops
from jaxtune.plan.compile import argument_parts, counted, program_of, shard_bytes
from jaxtune.plan.cost import Forecast, Work, forecast
from jaxtune.train import state, step

_PASSES = 2  # over gathered weights: forward and backward
_TENSOR_SUMS = 4  # sums over the tensor axis of a layer: two forward, two backward
_KEPT = 0.97  # share of the HBM that a step can have


class Traced(NamedTuple):
    """A remat choice, for the whole batch on one device: FLOPs, and the bytes that it saves for the backward pass."""

    flops_by_dtype: dict[str, float]
    model_flops: float
    saved_bytes: int
    num_rounds: int  # of the longest scan: the layers
    tokens: int


class Estimate(NamedTuple):
    """One candidate. `hbm_bytes` and `forecast` are estimates; `fits` is by the estimate."""

    mesh: dict[str, int]
    accumulation: int
    remat: str
    hbm_bytes: float
    temporary_bytes: float
    fits: bool
    forecast: Forecast


def traced(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, device: Any) -> Traced:
    """Traces the step of this config's remat choice, on one device and in one micro-batch."""
    config = config.copy_and_resolve_references()
    for axis in sharding.AXES:
        config.mesh[axis] = config.mesh[f"dcn_{axis}"] = 1
    config.train.accumulation = 1
    program = program_of(config, hf_config, adapter, [device])
    traced_step, hardware, model = counted(config, program)
    scans = [eqn for eqn in traced_step.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    saved = sum(_stacked_bytes(eqn) for eqn in scans)
    rounds = max((eqn.params["length"] for eqn in scans), default=1)
    tokens = step.capacity_tokens(config, program)
    return Traced(flops.by_dtype(hardware), flops.total(model), saved, rounds, tokens)


def _stacked_bytes(scan: Any) -> int:
    """Bytes of what a scan stacks up on the device, one row a round."""
    stacked = [var.aval for var in scan.outvars[flops.scanned(scan.params)[1] :]]
    on_device = [a for a in stacked if "host" not in str(getattr(a, "memory_space", "")).lower()]
    return sum(a.size * a.dtype.itemsize for a in on_device if hasattr(a.dtype, "itemsize"))


class Weights(NamedTuple):
    """Of a program on a mesh, bytes per device: what it is given; one layer gathered, all layers gathered, head and embedding
    gathered; gradients."""

    arguments: int
    layer: float
    gathered: float
    outside: float
    gradients: int


def weights(config: ConfigDict, program: state.Program, num_rounds: int) -> Weights:
    """Reads a program's shardings: axes that split batch rows are gathered for use, the others are not."""
    arguments = sum(argument_parts(config, program).values())
    layer = gathered = outside = 0.0
    for path, leaf in {**program.frozen, **program.state.params}.items():
        ways = [_ways(program.mesh, part) for part in leaf.sharding.spec]
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize / math.prod(kept for _, kept in ways)
        split = math.prod(rows for rows, _ in ways)
        moved = whole * (split - 1) / split
        if path.startswith("layers"):
            layer += whole / num_rounds if split > 1 else 0.0
            gathered += moved
        else:
            outside = max(outside, whole if split > 1 else 0.0)
            gathered += moved
    trainable = jax.tree.leaves(program.state.params)
    gradients = sum(shard_bytes([leaf]) * 4 // leaf.dtype.itemsize for leaf in trainable)
    return Weights(arguments, layer, gathered, outside, gradients)


def _kv_numbers(c: Any) -> int:
    """Keys and values of a token in one layer, as numbers; what a context axis gathers."""
    attention = c.blocks[0][0].attention
    return 2 * attention.num_kv_heads * getattr(attention, "head_dim", c.dim // attention.num_heads)


def _ways(mesh: Any, part: Any) -> tuple[int, int]:
    """(how often a dim is split over axes that have tokens of their own, over others); experts stay where they are."""
    axes = (part,) if isinstance(part, str) else tuple(part or ())
    own = () if axes == ("expert",) else (*sharding.BATCH_AXES, "context")
    rows = math.prod(mesh.shape[axis] for axis in axes if axis in own)
    return rows, math.prod(mesh.shape[axis] for axis in axes) // rows


def estimate(
    config: ConfigDict, program: state.Program, held: Weights, accumulation: int, remat: str, seen: Traced, most: Traced,
    place: Slice, correction: float,
) -> Estimate:  # fmt: skip
    """Memory and time of a program's mesh with this accumulation and remat, which was `seen` so; `most` is the trace that saves
    most of all.

    `correction` is what compiled steps needed of temporaries over what was estimated for them.
    """
    mesh = dict(program.mesh.shape)
    shards = sharding.num_batch_shards(program.mesh) * mesh["context"]
    each = 1 / (shards * accumulation)
    c, width = program.model_config, program.run.compute_dtype.itemsize
    one_layer = most.saved_bytes / most.num_rounds * each / mesh["tensor"]
    logits = config.train.loss_chunk_tokens * c.vocab_size * 4 * 2 / mesh["tensor"]
    summed = held.gradients * (1 if accumulation == 1 else 2)
    temporary = seen.saved_bytes * each + 2 * one_layer + 2 * held.layer + held.outside + logits + summed
    temporary *= correction
    devices = program.mesh.size
    tokens_each = most.tokens / shards
    sums = (_TENSOR_SUMS + (seen.saved_bytes < most.saved_bytes)) * c.num_layers * tokens_each * c.dim * width
    sent = _PASSES * accumulation * held.gathered + 2 * sums * (mesh["tensor"] - 1) / mesh["tensor"]
    reduced = held.gradients * 2 * (shards > 1)
    sent += c.num_layers * tokens_each * c.dim * width * 4 * (mesh["expert"] > 1)
    sent += _PASSES * c.num_layers * tokens_each * _kv_numbers(c) * width * (mesh["context"] - 1)
    hbm = _PASSES * accumulation * (held.gathered + held.arguments) + 4 * most.saved_bytes / devices
    crossing = reduced / max(place.num_slices, 1) if place.num_slices > 1 else 0.0
    work = Work(seen.flops_by_dtype, seen.model_flops, hbm, sent + reduced, crossing, most.tokens)
    needed = held.arguments + temporary
    made = forecast(work, place, max(1, config.train.steps), config.plan.efficiency)
    return Estimate(mesh, accumulation, remat, needed, temporary, needed <= _KEPT * place.hbm_bytes, made)
