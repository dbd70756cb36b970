"""The same training, however it is laid out: batch, accumulation, mesh, processes, packing, interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import optim, sharding
from jaxtune.data import pipeline
from jaxtune.objectives import ops
from jaxtune.train import start, state, step
from jaxtune.weights import hf, source

NUM_STEPS = 4
pytestmark = pytest.mark.usefixtures("quick_compile")  # in this process; those that it starts compile as a user's do


def silent(items, total=None, label=""):
    return items


def batches(config: ConfigDict) -> tuple[pipeline.BatchSource, pipeline.Rows]:
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    splits = pipeline.load(config.data, {"train": Path(config.data.train)}, tokenizer)
    rows = pipeline.tokenize(splits.train, tokenizer, config.data)
    data = config.data
    options = (
        data.max_length,
        data.packing,
        data.shuffle,
        config.train.seed,
        config.train.batch_size,
        tokenizer.pad_id,
    )
    return pipeline.BatchSource(rows, *options), rows


def losses(config: ConfigDict, num_devices: int) -> list[float]:
    """Losses of a few steps of the real step on the first `num_devices` devices."""
    model, mesh = source.find(config), sharding.make_mesh(config, jax.devices()[:num_devices])
    program = state.abstract(config, model.hf_config, mesh, config.train.steps)
    current, frozen = start.load(config, model, program, None, silent)
    run, data = step.make(config, program), batches(config)[0]
    found = []
    for number in range(NUM_STEPS):
        batch = {name: data[number][name] for name in step.fields(config, program)}
        current, metrics = run(current, frozen, sharding.to_global(batch, mesh, config.train.batch_size))
        found.append(float(metrics["loss"]))
    return found


def laid_out(config: ConfigDict, **mesh: int) -> ConfigDict:
    for axis, size in mesh.items():
        config.mesh[axis] = size
    return config


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {}


LAYOUTS = {
    "accumulated": (1, {}, 8),
    "accumulated by 2 on fsdp 4": (4, {"fsdp": 4}, 2),
    "fsdp 8": (8, {"fsdp": 8}, 1),
    "fsdp 4 x tensor 2": (8, {"fsdp": 4, "tensor": 2}, 1),
    "data 2 x fsdp 2 x tensor 2": (8, {"data": 2, "fsdp": 2, "tensor": 2}, 1),
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(
    tiny_config: ConfigDict, reference: dict[str, list[float]], layout: str, method: str
) -> None:
    tiny_config.tune.method = method
    if method not in reference:
        reference[method] = losses(laid_out(tiny_config.copy_and_resolve_references(), fsdp=1), 1)
    num_devices, mesh, accumulation = LAYOUTS[layout]
    config = laid_out(tiny_config, **{"fsdp": 1, **mesh})
    config.train.accumulation = accumulation
    found = losses(config, num_devices)
    assert reference[method][0] - reference[method][-1] > 0.01  # the weights did move
    np.testing.assert_allclose(found, reference[method], atol=1e-5, rtol=0)


LEAN = {
    "blocks of tokens": {"mlp_block_tokens": 16},
    "attention and its inputs saved": {"save": ("attention", "qkv", "mixed", "mlp")},
    "block inputs offloaded": {"offload": ("block_input",), "mlp_block_tokens": 32},
}


@pytest.mark.parametrize("lean", LEAN)
def test_memory_saved_changes_nothing(tiny_config: ConfigDict, reference: dict[str, list[float]], lean: str) -> None:
    if "lora" not in reference:
        reference["lora"] = losses(laid_out(tiny_config.copy_and_resolve_references(), fsdp=1), 1)
    tiny_config.train.update(LEAN[lean])
    found = losses(laid_out(tiny_config, fsdp=4), 4)
    np.testing.assert_allclose(found, reference["lora"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("fsdp", "length", "spread"), [(1, 64, False), (8, 64, True), (8, 65536, False)])
def test_the_head_is_spread_while_hidden_states_are_few(
    tiny_config: ConfigDict, fsdp: int, length: int, spread: bool
) -> None:
    tiny_config.data.max_length = length
    mesh = sharding.make_mesh(laid_out(tiny_config, fsdp=fsdp), jax.devices()[:fsdp])
    program = state.abstract(tiny_config, source.find(tiny_config).hf_config, mesh, 1)
    assert program.run.spread_head == spread


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_weights_may_be_stored_in_bfloat16(tiny_config: ConfigDict, method: str) -> None:
    config = laid_out(tiny_config, fsdp=1)
    config.tune.dtype, config.tune.method = "bfloat16", method
    program = state.abstract(config, source.find(config).hf_config, sharding.make_mesh(config, jax.devices()[:1]), 2)
    batch = step.abstract_batch(config, program)
    after, _ = jax.eval_shape(step.make(config, program), program.state, program.frozen, batch)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, program.state)


def test_dropout_does_not_depend_on_the_mesh(tiny_config: ConfigDict) -> None:
    tiny_config.tune.dropout = 0.3
    one = losses(laid_out(tiny_config.copy_and_resolve_references(), fsdp=1), 1)
    np.testing.assert_allclose(losses(laid_out(tiny_config, fsdp=4, tensor=2), 8), one, atol=1e-5, rtol=0)
    tiny_config.tune.dropout = 0.0
    without = losses(tiny_config, 8)
    assert abs(without[-1] - one[-1]) > 1e-4


def test_packed_is_unpacked_per_row(tiny_config: ConfigDict) -> None:
    """Each row's own loss, packed with strangers or alone in a batch row, is the same."""
    model, mesh = source.find(tiny_config), sharding.make_mesh(laid_out(tiny_config, fsdp=1), jax.devices()[:1])
    program = state.abstract(tiny_config, model.hf_config, mesh, 1)
    current, frozen = start.load(tiny_config, model, program, None, silent)

    @jax.jit
    def nll(batch):
        policy = step.policy(program, {**frozen, **current.params}, 64)
        return ops.token_nll(policy.head, policy.hidden(batch, None), batch["targets_BT"]) * batch["weights_BT"]

    def per_row(packing: bool) -> np.ndarray:
        tiny_config.data.packing = packing
        data, rows = batches(tiny_config)
        sums = np.zeros(len(rows))
        for number in range(-(-data.num_bins // tiny_config.train.batch_size)):
            batch = data[number]
            values = np.asarray(nll({name: batch[name] for name in step.fields(tiny_config, program)}))
            seen = batch["row_ids_BT"] >= 0
            first = number * tiny_config.train.batch_size
            real = np.arange(first, first + len(values)) < data.num_bins  # the last batch wraps into the next epoch
            seen &= real[:, None]
            np.add.at(sums, batch["row_ids_BT"][seen], values[seen])
        return sums

    packed, alone = per_row(True), per_row(False)
    assert (alone > 0).all()
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_a_skipped_step_moves_neither_rate_nor_mean(tiny_config: ConfigDict) -> None:
    """The first two steps are broken: the third is as the first of a run without them."""
    config = laid_out(tiny_config, fsdp=1)
    config.optim.schedule, config.optim.warmup_steps, config.train.steps = "linear", 2, 4
    model, mesh = source.find(config), sharding.make_mesh(config, jax.devices()[:1])
    program = state.abstract(config, model.hf_config, mesh, config.train.steps)
    current, frozen = start.load(config, model, program, None, silent)
    run, batch = step.make(config, program), batches(config)[0][0]
    arrays = sharding.to_global(
        {name: batch[name] for name in step.fields(config, program)}, mesh, config.train.batch_size
    )
    found = []
    for base in (
        {name: value * np.nan if name == "norm.scale" else value for name, value in frozen.items()},
        frozen,
        frozen,
    ):
        current, metrics = run(current, base, arrays)
        found.append((bool(metrics["ok"]), float(metrics["learning_rate"]), float(current.loss_mean)))
    rate = config.optim.learning_rate
    assert [ok for ok, _, _ in found] == [False, True, True]
    np.testing.assert_allclose([r for _, r, _ in found], [0, 0, rate / 2], rtol=1e-6)
    assert found[0][2] == 0
    assert found[1][2] == float(metrics["loss"]), (
        "a rate of 0 changes nothing, so this is the first good step's loss too"
    )


def test_sgd_decays_matrices(tiny_config: ConfigDict) -> None:
    tiny_config.optim.name, tiny_config.optim.weight_decay, tiny_config.optim.clip_norm = "sgd", 0.5, 0.0
    tiny_config.optim.schedule, tiny_config.optim.warmup_steps = "constant", 0
    params = {"a.kernel": np.ones((2, 2), "f"), "a.bias": np.ones(2, "f")}
    made = optim.make(tiny_config, dict.fromkeys(params, "full"), 9)
    updates, _ = made.update(jax.tree.map(np.zeros_like, params), made.init(params), params)
    rate = tiny_config.optim.learning_rate
    np.testing.assert_allclose(updates["a.kernel"], -rate * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["a.bias"], 0)


# ---- runs as processes ----


def write_config(config: ConfigDict, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(config_lib.to_json(config))
    return path


def launched(
    path: Path, workdir: Path, *flags: str, devices: int = 1, entry: Sequence[str] = ("-m", "jaxtune.launch")
) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, *entry, f"--config={path}", f"--workdir={workdir}", *flags]
    # Tests that run in the background ignore Ctrl-C, and a process that they start would do as they do.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        signal.signal(signal.SIGINT, previous)


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def logged(workdir: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


@pytest.fixture
def long_run(tiny_config: ConfigDict, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A run of 40 steps with dropout, shuffling, validation and a checkpoint after every step."""
    config = laid_out(tiny_config, fsdp=1)
    config.train.steps, config.tune.dropout, config.checkpoint.every_steps = 40, 0.1, 1
    config.data.validation_fraction, config.train.eval_every_steps = 0.2, 7
    path = write_config(config, tmp_path)
    return lambda name: (path, tmp_path / name)


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(long_run: Callable[[str], tuple[Path, Path]]) -> None:
    """SIGKILL at random moments, while saving too: every loss to the bit, and the adapter's every byte."""
    path, whole = long_run("whole")
    finished(launched(path, whole))
    _, broken = long_run("broken")
    rng, kills = random.Random(0), 0
    while True:
        before = len(logged(broken)) if (broken / "metrics.jsonl").exists() else 0
        process = launched(path, broken, "--config.checkpoint.resume=True")
        target = before + rng.randint(3, 10)
        while process.poll() is None and kills < 3:
            done = (broken / "metrics.jsonl").read_text().count('"loss"') if (broken / "metrics.jsonl").exists() else 0
            if done >= target:
                time.sleep(rng.random() * 0.05)  # anywhere within a step or its save
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        output, _ = process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, output
            break
    assert kills == 3
    assert logged(broken) == logged(whole)
    assert logged(broken, "eval/loss") == logged(whole, "eval/loss")
    assert logged(broken, "trained_tokens") == logged(whole, "trained_tokens")
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_and_ask_to_be_resumed(
    long_run: Callable[[str], tuple[Path, Path]], number: signal.Signals
) -> None:
    path, workdir = long_run(number.name)
    process = launched(path, workdir, "--config.checkpoint.every_steps=0", "--config.train.eval_every_steps=0")
    while not (workdir / "metrics.jsonl").exists() or '"loss"' not in (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "resume" in output
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [len(logged(workdir))]


# Orbax reads with many coroutines at once; the first that fails leaves the others unawaited in a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", ["overwritten", "cut short"])
def test_a_damaged_newest_checkpoint_falls_back(
    tiny_config: ConfigDict, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    from jaxtune import checkpoint, run

    config = laid_out(tiny_config)
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 3
    run.train(config, Path(config.workdir))
    folder = Path(config.workdir) / "checkpoints"
    assert sorted(int(p.name) for p in folder.iterdir()) == [2, 4, 6]
    for file in (folder / "6" / "state").rglob("d/*"):  # the arrays' values
        data = bytearray(file.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64) if damage == "overwritten" else b""
        file.write_bytes(data)
    program, _ = start.program(config, source.find(config))
    with checkpoint.Checkpoints(config.workdir, config) as checkpoints:
        restored = checkpoints.restore(program.state)
    assert restored is not None
    assert restored.step == 4
    assert "is damaged" in capfd.readouterr().err


def test_a_checkpoint_restores_on_another_mesh(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Saved on fsdp 8, restored on tensor 2 x fsdp 2 x context 2, saved there, restored on one device: every bit of the state."""
    from jaxtune import checkpoint, run

    run.train(laid_out(tiny_config, fsdp=8, tensor=1), Path(tiny_config.workdir))
    config = tiny_config.copy_and_resolve_references()

    def restored(workdir: Path | str, devices: int, **mesh: int) -> checkpoint.Restored:
        made = sharding.make_mesh(laid_out(config, **mesh), jax.devices()[:devices])
        program = state.abstract(config, hf.read_config(Path(config.model.source)), made, 6)
        with checkpoint.Checkpoints(str(workdir), config) as checkpoints:
            found = checkpoints.restore(program.state)
        assert found is not None
        return found

    def values(found: checkpoint.Restored) -> list[np.ndarray]:
        kept = found.state._replace(key=jax.random.key_data(found.state.key))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(kept)]

    first = restored(config.workdir, 8, fsdp=8)
    second = restored(config.workdir, 8, fsdp=2, tensor=2, context=2)
    with checkpoint.Checkpoints(str(tmp_path / "second"), config) as checkpoints:
        checkpoints.save(6, second.state, second.progress)
        checkpoints.wait()
    last = restored(tmp_path / "second", 1, fsdp=1, tensor=1, context=1)
    for one, two, three in zip(values(first), values(second), values(last), strict=True):
        assert (one == two).all()
        assert (one == three).all()
