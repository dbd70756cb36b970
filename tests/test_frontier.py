"""The frontier: every method at every strength once, gain against what it cost, the pick's config written."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import frontier, launch, pictures, validation
from jaxtune.train.loop import Preempted
from jaxtune.types import UserError

RATES = ("plain", (), ("optim.learning_rate", (1e-4, 1e-3, 1e-2)))
REPLAY = ("low_rank", (("tune.alpha", 8.0),), ("tune.rank", (2, 4)))
SHARES = ("wise_ft", (), ("merge.sweep", (0.25, 0.5)))
WIKI = ("wiki", (("data.test", "rows.jsonl"), ("tolerance", 0.02)))


@pytest.fixture
def config(tiny_config: ConfigDict) -> ConfigDict:
    tiny_config.frontier.methods, tiny_config.protect.sets = (RATES, REPLAY, SHARES), (WIKI,)
    tiny_config.tracking.report = True
    return tiny_config


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a comparison's time."""
    monkeypatch.setattr(pictures, "clouds", lambda *_: False)


def report(gain: float, cost: float, kl: float) -> dict[str, Any]:
    """As a run's report.json has it: accuracy rises by `gain`, bits per byte of 0.8 by `cost`."""

    def gap(value: float, higher: bool) -> dict[str, Any]:
        return {
            "value": value,
            "low": value - 0.02,
            "high": value + 0.02,
            "p": 0.01,
            "test": "t",
            "higher_is_better": higher,
        }

    wiki = {
        "metric": "bits_per_byte", "higher_is_better": False, "tolerance": 0.02, "before": {"bits_per_byte": {"value": 0.8}},
        "after": {"bits_per_byte": {"value": 0.8 + cost}}, "difference": {"bits_per_byte": gap(cost, False)}, "broken": cost > 0.02,
    }  # fmt: skip
    return {
        "metric": "accuracy",
        "difference": {"accuracy": gap(gain, True)},
        "protected": {"wiki": wiki},
        "base_kl": kl,
    }


class Fake:
    """Ends at once: gain and cost grow with the rate; rank 4 fails; `stop` is stopped once."""

    def __init__(self, stop: str = ""):
        self.started: list[str] = []
        self.environments: list[dict[str, str]] = []
        self.known: list[bool] = []
        self.stop, self.lock = stop, threading.Lock()

    def __call__(
        self, config: Path, workdir: Path, resume: bool, log: Path, verb: str = "train", environment: Any = None, started: Any = None
    ) -> int:  # fmt: skip
        given = config_lib.from_json(config.read_text())
        validation.validate(given)
        with self.lock:
            self.started.append(f"{verb} {workdir.name}")
            self.environments.append(dict(environment or {}))
            self.known.append(resume and (workdir / "before.json").exists())
        workdir.mkdir(parents=True, exist_ok=True)
        if workdir.name == self.stop:
            self.stop = ""
            return 75
        if verb == "merge":
            assert Path(given.merge.adapters[0][0]).parent.name == "plain,learning_rate=0.01"
            shares = [{"share": s, **report(0.4 * s, 0.08 * s**2, s)} for s in given.merge.sweep]
            (workdir / "merge.json").write_text(json.dumps({"shares": shares}))
            return 0
        if given.tune.rank == 4 and given.tune.alpha == 8.0:
            log.write_text("words\nerror: out of device memory\n")
            return 2
        rate = given.optim.learning_rate
        low = given.tune.alpha == 8.0
        told = report(0.05, 0.06, 0.6) if low else report({1e-4: 0.1, 1e-3: 0.2, 1e-2: 0.4}[rate], rate * 8, rate * 100)
        (workdir / "report.json").write_text(json.dumps(told))
        (workdir / "before.json").write_text("{}")
        return 0


