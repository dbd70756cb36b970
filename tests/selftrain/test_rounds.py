"""Self-training end to end on a tiny model: rounds that go on exactly after a kill, the control, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, validation
from jaxtune.rewards import answers
from jaxtune.selftrain import sampling
from jaxtune.train import loop
from jaxtune.types import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    """A config whose model says good or bad, and is right now and then: taught by a few steps."""
    folder, rng = tmp_path_factory.mktemp("moods"), np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(['red', 'cat', 'sat'], 3))} {mood},{mood}" for mood in ["good", "bad"] * 30]
    (folder / "rows.csv").write_text("text,answer\n" + "\n".join(rows) + "\n")
    config = config_lib.base()
    config.workdir, config.model.source, config.data.train = (
        str(folder / "sft"),
        str(tiny_model),
        str(folder / "rows.csv"),
    )
    config.data.prompt, config.data.label_column, config.data.test_fraction = "{text}", "answer", 0.2
    config.data.max_length, config.train.batch_size, config.train.steps, config.train.loss_chunk_tokens = 64, 8, 8, 64
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.0, 1e-2
    config.tracking.progress, config.tracking.report, config.eval.before_after = "off", False, False
    config.eval.bootstrap_samples, config.generate.max_new_tokens = 20, 6
    run.train(config.copy_and_resolve_references(), Path(config.workdir))
    config.tune.adapter = str(folder / "sft" / "adapter")
    config.reward.functions = (("exact_answer", 1.0),)
    config.self_training.rounds, config.self_training.samples, config.self_training.max_new_tokens = 2, 2, 6
    config.self_training.temperature, config.self_training.part_prompts, config.self_training.slots = 1.0, 16, 8
    config.train.steps, config.checkpoint.every_steps = 6, 2
    config.eval.before_after, config.tracking.report = True, True
    return config


@pytest.fixture
def config(started: ConfigDict, tmp_path: Path) -> ConfigDict:
    config = started.copy_and_resolve_references()
    config.workdir = str(tmp_path / "rounds")
    return config


@pytest.fixture(scope="module")
def whole(started: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing interrupted."""
    config, workdir = started.copy_and_resolve_references(), tmp_path_factory.mktemp("whole") / "run"
    config.workdir = str(workdir)
    validation.validate(config)
    run.self_train(config, workdir)
    return workdir


