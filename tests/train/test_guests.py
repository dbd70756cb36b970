"""Models that are in the step and do not train: whose numbers they give, on which mesh, and what knows nothing of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import checkpoint, run, sharding
from jaxtune.data.batches import stack
from jaxtune.plan import compile as plan_compile
from jaxtune.train import guests, start, state, step
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.validation import validate
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """Another model of the same words: deeper, and other weights."""
    return make_model(tmp_path_factory.mktemp("teacher") / "deep", seed=5, num_hidden_layers=3)


def taught(config: ConfigDict, teacher: Any, **changes: Any) -> ConfigDict:
    config.train.objective, config.distill.teacher, config.data.max_length = "distill", str(teacher), 128
    config.update_from_flattened_dict(changes)
    return config


def made(config: ConfigDict) -> tuple[Any, state.State, dict[str, Any]]:
    model = source.find(config)
    mesh = sharding.make_mesh(config, jax.devices()[: config.mesh.fsdp * config.mesh.tensor])
    program = state.abstract(config, model.hf_config, mesh, config.train.steps)
    return (program, *start.load(config, model, program, None, lambda items, *_: iter(items)))


def one_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    tokenizer = source.find_tokenizer(config, source.find(config))
    rows = rows_lib.read(config, tokenizer, lambda items, *_: items).train
    return stack(
        rows, [(2 * i, 2 * i + 1) for i in range(config.train.batch_size)], config.data.max_length, tokenizer.pad_id
    )


def metrics_of(config: ConfigDict) -> dict[str, float]:
    program, current, frozen = made(config)
    batch = one_batch(config)
    fields = {name: batch[name] for name in step.fields(config, program)}
    arrays = sharding.to_global(fields, program.mesh, config.train.batch_size)
    _, metrics = step.make(config, program)(current, frozen, arrays)
    return {name: float(value) for name, value in metrics.items()}


def test_a_teacher_on_a_mesh_and_in_parts_gives_the_same_numbers(tiny_config: ConfigDict, teacher: Path) -> None:
    """Loss and gradient norm of one device, of 8 that share both models' weights, and of two micro-batches; none of sft's."""
    config = taught(tiny_config, teacher, **{"distill.divergence": "js", "distill.temperature": 2.0, "mesh.fsdp": 1})
    alone = metrics_of(config)
    config.mesh.fsdp, config.mesh.tensor, config.train.accumulation = 4, 2, 2
    shared = metrics_of(config)
    assert shared.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(alone["loss"], 0.5 * alone["divergence"] + 0.5 * alone["nll"], rtol=1e-6)
    assert alone["divergence"] > 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_start_is_the_first_weights(tiny_config: ConfigDict, method: str) -> None:
    """It is a copy of what trains: no distance at first, some after a step; and what does not train is not held twice."""
    config = taught(tiny_config, "start", **{"tune.method": method, "distill.alpha": 0.9, "mesh.fsdp": 1})
    program, current, frozen = made(config)
    extra = {path for path in frozen if "/" in path}
    assert extra == {f"start/{path}" for path in current.params}
    batch = one_batch(config)
    arrays = sharding.to_global({name: batch[name] for name in step.fields(config, program)}, program.mesh, 8)
    run_step, found = step.make(config, program), []
    for _ in range(2):
        current, metrics = run_step(current, frozen, arrays)
        found.append(float(metrics["divergence"]))
    assert abs(found[0]) < 1e-6
    assert found[1] > 1e-4


def test_runs_are_taught_measured_and_saved(tiny_config: ConfigDict, teacher: Path) -> None:
    """Distilled from another model, a student comes nearer to it; checkpoint and adapter hold nothing of the teacher."""
    config = taught(tiny_config, teacher, **{"distill.alpha": 1.0, "train.steps": 12, "data.test_fraction": 0.2})
    config.tune.method, config.eval.before_after, config.eval.metric = "full", True, "perplexity"
    workdir = Path(config.workdir)
    run.train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    apart = [row["divergence"] for row in rows if "divergence" in row]
    assert apart[-1] < 0.8 * apart[0]
    with checkpoint.Checkpoints(config.workdir, config, resuming=False) as checkpoints:
        restored = checkpoints.restore(start.program(guests.none(config), source.find(config))[0].state)
    assert restored is not None
    assert not any("/" in path for path in restored.state.params)
    run.evaluate(config, workdir)  # without the teacher
    model = source.find(config)
    config.model.source = str(workdir / "model")
    assert source.find(config).hf_config["num_hidden_layers"] == model.hf_config["num_hidden_layers"]


def test_a_plan_counts_the_teacher(tiny_config: ConfigDict, teacher: Path) -> None:
    plain = start.program(tiny_config, source.find(tiny_config))[0]
    config = taught(tiny_config.copy_and_resolve_references(), teacher)
    program = start.program(config, source.find(config))[0]
    weights = plan_compile.shard_bytes(jax.tree.leaves(program.guests["teacher"].frozen))
    more, less = (
        plan_compile.argument_parts(*each)["frozen_params"] for each in ((config, program), (tiny_config, plain))
    )
    assert weights > 1e5
    assert more - less == weights
    assert program.state.params.keys() == plain.state.params.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.teacher": ""}, "distill.teacher is empty"),
        ({"distill.teacher": "nowhere"}, "nowhere"),
        ({"distill.teacher": "preset:llama_tiny"}, "scores 256 words"),
        ({"distill.teacher": "adapter_off", "tune.method": "full"}, "no adapter to switch off"),
        ({"distill.alpha": 1.5}, "distill.alpha is 1.5"),
        ({"distill.top_k": 10_000}, "distill.top_k=10000"),
        ({"distill.mode": "precomputed"}, "such as distill.top_k=64"),
        ({"tune.method": "prompt"}, "virtual tokens before each text that no teacher knows"),
        ({"distill.teacher": "start", "distill.teacher_quantize": "int8"}, "is this model itself"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_told(tiny_config: ConfigDict, teacher: Path, changes: dict[str, Any], message: str) -> None:
    config = taught(tiny_config, teacher, **changes)

    def asked() -> None:
        validate(config)
        run.dry_run(config, Path(config.workdir))

    with pytest.raises(UserError, match=message):
        asked()


def test_another_tokenizer_is_refused(tiny_config: ConfigDict, teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    made = json.loads((other / "tokenizer.json").read_text())
    words = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    one, two = words[-1], words[-2]
    vocab = made["model"]["vocab"]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"another vocabulary.*distill.mode='sequence'"):
        run.dry_run(taught(tiny_config, other), tmp_path)


def test_layers_of_another_width_are_matched(
    tiny_config: ConfigDict, tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> None:
    """Hidden states come nearer through matrices that are learned and saved, but no part of what is exported; attention too."""
    wide = make_model(
        tmp_path_factory.mktemp("wide") / "model", seed=7, hidden_size=48, num_attention_heads=4, num_key_value_heads=4
    )
    config = taught(tiny_config, wide, **{"distill.alpha": 0.5, "train.steps": 12, "data.test_fraction": 0.2})
    config.distill.layer_map, config.distill.hidden_weight, config.distill.attention_weight = (
        ((0, 0), (1, 1)),
        20.0,
        20.0,
    )
    workdir = Path(config.workdir)
    run.train(config, workdir)
    rows = [row for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "divergence" in row]
    for row in rows:
        parts = (
            0.5 * row["divergence"] + 0.5 * row["nll"] + 20 * row["hidden_distance"] + 20 * row["attention_divergence"]
        )
        np.testing.assert_allclose(row["loss"], parts, rtol=1e-5)
    for name in ("hidden_distance", "attention_divergence"):
        assert rows[-1][name] < 0.9 * rows[0][name]
    run.evaluate(config, workdir)
    exported = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    assert b"projections" not in exported


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distill.layer_map": ((0, 3),), "distill.hidden_weight": 1.0},
            "names layer 3 of the teacher, which has 3, 0 to 2",
        ),
        (
            {"distill.layer_map": ((2, 0),), "distill.hidden_weight": 1.0},
            "names layer 2 of the student, which has 2, 0 to 1",
        ),
        ({"distill.layer_map": ((0, 0),)}, "pairs of layers need a weight"),
        ({"distill.layer_map": (0, 1), "distill.hidden_weight": 1.0}, "expected \\(number of a student's layer"),
        (
            {
                "distill.layer_map": ((0, 0),),
                "distill.hidden_weight": 1.0,
                "distill.mode": "precomputed",
                "distill.top_k": 4,
            },
            "needs the teacher's layers in the step",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_layer_maps_are_told(
    tiny_config: ConfigDict, teacher: Path, changes: dict[str, Any], message: str
) -> None:
    test_mistakes_are_told(tiny_config, teacher, changes, message)


def test_a_teacher_has_its_adapter_and_its_codes(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """A student that starts from an adapter is at its teacher with it, away from the one without, and near the one in int8."""
    tiny_config.workdir = str(tmp_path / "made")
    run.train(tiny_config, tmp_path / "made")
    adapter, base = str(tmp_path / "made" / "adapter"), tiny_config.model.source
    config = taught(tiny_config, base, **{"mesh.fsdp": 1, "tune.adapter": adapter})

    def apart(**changes: Any) -> float:
        one = config.copy_and_resolve_references()
        one.update_from_flattened_dict({f"distill.{name}": value for name, value in changes.items()})
        model = source.find(one)
        options, values = start.adapter(one, model)
        program = state.abstract(one, model.hf_config, sharding.make_mesh(one, jax.devices()[:1]), 1, options)
        current, frozen = start.load(one, model, program, values, lambda items, *_: iter(items))
        batch = one_batch(one)
        arrays = sharding.to_global({name: batch[name] for name in step.fields(one, program)}, program.mesh, 8)
        return float(step.make(one, program)(current, frozen, arrays)[1]["divergence"])

    without = apart()
    assert abs(apart(teacher_adapter=adapter)) < 1e-6 < 1e-3 < without
    assert 1e-6 < apart(teacher_adapter=adapter, teacher_quantize="int8") < 0.2 * without


def test_a_teacher_stands_beside_another_objective(tiny_config: ConfigDict, teacher: Path) -> None:
    """Cross-entropy, and half of what the teacher says beside it."""
    config = taught(tiny_config, teacher, **{"mesh.fsdp": 1, "distill.alpha": 1.0})
    alone = metrics_of(config)
    config.train.objective, config.train.beside = "sft", (("distill", 0.5),)
    program, current, frozen = made(config)
    batch = one_batch(config)
    both = batch | {f"1/{name}": array for name, array in batch.items()}
    fields = {name: both[name] for name in step.fields(config, program)}
    arrays = sharding.to_global(fields, program.mesh, config.train.batch_size)
    _, metrics = step.make(config, program)(current, frozen, arrays)
    np.testing.assert_allclose(metrics["loss"], alone["nll"] + 0.5 * alone["divergence"], rtol=1e-5)