def test_runs_are_compared_and_the_pick_is_written(config: ConfigDict, capsys: pytest.CaptureFixture[str]) -> None:
    workdir, fake = Path(config.workdir), Fake()
    frontier.frontier(config, workdir, fake)
    assert fake.started == [
        "train plain,learning_rate=0.0001", "train plain,learning_rate=0.001", "train plain,learning_rate=0.01",
        "train low_rank,rank=2", "train low_rank,rank=4", "merge wise_ft",
    ]  # fmt: skip
    assert fake.known == [False, True, True, True, True, False]  # what was measured before is measured once
    told = json.loads((workdir / "frontier.json").read_text())
    points = {one["name"]: one for one in told["points"]}
    assert points.keys() == {
        "plain,learning_rate=0.0001", "plain,learning_rate=0.001", "plain,learning_rate=0.01", "low_rank,rank=2",
        "wise_ft,share=0.25", "wise_ft,share=0.5",
    }  # fmt: skip
    assert points["low_rank,rank=2"]["dominated"]  # 0.05 for 0.06, and a rate of 1e-4 has 0.1 for 0.0008
    assert not points["plain,learning_rate=0.01"]["dominated"]  # nobody gains as much
    assert points["plain,learning_rate=0.01"]["broken"] == ["wiki"]
    assert points["wise_ft,share=0.5"]["retention"]["value"] == pytest.approx(-0.02 / 0.8)
    # 0.2 for 0.02 (share) and 0.2 for 0.008 (rate): the better kept of equals.
    assert told["picked"] == "plain,learning_rate=0.001"
    picked = config_lib.from_json((workdir / "picked.json").read_text())
    assert (picked.optim.learning_rate, picked.workdir, picked.frontier.methods) == (1e-3, "", ())
    assert told["base_kl"]["retention"]["points"] == 6
    with (workdir / "frontier.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[0]["run"] == "plain,learning_rate=0.01"
    assert float(table[0]["wiki_value"]) == pytest.approx(-0.1)
    assert all((workdir / name).read_bytes()[:4] == b"\x89PNG" for name in ("frontier.png", "base_kl.png"))
    out = capsys.readouterr().out
    assert "failed: low_rank,rank=4: error: out of device memory" in out
    assert "picked by 'within': plain,learning_rate=0.001" in out
    assert "Spearman" in out
    again = Fake()
    frontier.frontier(config, workdir, again)
    assert again.started == ["train low_rank,rank=4"]


@pytest.mark.usefixtures("no_plots")
def test_the_pick_of_an_interpolation_is_a_merge(config: ConfigDict) -> None:
    config.frontier.methods, config.frontier.pick, workdir = (RATES, SHARES), "knee", Path(config.workdir)
    config.merge.method = "cat"
    frontier.frontier(config, workdir, Fake())
    told = json.loads((workdir / "frontier.json").read_text())
    job = frontier.planned(config, workdir)[-1]
    assert (job.verb, job.source) == ("merge", "plain,learning_rate=0.01")
    point = next(one for one in told["points"] if one["name"] == "wise_ft,share=0.25")
    picked = frontier._picked(config, job, point)
    assert picked.merge.adapters == ((f"{workdir}/runs/plain,learning_rate=0.01/adapter", 0.25),)
    assert picked.merge.sweep == ()


def test_strengths_have_short_names() -> None:
    """Of long values, what tells them apart."""
    replay = [(("pypi:a-long-package==1.0#with/a/path.jsonl", share, (("data.limit", 400),)),) for share in (0.1, 0.5)]
    assert frontier.labels(replay) == ["0.1", "0.5"]
    assert frontier.labels([(("kl_base", 0.1),), (("ewc", 2.0),)]) == ["kl_base_0.1", "ewc_2.0"]
    assert frontier.labels([tuple(range(10)), tuple(range(10, 20))]) == ["0-9", "10-19"]
    assert frontier.labels([(1,), (2, 4)]) == ["1", "2_4"]
    assert frontier.labels([1e-4, 0.001]) == ["0.0001", "0.001"]
    assert frontier.labels([(), (("kl_base", 1.0),)]) == ["none", "kl_base_1.0"]


@pytest.mark.usefixtures("no_plots")
def test_workers_have_devices_of_their_own(config: ConfigDict) -> None:
    config.frontier.workers = 2
    config.frontier.environments = ((("CUDA_VISIBLE_DEVICES", "0"),), (("CUDA_VISIBLE_DEVICES", "1"),))
    fake = Fake()
    frontier.frontier(config, Path(config.workdir), fake)
    assert len(fake.started) == 6
    assert fake.started[-1] == "merge wise_ft"  # after those whose weights it takes
    assert {one["CUDA_VISIBLE_DEVICES"] for one in fake.environments} <= {"0", "1"}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_frontier_goes_on(config: ConfigDict, workers: int) -> None:
    config.frontier.workers, workdir, fake = workers, Path(config.workdir), Fake("plain,learning_rate=0.001")
    with pytest.raises(Preempted, match="learning_rate=0.001"):
        frontier.frontier(config, workdir, fake)
    assert "merge wise_ft" not in fake.started
    frontier.frontier(config, workdir, fake)
    assert fake.started.count("train plain,learning_rate=0.001") == 2
    assert fake.started.count("train plain,learning_rate=0.0001") == 1
    config.train.steps = 9
    with pytest.raises(UserError, match="holds a frontier whose run .* another config"):
        frontier.frontier(config, workdir, fake)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.frontier.update({"methods": ()}), "needs config.frontier.methods"),
        (lambda c: c.protect.update({"sets": ()}), "name what is to be kept in config.protect.sets"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("optim.lerning_rate", (1,))),)}), "did you mean 'optim.learning_rate'"),
        (lambda c: c.frontier.update({"methods": (("a", (("tune.rnk", 2),), ("tune.alpha", (1.0,))),)}), "did you mean 'tune.rank'"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("tune.rank", (2, "four"))),)}), "tune.rank takes a int"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("optim.name", ("loin",))),)}), "run a,name=loin of the frontier: .*did you mean 'lion'"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("tune.rank", ())),)}), "expected \\(name"),
        (lambda c: c.frontier.update({"methods": (("a/b", (), ("tune.rank", (2,))),)}), "a method called 'a/b'"),
        (lambda c: c.frontier.update({"methods": (RATES, RATES)}), "two methods called 'plain'"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("tune.rank", (2, 2))),)}), "makes 'a,rank=2' twice"),
        (lambda c: c.frontier.update({"methods": (SHARES,)}), "is no run that trains"),
        (lambda c: c.frontier.update({"interpolates": "plain,learning_rate=0.1"}), "is no run that trains.*did you mean 'plain,learning_rate=0.01'"),
        (lambda c: c.frontier.update({"methods": (("a", (), ("frontier.pick", ("knee",))),)}), "or is the frontier's own"),
        (lambda c: c.frontier.update({"environments": ((("A", "1"),), (("A", "2"),))}), "has 2 entries; expected one for each"),
        (lambda c: c.frontier.update({"pick": "kneee"}), "did you mean 'knee'"),
    ],
)  # fmt: skip
def test_a_frontier_that_cannot_be_is_refused_before_it_begins(config: ConfigDict, change: Any, says: str) -> None:
    change(config)
    fake = Fake()

    def refused() -> None:
        validation.validate(config)
        frontier.frontier(config, Path(config.workdir), fake)

    with pytest.raises(UserError, match=says):
        refused()
    assert not fake.started


