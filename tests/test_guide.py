"""`guide` end to end on a tiny model: asked, answered, trained, compared, traced; stopped anywhere; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import guide, launch, run, validation, workdir
from jaxtune.evals import tasks as evals_tasks
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance import training
from jaxtune.lineage import chain
from jaxtune.review import people, queue, store, tasks
from jaxtune.review.record import Item, Verdict
from jaxtune.train import round_files
from jaxtune.types import RESUME_EXIT_CODE, UserError, Waiting
from jaxtune.workdir import read_lines, write_lines

pytestmark = pytest.mark.usefixtures("quick_compile")
TASKS = (
    ("fix", (("kind", "edit"), ("overlap", 3))),
    ("better", (("kind", "compare"), ("overlap", 2))),
    ("old_new", (("kind", "compare"), ("overlap", 1))),
)


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    """A model that says good or bad, taught by a few steps; experts correct its answers and compare them."""
    folder, rng = tmp_path_factory.mktemp("moods"), np.random.default_rng(0)
    words = ["red", "cat", "sat", "ran", "mat", "hill", "sky", "under"]
    rows = [f"{' '.join(rng.choice(words, 4))} {mood},{mood}" for mood in ["good", "bad"] * 40]
    assert len(set(rows)) == len(rows)
    (folder / "rows.csv").write_text("text,answer\n" + "\n".join(rows) + "\n")
    (folder / "guideline.md").write_text("The last word is the answer.")
    made = config_lib.base()
    made.name, made.workdir, made.model.source = "moods", str(folder / "sft"), str(tiny_model)
    made.data.train, made.data.prompt, made.data.label_column = str(folder / "rows.csv"), "{text}", "answer"
    made.data.test_fraction, made.data.validation_fraction, made.data.max_length = 0.25, 0.0, 64
    made.train.batch_size, made.train.steps, made.train.loss_chunk_tokens = 8, 4, 64
    made.tune.rank, made.tune.dropout, made.optim.learning_rate = 4, 0.0, 1e-2
    made.tracking.progress, made.eval.before_after = "off", False
    made.eval.bootstrap_samples, made.generate.max_new_tokens, made.eval.labels = 20, 6, ("bad", "good")
    made.generate.temperature = 1.5
    run.train(made.copy_and_resolve_references(), Path(made.workdir))
    made.tune.adapter, made.train.steps, made.train.beside = (
        str(folder / "sft" / "adapter"),
        6,
        (("cpo", 0.5, "guide:pairs"),),
    )
    made.review.tasks = (("fix", (*TASKS[0][1], ("guideline", str(folder / "guideline.md")))), *TASKS[1:])
    made.guide.rows, made.guide.max_new_tokens, made.guide.slots, made.guide.temperature = 16, 6, 8, 1.5
    made.guide.compare_task, made.guide.compare_rows = "old_new", 8
    made.protect.sets = (
        (
            "beside",
            (
                ("data.test", str(folder / "rows.csv")),
                ("data.prompt", "{text}"),
                ("data.label_column", "answer"),
                ("eval.limit", 8),
            ),
        ),
    )
    validation.validate(made)
    return made


def in_folder(config: ConfigDict, folder: Path, **guide_fields: Any) -> ConfigDict:
    made = config.copy_and_resolve_references()
    made.guide.folder = str(folder)
    for key, value in guide_fields.items():
        made.guide[key] = value
    return made


def answer(item: Item) -> dict[str, Any]:
    """What an expert who knows says."""
    right = item.payload["prompt"][-1]["content"].split()[-1]
    if "answer" in item.payload:
        return {"text": right}
    by = sorted(item.payload["candidates"], key=lambda one: (one["text"] != right, len(one["text"]), one["text"]))
    return {"order": [[one["id"]] for one in by], "bad": False}


def experts(folder: Path, config: ConfigDict, round: int = 1, flagged: int = 0) -> int:
    """Three people who answer all that is asked; the first flags some items. Returns how many answers they gave."""
    every, given = tasks.read(config.review.tasks), 0
    with store.opened(str(folder / "review.db")) as engine:
        known = people.everyone(engine) or [
            people.add(engine, name, "expert") for name in ("Ann Ames", "Bo Berg", "Cy Cole")
        ]
        for person in known:
            while (assigned := queue.assign(engine, person, every, round)) is not None:
                item = assigned.item
                rest = {"shown": {}, "guideline": 0, "seconds": 2.0}
                if flagged and "answer" in item.payload:
                    flag = {"flags": [{"type": "privacy", "group": "", "note": "a name"}]}
                    queue.submit(
                        engine, person, every, Verdict(uuid.uuid4().hex, item.id, person.id, "flag", flag, **rest)
                    )
                    flagged -= 1
                verdict = Verdict(uuid.uuid4().hex, item.id, person.id, every[item.task].kind, answer(item), **rest)
                assert queue.submit(engine, person, every, verdict)
                given += 1
    return given


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round that came to its end."""
    folder = tmp_path_factory.mktemp("whole") / "rounds"
    mine = in_folder(config, folder)
    with pytest.raises(
        Waiting, match=r"(?s)round 1 waits for .*fix 0 of 48 answers.*jaxtune review --config=\S+review.json"
    ):
        guide.guide(mine, Path("unused"))
    assert experts(folder, mine, flagged=2) > 48
    with pytest.raises(Waiting, match="blind comparison"):
        guide.guide(mine, Path("unused"))
    experts(folder, mine)
    guide.guide(mine, Path("unused"))
    return folder


