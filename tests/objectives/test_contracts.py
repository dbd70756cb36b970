"""What every objective of the registry keeps: a finite loss, no gradient of masked tokens, no change by how a batch is laid out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import registry, sharding
from jaxtune.config import base
from jaxtune.models import llama
from jaxtune.objectives import OBJECTIVES
from jaxtune.train import guests, random_weights, start, state, step
from jaxtune.train.preferences import READERS
from jaxtune.types import BATCH_FIELDS, BRANCH_BITS
from jaxtune.weights import source

B, T, VOCAB = 4, 32, 64
HEADED = {"classify": ("a", "b"), "token_classify": ("a", "b"), "reward": ("reward",)}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config_of(name: str) -> ConfigDict:
    config = base()
    config.train.objective, config.train.batch_size, config.data.max_length, config.train.steps = name, B, T, 2
    config.data.max_passage_length, config.tune.rank, config.tune.dropout, config.tune.init = 8, 2, 0.0, "a_zero"
    config.train.loss_chunk_tokens, config.train.remat = 16, "none"
    config.distill.teacher = "start"
    config.preference.orpo_prompts = False  # where it is True its prompts train, whatever their weights
    if name in HEADED:
        config.model.head = "token" if name == "token_classify" else "sequence"
        config.model.labels = HEADED[name]
    config.mesh.fsdp = 1
    return config


def segments(name: str, rng: np.random.Generator) -> np.ndarray:
    """Two rows of the data in each batch row; those of answers in branches, the shared prompt first."""
    if name not in READERS:
        return np.repeat([[1] * 12 + [2] * 14 + [0] * 6], B, 0)
    one = [2, 3] if READERS[name] == "judged" else [1, 2]
    other = [1, 3] if READERS[name] == "judged" else [1, 2]
    branches = [*np.repeat([0, *one], [4, 6, 5]), *np.repeat([0, *other], [3, 4, 7])]
    numbers = [1] * 15 + [2] * 14
    ids = np.asarray(numbers) | np.asarray(branches) << BRANCH_BITS
    return np.repeat([[*ids, 0, 0, 0]], B, 0)


def batch_of(name: str, config: ConfigDict, program: state.Program) -> dict[str, np.ndarray]:
    """A batch of every field the objective reads, of random values that its name allows."""
    rng = np.random.default_rng(0)
    segments_BT = segments(name, rng).astype(np.int32)
    ends_BT = np.diff(segments_BT, axis=1, append=-1) != 0
    weights_BT = ((segments_BT != 0) & ~ends_BT & (rng.random((B, T)) < 0.7)).astype(np.float32)
    if name in READERS:
        weights_BT *= segments_BT >> BRANCH_BITS > 0
    if name == "reward":
        weights_BT = (ends_BT & (segments_BT >> BRANCH_BITS > 0)).astype(np.float32)
    labels = len(HEADED[name]) if name in HEADED else VOCAB
    positions_BT = np.repeat(np.arange(T)[None], B, 0)
    known: dict[str, Any] = {
        "segment_ids_BT": segments_BT, "weights_BT": weights_BT, "positions_BT": positions_BT,
        "targets_BT": rng.integers(0, labels, (B, T)), "query_ids_B": np.arange(B),
    }  # fmt: skip
    made = {}
    for field, like in step.abstract_batch(config, program).items():
        if field in known:
            value = known[field]
        elif "segment_ids" in field:
            value = np.ones(like.shape)
        elif field.startswith("passage_ids"):
            value = np.arange(np.prod(like.shape)).reshape(like.shape)
        elif np.issubdtype(like.dtype, np.integer):
            value = rng.integers(1, VOCAB, like.shape)
        else:
            value = rng.normal(size=like.shape)
        made[field] = np.asarray(value).astype(BATCH_FIELDS[field])
    return made


def one_step(config: ConfigDict, batches: list[dict[str, np.ndarray]], devices: int) -> list[dict[str, float]]:
    """Metrics of a first step on each batch."""
    preset = llama._preset(16, 1, 2, 2, 32, VOCAB, 1e4, max_position_embeddings=64, head_dim=8)
    hf_config = source.with_head({**preset, "architectures": ["LlamaForCausalLM"]}, config)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    program = state.abstract(config, hf_config, mesh, 2)
    found = []
    run = None
    for batch in batches or [batch_of(config.train.objective, config, program)]:
        made, frozen = state.create(program, random_weights.random_base(program, 0), 0)
        frozen |= guests.load(config, program, made.params, start.load, None)
        run = run or step.make(config, program)
        _, metrics = run(made, frozen, sharding.to_global(batch, mesh, B))
        found.append({name: float(value) for name, value in metrics.items()} | {"batch": batch})  # type: ignore[dict-item]
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract(name: str) -> None:
    config = config_of(name)
    whole = registry.load("objective", name, OBJECTIVES).OBJECTIVE.whole_batch
    (alone,) = one_step(config, [], 1)
    batch: Any = alone.pop("batch")
    assert np.isfinite(list(alone.values())).all()
    assert alone["grad_norm"] > 0
    masked = {**batch}
    if "targets_BT" in batch:
        masked["targets_BT"] = np.where(batch["weights_BT"] != 0, batch["targets_BT"], (batch["targets_BT"] + 1) % 2)
    config.mesh.fsdp, config.train.accumulation = (4, 1) if whole else (2, 2)
    apart, unmoved = one_step(config, [batch, masked], config.mesh.fsdp)
    for metrics in (apart, unmoved):
        metrics.pop("batch")
        assert metrics.keys() == alone.keys()
        for metric, value in alone.items():
            np.testing.assert_allclose(metrics[metric], value, rtol=2e-5, atol=2e-6, err_msg=f"{name}: {metric}")


def test_every_head_has_its_objectives() -> None:
    assert {name for name in start.HEADS if name != "mlm"} == set(HEADED)
