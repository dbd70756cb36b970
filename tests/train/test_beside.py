"""Objectives side by side: each divided by its own weight, once; rows of their own; and resumed with an average of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, sharding
from jaxtune.train import rows as rows_lib
from jaxtune.train import start, state, step
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


def silent(items, total=None, label=""):
    return items


def measured(config: ConfigDict, devices: int = 1, accumulation: int = 1, steps: int = 1) -> list[dict[str, float]]:
    """Metrics of the first steps on so many devices."""
    config = config.copy_and_resolve_references()
    config.train.accumulation, config.mesh.fsdp, config.optim.clip_norm = accumulation, devices, 0.0
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    beside = start.beside(config, model, tokenizer)
    rows = rows_lib.read(config, tokenizer, silent, start.reader(config, model, tokenizer), beside)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    program = state.abstract(config, model.hf_config, mesh, config.train.steps)
    current, frozen = start.load(config, model, program, None, silent)
    fields, take = step.fields(config, program), step.make(config, program)
    found = []
    for batch in rows_lib.for_loop(config, rows, tokenizer, program).train(0, steps):
        arrays = sharding.to_global({name: batch[name] for name in fields}, mesh, config.train.batch_size)
        current, metrics = take(current, frozen, arrays)
        found.append({name: float(value) for name, value in metrics.items()})
    return found


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    path = tmp_path / "replay.jsonl"
    rng = np.random.default_rng(1)
    words = "the cat sat on a red mat under blue hill".split()
    lines = [{"text": " ".join(rng.choice(words, rng.integers(3, 30)))} for _ in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_small_weights_are_means_too(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Class weights that add up to less than 1 in a batch divide by their sum all the same, as torch's do."""
    rows = [{"text": f"the cat {i}", "label": ["good", "bad"][i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_config.data.train, tiny_config.data.prompt = str(tmp_path / "rows.jsonl"), "{text}"
    tiny_config.data.label_column, tiny_config.train.objective = "label", "classify"
    tiny_config.model.head, tiny_config.model.labels = "sequence", ("bad", "good")
    found = []
    for scale in (1.0, 2.0**-7):
        tiny_config.train.class_weights = (1.0 * scale, 2.0 * scale)
        found += measured(tiny_config)
    assert 0.1 < found[0]["loss"] < 5
    assert found[0]["grad_norm"] > 0
    for name in ("loss", "grad_norm", "accuracy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-6)


def test_one_objective_twice_is_its_multiple(tiny_config: ConfigDict) -> None:
    (alone,) = measured(tiny_config)
    tiny_config.train.beside = (("sft", 0.5),)
    (both,) = measured(tiny_config)
    np.testing.assert_allclose(both["loss"], 1.5 * alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(both["grad_norm"], 1.5 * alone["grad_norm"], rtol=1e-5)
    assert both["loss/sft_0"] == both["loss/sft_1"] == pytest.approx(alone["loss"], rel=1e-6)


def test_each_is_divided_by_its_own_weight_however_the_batch_is_laid_out(tiny_config: ConfigDict, replay: Path) -> None:
    tiny_config.train.beside = (("sft", 0.25, str(replay)),)
    one = measured(tiny_config, steps=3)
    np.testing.assert_allclose(one[0]["loss"], one[0]["loss/sft_0"] + 0.25 * one[0]["loss/sft_1"], rtol=1e-6)
    assert abs(one[0]["loss/sft_0"] - one[0]["loss/sft_1"]) > 1e-3  # rows of its own
    parted = measured(tiny_config, devices=2, accumulation=4, steps=3)
    for name in ("loss", "grad_norm", "loss/sft_1"):
        np.testing.assert_allclose([m[name] for m in parted], [m[name] for m in one], rtol=2e-5, err_msg=name)


def test_passages_beside_chats(tiny_config: ConfigDict) -> None:
    """Another kind of rows, with fields of its own, on the same model."""
    tiny_config.train.beside, tiny_config.data.max_passage_length = (("contrastive", 0.1, "pairs.jsonl"),), 16
    tiny_config.mesh.fsdp = 1
    program = state.abstract(
        tiny_config, source.find(tiny_config).hf_config, sharding.make_mesh(tiny_config, jax.devices()[:1]), 1
    )
    batch = step.abstract_batch(tiny_config, program)
    assert batch["1/passage_tokens_BQU"].shape == (8, 1, 16)
    assert batch["tokens_BT"].shape == batch["1/tokens_BT"].shape == (8, 64)
    _, metrics = jax.eval_shape(step.make(tiny_config, program), program.state, program.frozen, batch)
    assert {"accuracy", "contrastive/accuracy", "loss/sft", "loss/contrastive"} <= set(metrics)
    tiny_config.train.accumulation = 2
    with pytest.raises(UserError, match="contrastive"):
        step.fields(tiny_config, program)


def test_an_objective_without_its_head_is_refused(tiny_config: ConfigDict) -> None:
    tiny_config.train.beside = (("mlm", 0.1),)
    model = source.find(tiny_config)
    with pytest.raises(UserError, match="mlm"):
        start.beside(tiny_config, model, source.find_tokenizer(tiny_config, model))


def test_a_resumed_run_with_an_average_is_the_whole_run(tiny_config: ConfigDict, replay: Path) -> None:
    """Validation, the exported adapter and every loss, to the bit; what is exported is the average, unless asked otherwise."""
    config = tiny_config
    config.optim.ema_decay, config.checkpoint.every_steps, config.data.validation_fraction = 0.9, 3, 0.2
    config.train.beside, config.train.neftune_noise_alpha = (("sft", 0.25, str(replay)),), 5.0
    config.train.label_smoothing, config.train.z_loss_weight = 0.1, 1e-3
    config.checkpoint.keep, config.train.eval_every_steps = 3, 3
    workdir = Path(config.workdir)

    def record() -> tuple[bytes, list[tuple]]:
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        kept = [
            (m["step"], m.get("loss"), m.get("eval/loss"), m.get("eval/nll"))
            for m in lines
            if "loss" in m or "eval/loss" in m
        ]
        return (workdir / "adapter" / "adapter_model.safetensors").read_bytes(), kept

    run.train(config.copy_and_resolve_references(), workdir)
    whole = record()
    assert all(evaluated is None or nll < evaluated for _, _, evaluated, nll in whole[1])
    shutil.rmtree(workdir / "checkpoints" / "6")
    config.checkpoint.resume = True
    run.train(config.copy_and_resolve_references(), workdir)
    assert record() == whole
    config.checkpoint.resume, config.optim.use_ema = False, False
    run.export(config, workdir)
    assert record()[0] != whole[0]
