"""What holds a run near its start: the same however the batch is laid out, kept for a resumed run, and felt by the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import sharding
from jaxtune.objectives.divergences import Form, divergence
from jaxtune.train import fisher, start, state, step
from jaxtune.train import rows as rows_lib
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


def silent(items, total=None, label=""):
    return items


def trained(config: ConfigDict, devices: int = 1, accumulation: int = 1, steps: int = 3) -> tuple[list, dict, dict]:
    """Metrics of the first steps on so many devices, the parameters after them, and the frozen ones."""
    config = config.copy_and_resolve_references()
    config.train.accumulation, config.mesh.fsdp = accumulation, devices
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    rows = rows_lib.read(config, tokenizer, silent, start.reader(config, model, tokenizer))
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    options, values = start.adapter(config, model)
    program = state.abstract(config, model.hf_config, mesh, config.train.steps, options)
    current, frozen = start.load(config, model, program, values, silent)
    frozen = fisher.with_penalties(
        config, Path(config.workdir), model, tokenizer, program, current.params, frozen, silent
    )
    assert jax.tree.map(lambda x: x.shape, frozen) == jax.tree.map(lambda x: x.shape, program.frozen)
    fields, take, found = step.fields(config, program), step.make(config, program), []
    for batch in rows_lib.for_loop(config, rows, tokenizer, program).train(0, steps):
        arrays = sharding.to_global({name: batch[name] for name in fields}, mesh, config.train.batch_size)
        current, metrics = take(current, frozen, arrays)
        found.append({name: float(value) for name, value in metrics.items()})
    return found, {path: sharding.to_host(value) for path, value in current.params.items()}, frozen


@pytest.fixture
def held(tiny_config: ConfigDict, chats: Path) -> ConfigDict:
    tiny_config.retain.fisher_data = (("data.train", str(chats)), ("data.limit", 10))
    return tiny_config


PENALTIES = (("kl_base", 0.5), ("l2_start", 0.1), ("ewc", 10.0))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_layout_changes_nothing(held: ConfigDict, method: str) -> None:
    """Losses, penalties and the gradient of all together: one device, eight, micro-batches."""
    held.tune.method, held.retain.penalties, held.train.batch_size = method, PENALTIES, 16
    held.data.packing = False  # 91 rows, so that they fill three batches
    if method == "full":
        held.optim.learning_rate = 1e-3
    one, weights, _ = trained(held)
    assert {"penalty/kl_base", "penalty/l2_start", "penalty/ewc"} <= set(one[0])
    assert one[0]["penalty/kl_base"] == pytest.approx(0, abs=1e-6)
    assert one[0]["penalty/l2_start"] == one[0]["penalty/ewc"] == 0
    assert all(one[2][f"penalty/{name}"] > 1e-6 for name, _ in PENALTIES)
    shutil.rmtree(held.workdir)  # the Fisher information is computed anew, on another mesh
    found, theirs, _ = trained(held, devices=8, accumulation=2)
    for name in ("loss", "grad_norm", *(f"penalty/{name}" for name, _ in PENALTIES)):
        np.testing.assert_allclose([m[name] for m in found], [m[name] for m in one], rtol=3e-4, atol=1e-6, err_msg=name)
    for path, value in weights.items():
        np.testing.assert_allclose(theirs[path], value, atol=2e-4, err_msg=path)
    held.retain.penalties = ()
    free, moved, _ = trained(held)
    assert free[0]["loss"] == one[0]["loss"]
    assert free[2]["loss"] < one[2]["loss"]  # who is held learns less


def test_kl_is_that_of_whole_distributions(tiny_config: ConfigDict) -> None:
    """The logged penalty of step 2 against full logits of both models; not for the target's sake with `kl_non_target`."""
    tiny_config.retain.penalties = (("kl_base", 1e-9),)
    tiny_config.retain.kl_temperature, tiny_config.retain.kl_non_target = 2.0, True
    found, _, _ = trained(tiny_config, steps=2)
    plain = tiny_config.copy_and_resolve_references()
    plain.retain.penalties = ()
    _, after, frozen = trained(plain, steps=1)
    model = source.find(plain)
    tokenizer = source.find_tokenizer(plain, model)
    rows = rows_lib.read(plain, tokenizer, silent)
    batch = {name: jnp.asarray(value) for name, value in rows.batches[1].items()}
    program = state.abstract(plain, model.hf_config, sharding.make_mesh(plain, jax.devices()[:1]), 1)
    seen = step.policy(program, {**frozen, **after}, 64)
    base = step.reference(program, {**frozen, **after}, 64)
    logits = [p.head.apply(p.head.params, p.hidden(batch, None)) for p in (seen, base)]
    apart = divergence(*logits, batch["targets_BT"], Form(temperature=2.0, non_target=True))
    wanted = jnp.sum(apart * batch["weights_BT"]) / jnp.sum(batch["weights_BT"])
    assert wanted > 1e-5
    np.testing.assert_allclose(found[1]["penalty/kl_base"], wanted, rtol=1e-3)


