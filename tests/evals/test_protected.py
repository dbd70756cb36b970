"""Protected sets: what one says, how it is read and judged, and what a run does when one is broken."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, tracking, validation
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import protected, tasks
from jaxtune.types import UserError


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """General text, a line a row."""
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("protected") / "general.txt"
    words = "zyx pqj vkk wmz QRS JKX 173 940".split()  # nothing that the chats say
    path.write_text("".join(" ".join(rng.choice(words, 12)) + "\n" for _ in range(24)))
    return path


def general(texts: Path, *more: tuple) -> tuple:
    return ("general", (("data.test", str(texts)), ("data.format", "text"), ("eval.metric", "perplexity"), *more))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((("a", (("data.tset", "x.txt"),)),), "'data.tset'; did you mean 'data.test'"),
        ((("a", (("train.steps", 3),)),), "has the key 'train.steps'"),
        ((("a", ()), ("a", ())), "two sets called 'a'"),
        ((("a", (("tolerance", -0.1),)),), "tolerance=-0.1; expected 0 or more"),
        ((("a", (("eval.limit", "many"),)),), "eval.limit='many'; expected a int"),
        (
            (("a", (("eval.metric", "perplxity"),)),),
            "'a': config.eval.metric is 'perplxity'.*did you mean 'perplexity'",
        ),
        ((("a", (("eval.limit", 3), ("eval.limit", 4))),), "'eval.limit' twice"),
        ((("a b", ()),), "called 'a b'"),
        (("a",), "expected .name, ..key, value"),
    ],
)
def test_a_set_that_says_something_else_is_refused(sets: tuple, message: str) -> None:
    config = config_lib.base()
    config.protect.sets = sets
    with pytest.raises(UserError, match=message):
        validation.validate(config)


def test_options_of_sets_are_checked() -> None:
    config = config_lib.base()
    config.protect.on_broken = "rolback"
    with pytest.raises(UserError, match="did you mean 'rollback'"):
        validation.validate(config)
    config.protect.on_broken = "stop"
    with pytest.raises(UserError, match="protect.on_broken='stop' asks after protected sets, and there are none"):
        validation.validate(config)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def test_sets_are_read_each_by_its_own_config(texts: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    choice = tmp_path / "choice.csv"
    choice.write_text("text,mood\n" + "".join(f"the cat {n},{['good', 'bad'][n % 2]}\n" for n in range(8)))
    given = (("data.test", str(choice)), ("data.prompt", "{text}"), ("data.label_column", "mood"), ("eval.limit", 5))
    config = config_lib.base()
    config.data.label_column, config.eval.metric, config.eval.limit = (
        "nothing",
        "exact_match",
        1,
    )  # the run's, not theirs
    config.protect.sets = (general(texts, ("tolerance", 0.1)), ("choice", given))
    first, second = protected.read(config, tokenizer)
    assert (first.metric, first.higher_is_better, first.tolerance, len(first.held.examples)) == (
        "bits_per_byte",
        False,
        0.1,
        24,
    )
    assert (second.metric, second.higher_is_better, second.tolerance) == ("accuracy", True, config.protect.tolerance)
    assert second.held.labels == ("bad", "good")
    assert len(second.held.rows) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((("eval.split", "validation"),), "'general': has no rows of eval.split='validation'"),
        ((("eval.metric", "labels"),), "'general': eval.metric='labels' needs an answer in every row"),
        ((("judged", "perplxity"),), "'general': is judged by 'perplxity'.*did you mean 'perplexity'"),
        ((("data.test", "no.txt"),), "'general': .*no.txt"),
    ],
)
def test_a_set_without_what_its_metric_needs_is_refused(
    texts: Path, tokenizer: Tokenizer, more: tuple, message: str
) -> None:
    config, (name, given) = config_lib.base(), general(texts)
    config.protect.sets = ((name, tuple(dict((*given, *more)).items())),)
    with pytest.raises(UserError, match=message):
        protected.read(config, tokenizer)


def answered(right: str) -> tasks.Result:
    rows = [{"row_id": str(i), "answer": "x", "correct": one == "1"} for i, one in enumerate(right)]
    return tasks.measured(("exact_match",), rows)


def of_bytes(nats: list[float]) -> tasks.Result:
    ones = np.ones(len(nats))
    return tasks.perplexity(np.asarray(nats), ones, np.asarray(nats), ones)


def test_a_set_is_broken_by_its_worsening_alone() -> None:
    def one(name: str, metric: str, tolerance: float) -> protected.Protected:
        return protected.Protected(name, config_lib.base(), None, metric, tasks.higher_is_better(metric), tolerance)

    sets = [one("sums", "exact_match", 0.25), one("text", "bits_per_byte", 0.5)]
    ln2 = float(np.log(2))
    before = {"sums": answered("11110000"), "text": of_bytes([2 * ln2] * 4)}
    after = {"sums": answered("11000000"), "text": of_bytes([2.6 * ln2] * 4)}
    verdicts = protected.judge(sets, before, after)
    assert verdicts["sums"].worsening.value == 0.25  # at its tolerance, and not beyond
    assert not verdicts["sums"].broken
    assert verdicts["text"].worsening.value == pytest.approx(0.6)
    assert verdicts["text"].broken
    after["sums"] = answered("10000000")
    assert protected.judge(sets, before, after)["sums"].broken  # worse by 0.375
    assert not protected.judge(sets, before, after, "interval")["sums"].broken  # by chance, perhaps
    assert protected.judge(sets, before, after, "interval")["text"].broken  # every row is worse by as much
    assert not any(
        one.broken for one in protected.judge(sets, after, before).values()
    )  # what became better breaks nothing
    same = protected.judge(sets, before, before)["sums"]
    assert "0.5 to 0.5, worse by 0 [0, 0], tolerance 0.25" in same.told()  # and not by -0
    told = protected.account(verdicts, before, after)["text"]
    assert told["difference"]["bits_per_byte"]["value"] == pytest.approx(0.6)
    assert told["before"]["bits_per_byte"]["value"] == pytest.approx(2.0)
    json.dumps(told)


def test_a_worsening_that_is_no_number_breaks_a_set() -> None:
    one = protected.Protected("text", config_lib.base(), None, "perplexity", False, 1.0)
    with np.errstate(invalid="ignore"):
        broken = protected.judge([one], {"text": of_bytes([1.0, 1.0])}, {"text": of_bytes([1.0, np.nan])})[
            "text"
        ].broken
    assert broken


def opinions(path: Path, mood: str) -> Path:
    """Rows whose text says nothing, and whose answer is always the same."""
    path.write_text("text,mood\n" + "".join(f"the cat {n},{mood}\n" for n in range(32)))
    return path


@pytest.fixture
def forgetful(tiny_config: ConfigDict, texts: Path, tmp_path: Path) -> ConfigDict:
    """A run that learns to answer "good", and protected: that the answer is "bad"; and text that it does not make worse."""
    config = tiny_config
    config.data.train, config.data.prompt, config.data.label_column = (
        str(opinions(tmp_path / "good.csv", "good")),
        "{text}",
        "mood",
    )
    config.data.validation_fraction, config.train.eval_every_steps, config.tracking.report = 0.2, 2, True
    config.eval.split, config.eval.labels = "validation", ("bad", "good")
    bad = [
        ("data.test", str(opinions(tmp_path / "bad.csv", "bad"))),
        ("data.prompt", "{text}"),
        ("data.label_column", "mood"),
    ]
    bad += [
        ("eval.labels", ("bad", "good")),
        ("judged", "label_nll"),
        ("eval.bootstrap_samples", 50),
        ("eval.limit", 16),
    ]
    config.protect.sets = (
        general(texts, ("tolerance", 9.0), ("eval.bootstrap_samples", 50)),
        ("bad", (*bad, ("tolerance", 1.0))),
    )
    config.protect.every_steps, config.protect.kl_rows = 2, 8
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.schedule = 3e-3, 0.0, "constant"
    return config


def logged(config: ConfigDict, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def report(config: ConfigDict) -> dict:
    return json.loads((Path(config.workdir) / "report.json").read_text())


@pytest.mark.usefixtures("quick_compile")
def test_a_run_says_what_it_cost(forgetful: ConfigDict, capsys) -> None:
    config = forgetful
    run.train(config, Path(config.workdir))
    told, scores = report(config)["protected"]["bad"], logged(config, "protected/bad/label_nll")
    print(told, scores, logged(config, "base_kl"), logged(config, "protected/general/bits_per_byte"))
    assert list(scores) == [-1, 1, 3, 5]
    assert scores[-1] == told["before"]["label_nll"]["value"]
    assert scores[5] == told["after"]["label_nll"]["value"]
    gap = told["difference"]["label_nll"]
    assert gap["value"] == pytest.approx(scores[5] - scores[-1])
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert told["broken"]
    assert not report(config)["protected"]["general"]["broken"]
    kl = logged(config, "base_kl")
    assert list(kl) == [1, 3, 5]
    assert 0 < kl[1] < kl[5]
    assert report(config)["base_kl"] == kl[5]
    page = (Path(config.workdir) / "report.html").read_text()
    assert "Protected set bad is broken: label_nll" in page
    assert "BROKEN" in capsys.readouterr().out
    run.evaluate(config, Path(config.workdir))  # the same again, against the scores that the run has kept
    assert "protected bad, after: label_nll" in capsys.readouterr().out
    evaluation = json.loads((Path(config.workdir) / "evaluation.json").read_text())
    assert evaluation["protected"]["bad"]["before"] == told["before"]
    assert evaluation["protected"]["bad"]["after"]["label_nll"]["value"] == pytest.approx(
        told["after"]["label_nll"]["value"]
    )


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[str, float]) -> list[str]:
    """Has sets measured by what a script says of each moment, in nats per byte; returns when they were."""
    asked: list[str] = []

    def measure(sets: list[protected.Protected], *rest: object) -> dict[str, tasks.Result]:
        asked.append(str(rest[-1]))
        return {one.name: of_bytes([losses[asked[-1]]] * 4) for one in sets}

    monkeypatch.setattr(protected, "measure", measure)
    return asked


@pytest.fixture
def judged(tiny_config: ConfigDict, texts: Path) -> ConfigDict:
    """Six steps, looked at after every other one; bits per byte may rise by 1, which are ln 2 nats."""
    config = tiny_config
    config.protect.sets = (general(texts, ("tolerance", 1.0), ("eval.bootstrap_samples", 20)),)
    config.protect.every_steps, config.protect.kl_rows, config.tracking.report = 2, 0, True
    return config


def exported(config: ConfigDict) -> bytes:
    return (Path(config.workdir) / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("quick_compile")
def test_a_broken_set_ends_the_run_and_so_it_stays(judged: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    config, workdir = judged, Path(judged.workdir)
    config.protect.on_broken = "stop"
    asked = scripted(monkeypatch, {"before": 1.0, "step 2": 1.5, "step 4": 2.0, "after": 2.0})
    run.train(config, workdir)
    assert asked == ["before", "step 2", "step 4"]  # what is exported is what was looked at last
    assert sorted(logged(config, "loss")) == [0, 1, 2, 3]
    assert (
        "Stopped after step 4 of 6, for there it broke a protected set beyond its tolerance: general"
        in report(config)["notices"][0]
    )
    result = exported(config)
    config.checkpoint.resume = True
    run.train(config, workdir)
    assert asked[3:] == ["after"]  # before was kept; no further step was taken
    assert sorted(logged(config, "loss")) == [0, 1, 2, 3]
    assert exported(config) == result


@pytest.mark.usefixtures("quick_compile")
def test_a_broken_set_rolls_the_run_back(judged: ConfigDict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, workdir = judged, Path(judged.workdir)
    config.protect.on_broken, config.checkpoint.every_seconds = (
        "rollback",
        0.0,
    )  # every step is saved, the latest two kept
    config.protect.every_steps, config.train.steps = 1, 6
    asked = scripted(monkeypatch, {"before": 1.0, "step 1": 1.5, "step 2": 2.0, "after": 1.5})
    run.train(config, workdir)
    assert asked == ["before", "step 1", "step 2", "after"]
    told = report(config)
    assert "Rolled back to step 1" in told["notices"][1]
    assert not told["protected"]["general"]["broken"]
    result = exported(config)
    config.export.output, config.export.checkpoint = str(tmp_path / "again"), "best"
    run.export(config, workdir)  # what is best is what the run was rolled back to
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == result
    config.export.checkpoint, config.export.output = "latest", str(tmp_path / "latest")
    run.export(config, workdir)
    assert (tmp_path / "latest/adapter_model.safetensors").read_bytes() != result


@pytest.mark.usefixtures("quick_compile")
def test_without_a_step_within_tolerance_nothing_is_exported(
    judged: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = judged, Path(judged.workdir)
    config.protect.on_broken = "rollback"
    scripted(monkeypatch, {"before": 1.0, "step 2": 2.0, "after": 2.0})
    with pytest.raises(
        UserError, match="nothing is exported: every measured checkpoint breaks a protected set.*general"
    ):
        run.train(config, workdir)
    assert not (workdir / "adapter").exists()
    assert "Nothing is exported" in report(config)["alerts"][1]
    with pytest.raises(UserError, match="export.checkpoint='latest' takes the last all the same"):
        run.export(config, workdir)


@pytest.mark.usefixtures("quick_compile")
def test_a_killed_run_gives_the_same_verdicts(
    judged: ConfigDict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cut off after the step that was within tolerance was saved; the run that resumes is rolled back to it."""
    config, workdir = judged, Path(judged.workdir)
    config.protect.on_broken, config.train.steps = "rollback", 6
    losses = {"before": 1.0, "step 2": 1.5, "step 4": 2.0, "after": 1.5}
    asked, killed = scripted(monkeypatch, losses), protected.measure

    def cut_off(*given: object) -> dict[str, tasks.Result]:
        if given[-1] == "step 4":
            raise KeyboardInterrupt
        return killed(*given)

    monkeypatch.setattr(protected, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.train(config, workdir)
    monkeypatch.setattr(protected, "measure", killed)
    config.checkpoint.resume = True
    run.train(config, workdir)
    assert asked == ["before", "step 2", "step 4", "after"]
    resumed, told = exported(config), report(config)["protected"]
    config.checkpoint.resume, config.workdir = False, str(tmp_path / "whole")
    run.train(config, Path(config.workdir))
    assert exported(config) == resumed
    assert report(config)["protected"] == told


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert tracking.red("broken", Terminal()) == "\x1b[31mbroken\x1b[0m"
    assert tracking.red("broken", io.StringIO()) == "broken"
    monkeypatch.setenv("NO_COLOR", "1")
    assert tracking.red("broken", Terminal()) == "broken"


@pytest.mark.usefixtures("quick_compile")
def test_a_model_of_labels_is_protected_on_rows_of_labels(forgetful: ConfigDict, tmp_path: Path) -> None:
    config = forgetful
    config.model.head, config.model.labels, config.train.objective, config.train.steps = (
        "sequence",
        ("bad", "good"),
        "classify",
        2,
    )
    given = [pair for pair in config.protect.sets[1][1] if pair[0] != "eval.labels"]
    config.protect.sets, config.eval.labels, config.eval.before_after = (("bad", tuple(given)),), (), False
    run.train(config, Path(config.workdir))
    assert set(report(config)["protected"]["bad"]["after"]) == {"accuracy", "macro_f1", "label_nll"}
    assert "base_kl" not in report(config)  # a head that starts random has no distribution to keep
