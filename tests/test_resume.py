"""A run that goes on: from what it was, over the whole of it, and never silently from something else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from jaxtune import checkpoint, run
from jaxtune import config as config_lib
from jaxtune.plan import compile
from jaxtune.train import loop, rows, start
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


def read(workdir: Path, name: str) -> dict:
    return json.loads((workdir / name).read_text())


def test_a_resumed_run_is_told_as_a_whole_and_refuses_other_rows(tiny_config: ConfigDict, tmp_path: Path) -> None:
    config, workdir = tiny_config, Path(tiny_config.workdir)
    data = shutil.copy(config.data.train, tmp_path / "mine.jsonl")
    config.data.train, config.data.test_fraction, config.data.validation_fraction = str(data), 0.2, 0.0
    config.train.steps, config.train.epochs, config.checkpoint.every_steps, config.checkpoint.keep = 0, 2.0, 1, 9
    config.tracking.report, config.eval.before_after, config.eval.bootstrap_samples = True, True, 20
    run.train(config.copy_and_resolve_references(), workdir)
    whole, before = read(workdir, "report.json"), read(workdir, "before.json")
    assert read(workdir, "config.json")["train"]["steps"] == 0, "so that another epochs still decides"
    last = whole["train"]["steps"]
    shutil.rmtree(workdir / "checkpoints" / str(last))

    config.checkpoint.resume, config.eval.limit = True, 5
    run.train(config.copy_and_resolve_references(), workdir)
    resumed, again = read(workdir, "report.json"), read(workdir, "before.json")
    for part, key in (("train", "steps"), ("train", "trained_tokens"), ("data", "padding_share")):
        assert resumed[part][key] == whole[part][key]
    assert resumed["train"]["seconds"] > 0.5 * whole["train"]["seconds"]
    assert resumed["train"]["tokens_per_second"] > 0
    assert len(before["rows"]) > len(again["rows"]) == 5, "the start is measured again on the rows that are asked for"

    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[1:]) + "\n")
    config.name = "other"
    with pytest.raises(UserError, match=r"checkpoint .* was trained on other rows: data\.train .*mine\.jsonl"):
        run.train(config, workdir)
    assert read(workdir, "config.json")["name"] == "run"
    assert read(workdir, "before.json") == again


def test_what_other_verbs_ask_for_changes_no_run(tiny_config: ConfigDict) -> None:
    """A config that is extended for `merge` or `frontier` is still that of its run; one that trains otherwise is not."""
    saved, config = json.loads(config_lib.to_json(tiny_config)), tiny_config
    config.merge.adapters, config.frontier.workers, config.self_distill.stop = (("mine", 1.0),), 2, False
    assert checkpoint.first_change(saved, config, checkpoint.free(config)) is None
    config.retain.penalties = (("kl_base", 0.1),)
    changed = checkpoint.first_change(saved, config, checkpoint.free(config))
    assert changed is not None
    assert changed[0] == "retain.penalties"


def test_an_early_stop_stays_one_and_lost_steps_are_kept_aside(
    tiny_config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = tiny_config, Path(tiny_config.workdir)
    config.optim.learning_rate, config.data.validation_fraction = 0.0, 0.2  # nothing gets better
    config.train.patience, config.train.eval_every_steps, config.tracking.progress = 1, 1, "lines"
    config.checkpoint.resume, config.tracking.report = True, True
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 0}\n')  # killed before its first checkpoint
    run.train(config, workdir)
    said = capsys.readouterr().err
    assert "has no checkpoint to resume from: starting at step 0" in said
    assert "are in metrics.1.jsonl" in said
    assert "no test rows: nothing is measured before and after" in said
    assert (workdir / "metrics.1.jsonl").read_text() == '{"step": 0}\n'
    stopped, metrics = read(workdir, "report.json"), (workdir / "metrics.jsonl").read_text()
    assert stopped["train"]["steps"] == 2
    run.train(config, workdir)
    again = read(workdir, "report.json")
    assert (workdir / "metrics.jsonl").read_text() == metrics
    assert again["train"] | {"peak_memory_bytes": 0} == stopped["train"] | {"peak_memory_bytes": 0}
    assert [text.split(" ")[0] for text in again["notices"]] == ["Stopped", "There"]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4), (0.1, 1), (3.0, 11)])
def test_epochs_train_every_row(tiny_config: ConfigDict, epochs: float, steps: int) -> None:
    """29 batch rows of one row each, 8 a step."""
    tiny_config.data.packing, tiny_config.data.limit, tiny_config.train.epochs = False, 29, epochs
    tiny_config.train.steps = 0
    tokenizer = source.find_tokenizer(tiny_config, source.find(tiny_config))
    rows.read(tiny_config, tokenizer, lambda items, total, label: items)
    assert tiny_config.train.steps == steps


def test_a_run_that_fails_before_its_first_step_leaves_its_workdir_free(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise UserError("no step was taken")

    workdir = Path(tiny_config.workdir)
    monkeypatch.setattr(run.loop, "train", fails)
    for _ in range(2):
        with pytest.raises(UserError, match="no step was taken"):
            run.train(tiny_config, workdir)
    assert (workdir / "checkpoints").is_dir()


def test_the_plan_compiles_the_adapter_that_training_starts_from(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, seen = tiny_config, source.find(tiny_config), []
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, total, label: items)
    config.tune.adapter = str(
        start.write_result(config, Path(config.workdir), model, None, program, state.params, frozen)
    )
    config.tune.rank = 16
    monkeypatch.setattr(compile, "compiled", lambda config, hf_config, adapter: (seen.append(adapter), {}))
    with pytest.raises(AttributeError):  # there is no plan to write
        run.plan(config, Path(config.workdir))
    assert [options.rank for options in seen] == [4]


def test_a_validation_loss_that_is_no_number_is_never_the_best(tiny_config: ConfigDict) -> None:
    tiny_config.train.steps, said = 3, []
    tracker = SimpleNamespace(log=lambda step, metrics: None, say=said.append)
    progress, state = loop.Progress(), SimpleNamespace(params={})
    for done, loss in enumerate([math.nan, 2.0, math.nan], 1):
        loop._validate(tiny_config, lambda *_, loss=loss: {"loss": loss}, state, {}, tracker, progress, done)
    assert (progress.best_loss, progress.best_step, progress.evals_without_better) == (2.0, 2, 1)
    assert said == ["WARNING: Validation loss after step 1 is nan.", "WARNING: Validation loss after step 3 is nan."]
    assert progress.notices == ["ERROR: Validation loss after step 3 is nan. What was trained last is broken."]