def test_a_run_leaves_what_it_kept_and_refused(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    first, second = report["rounds"]["all"]
    prompts = first["prompts"]
    assert prompts + len(lines(whole / "held" / "test.jsonl")) == 60
    for told, name in ((first, "round_01"), (second, "round_02")):
        kept, refused = lines(whole / name / "kept.jsonl"), lines(whole / name / "refused.jsonl")
        assert len(kept) == told["kept"]
        assert len(kept) + len(refused) == told["sampled"] >= 2 * prompts
        assert {row["reason"] for row in refused} <= {"below_threshold", "cut_off", "empty", "enough_for_prompt"}
        assert len({row["row_id"] for row in kept}) == len(kept), "of a prompt one answer"
        for row in kept:
            assert answers.plain(row["messages"][-1]["content"]) == row["answer"]
            assert "Hint" not in row["messages"][0]["content"]
        assert told["steps"] == 6
        assert told["hinted"] == sum(row["sample"]["hinted"] for row in kept)
    control = report["rounds"]["gold"]
    assert control["steps"] == second["steps"]
    assert control["gold"] == min(second["kept"], prompts) == len(lines(whole / "control_02" / "gold.jsonl"))
    assert report["rounds"]["names"] == ["before", "round 1", "round 2"]
    assert report["after"]["pass_rate"] == second["after"]["pass_rate"]
    assert report["beside"]["gold answers"]["metrics"] == control["after"]
    page = (whole / "report.html").read_text()
    assert '<h2 id="rounds">Rounds</h2>' in page
    assert "Pass rate by round" in page
    before = [(whole / name / "train" / "before.json").read_text() for name in ("round_01", "round_02", "control_02")]
    assert before[0] == before[1] == before[2], "the untuned model is measured once"


class Killed(Exception):
    """What a test kills a run by."""


def test_killed_in_the_middle_of_rounds_it_goes_on_to_the_same(
    config: ConfigDict, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has finished its first round; it is killed while the second samples, and once more while it trains."""
    workdir, sample, record = Path(config.workdir), sampling._sample, loop._record
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("round_02", "control_02", "report.*"))
    made: list[int] = []

    def dies_in_the_second_part(settings: ConfigDict, task: object, number: int, which: range, *rest: object) -> object:
        assert number == 2, "the first round is not made again"
        if which.start == 16 and not died:
            died.append(True)
            raise Killed
        made.append(which.start)
        return sample(settings, task, number, which, *rest)

    def dies_at_step_three(settings: ConfigDict, *rest: object) -> None:
        if rest[2].step == 3:
            raise Killed
        record(settings, *rest)

    died: list[bool] = []
    config.checkpoint.resume = True
    monkeypatch.setattr(sampling, "_sample", dies_in_the_second_part)
    with pytest.raises(Killed):
        run.self_train(config, workdir)
    assert [path.name for path in (workdir / "round_02" / "samples").iterdir()] == ["part_0000.json"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_record", dies_at_step_three)
        with pytest.raises(Killed):
            run.self_train(config, workdir)
    assert not (workdir / "round_02" / "round.json").exists()
    run.self_train(config, workdir)
    assert made == [0, 16, 32, 48], "no part was made twice"
    for name in ("round_02/kept.jsonl", "round_02/refused.jsonl", "control_02/gold.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("round_02", "control_02"):
        adapter = f"{name}/train/adapter/adapter_model.safetensors"
        assert (workdir / adapter).read_bytes() == (whole / adapter).read_bytes(), name
    (again,), (once,) = ([json.loads((at / "report.json").read_text())["after"]] for at in (workdir, whole))
    assert again == once


def test_another_round_is_added_and_other_settings_are_refused(config: ConfigDict, whole: Path) -> None:
    workdir = Path(config.workdir)
    shutil.copytree(whole, workdir)
    with pytest.raises(UserError, match="holds an earlier run: add --config.checkpoint.resume=True"):
        run.self_train(config, workdir)
    config.checkpoint.resume, config.self_training.samples = True, 3
    with pytest.raises(UserError, match="another config: self_training.samples was 2 and is now 3"):
        run.self_train(config, workdir)
    config.self_training.samples, rows = 2, Path(config.workdir).parent / "rows.csv"
    rows.write_text(Path(config.data.train).read_text().replace("cat", "dog"))
    began = workdir / "self_training_began.json"
    began.write_text(began.read_text().replace(config.data.train, str(rows)))
    config.data.train = str(rows)
    with pytest.raises(UserError, match="are of other rows: data.train"):
        run.self_train(config, workdir)


def _long(config: ConfigDict) -> None:
    rows = Path(config.workdir).parent / "long.csv"
    rows.write_text("text,answer\n" + "".join(f"{'cat ' * 90} {i},good\n" for i in range(20)))
    config.data.train = str(rows)


def _without_answer(config: ConfigDict) -> None:
    rows = Path(config.workdir).parent / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "who"}]}
    rows.write_text("".join(json.dumps(chat | {"n": i}) + "\n" for i in range(20)))
    config.data.train, config.data.format, config.data.label_column = str(rows), "messages", ""


def _pairs(config: ConfigDict) -> None:
    rows = Path(config.workdir).parent / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"question": f"who {i}", "passage": "the cat"}) + "\n" for i in range(20)))
    config.data.train, config.data.format, config.data.label_column, config.data.prompt = str(rows), "pair", "", ""


def _set(**changes: object) -> Callable[[ConfigDict], None]:
    return lambda config: config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(reward__functions=()), r"reward\.functions is empty: name at least one"),
        (_set(reward__functions=(("exact_anser", 1.0),)), "unsupported reward 'exact_anser'"),
        (_set(reward__functions=(("none.py:mine", 1.0),)), "there is no file 'none.py'"),
        (_set(reward__threshold=1.5), r"round 1 kept none of \d+ answers \(.*below_threshold \d+"),
        (_set(data__test_fraction=0.0), "held-out rows: set data.test_fraction or data.test"),
        (_set(eval__split="validation"), "eval.split is 'validation'; set 'test'"),
        (_set(train__patience=2), "set train.patience=0"),
        (_set(train__objective="mlm"), "train.objective is 'mlm'; set 'sft'"),
        (_set(self_training__temperature=0.0), "gives the same answer 2 times"),
        (_set(self_training__hint=" It is {anser}."), "self_training.hint names column 'anser'; did you mean 'answer'"),
        (_set(self_training__reward_model="x"), "are both set; one of them judges"),
        (_set(data__max_length=512), r"data\.max_length=512 exceeds the model's 256 positions"),
        (_set(generate__max_new_tokens=250), r"rows\.csv:\d+: a held-out prompt of \d+ tokens and generate\.max_new_tokens=250"),
        (_long, "none of the 1[0-9] prompts leaves room for an answer: data.max_length=64"),
        (_without_answer, r"chats\.jsonl:1: a reward compares with the answer in column 'answer', which is missing"),
        (_pairs, r"pairs\.jsonl:\d+: self_train needs prompts"),
    ],
)  # fmt: skip
def test_refused_with_one_clear_line(config: ConfigDict, change: Callable[[ConfigDict], None], says: str) -> None:
    change(config)
    with pytest.raises(UserError, match=says):
        run.self_train(config, Path(config.workdir))


def test_prompts_that_are_too_long_are_counted_and_the_rest_goes_on(config: ConfigDict) -> None:
    rows = Path(config.workdir).parent / "some.csv"
    rows.write_text(Path(config.data.train).read_text() + f"{'cat ' * 90},good\n{'dog ' * 90},bad\n")
    config.data.train, config.self_training.rounds, config.self_training.control = str(rows), 1, False
    config.self_training.method, config.self_training.with_gold, config.train.steps = "rest_em", True, 2
    run.self_train(config, Path(config.workdir))
    folder = Path(config.workdir) / "round_01"
    told = json.loads((folder / "round.json").read_text())
    too_long = told["refused"].get("prompt_too_long", 0)
    assert 1 <= too_long <= 2, "of the two, as many as were not held out"
    assert told["gold"] == told["prompts"]
    assert len(lines(folder / "trained.jsonl")) == told["kept"] + told["gold"]
    assert told["hinted"] == 0, "a hint is STaR's"


def test_a_reward_model_judges(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that likes short answers, and gives no number to those of an even length."""
    asked: list[tuple[str, str]] = []

    def load(uri: str, config: ConfigDict) -> sampling.Score:
        def score(pairs: list[tuple[str, str]]) -> np.ndarray:
            asked.extend(pairs)
            return np.asarray([1.0 if len(said) % 2 else np.nan for _, said in pairs])

        assert uri == "runs/reward/adapter"
        return score

    monkeypatch.setattr(run.judge, "load", load)
    config.reward.functions, config.self_training.reward_model = (), "runs/reward/adapter"
    config.self_training.rounds, config.self_training.control, config.train.steps = 1, False, 2
    config.self_training.method, config.eval.metric = "rft", "exact_match"
    run.self_train(config, Path(config.workdir))
    folder = Path(config.workdir) / "round_01"
    told = json.loads((folder / "round.json").read_text())
    kept, refused = lines(folder / "kept.jsonl"), lines(folder / "refused.jsonl")
    assert all(len(row["messages"][-1]["content"]) % 2 for row in kept)
    failed = [row for row in refused if row["reason"] == "reward_failed"]
    assert all(len(row["completion"]) % 2 == 0 and row["reward"] is None for row in failed)
    count, message = told["errors"]["reward_model: not_a_number"]
    assert count >= len(failed) > 0
    assert message == "its score is NaN or infinite"
    assert all(said.strip() for _, said in asked), "an empty answer has no score"
    assert {prompt.split()[-1] for prompt, _ in asked} == {"good", "bad"}, "it reads the user's turn"
    assert told["metric"] == "exact_match"
