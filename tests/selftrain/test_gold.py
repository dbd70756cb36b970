"""Self-distillation on a tiny model: gold answers restated, or a teacher that sees them; what a round may cost; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, validation
from jaxtune.data import contexts
from jaxtune.data.completions import lay_out, taught_fields
from jaxtune.data.formats import Example
from jaxtune.selftrain import gold, limits, sampling
from jaxtune.train import loop
from jaxtune.types import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")
TOLD = "{question} {answer}"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rewriting(config: ConfigDict) -> ConfigDict:
    config.self_training.method, config.self_distill.verifier = "rewrite", "answer"
    config.reward.functions, config.self_distill.rewrite_prompt = (), TOLD
    config.self_distill.entropy_prompts, config.train.steps, config.eval.metric = 8, 2, "exact_match"
    return config


@pytest.fixture
def taught(rewriting: ConfigDict) -> ConfigDict:
    rewriting.self_training.method, rewriting.self_training.from_base = "demonstration", False
    rewriting.self_distill.demonstration_prompt, rewriting.train.steps = TOLD, 3
    return rewriting


def test_rewrites_that_verify_are_learned_and_gold_where_none_does(rewriting: ConfigDict) -> None:
    config, workdir = rewriting, Path(rewriting.workdir)
    config.self_training.rounds = 1
    validation.validate(config)
    run.self_train(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    for number, told in enumerate(report["rounds"]["all"], 1):
        folder = workdir / f"round_{number:02d}"
        kept, refused, trained = (lines(folder / f"{name}.jsonl") for name in ("kept", "refused", "trained"))
        assert len(kept) == told["kept"] > 0
        assert len(kept) + told["gold"] == told["prompts"] == len(trained), "one answer to each prompt"
        assert len(kept) + len(refused) == told["sampled"] == 2 * told["prompts"]
        assert {row["reason"] for row in refused} <= {"below_threshold", "cut_off", "empty", "enough_for_prompt"}
        for row in kept:
            assert row["answer"] in row["messages"][-1]["content"]
        for row in trained[len(kept) :]:
            assert row["messages"][-1]["content"] == row["answer"]
        assert all(row["messages"][0]["content"] == row["text"] for row in trained), "learned without being told"
        assert 0 < told["entropy"] < 8
    beside = report["rounds"]["beside"]
    assert [one["title"] for one in beside] == ["Entropy, nats a token"]
    assert len(beside[0]["estimates"]) == 2
    assert report["rounds"]["gold"]["steps"] == 2
    assert "Entropy, nats a token by round" in (workdir / "report.html").read_text()
    assert (workdir / "rounds.png").exists()


class Killed(Exception):
    """What a test kills a run by."""


def test_a_model_is_taught_by_itself_with_the_answer_in_sight(
    taught: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is the divergence on its own answers; each round goes on from the one before; a kill changes nothing."""
    config, workdir = taught, Path(taught.workdir)
    validation.validate(config)
    record = loop._record

    def dies(settings: ConfigDict, *rest: Any) -> None:
        if "round 2" in settings.name and rest[2].step == 2 and not died:
            died.append(True)
            raise Killed
        record(settings, *rest)

    died: list[bool] = []
    monkeypatch.setattr(loop, "_record", dies)
    with pytest.raises(Killed):
        run.self_train(config, workdir)
    config.checkpoint.resume = True
    run.self_train(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    first, second = report["rounds"]["all"]
    assert first["sampled"] == 0
    assert first["gold"] == first["prompts"]
    assert report["rounds"]["gold"]["steps"] == first["steps"] + second["steps"] == 6, "the control takes as many steps"
    made = json.loads((workdir / "round_02" / "train" / "config.json").read_text())
    assert made["tune"]["adapter"] == str(workdir / "round_01" / "train" / "adapter")
    metrics = [row for row in lines(workdir / "round_01" / "train" / "metrics.jsonl") if "divergence" in row]
    for row in metrics:
        assert row["own_words"] == 1
        assert row["left_out_completions"] == 0
        np.testing.assert_allclose(row["loss"], row["divergence"], rtol=1e-5)
    assert metrics[0]["divergence"] > 1e-4, (
        "a teacher that sees the answer expects other words, though its weights are the same"
    )


def test_a_teacher_that_sees_no_more_than_its_student_teaches_nothing(taught: ConfigDict) -> None:
    """At the first step both are one model on one text: the fields line both up, or the divergence would not be 0."""
    taught.self_training.rounds, taught.self_training.control, taught.train.steps = 1, False, 1
    taught.self_distill.demonstration_prompt, taught.self_distill.entropy_prompts = "{question}", 0
    run.self_train(taught, Path(taught.workdir))
    (row,) = [
        row for row in lines(Path(taught.workdir) / "round_01" / "train" / "metrics.jsonl") if "divergence" in row
    ]
    assert row["trained_tokens"] > 0
    assert abs(row["divergence"]) < 1e-5


def test_what_a_teacher_reads_is_laid_out_beside_its_students() -> None:
    prompts, shown = [[1, 2], [3], [4, 5]], [[1, 9, 9, 2], [9, 3, 3], [4, 9, 9, 9, 5]]
    completions = [np.asarray(one, np.int32) for one in ([11, 12], [13], [14, 15, 16])]
    lengths, order = [len(s) + len(c) for s, c in zip(shown, completions, strict=True)], np.arange(3)
    student = lay_out(prompts, completions, [0, 1, 2], order, 1, 3, 10, 0, lengths)
    fields = taught_fields(student, lay_out(shown, completions, [0, 1, 2], order, 1, 3, 10, 0, lengths))
    batch = student.batch(0)
    trains = batch["weights_BT"] > 0
    assert trains.sum() == 6
    row, _ = np.nonzero(trains)
    at = fields["teacher_at_BT"][trains]
    assert (fields["teacher_tokens_BT"][row, at + 1] == batch["targets_BT"][trains]).all()
    assert (fields["teacher_segment_ids_BT"][row, at + 1] == fields["teacher_segment_ids_BT"][row, at]).all()


def test_a_prompt_is_told_its_answer_in_place_of_its_last_turn() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    chat = contexts.told(Example("r:1", messages=tuple(turns), answer="a"), "{question}? {answer}!", "key")
    assert [one["content"] for one in chat.messages or ()] == ["s", "q? a!"]
    plain = contexts.told(Example("r:1", prompt="q ", answer="a", row={"why": "w"}), "{question}|{answer}|{why}", "key")
    assert plain.prompt == "q|a|w"
    with pytest.raises(UserError, match="r:1: key tells the row's answer, and this row has none"):
        contexts.told(Example("r:1", prompt="q"), "{answer}", "key")


@pytest.mark.parametrize(
    ("verifier", "regex", "text", "right"),
    [
        ("answer", "", "It is 7, surely.", True),
        ("answer", "", "It is 17.", False),
        ("answer", r"= (\d+)", "3 + 4 = 7 and 7 = 8", False),
        ("answer", r"= (\d+)", "3 + 4 = 7", True),
        ("similar", "", "7", True),
        ("similar", "", "it may well be 7 or less", False),
    ],
)
def test_verifiers(config: ConfigDict, verifier: str, regex: str, text: str, right: bool) -> None:
    config.self_training.method, config.self_distill.verifier, config.reward.completion_regex = (
        "rewrite",
        verifier,
        regex,
    )
    score = gold.judge(config)([Example("r:1", prompt="3 + 4", answer="7")], [text])[0][0]
    assert bool(score >= gold.threshold(config)) is right


def test_words_in_common() -> None:
    assert gold.overlap("the cat sat", "The cat, the cat") == pytest.approx(2 * 2 / 7)
    assert gold.overlap("", "the") == 0


def test_a_round_that_costs_too_much_is_the_last(config: ConfigDict) -> None:
    def told(now: float, before: float = 0.6, broken: bool = False) -> dict[str, Any]:
        kept = {"metric": "accuracy", "tolerance": 0.02, "higher_is_better": True, "broken": broken}
        kept |= {"before": {"accuracy": {"value": before}}, "after": {"accuracy": {"value": now}}}
        return {"entropy": 0.3, "protected": {"boolq": kept}}

    assert limits.broken(config, 1.0, [told(0.5)]) == ""
    config.self_distill.entropy_floor = 0.5
    said = limits.broken(config, 1.0, [told(0.6)])
    assert (
        said
        == "the entropy of its answers is 0.300 nats a token, below self_distill.entropy_floor=0.5 of the untuned model's 1.000"
    )
    config.self_distill.entropy_floor = 0.2
    said = limits.broken(config, 1.0, [told(0.5, broken=True)])
    assert said == "protected set boolq is broken: accuracy 0.5, 0.6 before (tolerance 0.02)"
    config.self_training.from_base = False
    creeping = [told(0.59), told(0.575, before=0.59)]
    assert "accuracy 0.575, 0.6 before" in limits.broken(config, 1.0, creeping), "no round lost much, all of them did"
    config.self_distill.stop = False
    assert limits.broken(config, 1.0, creeping) == ""


def test_nothing_verifies_and_the_entropy_falls(
    rewriting: ConfigDict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gold alone is trained on, which is said; a round below the floor is the last, and nothing is the result."""
    config, workdir = rewriting, Path(rewriting.workdir)
    monkeypatch.setattr(gold, "judge", lambda _: lambda examples, texts: (np.zeros(len(texts)), {}, {}))
    entropies = iter([1.0, 0.1])
    monkeypatch.setattr(limits, "entropy", lambda *_: next(entropies))
    config.self_distill.entropy_floor, config.self_training.control = 0.5, False
    config.tracking.progress = "lines"
    run.self_train(config, workdir)
    said = capsys.readouterr()
    assert "none verified, and it trains on these alone" in said.err
    assert "no result. Round 1 is the last, and the model as it was is the better one" in said.out
    assert not (workdir / "round_02").exists()
    report = json.loads((workdir / "report.json").read_text())
    assert report["alerts"][0].startswith("Round 1 is the last")
    notices = report["notices"]
    assert any("none of" in one and "rewrites verified; it was trained on gold answers alone" in one for one in notices)


def _without_answers(config: ConfigDict) -> None:
    rows = Path(config.workdir).parent / "chats.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"who {i}"}]}) + "\n" for i in range(20))
    )
    config.data.train, config.data.format, config.data.label_column = str(rows), "messages", ""


def _set(**changes: object) -> Callable[[ConfigDict], None]:
    return lambda config: config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_answers, r"chats\.jsonl:\d+: self_training\.method='rewrite' starts from gold answers, and \d+ of \d+ rows have none"),
        (_set(self_distill__verifier="reward"), r"reward\.functions is empty: name at least one"),
        (_set(self_distill__verifier="rewards"), "self_distill.verifier is 'rewards'"),
        (_set(self_distill__rewrite_prompt="Say it again."), "does not tell the gold answer: put {answer} in it"),
        (_set(self_distill__rewrite_prompt="{answer"), "self_distill.rewrite_prompt is not a template"),
        (_set(self_distill__rewrite_prompt="{anser}{answer}"), "self_distill.rewrite_prompt names column 'anser'; did you mean 'answer'"),
        (_set(self_training__rounds=0), "self_training.rounds is 0; expected at least 1"),
        (_set(train__objective="mlm"), "train.objective is 'mlm'; set 'sft'"),
        (_set(self_training__with_gold=True), "'rewrite' starts from gold answers; set it to False"),
        (_set(self_training__method="demonstration"), "set self_training.from_base=False"),
        (_set(self_distill__entropy_floor=0.5, self_distill__entropy_prompts=0), "entropy_prompts=0 does not measure"),
        (_set(distill__demonstration="{question}"), "distill.demonstration='{question}' .*does not tell"),
        (_set(distill__demonstration="{answer}"), "goes with train.objective='distill' and distill.on_policy=1.0"),
        (_set(protect__on_broken="stop"), "protect.on_broken='stop'"),
    ],
)  # fmt: skip
def test_refused_with_one_clear_line(
    rewriting: ConfigDict, change: Callable[[ConfigDict], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(rewriting)
    monkeypatch.setattr(sampling, "answers", lambda *_: pytest.fail("sampled"))

    def launched() -> None:
        validation.validate(rewriting)
        run.self_train(rewriting, Path(rewriting.workdir))

    with pytest.raises(UserError, match=says):
        launched()
