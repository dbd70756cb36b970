"""The sweep: every combination once, in a folder of its own; failures and interruptions cost nothing but themselves."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import launch, sweep, validation
from jaxtune.train.loop import Preempted
from jaxtune.types import UserError

GRID = (("optim.learning_rate", (1e-4, 1e-3, 1e-2)), ("tune.rank", (2, 4)))


class Fake:
    """Starts runs that end at once: the loss falls with the rate; rank 4 at 1e-3 fails; `stop` is stopped once."""

    def __init__(self, stop: str = ""):
        self.started: list[str] = []
        self.resumed: list[str] = []
        self.stop = stop

    def __call__(self, config: Path, workdir: Path, resume: bool, log: Path) -> int:
        self.started.append(workdir.name)
        self.resumed += [workdir.name] if resume else []
        given = config_lib.from_json(config.read_text())
        workdir.mkdir(parents=True, exist_ok=True)
        rate, rank = given.optim.learning_rate, given.tune.rank
        lines = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0, "eval/loss": 2 - rate * 100 + rank / 100}]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if workdir.name == self.stop:
            self.stop = ""
            return 75
        if (rate, rank) == (1e-3, 4):
            log.write_text("some words\nerror: out of device memory\n")
            return 2
        return 0


def test_a_grid_is_trained_whole_and_compared(tiny_config: ConfigDict, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config.sweep.axes, workdir = GRID, Path(tiny_config.workdir)
    fake = Fake()
    sweep.sweep(tiny_config, workdir, fake)
    assert fake.started == [
        f"learning_rate={rate},rank={rank}" for rate in ("0.0001", "0.001", "0.01") for rank in (2, 4)
    ]
    told = json.loads((workdir / "sweep.json").read_text())["runs"]
    assert [(row["values"]["optim.learning_rate"], row["values"]["tune.rank"]) for row in told] == [
        (1e-2, 2), (1e-2, 4), (1e-3, 2), (1e-4, 2), (1e-4, 4), (1e-3, 4)
    ]  # fmt: skip
    assert (told[-1]["status"], told[-1]["error"]) == ("failed", "error: out of device memory")
    with (workdir / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[0]["tune.rank"] == "2"
    assert float(table[0]["eval/loss"]) == pytest.approx(1.02)
    assert table[-1]["eval/loss"] == ""
    assert (workdir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "best: learning_rate=0.01,rank=2" in out
    assert "failed: learning_rate=0.001,rank=4: error: out of device memory" in out
    again = Fake()
    sweep.sweep(tiny_config, workdir, again)
    assert again.started == ["learning_rate=0.001,rank=4"]  # what failed is tried again, and nothing else
    assert json.loads((workdir / "sweep.json").read_text())["runs"][:-1] == told[:-1]


def test_a_stopped_sweep_goes_on(tiny_config: ConfigDict) -> None:
    tiny_config.sweep.axes, workdir = GRID, Path(tiny_config.workdir)
    stopped = "learning_rate=0.0001,rank=4"
    fake = Fake(stopped)
    with pytest.raises(Preempted, match="run 2 of 6"):
        sweep.sweep(tiny_config, workdir, fake)
    sweep.sweep(tiny_config, workdir, fake)
    assert fake.started.count(stopped) == 2
    assert fake.resumed == [stopped]
    assert len(fake.started) == 7
    tiny_config.train.steps = 9
    with pytest.raises(UserError, match="another config"):
        sweep.sweep(tiny_config, workdir, fake)


def test_random_choices_are_the_seeds(tiny_config: ConfigDict) -> None:
    options = tiny_config.sweep
    options.axes = (
        ("optim.learning_rate", ("log", 1e-5, 1e-1)),
        ("tune.rank", ("linear", 1, 9)),
        ("optim.name", ("lion", "sgd")),
    )
    options.method, options.num_runs = "random", 24
    validation.validate(tiny_config)

    def values(seed: int) -> list[dict[str, Any]]:
        options.seed = seed
        return [run.values for run in sweep.combinations(tiny_config, Path("w"))]

    found = values(0)
    assert found == values(0) != values(1)
    rates = sorted(one["optim.learning_rate"] for one in found)
    assert 1e-5 <= rates[0] < 1e-4 < 1e-2 < rates[-1] <= 1e-1
    assert 3e-4 < rates[len(rates) // 2] < 5e-3  # the middle of the logarithm, not of the range
    assert {one["tune.rank"] for one in found} <= set(range(1, 10))
    assert len({one["tune.rank"] for one in found}) > 4
    assert {one["optim.name"] for one in found} == {"lion", "sgd"}


def test_runs_are_compared_by_their_rewards(tiny_config: ConfigDict, tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 0.0} | ({"reward": i / 20} if i % 2 == 0 else {}) for i in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweep.measured(tmp_path, "max", "reward") == {"loss": 0.0, "reward": pytest.approx(0.9)}
    tiny_config.train.objective, tiny_config.reward.functions = "grpo", (("length", 1.0),)
    tiny_config.rl.update({"prompts_per_round": 2, "group_size": 4, "max_prompt_length": 20, "max_new_tokens": 12})
    tiny_config.sweep.axes = (("optim.learning_rate", (1e-4, 1e-3)),)
    with pytest.raises(
        UserError, match=r"sweep\.metric='eval/loss': .*'grpo' has no validation loss; set sweep\.metric='reward'"
    ):
        sweep.combinations(tiny_config, tmp_path)
    tiny_config.sweep.metric = "reward"
    assert len(sweep.combinations(tiny_config, tmp_path)) == 2


@pytest.mark.parametrize("method", ["grid", "random"])
def test_words_that_begin_as_a_range_are_words(tiny_config: ConfigDict, method: str) -> None:
    words = ("linear", "cosine")
    tiny_config.sweep.update({"axes": (("optim.schedule", words),), "method": method, "num_runs": 8})
    validation.validate(tiny_config)
    runs = sweep.combinations(tiny_config, Path(tiny_config.workdir))
    assert sorted(run.config.optim.schedule for run in runs) == sorted(words)


@pytest.mark.parametrize(
    ("axes", "more", "says"),
    [
        ((), {}, "needs config.sweep.axes"),
        ((("optim.name", ("lion", "loin")),), {}, "run name=loin of the sweep: .*did you mean 'lion'"),
        ((("tune.rank", (2, "four")),), {}, "tune.rank takes a int"),
        ((("workdir", ("a", "b")),), {}, "'workdir' does not exist, or is the sweep's own"),
        ((("tune.rank", (2, 2)),), {}, "makes 'rank=2' twice"),
        ((("optim.lerning_rate", (1,)),), {}, "did you mean 'optim.learning_rate'"),
        ((("optim.learning_rate", ("log", 1e-4, 1e-3)),), {}, "a range"),
        ((("optim.learning_rate", ("log", 0, 1e-3)),), {"method": "random", "num_runs": 3}, "low above 0"),
        ((("optim.learning_rate", (1e-4,)),), {"method": "random"}, "set sweep.num_runs"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_begins(
    tiny_config: ConfigDict, axes: Any, more: dict[str, Any], says: str
) -> None:
    tiny_config.sweep.update({"axes": axes, **more})

    def refused() -> None:
        validation.validate(tiny_config)
        sweep.sweep(tiny_config, Path(tiny_config.workdir), Fake())

    with pytest.raises(UserError, match=says):
        refused()
    assert not Path(tiny_config.workdir).exists()


def test_real_runs_in_processes_of_their_own(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: one run trains, the other's model is not there."""
    tiny_config.train.steps, tiny_config.data.validation_fraction, tiny_config.sweep.metric = 2, 0.0, "loss"
    tiny_config.sweep.axes = (("model.source", (tiny_config.model.source, str(tmp_path / "nowhere"))),)
    path, workdir = tmp_path / "config.json", tmp_path / "sweep"
    path.write_text(config_lib.to_json(tiny_config))
    assert launch.main(["sweep", f"--config={path}", f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    good, bad = json.loads((workdir / "sweep.json").read_text())["runs"]
    assert (good["status"], bad["status"]) == ("done", "failed")
    assert "nowhere" in bad["error"]
    assert good["metrics"]["loss"] > 0
    assert (workdir / "runs" / good["name"] / "adapter" / "adapter_model.safetensors").exists()
    assert re.search(r"failed: .*nowhere", out)
