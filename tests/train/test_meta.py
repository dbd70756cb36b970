"""Reptile and first-order MAML: their updates by hand, tasks vmapped as tasks in a loop, batches by the step alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, sharding, validation
from jaxtune.train import meta, start
from jaxtune.train import rows as rows_lib
from jaxtune.train import step as step_lib
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


def options(**changes: Any) -> ConfigDict:
    config = config_lib.base()
    config.meta.inner_optimizer, config.meta.inner_rate, config.meta.tasks, config.meta.inner_steps = "sgd", 0.1, 2, 3
    config.meta.update(changes)
    return config.meta


def quadratic(params: Any, batch: Any, key: Any) -> Any:
    """The gradient of w / 2 (p - c)^2, w times what a step divides by."""
    apart, weight = params["p"] - batch["c_B"][0], batch["w_B"][0]
    return {"p": weight * apart}, (0.5 * weight * apart**2, weight, {})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_reptile_by_hand(accumulation: int) -> None:
    """Steps of rate a towards c leave (1 - a)^3 of the way: p - q = (1 - (1 - a)^3) (p - c), whatever the loss weights."""
    c_task = np.asarray([4.0, -1.0])
    batch = {"c_B": jnp.repeat(jnp.asarray(c_task), 3)[:, None], "w_B": jnp.asarray([1.0, 5, 2, 3, 1, 7])[:, None]}
    params = {"p": jnp.float32(1.0)}
    grads, (value, tasks, told) = meta.summed_gradients(
        options(algorithm="reptile"), quadratic, params, batch, jax.random.key(0), accumulation
    )
    assert np.isclose(grads["p"], np.sum((1 - 0.9**3) * (1 - c_task)))
    assert tasks == 2
    assert np.isclose(value, np.sum(0.5 * (1 - c_task) ** 2))
    assert np.isclose(told["adapted_loss"][0], np.sum(0.5 * (0.9**2 * (1 - c_task)) ** 2))  # before the last step


def test_first_order_maml_by_hand() -> None:
    """The gradient of the query's loss where the inner steps end, and no derivative of these steps."""
    support, query = np.asarray([[4.0] * 3, [-1.5] * 3]), np.asarray([[5.0], [-1.0]])
    batch = {"c_B": jnp.asarray(np.c_[support, query]).reshape(8, 1), "w_B": jnp.full((8, 1), 2.0)}
    params = {"p": jnp.float32(1.0)}
    grads, (_, _, told) = meta.summed_gradients(
        options(algorithm="fomaml"), quadratic, params, batch, jax.random.key(0), 1
    )
    adapted = support[:, 0] + 0.9**3 * (1 - support[:, 0])
    assert np.isclose(grads["p"], np.sum(adapted - query[:, 0]))
    assert np.isclose(told["adapted_loss"][0], np.sum(0.5 * (adapted - query[:, 0]) ** 2))


@pytest.fixture
def config(tiny_config: ConfigDict, chats: Path, tmp_path: Path) -> ConfigDict:
    """The chats as four tasks, of which one is held out; four rows of a step for each of two tasks."""
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    named = [{**row, "kind": f"task {at % 4}"} for at, row in enumerate(rows)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    tiny_config.data.train, tiny_config.data.packing = str(tmp_path / "tasks.jsonl"), False
    tiny_config.data.test_fraction, tiny_config.data.validation_fraction = 0.2, 0.1
    tiny_config.meta.task_column, tiny_config.meta.held_out = "kind", ("task 3",)
    tiny_config.meta.tasks, tiny_config.meta.inner_steps, tiny_config.meta.inner_rate = 2, 2, 0.05
    tiny_config.optim.name, tiny_config.optim.learning_rate, tiny_config.optim.schedule = "sgd", 0.5, "constant"
    tiny_config.optim.clip_norm, tiny_config.optim.warmup_steps = 0.0, 0
    return tiny_config


def prepared(config: ConfigDict) -> Any:
    """(program, state, frozen, rows) of a run, its A drawn and its B moved away from 0, so that both have gradients."""
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    rows = rows_lib.read(config, tokenizer, lambda items, total, label: items)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, total, label: iter(items))
    moved = jax.jit(lambda params: {p: v + 0.01 for p, v in params.items()})(state.params)
    return program, state._replace(params=moved), frozen, rows


