"""Several processes are one run: the same losses, each with its own rows and shards; and none outlives another."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import hosts, launch, run, sharding
from jaxtune.weights import hf
from tests.train.test_exactness import finished, launched, logged, write_config

STEPS, HEARTBEAT_SECONDS = 12, 60
SHORT_SECONDS = 30  # where a process is lost: what the others wait; a machine that stalls for 70 s fails the test


class Runs(NamedTuple):
    config: ConfigDict
    path: Path
    folder: Path


@pytest.fixture(scope="module")
def runs(
    tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory, quick_compile: None
) -> Iterator[Runs]:
    """A config of fsdp 2 x context 2, with dropout, packing and validation, and where its runs go."""
    config, folder = config_lib.base(), tmp_path_factory.mktemp("hosts")
    config.model.source, config.data.train = str(tiny_model), str(chats)
    config.data.max_length, config.train.batch_size, config.train.steps, config.train.loss_chunk_tokens = (
        64,
        8,
        STEPS,
        64,
    )
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.1, 1e-2
    config.tracking.progress, config.tracking.report, config.eval.before_after = "off", False, False
    config.data.validation_fraction, config.train.eval_every_steps = 0.2, 6
    config.mesh.fsdp, config.mesh.context, config.mesh.heartbeat_seconds = 2, 2, HEARTBEAT_SECONDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the processes too
        yield Runs(config, write_config(config, folder), folder)


def together(
    runs: Runs, name: str, num: int, *flags: str, entry: Sequence[str] = ("-m", "jaxtune.launch")
) -> list[subprocess.Popen]:
    """`num` processes, of four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (*flags, f"--coordinator=127.0.0.1:{port}", f"--num_processes={num}")
    return [
        launched(runs.path, runs.folder / name, *flags, f"--process_id={i}", devices=4 // num, entry=entry)
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def of_two(runs: Runs) -> list[str]:
    """What each of two processes printed, of a run that nothing disturbs."""
    entry = (str(Path(__file__).parent / "counted_launch.py"),)
    return [finished(process) for process in together(runs, "two", 2, entry=entry)]


def test_one_two_and_four_processes_are_one_run(runs: Runs, of_two: list[str]) -> None:
    for process in together(runs, "four", 4):
        finished(process)
    alone = runs.config.copy_and_resolve_references()
    alone.workdir, alone.mesh.fsdp, alone.mesh.context = str(runs.folder / "one"), 4, 2
    run.train(alone, runs.folder / "one")
    one, two, four = (logged(runs.folder / name) for name in ("one", "two", "four"))
    assert list(one) == list(range(STEPS))
    assert one[0] - one[STEPS - 1] > 0.1
    evals = [list(logged(runs.folder / name, "eval/loss").values()) for name in ("one", "two", "four")]
    for losses, measured in ((two, evals[1]), (four, evals[2])):
        np.testing.assert_allclose(list(losses.values()), list(one.values()), atol=1e-5, rtol=0)
        np.testing.assert_allclose(measured, evals[0], atol=1e-5, rtol=0)
    expected, *others = (tensors(runs.folder / name) for name in ("one", "two", "four"))
    for other in others:
        assert other.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(other[name], value, atol=1e-4)  # twelve steps of AdamW at 1e-2


def tensors(workdir: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(workdir / "adapter" / "adapter_model.safetensors")


def test_each_host_reads_its_shards_of_the_weights_once(runs: Runs, of_two: list[str]) -> None:
    source = hf.Folder(Path(runs.config.model.source))
    sizes = {name: 4 * int(np.prod(source.shape(name))) for name in source.names()}
    vectors = sum(size for name, size in sizes.items() if len(source.shape(name)) == 1)
    matrices = sum(sizes.values()) - vectors
    for output in of_two:
        found = int(re.search(r"read (\d+) bytes of weights", output)[1])  # type: ignore[index]
        assert found == matrices // 2 + vectors


def test_a_checkpoint_of_two_processes_is_read_by_one(runs: Runs, of_two: list[str]) -> None:
    from jaxtune import checkpoint
    from jaxtune.train import state

    settings = hf.read_config(Path(runs.config.model.source))
    config = runs.config.copy_and_resolve_references()
    config.mesh.fsdp, config.mesh.context = 1, 1
    program = state.abstract(config, settings, sharding.make_mesh(config, jax.devices()[:1]), STEPS)
    with checkpoint.Checkpoints(str(runs.folder / "two"), config) as checkpoints:
        restored = checkpoints.restore(program.state)
    assert restored is not None
    assert restored.step == STEPS
    written = tensors(runs.folder / "two")
    for name, value in written.items():
        layer, linear, kind = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.(lora_[AB])", name).groups()  # type: ignore[union-attr]
        path = next(p for p in restored.state.params if f".{linear}.adapter." in p and p.endswith(kind.lower()))
        assert (value == np.asarray(restored.state.params[path])[int(layer)].T).all()


def test_a_broken_collective_waits_for_the_watch_to_say_who_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective of a CPU ends in an error at once when the other end is gone; the watch, which names it, needs its time."""
    done: list[object] = []
    watch = SimpleNamespace(join=lambda seconds=None: done.append(seconds))
    monkeypatch.setattr(hosts, "_looking", watch)
    monkeypatch.setattr(hosts, "_pause_seconds", 6.0)
    monkeypatch.setattr(hosts, "leave", lambda code: done.append("left"))
    for error, waited in ((jax.errors.JaxRuntimeError("Gloo AllGather failed"), [78.0]), (KeyError("ours"), [])):
        monkeypatch.setattr(launch, "_run", Mock(side_effect=error))
        done.clear()
        with pytest.raises(type(error)):
            launch.main(["train"])
        assert done == [*waited, "left"]  # within 10 looks a process is found to be silent


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_others_and_the_restart_goes_on_exactly(
    runs: Runs, of_two: list[str], lost: int
) -> None:
    """SIGKILL in mid-training; process 0 also keeps the service by which the others find each other."""
    name, heartbeat = f"without {lost}", f"--config.mesh.heartbeat_seconds={SHORT_SECONDS}"
    processes = together(
        runs, name, 2, heartbeat, "--config.checkpoint.every_steps=1", "--config.checkpoint.resume=True"
    )
    metrics = runs.folder / name / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < 4:
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.02)
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, _ = processes[1 - lost].communicate(timeout=300)
    assert time.monotonic() - killed < 10 * SHORT_SECONDS
    processes[lost].communicate()
    assert processes[1 - lost].returncode == 75, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert re.search(rf"error: process {lost}\b.* was lost.* --config.checkpoint.resume=True", lines[0])
    if lost == 0:
        return  # what goes on is the same
    for process in together(runs, name, 2, "--config.checkpoint.resume=True"):
        finished(process)
    assert logged(runs.folder / name) == logged(runs.folder / "two")
    assert logged(runs.folder / name, "eval/loss") == logged(runs.folder / "two", "eval/loss")
