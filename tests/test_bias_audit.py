"""`audit` end to end on tiny models: two models on the same rows, what is kept, augmentation, flags; and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxtune import bias_audit, launch, validation
from jaxtune import config as config_lib
from jaxtune.data import pipeline
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")
PAIRS = (("pets", (("cats", ("cat", "red")), ("dogs", ("dog", "blue")))),)
BBQ = {
    "category": "Sky", "question_polarity": "neg", "context": "the cat and the dog sat", "question": "who ran",
    "answer_info": {"ans0": ["cat", "cats"], "ans1": ["dog", "dogs"], "ans2": ["?", "unknown"]},
    "additional_metadata": {"stereotyped_groups": ["cats"]}, "ans0": "the cat", "ans1": "the dog", "ans2": "what",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    lines = [
        f"{n},{word} sat {rest},{answer}"
        for n in range(10)
        for word, rest, answer in (("cat", "on", "good"), ("dog", "under", "bad"), ("bird", "over", "bad"))
    ]
    (folder / "rows.csv").write_text("id,text,answer\n" + "\n".join(lines) + "\n")
    rows = [
        BBQ | {"example_id": n, "context_condition": "disambig" if n % 2 else "ambig", "label": 0 if n % 2 else 2}
        for n in range(6)
    ]
    (folder / "bbq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "crows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        table.writerows(
            [n, f"the cat ran {word}", f"the dog ran {word}", "stereo", "age"]
            for n, word in enumerate(("on", "over", "under"))
        )
    return folder


@pytest.fixture
def config(files: Path, tiny_model: Path, tmp_path: Path) -> ConfigDict:
    c = config_lib.base()
    c.name, c.model.source, c.data.train, c.data.split_key = "tiny", str(tiny_model), str(files / "rows.csv"), "id"
    c.data.prompt, c.data.label_column, c.data.validation_fraction, c.data.test_fraction = "{text}", "answer", 0.0, 0.3
    c.eval.labels, c.eval.bootstrap_samples, c.tracking.progress = ("good", "bad"), 50, "off"
    c.audit.groups, c.audit.templates = PAIRS, (("text", "{pets} said {text}"),)
    return c


def test_two_models_on_the_same_rows(
    config: ConfigDict, files: Path, make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    config.audit.bbq, config.audit.crows = str(files / "bbq.jsonl"), str(files / "crows.csv")
    config.audit.models = (("base", "base"), ("other", str(other)))
    config.privacy.names = ("Jane Roe",)
    validation.validate(config)
    bias_audit.audit(config, tmp_path / "a")
    assert all(
        "Roe" not in (tmp_path / "a" / name).read_text() for name in ("audit.json", "report.json", "report.html")
    )
    told = json.loads((tmp_path / "a" / "audit.json").read_text())
    base, new = (told["figures"][name] for name in ("base", "other"))
    assert [(one["part"], one["name"], one["metric"], one["rows"]) for one in base] == [
        (one["part"], one["name"], one["metric"], one["rows"]) for one in new
    ]
    assert {one["part"] for one in base} == {"probes", "bbq", "crows"}
    for first, second, gap in zip(base, new, told["differences"]["other - base"], strict=True):
        assert gap["value"] == pytest.approx(second["value"] - first["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert 0 < gap["p"] <= 1
    assert any(one["value"] for one in told["differences"]["other - base"])  # they are not the same model
    names = {one["name"] for one in base if one["part"] == "probes"}
    assert names == {"pets: cats, dogs", "pets: cats, dogs in '{pets} said {text}'"}
    assert any("words were swapped" in notice for notice in told["notices"])
    page, said = (tmp_path / "a" / "report.html").read_text(), capsys.readouterr().out
    for text in (page, said):
        assert "s_AMB" in text
        assert "stereotype preferred" in text
        assert "other - base" in text
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {"probes.png", "bbq.png", "crows.png"}

    kept = (tmp_path / "a" / "models" / "other.json").read_bytes()
    (tmp_path / "a" / "models" / "base.json").unlink()
    bias_audit.audit(config, tmp_path / "a")  # measures what is not there, and nothing else
    assert (tmp_path / "a" / "models" / "other.json").read_bytes() == kept
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["figures"] == told["figures"]


def test_the_base_is_the_model_without_its_adapter(config: ConfigDict) -> None:
    config.tune.adapter, config.tune.method = "somewhere", "full"
    assert bias_audit.model_config(config, "").tune.adapter == "somewhere"
    assert bias_audit.model_config(config, "base").tune.adapter == ""


def test_models_are_found_in_workdirs_and_folders(config: ConfigDict, tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own, no model's
    with pytest.raises(UserError, match="neither a model nor an adapter"):
        bias_audit.model_config(config, str(tmp_path / "run"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    config.tune.method = "full"
    for what in (tmp_path / "run", adapter):
        found = bias_audit.model_config(config, str(what))
        assert (found.tune.adapter, found.tune.method, found.model.source) == (
            str(adapter),
            "lora",
            config.model.source,
        )
    assert bias_audit.model_config(config, str(tiny_model)).model.source == str(tiny_model)


def test_augmented_rows_can_be_trained_on_and_keep_the_held_out_ones_apart(config: ConfigDict, tmp_path: Path) -> None:
    config.audit.augment = ("swaps", "templates")
    bias_audit.audit(config, tmp_path)
    folder = tmp_path / "augmented"
    tokenizer = source.find_tokenizer(config, source.find(config))
    before = pipeline.load(config.data, {"train": Path(config.data.train)}, tokenizer)
    own = config.data.copy_and_resolve_references()
    own.columns = ()
    after = pipeline.load(own, {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}, tokenizer)
    assert [one.messages for one in after.test] == [one.messages for one in before.test]  # as they were
    swapped = sum(
        bool({"cat", "dog"} & set(one.messages[0]["content"].split())) for one in before.train if one.messages
    )
    assert len(after.train) == len(before.train) + swapped + 2 * len(before.train)
    answers = {one.messages[0]["content"]: one.answer for one in after.train if one.messages}
    assert answers["dog sat on"] == answers["cat sat on"] == "good"  # both sides with the label of the one


def test_the_likelihood_of_answers_and_generated_ones_are_probed_too(config: ConfigDict, tmp_path: Path) -> None:
    config.audit.rows, config.audit.templates, config.generate.max_new_tokens = 2, (), 2
    for metric, wanted in (("perplexity", {"mean absolute gap", "gap"}), ("exact_match", {"flip rate", "accuracy"})):
        config.eval.metric, config.eval.labels = metric, ()
        bias_audit.audit(config, tmp_path / metric)
        told = json.loads((tmp_path / metric / "audit.json").read_text())
        assert {one["metric"] for one in told["figures"]["tiny"] if not one["metric"].startswith("gap, ")} == wanted


def test_flags_alone_need_no_model(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jaxtune.review import store
    from jaxtune.review.record import Verdict, make_item

    item = make_item(1, "mend", {"prompt": "who?", "answer": "<b>He.</b>"}, {})
    flag = {"flags": [{"type": "bias", "group": "women", "note": "always he"}]}
    verdicts = [("1", "flag", flag), ("2", "edit", {"text": "They."})]
    with store.opened(str(tmp_path / "review.db")) as engine, store.writing(engine) as connection:
        connection.execute(
            store.people.insert().values(id="p", name="Ann", role="expert", skills=[], active=True, at=0.0)
        )
        connection.execute(store.items.insert().values(**item._asdict(), at=0.0))
        for name, kind, answer in verdicts:
            store.insert_verdict(connection, Verdict(name, item.id, "p", kind, answer, {}, 0, 1.0))
    config.audit.groups, config.audit.templates, config.review.database = (), (), str(tmp_path / "review.db")
    bias_audit.audit(config, tmp_path / "a")
    assert "flagged bias, women: 1 flags on 1 items by 1 people" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "a" / "flagged_pairs.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": "who?", "chosen": "They.", "rejected": "<b>He.</b>", "item": item.id, "verdicts": ["2", "1"]}
    ]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "always he" in page
    assert "<b>He.</b>" not in page


def changed(config: ConfigDict, **values: Any) -> ConfigDict:
    for key, value in values.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"audit__groups": (), "audit__templates": ()}, "nothing to ask"),
        ({"audit__axes": ("pet",)}, "'pet'.*did you mean 'pets'"),
        (
            {"audit__templates": (), "audit__groups": (("g", (("a", ("fish",)), ("b", ("bear",)))),)},
            r"no word of audit.groups stands in any of the \d+ rows",
        ),
        ({"audit__columns": ("txt",)}, "'txt'.*did you mean 'text'"),
        ({"audit__score_label": "god"}, "'god' is no label.*did you mean 'good'"),
        ({"audit__split": "validation"}, "there are no validation rows"),
        ({"audit__bbq": "FILES/rows.csv"}, "rows.csv:2: no BBQ: the row lacks"),
        ({"audit__crows": "FILES/bbq.jsonl"}, "no CrowS-Pairs"),
        ({"model__head": "none", "train__objective": "contrastive"}, "neither a label"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(
    config: ConfigDict, files: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    values = {
        key: value.replace("FILES", str(files)) if isinstance(value, str) else value for key, value in values.items()
    }
    with pytest.raises(UserError, match=told):
        bias_audit.audit(changed(config, **values), tmp_path)


@pytest.mark.parametrize(
    ("asked", "told"),
    [("probes", "neither a label"), ("bbq", "writes no text, and BBQ"), ("crows", "gives sentences no likelihood")],
)
def test_a_model_that_cannot_answer_is_refused(
    config: ConfigDict, files: Path, tmp_path: Path, asked: str, told: str
) -> None:
    """A reward head scores answers: it has no labels, writes nothing and gives sentences no likelihood."""
    config.model.head, config.train.objective, config.eval.labels = "sequence", "reward", ()
    if asked != "probes":
        config.audit.groups, config.audit.templates = (), ()
        config.audit[asked] = str(files / {"bbq": "bbq.jsonl", "crows": "crows.csv"}[asked])
    with pytest.raises(UserError, match=told):
        bias_audit.audit(config, tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"split": "tests"}, "expected train, validation, test, all"),
        ({"bbq_rows": -1}, "expected 0 or more"),
        ({"models": (("a", "base"), ("a", "base"))}, "none twice"),
        ({"models": (("../a", "base"),)}, "plain names"),
        ({"models": (5,)}, "plain names"),
        ({"models": ("ab",)}, "plain names"),
        ({"augment": ("swap",)}, "expected 'swaps' or 'templates'"),
        ({"augment": ("templates",), "templates": ()}, "audit.templates has none"),
    ],
)
def test_fields_are_checked_before_anything_is_fetched(config: ConfigDict, values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        validation.validate(changed(config, **{f"audit__{key}": value for key, value in values.items()}))


def test_the_command(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(config_lib.to_json(config))
    assert launch.main(["audit", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.audit.axes=dogs"]) == 2
    assert "audit.axes has 'dogs'" in capsys.readouterr().err
