"""What model FLOPs utilisation is a share of: a step's own arithmetic, and what the devices at hand could do."""

from __future__ import annotations

from typing import Any

import jax

from jaxtune import chips
from jaxtune.config import ConfigDict
from jaxtune.plan import flops
from jaxtune.train import step
from jaxtune.train.loop import Flops
from jaxtune.train.state import Program


def of(config: ConfigDict, program: Program) -> Flops:
    """Model FLOPs of one optimizer step (`flops.model`) and the peak FLOP/s of the mesh; neither where no peak is known."""
    most = peak(config, program.mesh.devices.flat[0]) * program.mesh.size
    if not most:
        return Flops()
    batch = step.abstract_batch(config, program)
    forward = step.make_eval(config, program).trace(program.state.params, program.frozen, batch)
    return Flops(flops.total(flops.model(forward, len(jax.tree.leaves(program.state.params)))), most)


def peak(config: ConfigDict, device: Any) -> float:
    """FLOP/s of one device in the compute dtype: `tracking.peak_tflops`, else by its kind (`chips.toml`); 0 = not known."""
    if config.tracking.peak_tflops:
        return float(config.tracking.peak_tflops) * 1e12
    chip = chips.of_kind(device.device_kind, config.plan.prices)
    return chip.peak(config.model.compute_dtype) / chip.devices if chip else 0.0
