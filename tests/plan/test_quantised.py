"""QLoRA compiles for every TPU generation that plans reach: its base in codes, gathered as codes, smaller than in bfloat16."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune.plan import compile as plan_compile
from jaxtune.weights.source import hf_preset


@pytest.mark.parametrize(
    ("topology", "mesh", "kind", "ratio"),
    [
        ("v4:2x2x1", {"fsdp": -1}, "nf4", 0.27),
        ("v5e:2x4", {"fsdp": 4, "tensor": 2}, "nf4", 0.27),
        ("v5p:2x2x1", {"fsdp": -1}, "int8", 0.52),
        ("v6e:2x2", {"fsdp": -1}, "int4", 0.27),
        ("tpu7x:2x2x1", {"fsdp": -1}, "int8", 0.52),
    ],
)
def test_the_step_compiles_over_codes(topology: str, mesh: dict[str, int], kind: str, ratio: float) -> None:
    config: ConfigDict = config_lib.base()
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.data.max_length, config.train.batch_size, config.train.steps, config.tune.dropout = 512, 8, 10, 0.0
    config.plan.topology, config.model.quantize = topology, kind
    config.mesh.auto = False
    config.mesh.update(mesh)
    shape = hf_preset("llama3_2_1b") | {"num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 8}
    plan = plan_compile.compile_step(config, shape | {"head_dim": 128, "hidden_size": 1024, "intermediate_size": 2048})
    kernels = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048)
    assert plan.num_params == kernels + 512 * 1024 + 5 * 1024 + plan.num_trainable_params
    assert plan.fits
    trained_and_slots = 3 * 4 * plan.num_trainable_params / plan.mesh["fsdp"]
    base_bytes = plan.argument_bytes - trained_and_slots - 2 * 512 * 1024 / plan.num_devices
    assert base_bytes < ratio * 2 * kernels / plan.num_devices + 2**19
