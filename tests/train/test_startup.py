"""Start-up and the account of time: the step compiles beside the weights, programs are kept, every second has one cause."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, tracking, validation
from jaxtune.train import compiled, goodput, loop, profiling
from jaxtune.types import UserError
from tests.train.test_exactness import finished, launched, write_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# ---- the account ----


def test_every_lap_has_one_cause_and_they_add_up() -> None:
    began = time.perf_counter() - 5.0
    wall = goodput.Wall(began)
    with wall("load"):
        time.sleep(0.02)
    wall.lap(goodput.STEP)
    wall.redone_before = 1
    wall.count(0, ok=True)
    for step, ok in ((1, True), (2, False)):
        time.sleep(0.01)
        wall.lap(goodput.STEP)
        wall.count(step, ok)
    wall.lap("data")
    found = wall.account()
    assert found["start"] >= 5.0
    assert found["load"] >= 0.02
    assert set(found) >= {"training", "skipped", "redone", "data"}
    assert goodput.STEP not in found
    assert sum(found.values()) == pytest.approx(wall._at - began)
    metrics = wall.metrics()
    assert metrics["goodput/share"] == pytest.approx(
        metrics["goodput/training_seconds"] / metrics["goodput/wall_seconds"]
    )


def test_a_process_knows_when_it_began() -> None:
    code = "import time; time.sleep(0.2); from jaxtune.train import goodput as g; print(time.perf_counter() - g.process_began())"
    before = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.2 <= age <= time.perf_counter() - before + 0.05


def test_utilisation_is_told_only_where_it_is_known() -> None:
    assert loop.Flops(6e12, 1e13).utilisation(2.0) == {"mfu": pytest.approx(0.3)}
    assert loop.Flops(6e12, None).utilisation(2.0) == loop.Flops().utilisation(2.0) == {}


def test_a_run_accounts_for_its_time_and_for_steps_taken_twice(
    tiny_config: ConfigDict, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, workdir = tiny_config, Path(tiny_config.workdir)
    config.checkpoint.every_steps, config.checkpoint.keep, config.tracking.report = 1, 9, True
    config.tracking.progress = "lines"
    run.train(config.copy_and_resolve_references(), workdir, time.perf_counter() - 1.0)
    said, first = capsys.readouterr().err, lines(workdir)
    assert "first step done after" in said
    started = next(line for line in first if "start/whole_seconds" in line)
    assert started["step"] == 0
    assert started["start/start_seconds"] >= 1.0
    told = first[-1]
    assert told["step"] == 5
    assert "goodput/redone_seconds" not in told
    report = json.loads((workdir / "report.json").read_text())
    for account in ({k: v for k, v in told.items() if k.endswith("_seconds") and "wall" not in k}, report["wall"]):
        assert sum(account.values()) == pytest.approx(told["goodput/wall_seconds"], rel=0.2)
        assert min(account.values()) >= 0
    assert {"training", "load", "checkpoint", "export", "start"} <= set(report["wall"])
    page = (workdir / "report.html").read_text()
    assert "Time to the first step" in page
    assert "Goodput" in page

    for step in (4, 5, 6):  # as if it had been killed in step 3's save
        shutil.rmtree(workdir / "checkpoints" / str(step))
    config.checkpoint.resume, config.tracking.report = True, False
    run.train(config, workdir)
    again = lines(workdir)
    losses = [{line["step"]: line["loss"] for line in some if "loss" in line} for some in (first, again)]
    assert losses[0] == losses[1]
    assert again[-1]["goodput/redone_seconds"] > 0
    assert again[-1]["goodput/training_seconds"] == 0, "all that it did had been done"


def test_steps_are_traced(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """In a process of its own: XLA's profiler brings down one that has described a TPU, as the tests of plan do."""
    config, workdir = tiny_config, tmp_path / "traced"
    config.tracking.profile_steps, config.tracking.profile_start_step = 2, 3
    config.tracking.progress, config.tracking.report = "lines", True
    said = finished(launched(write_config(config, tmp_path), workdir))
    assert f"steps 3 to 4 traced in {workdir}/profile; to look at it: pip install xprof && xprof" in said
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert json.loads((workdir / "report.json").read_text())["wall"]["profile"] > 0
    assert lines(workdir)[-1]["goodput/profile_seconds"] > 0