@pytest.mark.parametrize(("algorithm", "inner", "batch_size"), [("reptile", "sgd", 32), ("fomaml", "adam", 48)])
def test_the_step_is_the_published_loop(config: ConfigDict, algorithm: str, inner: str, batch_size: int) -> None:
    """The jitted, vmapped, scanned step on eight devices against loops over tasks and steps, on a model with LoRA."""
    config.meta.algorithm, config.meta.inner_optimizer, config.train.batch_size = algorithm, inner, batch_size
    validation.validate(config)
    program, state, frozen, rows = prepared(config)
    assert program.mesh.size == 8
    before = {path: np.asarray(value, np.float64) for path, value in state.params.items()}
    batch = rows.batches[3]
    total = step_lib._loss(config, program, batch_size)

    @jax.jit
    def gradient(params: Any, part: Any) -> Any:
        grads, (value, weight, _) = jax.grad(lambda p: total({**frozen, **p}, part, None), has_aux=True)(params)
        return jax.tree.map(lambda g: g / weight, grads), value / weight

    num_batches = 2 + (algorithm == "fomaml")
    fields, sums, losses = step_lib.fields(config, program), dict.fromkeys(before, 0.0), []
    for task in range(2):
        parts = [  # row b is of batch b mod (tasks x batches)
            {name: batch[name][task * num_batches + at :: 2 * num_batches] for name in fields}
            for at in range(num_batches)
        ]
        params, second = dict(before), {path: np.zeros_like(value) for path, value in before.items()}
        for at, part in enumerate(parts[:2], 1):
            grads, loss = gradient({p: jnp.asarray(v, jnp.float32) for p, v in params.items()}, part)
            losses += [float(loss)] if at == 1 else []
            for path, g in grads.items():
                g = np.asarray(g, np.float64)
                second[path] = 0.999 * second[path] + 0.001 * g**2
                way = g if inner == "sgd" else g / (np.sqrt(second[path] / (1 - 0.999**at)) + 1e-8)
                params[path] = params[path] - 0.05 * way
        if algorithm == "fomaml":
            found, _ = gradient({p: jnp.asarray(v, jnp.float32) for p, v in params.items()}, parts[2])
        else:
            found = {path: before[path] - params[path] for path in before}
        sums = {path: sums[path] + np.asarray(found[path]) / 2 for path in sums}
    arrays = sharding.to_global({name: batch[name] for name in fields}, program.mesh, batch_size)
    after, metrics = step_lib.make(config, program)(state, frozen, arrays)
    assert np.isclose(metrics["loss"], np.mean(losses), atol=1e-5)
    assert metrics["adapted_loss"] > 0
    for path, value in after.params.items():
        expected = before[path] - 0.5 * sums[path]
        moved = np.abs(expected - before[path]).max()
        assert moved > 1e-5
        assert np.abs(np.asarray(value) - expected).max() <= 1e-3 * moved + 1e-6, path


def test_batches_are_the_steps_and_tasks_stay_apart(config: ConfigDict) -> None:
    config.meta.algorithm, config.train.batch_size = "fomaml", 48
    _, _, _, rows = prepared(config)
    of_row = {e.row_id: e.task for e in rows.splits.train}
    seen = set()
    for step in range(4):
        batch = rows.batches[step]
        assert all(np.array_equal(batch[name], rows.batches[step][name]) for name in batch)
        assert all(np.array_equal(batch[name][5:9], rows.batches.local(step, np.arange(5, 9))[name]) for name in batch)
        ids_B = batch["row_ids_BT"].max(1)
        tasks = [[of_row[rows.train.row_ids[i]] for i in ids_B[part::6]] for part in range(6)]
        assert [len({*tasks[at], *tasks[at + 1], *tasks[at + 2]}) for at in (0, 3)] == [1, 1]
        assert tasks[0][0] != tasks[3][0]
        support, query = {*ids_B[0::6], *ids_B[1::6]}, {*ids_B[2::6]}
        assert not support & query
        seen |= {task for part in tasks for task in part}
    assert seen == {"task 0", "task 1", "task 2"}
    assert {e.task for e in rows.splits.test} == {e.task for e in rows.splits.support} == {"task 3"}


def test_a_run_learns_and_resumes_to_the_bit(config: ConfigDict) -> None:
    config.meta.algorithm, config.train.batch_size, config.meta.inner_optimizer = "reptile", 32, "adam"
    config.meta.inner_rate, config.optim.learning_rate = 3e-3, 1.0
    config.checkpoint.every_steps, workdir = 3, Path(config.workdir)

    def trained() -> tuple[list[float], bytes]:
        run.train(config, workdir)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        by_step = {line["step"]: line["loss"] for line in lines if "loss" in line}
        return list(by_step.values()), (workdir / "adapter" / "adapter_model.safetensors").read_bytes()

    losses, adapter = trained()
    assert losses[-1] < losses[0] - 0.1
    shutil.rmtree(workdir / "checkpoints" / "6")
    config.checkpoint.resume = True
    assert trained() == (losses, adapter)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no inner steps": ({"meta.inner_steps": 0}, "meta.inner_steps is 0; expected at least 1"),
    "no rate": ({"meta.inner_rate": 0.0}, "meta.inner_rate is 0.0; expected above 0, or no task takes a step"),
    "uneven": ({"train.batch_size": 30}, "30 does not divide among meta.tasks=2 x 2 batches of each"),
    "groups": ({"train.accumulation": 4, "train.batch_size": 32}, "meta.tasks=2 does not divide by train.accumulation=4"),
    "objective": ({"train.objective": "mlm"}, "goes with train.objective='sft'"),
    "shots": ({"meta.shots": (4, 2)}, "expected whole numbers from 0 on, ascending"),
    "shots of what": ({"meta.shots": (1,), "meta.held_out": ()}, "name them in meta.held_out"),
    "rows a device": ({"train.batch_size": 16, "mesh.data": 8, "mesh.fsdp": 1}, "which do not divide over 8 devices: use a multiple of 32"),
    "no such task": ({"meta.held_out": ("tusk 3",)}, "did you mean 'task 3'"),
    "none left": ({"meta.held_out": tuple(f"task {i}" for i in range(4))}, "leaves no task to train on"),
    "no such column": ({"meta.task_column": "kinds"}, "did you mean 'kind'"),
    "few rows": ({"meta.algorithm": "fomaml", "train.batch_size": 240}, "expected more than the 40 of its query batch"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_refused(config: ConfigDict, changes: dict[str, Any], message: str) -> None:
    config.meta.algorithm, config.train.batch_size = "reptile", 32
    config.update_from_flattened_dict(changes)

    def begin() -> None:
        validation.validate(config)
        prepared(config)

    with pytest.raises(UserError, match=message):
        begin()
