"""What holds a run near its start: the same however the batch is laid out, kept for a resumed run, and felt by the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, sharding
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
    if method == "full":
        return
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


# ---- layers that do not train ----


def test_some_layers_train_and_have_a_state_alone(tiny_config: ConfigDict) -> None:
    """Layer 1 of both; embeddings by name not at all; what stays is the same to the bit, weight decay or not."""
    config = tiny_config
    config.tune.method, config.tune.train_layers, config.optim.weight_decay = "full", (1,), 0.1
    config.tune.freeze, config.optim.layer_decay, config.optim.ema_decay = (r"embed\..*",), 0.9, 0.9
    config.retain.penalties = (("l2_start", 1.0),)
    _, after, frozen = trained(config, devices=2)
    assert "embed.table" not in after
    assert "norm.scale" in after
    for path, value in after.items():
        before = sharding.to_host(frozen[f"retain/start/{path}"])
        if path.startswith("layers."):
            np.testing.assert_array_equal(value[0], before[0], err_msg=path)
            assert np.abs(value[1] - before[1]).max() > 0, path
        else:
            assert np.abs(value - before).max() > 0, path
    model = source.find(config)
    program = state.abstract(config, model.hf_config, sharding.make_mesh(config, jax.devices()[:1]), 1)
    stacked = [
        leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.opt_state)
        if "mu" in str(path) and "layers." in str(path)
    ]
    assert stacked
    assert all(shape[0] == 1 for shape in stacked)


def test_one_layer_trains_as_it_would_with_the_others_gradients_at_zero(tiny_config: ConfigDict) -> None:
    """By hand: SGD's step of the whole model, taken in layer 0 alone."""
    config = tiny_config
    config.optim.name, config.optim.schedule, config.optim.clip_norm, config.optim.warmup_steps = (
        "sgd",
        "constant",
        0.0,
        0,
    )
    config.tune.method, config.optim.learning_rate = "full", 0.1
    _, whole, _ = trained(config, steps=1)
    config.tune.train_layers, config.retain.penalties = (0,), (("l2_start", 0.0), ("ewc", 0.0))[:1]
    metrics, part, _ = trained(config, steps=1)
    for path, value in whole.items():
        wanted = value[0] if path.startswith("layers.") else value
        found = part[path][0] if path.startswith("layers.") else part[path]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7, err_msg=path)
    assert metrics[0]["grad_norm"] > 0


# ---- earlier tasks ----


def test_an_adapter_keeps_away_from_earlier_ones(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Two adapters in a row: the second's overlap with the first falls, and with it folded in, the base is what it was merged."""
    config = tiny_config
    config.data.validation_fraction = 0.0
    run.train(config.copy_and_resolve_references(), Path(config.workdir))
    first = str(Path(config.workdir) / "adapter")
    config.export.merge, config.export.output = True, str(tmp_path / "merged")
    run.export(config, Path(config.workdir))
    config.workdir, config.export.output = str(tmp_path / "second"), ""
    config.retain.earlier_adapters, config.retain.merge_earlier = (first,), True
    config.retain.penalties, config.train.seed = (("orthogonal", 10.0),), 1
    found, _, frozen = trained(config, steps=6)
    values = [m["penalty/orthogonal"] for m in found]
    assert values[0] > 0
    assert values[-1] < 0.7 * values[0]
    plain = tiny_config.copy_and_resolve_references()
    plain.retain.earlier_adapters, plain.retain.merge_earlier, plain.retain.penalties = (), False, ()
    plain.model.source = str(tmp_path / "merged")
    _, _, merged = trained(plain, steps=0)
    for path, value in merged.items():
        np.testing.assert_allclose(sharding.to_host(frozen[path]), sharding.to_host(value), atol=1e-6, err_msg=path)


def test_fisher_is_kept_added_up_and_used_again(
    held: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes reads its own; the next task's run adds half of the last one's to what it finds itself."""
    held.retain.penalties, held.train.steps = (("ewc", 1.0),), 2
    held.data.validation_fraction = 0.0
    run.train(held.copy_and_resolve_references(), Path(held.workdir))
    monkeypatch.setattr(fisher, "diagonal", None)  # not to be called
    held.checkpoint.resume = True
    run.train(held.copy_and_resolve_references(), Path(held.workdir))
    monkeypatch.undo()
    now, _ = information(held, "sampled")
    kept = fisher._read(Path(held.workdir) / fisher.FILE, "")
    assert kept is None  # asked for something else
    held.retain.fisher, held.retain.fisher_decay = held.workdir, 0.5
    held.workdir = str(tmp_path / "next")
    both, _ = information(held, "sampled")
    for path, value in now.items():
        np.testing.assert_allclose(
            both[path], 1.5 * value, rtol=2e-3, atol=1e-3, err_msg=path
        )  # on eight devices, and on one


# ---- replay ----


def test_replay_is_seen_told_and_resumed(tiny_config: ConfigDict, chats: Path, tmp_path: Path) -> None:
    config, workdir = tiny_config, Path(tiny_config.workdir)
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps({"text": f"the cat sat on mat {i}"}) + "\n" for i in range(30)))
    config.retain.replay = ((str(old), 0.25, (("data.limit", 20),)),)
    config.retain.rewarm, config.optim.warmup_steps = 5e-3, 2
    config.tracking.report, config.checkpoint.every_steps, config.data.validation_fraction = True, 3, 0.0

    def record() -> list[tuple]:
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        kept = [(m["step"], m["loss"], m["replay_share"], m["learning_rate"]) for m in lines if "loss" in m]
        return kept

    run.train(config.copy_and_resolve_references(), workdir)
    whole = record()
    assert [share for _, _, share, _ in whole] == [0.25] * 6
    np.testing.assert_allclose([rate for *_, rate in whole][:3], [5e-3, 7.5e-3, 1e-2], rtol=1e-6)
    data = json.loads((workdir / "report.json").read_text())["data"]
    assert data[f"replay of {old}, batch rows"] == 12
    assert data[f"replay of {old}, trained tokens"] > 0
    shutil.rmtree(workdir / "checkpoints" / "6")
    config.checkpoint.resume = True
    run.train(config.copy_and_resolve_references(), workdir)
    assert record() == whole
