"""`update` end to end on a tiny model: releases, a refusal, force, rollback, a kill in the middle; and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, update, validation
from jaxtune.lineage import ledger, scores
from jaxtune.train import loop
from jaxtune.types import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")
LABELS = {"colours": {"red": "good", "blue": "bad"}, "animals": {"cat": "fine", "dog": "answer"}}


def here(config: Path, workdir: Path, resume: bool, log: Path) -> int:
    """Trains as a process of its own would, in this one, where programs are compiled already."""
    given = config_lib.from_json(config.read_text())
    given.checkpoint.resume = resume
    run.train(given, workdir)
    return 0


def write_rows(path: Path, labels: dict[str, str], seed: int, num: int = 120) -> str:
    """Texts whose last word decides the answer."""
    rng = np.random.default_rng(seed)
    lines = ["text,answer"]
    for _ in range(num):
        word = str(rng.choice(list(labels)))
        lines.append(
            f"{' '.join(rng.choice(['sat', 'ran', 'on', 'mat', 'hill', 'sky', 'under'], 3))} {word},{labels[word]}"
        )
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def stage(folder: Path, model: Path, name: str, rows: str, labels: tuple[str, ...]) -> ConfigDict:
    config = config_lib.base()
    config.name, config.model.source, config.data.train = name, str(model), rows
    config.data.prompt, config.data.label_column, config.data.test_fraction = "{text}", "answer", 0.3
    config.data.validation_fraction, config.data.max_length, config.eval.labels = 0.0, 64, labels
    config.train.batch_size, config.train.steps, config.train.loss_chunk_tokens = 8, 30, 64
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.0, 1e-2
    config.tracking.progress, config.eval.bootstrap_samples = "off", 100
    config.lineage.folder, config.lineage.drift_rows, config.lineage.drift_permutations = (
        str(folder / "lineage"),
        30,
        99,
    )
    config.lineage.replay_share, config.lineage.margin = 0.25, 0.2
    return config


@pytest.fixture(scope="module")
def stages(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigDict]:
    folder = tmp_path_factory.mktemp("stages")
    made = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        rows = write_rows(folder / f"{name}.csv", labels, seed)
        made[name] = stage(folder, tiny_model, name, rows, tuple(labels.values()))
    flipped = dict(zip(LABELS["colours"], reversed(LABELS["colours"].values()), strict=True))
    rows = write_rows(folder / "flipped.csv", flipped, 2)
    made["flipped"] = stage(folder, tiny_model, "flipped", rows, tuple(flipped.values()))
    made["flipped"].lineage.replay_share = 0.0
    for config in made.values():
        validation.validate(config)
    return made


@pytest.fixture(scope="module")
def lineage(stages: dict[str, ConfigDict]) -> Path:
    """Base, two releases, and a stage that was made bad on purpose and is refused."""
    update.update(stages["colours"], Path("unused"), here)
    update.update(stages["animals"], Path("unused"), here)
    with pytest.raises(UserError, match=r"refused: .*colours: accuracy .*; release 2 stays"):
        update.update(stages["flipped"], Path("unused"), here)
    return Path(stages["colours"].lineage.folder)


def nobody(config: Path, workdir: Path, resume: bool, log: Path) -> int:
    raise AssertionError("nothing is to be trained")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def copy(lineage: Path, stages: dict[str, ConfigDict], tmp_path: Path) -> dict[str, ConfigDict]:
    """The stages' configs, with a copy of the lineage that a test may go on with."""
    shutil.copytree(lineage, tmp_path / "lineage")
    made = {name: config.copy_and_resolve_references() for name, config in stages.items()}
    for config in made.values():
        config.lineage.folder = str(tmp_path / "lineage")
    return made


def test_the_ledger_tells_what_was_released_and_what_was_refused(lineage: Path, stages: dict[str, ConfigDict]) -> None:
    base, first, second, bad = ledger.read(lineage)
    assert [line.get("verdict") for line in (base, first, second, bad)] == [None, "released", "released", "refused"]
    assert [line["release"] for line in (base, first, second, bad)] == [0, 1, 2, None]
    assert [line["parent"] for line in (first, second, bad)] == [0, 1, 2]
    assert ledger.current(ledger.read(lineage)) == 2
    assert first["data"]["files"]["train"]["uri"] == stages["colours"].data.train
    assert first["data"]["files"]["train"]["rows"] == 120
    assert first["replay"] is None
    assert second["replay"] == {"share": 0.25, "stages": ["colours"]}
    assert second["scores"]["colours"]["value"] > 0.9, "what was learnt first was kept, with replay"
    assert bad["scores"]["colours"]["worsening"]["low"] > 0.2
    assert "colours: accuracy" in bad["reason"]
    assert second["drift"]["labels"]["shifted"]
    assert not second["drift"]["length"]["shifted"]
    assert "**2** (current)" in (lineage / "ledger.md").read_text()
    for line in (first, second, bad):
        assert (lineage / line["weights"] / "adapter_model.safetensors").exists()