# ---- compiling ----


def test_a_compile_that_fails_ends_loading_and_says_why(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, seen = threading.Event(), []

    def make(*_: object) -> None:
        failed.set()
        raise RuntimeError("XLA would not")

    monkeypatch.setattr(compiled.step_lib, "make", make)

    def progress(items, total, label, **_):
        for item in items:
            assert failed.wait(60)
            time.sleep(0.01)
            seen.append(item)
            yield item

    monkeypatch.setattr(tracking, "progress", lambda items, total, label, **_: progress(items, total, label) if "weights" in label else iter(items))  # fmt: skip
    with pytest.raises(RuntimeError, match="XLA would not"):
        run.train(tiny_config, Path(tiny_config.workdir))
    assert len(seen) < 4, "the weights were read on, in vain"


def jitted(scale: float):
    def scaled(x):
        return jnp.sin(x) * scale

    return jax.jit(scaled)


def test_programs_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH_KEEPING_SECONDS", 0.0)
    config, shape = config_lib.base(), jax.ShapeDtypeStruct((7,), jnp.float32)
    before = dict(jax.config.values)
    x, found = jnp.arange(7, dtype=jnp.float32), []
    for place in ("off", str(tmp_path / "kept"), str(tmp_path / "kept")):
        config.compile_cache = place
        with compiled.kept(config):
            found.append(compiled._timed(jitted(3.0), shape))
    assert [one.from_cache for one in found] == [False, False, True]
    assert len({np.asarray(one.run(x)).tobytes() for one in found}) == 1
    assert any((tmp_path / "kept").rglob("*-cache"))
    assert dict(jax.config.values) == before


def test_a_folder_told_to_jax_wins_and_one_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    config = config_lib.base()
    told = jax.config.values["jax_compilation_cache_dir"]  # by these tests
    with compiled.kept(config):
        assert jax.config.values["jax_compilation_cache_dir"] == told
    (tmp_path / "file").touch()
    config.compile_cache = str(tmp_path / "file")
    with pytest.raises(UserError, match=r"compile_cache='.*file': cannot write there"), compiled.kept(config):
        pass


# ---- the trace ----


def test_steps_that_the_run_does_not_take_are_not_traced() -> None:
    config = config_lib.base()
    config.data.train, config.tracking.profile_steps, config.train.steps = "x.jsonl", 3, 7
    with pytest.raises(UserError, match="the run has 7 steps, 0 to 6; set tracking.profile_start_step=4 or less"):
        validation.validate(config)
    config.train.steps = 0  # as many as epochs need: not known yet
    validation.validate(config)
    config.train.steps = 2
    with pytest.raises(UserError, match="profile_start_step=0 and tracking.profile_steps=2 or less"):
        validation.validate(config)
    config.tracking.profile_steps = 1000
    with pytest.raises(UserError, match="profile_steps is 1000; expected 0 to 100"):
        validation.validate(config)


def test_a_resumed_run_traces_what_is_still_to_come(tiny_config: ConfigDict) -> None:
    config, said = tiny_config, []
    config.tracking.profile_steps, config.tracking.profile_start_step = 3, 4
    profile = profiling.Profile(config, Path(config.workdir), said.append, first=6)
    assert [step for step in range(6, 9) if profile.is_due(step)] == [6]
    assert not said
    profile = profiling.Profile(config, Path(config.workdir), said.append, first=7)
    assert not any(profile.is_due(step) for step in range(7, 20))
    assert said == ["steps 4 to 6 were taken before this run went on at step 7: nothing is traced"]