def test_real_runs_and_a_share_of_one(
    tiny_config: ConfigDict, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: a run trains, half of what it learnt is measured, the pick's config merges by itself."""
    tiny_config.train.steps, tiny_config.data.test_fraction, tiny_config.eval.bootstrap_samples = 3, 0.2, 50
    tiny_config.tracking.report = tiny_config.eval.before_after = True
    tiny_config.protect.sets = (
        ("chats", (("data.test", str(chats)), ("eval.metric", "perplexity"), ("tolerance", 9.0))),
    )
    methods = (("plain", (), ("optim.learning_rate", (1e-2,))), ("half", (), ("merge.sweep", (0.5,))))
    tiny_config.frontier.methods = methods
    path, workdir = tmp_path / "config.json", tmp_path / "frontier"
    path.write_text(config_lib.to_json(tiny_config))
    assert launch.main(["frontier", f"--config={path}", f"--workdir={workdir}"]) == 0
    told = json.loads((workdir / "frontier.json").read_text())
    whole, half = told["points"]
    assert (whole["name"], half["name"]) == ("plain,learning_rate=0.01", "half,share=0.5")
    assert 0 < half["base_kl"] < whole["base_kl"]
    assert 0 < half["gain"]["value"] != whole["gain"]["value"]
    assert "picked by 'within'" in capsys.readouterr().out
    picked = config_lib.from_json((workdir / "picked.json").read_text())
    assert not picked.frontier.methods
    assert (picked.merge.adapters == ()) == (told["picked"] == whole["name"])