def test_replay_holds_out_what_its_stage_held_out(lineage: Path, stages: dict[str, ConfigDict]) -> None:
    made = config_lib.from_json((lineage / "attempts/002/train.json").read_text())
    ((uri, share, settings),) = made.retain.replay
    assert (uri, share) == (stages["colours"].data.train, 0.25)
    assert dict(settings)["data.test_fraction"] == 0.3
    assert dict(settings)["data.prompt"] == "{text}"
    assert made.tune.adapter == str(lineage / "attempts/001/train/adapter")
    replayed = [
        line["replay_share"] for line in lines(lineage / "attempts/002/train/metrics.jsonl") if "replay_share" in line
    ]
    assert np.mean(replayed) == pytest.approx(0.25, abs=0.02)


def test_the_rows_that_got_worse_are_listed_the_worst_first(lineage: Path) -> None:
    worse = [row for row in lines(lineage / "attempts/003/worse.jsonl") if row["set"] == "colours"]
    by = [row["worse_by"] for row in worse]
    assert by == sorted(by, reverse=True)
    kept = {row["row_id"] for row in worse}
    released, candidate = (
        json.loads((lineage / place).read_text())["rows"]
        for place in ("attempts/002/results/candidate/colours.json", "attempts/003/results/candidate/colours.json")
    )
    assert kept == {a["row_id"] for a, b in zip(released, candidate, strict=True) if a["correct"] and not b["correct"]}
    for row in worse:
        assert row["prompt"].split()[-1] in LABELS["colours"]
        assert row["released"]["prediction"] == row["answer"] != row["candidate"]["prediction"]


def test_matrix_and_page(lineage: Path) -> None:
    report = json.loads((lineage / "attempts/003/report.json").read_text())
    values = np.asarray(report["matrix"]["values"], float)
    assert report["matrix"]["models"] == ["base", "1 colours", "2 animals", "3 flipped, refused"]
    assert report["matrix"]["stages"] == ["colours", "animals", "flipped"]
    assert np.isnan(values[1, 2])
    assert not np.isnan(values[[0, 0, 1, 1, 2, 3], [1, 2, 0, 1, 0, 2]]).any()
    _, first, second, bad = ledger.read(lineage)
    assert values[1, 0] == first["scores"]["colours"]["value"]
    assert values[3].tolist() == [bad["scores"][name]["value"] for name in report["matrix"]["stages"]]
    best = values[1:3, 0].max()
    assert report["transfer"]["forgetting"]["value"] == pytest.approx(
        ((best - values[3, 0]) + (values[2, 1] - values[3, 1])) / 2
    )
    back = report["transfer"]["backward_transfer"]
    assert back["value"] == pytest.approx(((values[3, 0] - values[1, 0]) + (values[3, 1] - values[2, 1])) / 2)
    assert back["low"] < back["value"] < back["high"]
    forward = ((values[1, 1] - values[0, 1]) + (values[2, 2] - values[0, 2])) / 2
    assert report["transfer"]["forward_transfer"]["value"] == pytest.approx(forward)
    page = (lineage / "attempts/003/report.html").read_text()
    assert "Stage matrix; after 3 flipped, refused: colours" in page
    assert "Refused, release 2 stays" in page
    assert len(lines(lineage / "attempts/003/unlike.jsonl")) == 30


