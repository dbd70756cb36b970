"""The peak that a step's FLOPs are a share of, and that run.py hands both to the loop."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from jaxtune import chips, sharding
from jaxtune import config as config_lib
from jaxtune.plan import utilisation
from jaxtune.train import state
from jaxtune.weights import source


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)  # fmt: skip
def test_a_device_is_known_by_its_kind(kind: str, chip: str) -> None:
    config = config_lib.base()
    config.model.compute_dtype = "bfloat16"
    of_chip = chips.table()[chip]
    assert utilisation.peak(config, SimpleNamespace(device_kind=kind)) * of_chip.devices == of_chip.peak("bfloat16")


def test_utilisation_is_known_where_the_peak_is() -> None:
    config = config_lib.base()
    config.model.source, config.mesh.fsdp = "preset:llama_tiny", 2
    config.data.max_length, config.train.batch_size = 32, 4
    mesh = sharding.make_mesh(config, jax.devices()[:2])
    program = state.abstract(config, source.find(config).hf_config, mesh, 1)
    assert utilisation.of(config, program) == (None, None)  # a CPU: nobody says what it could do
    config.tracking.peak_tflops = 0.5
    per_step, peak = utilisation.of(config, program)
    assert peak == 2 * 0.5e12
    assert per_step is not None
    matrices = [leaf.size for path, leaf in program.base.items() if path.endswith("proj.kernel")]
    tokens = config.train.batch_size * config.data.max_length
    assert per_step > 4 * sum(matrices) * tokens  # a frozen weight: 2 forward, 2 for the gradient that flows through it
    assert per_step < 8 * sum(leaf.size for leaf in program.base.values()) * tokens