def information(config: ConfigDict, labels: str) -> tuple[dict[str, np.ndarray], tuple]:
    config.retain.fisher_labels = labels
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    program = state.abstract(config, model.hf_config, sharding.make_mesh(config, jax.devices()[:1]), 1)
    current, frozen = start.load(config, model, program, None, silent)
    args = (config, Path(config.workdir), model, tokenizer, program, current.params, frozen, silent)
    return dict(fisher.information(*args)), (program, current.params, frozen, tokenizer)


def test_fisher_is_the_mean_square_of_each_rows_gradient(held: ConfigDict) -> None:
    """Row by row, without vmap; the squared gradient of the batch is another thing, and smaller."""
    held.mesh.fsdp, held.retain.penalties = 1, (("ewc", 1.0),)
    found, (program, params, frozen, tokenizer) = information(held, "data")
    data = fisher.rows.aside(fisher._rows_config(held), tokenizer, silent, "", fisher.rows.readers.NEXT)[1]
    policy_of = lambda p: step.policy(program, {**frozen, **p}, 64, graphdef=program.inference)  # noqa: E731
    loss = step.objective(held, program.hf_config).loss

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda p: loss(policy_of(p), {}, batch, None)[0])(params)

    batches = fisher.batches.eval_batches(data, 64, False, 1, tokenizer.pad_id)
    grads = [gradient(params, {name: jnp.asarray(x) for name, x in row.items()}) for row in batches]
    assert len(grads) == 10
    for path in found:
        rows = np.stack([np.asarray(grad[path]) for grad in grads])
        np.testing.assert_allclose(found[path], np.mean(rows**2, axis=0), rtol=1e-3, atol=1e-8, err_msg=path)
    path = "layers.attn.q_proj.adapter.lora_b" if "layers.attn.q_proj.adapter.lora_b" in found else max(found)
    of_the_batch = np.mean(np.stack([np.asarray(grad[path]) for grad in grads]), axis=0) ** 2
    assert of_the_batch.sum() < 0.7 * found[path].sum()
    assert found[path].sum() > 0
    sampled, _ = information(held, "sampled")
    assert 0 < sampled[path].sum() != found[path].sum()


def test_drawn_labels_have_the_models_probabilities() -> None:
    from jaxtune.objectives.ops import Head, Policy

    p = np.asarray([0.5, 0.3, 0.2], np.float32)
    head = Head(None, lambda _, h: jnp.broadcast_to(jnp.log(p), (*h.shape[:-1], 3)), 7)
    policy = Policy(lambda batch, key: jnp.zeros((1, 5000, 2)), head)
    drawn = fisher.labels(policy, {}, jax.random.key(0))
    assert drawn.shape == (1, 5000)
    np.testing.assert_allclose(np.bincount(np.asarray(drawn)[0], minlength=3) / 5000, p, atol=0.025)