def test_forced_with_a_reason_and_taken_back(copy: dict[str, ConfigDict], capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = copy["flipped"], Path(copy["flipped"].lineage.folder)
    config.lineage.force = "the labels were wrong all along"
    update.update(config, Path("unused"), nobody)
    forced = ledger.read(folder)[-1]
    assert (forced["verdict"], forced["release"]) == ("forced", 3)
    assert forced["weights"] == "attempts/003/train/adapter"
    assert forced["reason"].startswith("colours: accuracy")
    assert forced["reason"].endswith("forced: the labels were wrong all along")
    with pytest.raises(UserError, match="is what release 3 .* was trained on already"):
        update.update(config, Path("unused"), nobody)
    config.lineage.rollback, config.lineage.force = 1, "complaints"
    update.update(config, Path("unused"), nobody)
    assert "release 1 is current again" in capsys.readouterr().out
    assert ledger.current(ledger.read(folder)) == 1
    again = copy["animals"]
    update.update(again, Path("unused"), nobody)  # the very candidate that was made of release 1 before
    last = ledger.read(folder)[-1]
    assert (last["release"], last["parent"], last["weights"]) == (4, 1, "attempts/002/train/adapter")


class Killed(Exception):
    """What a test kills an update by."""


def test_killed_in_the_middle_it_goes_on_to_the_same_release(
    stages: dict[str, ConfigDict], lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while it trains, once while it measures, once before the ledger has the line."""
    config, record = stages["colours"].copy_and_resolve_references(), loop._record
    config.lineage.folder, config.checkpoint.every_steps = str(tmp_path / "lineage"), 10

    def dies(*_: Any) -> Any:
        raise Killed

    def dies_at_step_15(settings: ConfigDict, *rest: Any) -> None:
        if rest[2].step == 15:
            raise Killed
        record(settings, *rest)

    for owner, name, killer in (
        (loop, "_record", dies_at_step_15),
        (scores, "measured", dies),
        (ledger, "append", dies),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killer) if name != "append" else patch.setattr(update, "_judge", killer)
            with pytest.raises(Killed):
                update.update(config, Path("unused"), here if owner is loop else nobody if name == "append" else here)
    update.update(config, Path("unused"), nobody)
    (_, line), (_, first, *_) = ledger.read(tmp_path / "lineage"), ledger.read(lineage)
    adapter = "train/adapter/adapter_model.safetensors"
    assert (tmp_path / "lineage/attempts/001" / adapter).read_bytes() == (
        lineage / "attempts/001" / adapter
    ).read_bytes()
    assert line["scores"] == first["scores"]
    assert [path.name for path in (tmp_path / "lineage/attempts").iterdir()] == ["001"]


def test_another_config_begins_another_attempt(copy: dict[str, ConfigDict]) -> None:
    config, folder = copy["flipped"], Path(copy["flipped"].lineage.folder)
    config.optim.learning_rate = 2e-2

    def fails(config: Path, workdir: Path, resume: bool, log: Path) -> int:
        log.write_text("some words\nerror: out of device memory\n")
        return 2

    with pytest.raises(
        UserError, match="the candidate was not trained, and the released model stays: error: out of device"
    ):
        update.update(config, Path("unused"), fails)
    assert (folder / "attempts/004/began.json").exists()
    assert len(ledger.read(folder)) == 4, "what was not judged is in no line"


def test_margins_decide(copy: dict[str, ConfigDict]) -> None:
    """A margin that is wide enough for what was measured, by name; judged again without training."""
    config, folder = copy["flipped"], Path(copy["flipped"].lineage.folder)
    config.lineage.margins = (("colours", 1.0), ("animals", 1.0))
    update.update(config, Path("unused"), nobody)
    assert ledger.read(folder)[-1]["verdict"] == "released"
    assert ledger.read(folder)[-1]["scores"]["colours"]["margin"] == 1.0


def test_a_protected_set_holds_too(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    """Measured on base and released model when it is new, and judged with its own tolerance."""
    config, folder = copy["flipped"], Path(copy["flipped"].lineage.folder)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"the {w} sat on the mat"}) + "\n" for w in ("cat", "dog", "sky", "hill"))
    )
    config.protect.sets = (
        (
            "texts",
            (
                ("data.test", str(tmp_path / "texts.jsonl")),
                ("data.format", "text"),
                ("eval.metric", "perplexity"),
                ("tolerance", 50.0),
            ),
        ),
    )
    with pytest.raises(UserError, match="refused: colours"):
        update.update(config, Path("unused"), nobody)
    told = ledger.read(folder)[-1]["scores"]["texts"]
    assert (told["metric"], told["margin"]) == ("bits_per_byte", 50.0)
    assert (folder / "attempts/003/results/base/texts.json").exists()
    assert (folder / "attempts/003/results/released/texts.json").exists()


def _set(**changes: object) -> Callable[[dict[str, ConfigDict], Path], None]:
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return lambda copy, tmp_path: copy["flipped"].update_from_flattened_dict(values)


def _other_base(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    other = shutil.copytree(copy["flipped"].model.source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5e4}))
    copy["flipped"].model.source = str(other)


def _changed_data(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    """The first stage's rows lie elsewhere by the ledger's config; here another file is in their place."""
    folder = Path(copy["flipped"].lineage.folder)
    rows = write_rows(tmp_path / "changed.csv", LABELS["colours"], 7)
    before = ledger.read(folder)
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    kept: list[ledger.Line] = []
    for line in before:
        fields = {key: value for key, value in line.items() if key not in ("line", "date", "previous", "hash")}
        if line.get("release") == 1:
            path = folder / line["config"]["path"]
            path.write_text(path.read_text().replace(copy["colours"].data.train, rows))

            fields["config"] = {**line["config"], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        kept = ledger.append(tmp_path / "again", kept, fields)
    shutil.copytree(folder / "attempts", tmp_path / "again" / "attempts")
    copy["flipped"].lineage.folder = str(tmp_path / "again")


def _gone(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    shutil.rmtree(Path(copy["flipped"].lineage.folder) / "attempts/002/train/adapter")
    copy["flipped"].optim.learning_rate = 3e-2


def _config_changed(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    with (Path(copy["flipped"].lineage.folder) / "attempts/001/config.json").open("a") as file:
        file.write(" ")


def _same_data(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    rows = shutil.copy(copy["colours"].data.train, tmp_path / "february.csv")
    copy["flipped"].data.train = str(rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(lineage__folder=""), r"update needs --config\.lineage\.folder=FOLDER"),
        (_set(lineage__rollback=9), "has no release 9; it has 0, 1, 2"),
        (_set(data__test_fraction=0.0), r"flipped: no test rows: nothing is measured .* set data\.test_fraction"),
        (_set(lineage__margins=(("colors", 0.1),)), "config.lineage.margins names 'colors'; there are colours, animals, flipped"),
        (_set(protect__sets=(("animals", (("data.test", "x"),)),)), "config.protect.sets has 'animals', which is also a stage's name"),
        (_set(tune__method="full"), "release 2 is an adapter, which tune.method='full' cannot go on from"),
        (_set(tune__adapter="somewhere"), "'somewhere' does not exist"),
        (_other_base, r"the lineage in .* is of .*tiny, and model.source is '.*other', another model"),
        (_changed_data, r"data\.train of release 1 \('colours'\), .*colours\.csv, has changed since: SHA-256 .* put it back"),
        (_gone, "the weights of release 2 are gone"),
        (_config_changed, "by which release 1 was made, is gone or was changed"),
        (_same_data, r"february\.csv' is what release 1 \('colours'\) was trained on already \(the same SHA-256, read alike\)"),
    ],
)  # fmt: skip
def test_refused_with_one_clear_line(
    copy: dict[str, ConfigDict], tmp_path: Path, change: Callable[[dict[str, ConfigDict], Path], None], says: str
) -> None:
    change(copy, tmp_path)
    with pytest.raises(UserError, match=says):
        update.update(copy["flipped"], Path("unused"), nobody)


def test_changed_data_may_be_noted_instead(copy: dict[str, ConfigDict], tmp_path: Path) -> None:
    """The released model is then measured anew on what the file holds now."""
    _changed_data(copy, tmp_path)
    config = copy["animals"]
    config.lineage.folder, config.lineage.on_changed_data, config.lineage.rollback = str(tmp_path / "again"), "note", 1
    update.update(config, Path("unused"), nobody)
    config.lineage.rollback, config.train.steps, config.lineage.margin = -1, 4, 1.0
    update.update(config, Path("unused"), here)
    line = ledger.read(tmp_path / "again")[-1]
    assert any("has changed since" in note for note in line["notes"])
    assert (tmp_path / "again" / line["weights"]).parents[1].joinpath("results/released/colours.json").exists()


def test_a_killed_update_goes_on_by_the_same_command(stages: dict[str, ConfigDict], tmp_path: Path) -> None:
    """SIGKILL, of the update and of the training that it started; then the same command."""
    config, folder = stages["colours"].copy_and_resolve_references(), tmp_path / "lineage"
    config.lineage.folder, config.checkpoint.every_steps = str(folder), 1
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    command = [sys.executable, "-m", "jaxtune.launch", "update", f"--config={tmp_path / 'config.json'}"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    checkpoints = folder / "attempts/001/train/checkpoints"
    while not any(path.name.isdigit() for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert len(ledger.read(folder)) == 1, "the base alone"
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "release 1 is current" in again.stdout
    assert ledger.current(ledger.read(folder)) == 1
    assert "resuming after step" not in again.stdout


def test_training_has_the_accelerator_to_itself(stages: dict[str, ConfigDict], tmp_path: Path) -> None:
    """Some accelerators are one process's alone, so none is touched before the run that trains has ended."""
    config = stages["colours"].copy_and_resolve_references()
    config.lineage.folder = str(tmp_path / "lineage")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    code = (
        "import sys; from pathlib import Path; from jax._src import xla_bridge; from jaxtune import config, update\n"
        "def start(*_): print('free:', not xla_bridge.backends_are_initialized()); sys.exit(0)\n"
        "update.update(config.from_json(Path(sys.argv[1]).read_text()), Path('unused'), start)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.json")], capture_output=True, text=True)
    assert done.stdout.strip() == "free: True", done.stderr