@pytest.fixture
def copy(whole: Path, config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """A config whose folder is a copy of that round."""
    shutil.copytree(whole, tmp_path / "rounds")
    return in_folder(config, tmp_path / "rounds")


def test_a_round_leaves_rows_that_know_their_verdicts(whole: Path) -> None:
    data = whole / "round_01" / "data"
    sft, pairs, trained = (lines(data / f"{name}.jsonl") for name in ("sft", "pairs", "train"))
    assert trained == sft
    assert len(sft) == 14, "16 edits, two of them flagged"
    assert [one["type"] for one in lines(data / "flagged.jsonl")] == ["privacy"] * 2
    taken = {one["id"]: one for one in lines(data / "verdicts.jsonl")}
    for row in sft:
        assert row["completion"][0]["content"] == row["prompt"][-1]["content"].split()[-1]
        assert len(row["verdicts"]) == row["agreed"] == row["asked"] == 3
        assert all(taken[one]["item"] == row["item"] for one in row["verdicts"])
        assert row["guideline"] == [1]
    assert {row["task"] for row in pairs} == {"fix", "better"}
    for row in pairs:
        right = row["prompt"][-1]["content"].split()[-1]
        assert row["chosen"] == right or (row["task"] == "better" and len(row["chosen"]) <= len(row["rejected"]))


def test_the_ledger_and_the_report_tell_the_round(whole: Path) -> None:
    base, trained, compared = chain.read(whole / "ledger.jsonl")
    assert [line["kind"] for line in (base, trained, compared)] == ["base", "round", "comparison"]
    assert (trained["round"], trained["parent"], trained["verdicts"]["people"]) == (1, 0, 3)
    assert trained["data"]["train.jsonl"]["rows"] == 14
    assert trained["left_out"]["fix"] == {"flagged": 2}
    assert set(trained["scores"]) == {"held-out", "beside"}
    assert (whole / trained["weights"] / "adapter_config.json").exists()
    won = compared["wins"] + compared["ties"] + compared["losses"]
    assert (won, compared["unanswered"]) == (8, 0)
    page = (whole / "round_01" / "report.html").read_text()
    for words in (
        "Blind comparison of the new model with the old",
        "Items left out",
        "expert 1",
        "somebody flagged it",
    ):
        assert words in page
    assert "Ann Ames" not in page


def test_a_finished_round_is_told_again_and_changes_nothing(
    copy: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(copy.guide.folder)
    before = (folder / "ledger.jsonl").read_text()
    guide.guide(copy, Path("unused"), train=nobody)
    assert (folder / "ledger.jsonl").read_text() == before
    assert re.search(
        r"new against old, blind: \d better, \d ties, \d worse, 0 unanswered; win rate 0\.\d+", capsys.readouterr().out
    )


def nobody(config: ConfigDict, workdir: Path) -> None:
    raise AssertionError("nothing is to be trained")


def test_a_row_is_traced_to_verdicts_item_people_and_model(
    copy: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(copy.guide.folder)
    train = folder / "round_01" / "data" / "train.jsonl"
    row = lines(train)[4]
    for asked in (row["id"], f"{train}:5"):
        copy.guide.trace = asked
        guide.guide(copy, Path("unused"))
        said = capsys.readouterr().out
        for part in (
            row["id"], row["item"], *row["verdicts"], "expert 1", "expert 2", "expert 3", "guideline version 1", copy.model.source,
            copy.tune.adapter, "trained into round_01/train/adapter (sft), ledger line 1", "rows.csv, row rows.csv:",
        ):  # fmt: skip
            assert part in said
        assert "Ann" not in said
    copy.guide.show_names = True
    guide.guide(copy, Path("unused"))
    assert "Ann Ames" in capsys.readouterr().out
    for asked, match in (
        ("sft-none", "no row of"),
        (f"{train}:99", "has 14 lines"),
        (f"{folder / 'ledger.jsonl'}:1", "no row that guide made"),
    ):
        copy.guide.trace = asked
        with pytest.raises(UserError, match=match):
            guide.guide(copy, Path("unused"))


def test_a_trace_finds_what_was_changed(copy: ConfigDict) -> None:
    train = Path(copy.guide.folder) / "round_01" / "data" / "train.jsonl"
    copy.guide.trace = lines(train)[0]["id"]
    train.write_text(train.read_text().replace('"good"', '"bad"'))
    with pytest.raises(UserError, match="is not what round 1 trained on"):
        guide.guide(copy, Path("unused"))


def test_the_next_round_starts_from_the_last_and_asks_other_rows(copy: ConfigDict) -> None:
    folder, copy.guide.round, copy.guide.rows = Path(copy.guide.folder), 2, 10
    with pytest.raises(Waiting):
        guide.guide(copy, Path("unused"))
    first, second = (lines(folder / f"round_{n:02d}" / "items.jsonl") for n in (1, 2))
    seen = {(one["task"], one["origin"]["row_sha256"]) for one in first}
    assert second
    assert not seen & {(one["task"], one["origin"]["row_sha256"]) for one in second}
    made_by = [model for one in second for model in one["origin"]["models"].values()]
    assert {(model["checkpoint"], model["round"]) for model in made_by} == {
        (str(folder / "round_01" / "train" / "adapter"), 1)
    }
    copy.guide.start_from = 0
    with pytest.raises(UserError, match="began from round 1, and guide.start_from asks for 0"):
        guide.guide(copy, Path("unused"))


class Stopped(BaseException):
    """What a kill is in one process."""


def test_stopped_anywhere_the_same_command_goes_on(
    whole: Path, config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before its first file, its second, its third, and so on; what comes out is an uninterrupted round's."""
    folder = tmp_path / "rounds"
    mine = in_folder(config, folder)
    real, left, num_stops = folder_lib.write_whole, [0], 0

    def stopping(path: Path, text: str) -> None:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        real(path, text)

    for module in (folder_lib, workdir):  # single files, and files of lines
        monkeypatch.setattr(module, "write_whole", stopping)
    waited = 0
    while True:
        left[0] = num_stops
        try:
            guide.guide(mine, Path("unused"))
            break
        except Stopped:
            num_stops += 1
            assert num_stops < 40
        except Waiting:
            waited += 1
            if waited < 3:
                same_verdicts(whole, folder, mine)
    assert num_stops > 5
    for name in ("sft", "pairs", "train", "left_out"):
        rows, wanted = (lines(each / "round_01" / "data" / f"{name}.jsonl") for each in (folder, whole))
        assert rows == wanted
    weights = [
        (each / "round_01" / "train" / "adapter" / "adapter_model.safetensors").read_bytes() for each in (folder, whole)
    ]
    assert weights[0] == weights[1]
    assert [line["kind"] for line in chain.read(folder / "ledger.jsonl")] == ["base", "round", "comparison"]


def same_verdicts(whole: Path, folder: Path, config: ConfigDict) -> None:
    """Gives the items that are asked the answers that they have in another folder."""
    with store.opened(str(whole / "review.db")) as engine, store.opened(str(folder / "review.db")) as other:
        if not people.everyone(other):
            with store.writing(engine) as there, store.writing(other) as here:
                rows = [dict(row) for row in there.execute(store.people.select()).mappings()]
                here.execute(store.people.insert(), rows)
        asked = {item.id for item in store.read_items(other, 1)}
        for verdict in store.read_verdicts(engine, 1, all_of_them=True):
            if verdict.item in asked:
                store.add_verdict(other, verdict)


def test_the_command_line_ends_with_75_while_answers_are_missing(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = in_folder(config, tmp_path / "rounds", answers="rows", tasks=("fix",))
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(mine))
    assert launch.main(["guide", f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == RESUME_EXIT_CODE
    assert "fix 0 of 48 answers" in capsys.readouterr().err


class Served:
    """A page behind which experts sit, in the place of the process that serves it."""

    def __init__(self, answer: Any, command: list[str]):
        self.answer, self.command, self.ended, self.returncode = answer, command, False, 1
        served.append(self)

    def poll(self) -> int | None:
        return self.answer()

    def terminate(self) -> None:
        self.ended = True

    def wait(self) -> int:
        return 0


served: list[Served] = []


def test_waiting_serves_the_page_until_enough_is_answered(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rounds of mine"
    mine = in_folder(config, folder, answers="rows", tasks=("fix",), wait=True, poll_seconds=0.01)
    mine.train.beside = ()

    def stop(config: ConfigDict, workdir: Path) -> None:
        raise Stopped

    def answered() -> None:
        experts(folder, mine)

    monkeypatch.setattr(guide.subprocess, "Popen", lambda command: Served(lambda: 1, command))
    with pytest.raises(UserError, match="the page ended .exit code 1. before enough was answered"):
        guide.guide(mine, Path("unused"), stop)
    monkeypatch.setattr(guide.subprocess, "Popen", lambda command: Served(answered, command))
    with pytest.raises(Stopped):
        guide.guide(mine, Path("unused"), stop)
    assert len(lines(folder / "round_01" / "data" / "train.jsonl")) == 16
    assert all(one.ended for one in served)
    assert served[-1].command[-3:] == [
        "review",
        f"--config={folder / 'round_01' / 'review.json'}",
        f"--workdir={folder}",
    ]


def change(config: ConfigDict, **fields: Any) -> ConfigDict:
    made = config.copy_and_resolve_references()
    for key, value in fields.items():
        section, _, name = key.rpartition("__")
        made[section][name] = value
    return made


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"review__tasks": ()}, "guide needs review.tasks"),
        ({"guide__tasks": ("fxi",)}, "did you mean 'fix'"),
        ({"guide__compare_task": "fix"}, "expected one of kind 'compare'"),
        ({"guide__tasks": ("fix", "old_new")}, "give one of them a task of its own"),
        ({"train__objective": "kto", "train__beside": ()}, "from which train.objective='kto' learns nothing"),
        ({"train__objective": "grpo"}, "learns from none of them"),
        ({"guide__round": 2}, "needs round 1"),
        ({"guide__temperature": 0.0}, "needs outputs that differ"),
        ({"data__test_fraction": 0.0}, "measures each round on held-out rows"),
        ({"train__beside": (("dpo", 0.5, "guide:pears"),)}, "guide:pears"),
    ],
)
def test_a_config_that_no_round_can_follow_is_refused(
    config: ConfigDict, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=re.escape(match)):
        guide.guide(change(in_folder(config, tmp_path / "rounds"), **fields), Path("unused"))
    assert not list(tmp_path.glob("rounds/round_*"))


def test_nothing_answered_and_nothing_agreed(config: ConfigDict, tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    mine = in_folder(config, folder, answers="rows", tasks=("fix",), enough=0.0)
    with pytest.raises(UserError, match="no verdict was given"):
        guide.guide(mine, Path("unused"), nobody)
    experts(folder, mine)
    with store.opened(str(folder / "review.db")) as engine:
        names = [one.name for one in people.everyone(engine)]
    with pytest.raises(UserError, match=r"gave no row that train.objective='sft' learns from: fix: 16 not_trusted"):
        guide.guide(change(mine, guide__trust=tuple((name, 0.0) for name in names)), Path("unused"), nobody)
    with pytest.raises(UserError, match="guide.trust names 'nobody'"):
        guide.guide(change(mine, guide__trust=(("nobody", 0.5),)), Path("unused"), nobody)


def test_what_changes_under_a_round_is_refused(copy: ConfigDict, config: ConfigDict, tmp_path: Path) -> None:
    for fields, match in (
        ({"guide__rows": 3}, "guide.rows was 16 when round 1 was begun, and is 3 now"),
        ({"data__prompt": "{text}!"}, "data.prompt was"),
        ({"model__source": "preset:tiny"}, "preset"),
    ):
        with pytest.raises(UserError, match=re.escape(match)):
            guide.guide(change(copy, **fields), Path("unused"), nobody)
    rows = tmp_path / "rows.csv"
    shutil.copy(config.data.train, rows)
    mine = in_folder(change(config, data__train=str(rows)), tmp_path / "other", answers="rows", tasks=("fix",))
    with pytest.raises(Waiting):
        guide.guide(mine, Path("unused"))
    rows.write_text(rows.read_text().replace("good,good", "fine,good"))
    with pytest.raises(UserError, match=r"rows of data.train=.* have changed since round 1 began"):
        guide.guide(mine, Path("unused"))


def test_rules_and_rows_stay_once_the_rows_are_made(whole: Path, config: ConfigDict, tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    shutil.copytree(whole, folder)
    (folder / "ledger.jsonl").write_text((whole / "ledger.jsonl").read_text().splitlines()[0] + "\n")
    mine = in_folder(config, folder)
    with pytest.raises(UserError, match=r"guide.edits was 'majority' when the rows of round 1 were made"):
        guide.guide(change(mine, guide__edits="each"), Path("unused"), nobody)
    (folder / "round_01" / "data" / "sft.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"sft.jsonl is gone or was changed"):
        guide.guide(mine, Path("unused"), nobody)


def test_two_guides_and_a_broken_ledger(copy: ConfigDict) -> None:
    folder = Path(copy.guide.folder)
    with folder_lib.opened(folder), pytest.raises(UserError, match=r"another guide of .* is at work \(process \d+"):
        guide.guide(copy, Path("unused"))
    path = folder / "ledger.jsonl"
    path.write_text(path.read_text().replace('"people": 3', '"people": 9'))
    with pytest.raises(UserError, match="chain of hashes is broken"):
        guide.guide(copy, Path("unused"))


@pytest.mark.parametrize(("objective", "kinds"), [("dpo", "pairs"), ("orpo", "pairs")])
def test_pairs_train_and_are_measured_on_the_task(
    whole: Path, config: ConfigDict, tmp_path: Path, objective: str, kinds: str
) -> None:
    """The same verdicts, learned from as preferences."""
    folder = tmp_path / "rounds"
    mine = change(
        in_folder(config, folder, compare_task="", tasks=("fix", "better")), train__objective=objective, train__steps=2
    )
    with pytest.raises(Waiting):
        guide.guide(mine, Path("unused"))
    same_verdicts(whole, folder, mine)
    guide.guide(mine, Path("unused"))
    trained = chain.read(folder / "ledger.jsonl")[1]
    assert trained["objective"] == objective
    assert lines(folder / "round_01" / "data" / "train.jsonl") == lines(folder / "round_01" / "data" / f"{kinds}.jsonl")
    assert trained["scores"]["held-out"]["metric"] == "accuracy"


def test_a_reward_model_learns_from_ratings(config: ConfigDict, tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    mine = in_folder(config, folder, compare_task="", tasks=("score",), candidates=3)
    mine.train.objective, mine.train.steps, mine.tune.adapter, mine.protect.sets, mine.train.beside = (
        "reward",
        2,
        "",
        (),
        (),
    )
    mine.review.tasks, mine.eval.metric, mine.eval.labels = (("score", (("kind", "rate"),)),), "auto", ()
    mine.model.head = "sequence"
    with pytest.raises(Waiting):
        guide.guide(mine, Path("unused"))
    with store.opened(str(folder / "review.db")) as engine:
        person = people.add(engine, "Ann", "expert")
        every = tasks.read(mine.review.tasks)
        while (assigned := queue.assign(engine, person, every, 1)) is not None:
            rating = 1.0 + len(assigned.item.payload["answer"]) % 5
            given = Verdict(uuid.uuid4().hex, assigned.item.id, person.id, "rate", {"rating": rating}, {}, 0, 1.0)
            queue.submit(engine, person, every, given)
    guide.guide(mine, Path("unused"))
    trained = chain.read(folder / "ledger.jsonl")[1]
    assert (trained["objective"], trained["starts_others"], trained["scores"]) == ("reward", False, {})
    mine.guide.round, mine.guide.start_from = 2, 1
    with pytest.raises(UserError, match="round 1 of .* has no result that another could start from"):
        guide.guide(mine, Path("unused"))


def test_the_unsure_are_asked_first_and_suggestions_stand_with_their_item(config: ConfigDict, tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    mine = in_folder(config, folder, compare_task="", prelabels=True)
    mine.review.tasks = (
        ("mood", (("kind", "label"), ("labels", ("bad", "good")), ("order", "priority"), ("prelabels", "show"))),
    )
    mine.train.beside = ()
    with pytest.raises(Waiting):
        guide.guide(mine, Path("unused"))
    with store.opened(str(folder / "review.db")) as engine:
        items = {item.id: item for item in store.read_items(engine, 1)}
        person, every, scores = people.add(engine, "Ann", "expert"), tasks.read(mine.review.tasks), []
        while (assigned := queue.assign(engine, person, every, 1)) is not None:
            item = items[assigned.item.id]
            suggested, shares = assigned.item.payload["prelabel"], item.origin["shares"]
            assert suggested["score"] == max(shares)
            assert suggested["labels"] == [("bad", "good")[shares.index(max(shares))]]
            scores.append(max(shares))
            given = Verdict(uuid.uuid4().hex, item.id, person.id, "label", {"labels": ["good"]}, {}, 0, 1.0)
            queue.submit(engine, person, every, given)
    assert len(scores) == 16
    assert scores == sorted(scores)


def test_every_objective_that_learns_from_preferences_has_its_rows() -> None:
    from jaxtune.train.preferences import READERS

    assert set(READERS) <= set(training.LEARNS)


def test_a_text_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path: Path) -> None:
    text, file = "one\u2028two\u0085three\u2029four", tmp_path / "lines.jsonl"
    write_lines(file, [{"text": text}, {"text": "x"}])
    assert read_lines(file) == [{"text": text}, {"text": "x"}]
    round_files.keep_lines(file, lambda line: line["text"] == text)
    assert read_lines(file) == [{"text": text}]
    file.write_text(
        json.dumps({"row_id": "a", "answer": text, "after": {"prediction": text}}, ensure_ascii=False) + "\n"
    )
    assert evals_tasks.read_predictions(file, "after") == [{"row_id": "a", "answer": text, "prediction": text}]
    ledger = tmp_path / "ledger.jsonl"
    written = chain.append(ledger, chain.append(ledger, [], {"kind": "base", "name": text}), {"kind": "round"})
    assert chain.read(ledger) == written
