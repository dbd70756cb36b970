"""Items and verdicts out to files and in again: nothing is lost, broken records cost themselves alone."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from jaxtune.review import exchange, people, store
from jaxtune.review import tasks as tasks_lib
from jaxtune.review.record import Verdict, make_item
from jaxtune.types import UserError

TASKS = tasks_lib.read(
    (
        ("tone", (("kind", "label"), ("labels", ("bad", "good")))),
        ("topics", (("kind", "label"), ("labels", ("price", "taste", "size")), ("multi", True))),
        ("parties", (("kind", "span"), ("labels", ("lessor", "lessee")))),
        ("stars", (("kind", "rate"),)),
        ("warmth", (("kind", "rate"), ("scale", (-1.0, 1.0, 0.5)))),
        ("better", (("kind", "compare"), ("overlap", 2))),
        ("fix", (("kind", "edit"),)),
        ("keep", (("kind", "accept"),)),
    )
)
CHAT = [
    {"role": "user", "content": "Is it <b>due</b>?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "When?"},
]
LEASE = "The 🏠 of Ada is let to Bob\u2028Smith."
TWO = [{"id": "a", "text": "In May."}, {"id": "b", "text": "Soon & <i>gladly</i>."}]
THREE = [{"id": "x", "text": "one"}, {"id": "prompt", "text": "two"}, {"id": "z", "text": "three"}]
FLAG = {"flags": [{"type": "bias", "group": "women", "note": "a: b"}, {"type": "wrong", "group": "", "note": ""}]}


def _filled(db: store.Engine) -> list[Verdict]:
    """A database with an item of each kind and every kind of verdict; returns all verdicts."""
    anna = people.add(db, "Anna", "senior", ("legal",))
    ben = people.add(db, "Ben", "expert")
    number = store.set_guideline(db, "tone", "Old") and store.set_guideline(db, "tone", "Be strict.\n")
    origin = {"source": "rows.jsonl", "row": 3, "models": {"a": {"model": "old"}, "b": {"model": "new"}}}
    shown = {"order": ["b", "a"], "prelabel": False}
    asked = [
        (
            "tone",
            {"text": "So <script>alert(1)</script> good", "prelabel": {"labels": ["bad"], "score": 0.75, "by": "m"}},
            {"labels": ["good"]},
        ),
        ("topics", {"text": "dear and small"}, {"labels": ["price", "size"]}),
        ("topics", {"text": "nothing"}, {"labels": []}),
        (
            "parties",
            {"text": LEASE},
            {"spans": [{"start": 9, "end": 12, "label": "lessor"}, {"start": 23, "end": 32, "label": "lessee"}]},
        ),
        ("parties", {"text": "Nobody."}, {"spans": []}),
        ("stars", {"prompt": CHAT, "answer": "In May."}, {"rating": 4.0}),
        ("warmth", {"text": "cold"}, {"rating": -0.5}),
        ("better", {"prompt": CHAT, "candidates": TWO}, {"order": [["b"], ["a"]], "bad": False}),
        ("better", {"prompt": "Tie?", "candidates": TWO}, {"order": [["a", "b"]], "bad": True}),
        ("better", {"prompt": "Three", "candidates": THREE}, {"order": [["z"], ["prompt", "x"]], "bad": False}),
        ("better", {"prompt": "All", "candidates": THREE}, {"order": [["z"], ["x"], ["prompt"]], "bad": True}),
        ("fix", {"prompt": "When?", "answer": "Never"}, {"text": "In May.\nOr June."}),
        ("keep", {"text": "A row"}, {"accept": False, "reason": "too short"}),
        ("keep", {"prompt": "p", "answer": "q"}, {"accept": True, "reason": ""}),
    ]
    items = [make_item(1, task, payload, origin, overlap=2) for task, payload, _ in asked]
    items[0] = items[0]._replace(gold={"labels": ["good"]})
    store.add_items(db, items)
    for at, (item, (task, _, answer)) in enumerate(zip(items, asked, strict=True)):
        answer = tasks_lib.checked(TASKS[task], item, TASKS[task].kind, answer)
        more = {"guideline": number if task == "tone" else 0, "seconds": 1.25 + at, "at": 1.7e9 + at / 7}
        store.add_verdict(db, Verdict(f"v{at}", item.id, anna.id, TASKS[task].kind, answer, shown, **more))
    plain = {"shown": {}, "guideline": 0, "seconds": 2.0, "at": 1.7e9}
    store.add_verdict(db, Verdict("flag", items[0].id, ben.id, "flag", FLAG, **plain))
    store.add_verdict(db, Verdict("skip", items[1].id, ben.id, "skip", {"reason": "not mine"}, **plain))
    store.add_verdict(db, Verdict("first", items[2].id, ben.id, "label", {"labels": ["size"]}, **plain))
    store.add_verdict(
        db, Verdict("then", items[2].id, ben.id, "label", {"labels": ["taste"]}, supersedes="first", **plain)
    )
    store.add_verdict(db, Verdict("oops", items[3].id, ben.id, "span", {"spans": []}, **plain))
    store.add_verdict(db, Verdict("undone", items[3].id, ben.id, "retract", {}, supersedes="oops", **plain))
    senior = Verdict("settled", items[4].id, ben.id, "span", {"spans": []}, adjudicates=True, **plain)
    store.add_verdict(db, senior)
    return store.read_verdicts(db, all_of_them=True)


@pytest.fixture
def db(url: str):
    with store.opened(url) as engine:
        yield engine


def _of_texts(verdicts: list[Verdict], engine: store.Engine) -> list[Verdict]:
    """Guidelines have other numbers in another database: they are compared by their texts."""
    texts = {one["number"]: one["text"] for one in exchange._guidelines(engine)}
    return sorted(one._replace(guideline=texts.get(one.guideline, "")) for one in verdicts)


@pytest.mark.parametrize("format", ["jsonl", "label_studio", "argilla"])
def test_round_trip(db: store.Engine, tmp_path: Path, format: str) -> None:
    given = _filled(db)
    file = tmp_path / "out" / "export.json"
    num_items, num_verdicts = exchange.write_file(db, TASKS, file, format, pseudonyms=False)
    if format != "jsonl":  # those that count
        given = [one._replace(supersedes="") for one in store.read_verdicts(db)]
    assert (num_items, num_verdicts) == (14, len(given))
    with store.opened(str(tmp_path / "other.db")) as other:
        store.set_guideline(other, "fix", "so that numbers differ")
        if format != "jsonl":  # there a guideline is named by its hash alone
            store.set_guideline(other, "tone", "Be strict.\n")
        done = exchange.read_file(other, TASKS, file, format)
        assert done == exchange.Imported(14, 0, len(given), 0, 2, [])
        assert _of_texts(store.read_verdicts(other, all_of_them=True), other) == _of_texts(given, db)
        here, there = store.read_items(db), store.read_items(other)
        if format != "jsonl":  # there models and gold are left out, for the eyes of experts who compare blind
            here = [one._replace(gold=None, origin={k: one.origin[k] for k in ("source", "row")}) for one in here]
        assert there == here
        arrived = people.everyone(other)
        assert {(one.name, one.role, one.active) for one in arrived} == {
            ("Anna", "expert", False),
            ("Ben", "expert", False),
        }
        again = exchange.read_file(other, TASKS, file, format)
        assert again == exchange.Imported(0, 14, 0, len(given), 0, [])
    back = exchange.read_file(db, TASKS, file, format)
    assert back == exchange.Imported(0, 14, 0, len(given), 0, [])


@pytest.mark.parametrize("format", ["jsonl", "label_studio", "argilla"])
def test_pseudonyms(db: store.Engine, tmp_path: Path, format: str) -> None:
    _filled(db)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        exchange.write_file(db, TASKS, file, format)
    text = files[0].read_text()
    assert files[1].read_text() == text  # one person has one pseudonym
    for person in people.everyone(db):
        assert person.id not in text
        assert f'"{person.name}"' not in text
    assert text.count("person-") == (21 if format == "jsonl" else 18)
    with db.connect() as connection:
        key = connection.scalar(store.sa.select(store.about.c.value).where(store.about.c.key == "pseudonyms"))
    assert key not in text


@pytest.mark.parametrize("format", ["label_studio", "argilla"])
def test_what_experts_may_see_names_no_model(db: store.Engine, tmp_path: Path, format: str) -> None:
    _filled(db)
    exchange.write_file(db, TASKS, tmp_path / "a.json", format)
    text = (tmp_path / "a.json").read_text()
    assert "models" not in text
    assert "gold" not in text


def test_label_studio_as_it_writes_itself(db: store.Engine, tmp_path: Path) -> None:
    """Tasks in the shape of its exports: other names of controls, users as numbers or objects, drafts, relations, UTF-16 offsets."""
    region = {"id": "Dx_aB91ISN", "from_name": "sentiment", "to_name": "txt", "type": "choices", "origin": "manual"}
    done = {
        "created_at": "2021-03-09T22:16:08.728353Z",
        "lead_time": 4.288,
        "was_cancelled": False,
        "ground_truth": False,
        "task": 1,
    }
    annotations = [
        done | {"id": 1001, "completed_by": 10, "result": [region | {"value": {"choices": ["good"]}}]},
        done
        | {
            "id": 1002,
            "completed_by": {"id": 11, "email": "b@example.org"},
            "result": [region | {"value": {"choices": ["bad"]}}],
            "ground_truth": True,
        },
        done | {"id": 1003, "completed_by": 12, "result": [], "was_cancelled": True},
        done | {"id": 1004, "completed_by": 13, "result": [region | {"value": {"choices": ["meh"]}}]},
    ]
    predictions = [
        {"model_version": "1", "score": 0.4, "result": [region | {"value": {"choices": ["bad"]}}]},
        {"model_version": "2", "score": 0.9, "result": [region | {"value": {"choices": ["good"]}}]},
    ]
    task = {
        "id": 1,
        "data": {"review": "fine"},
        "annotations": annotations,
        "predictions": predictions,
        "drafts": [],
        "meta": {},
    }
    (tmp_path / "ls.json").write_text(json.dumps([task], indent=2))
    got = exchange.read_file(db, TASKS, tmp_path / "ls.json", "label_studio", "tone", columns=(("text", "review"),))
    assert got[:5] == (1, 0, 3, 0, 3)
    assert [one.reason for one in got.broken] == [
        "annotation 4: labels=['meh'] came; expected a list of bad, good, none twice"
    ]
    item = store.read_items(db)[0]
    assert item.payload == {"text": "fine", "prelabel": {"labels": ["good"], "score": 0.9}}
    assert item.gold == {"labels": ["bad"]}
    first, second, third = store.read_verdicts(db)
    assert (first.person, first.answer, first.seconds) == ("label_studio:10", {"labels": ["good"]}, 4.288)
    assert first.at == pytest.approx(1615328168.728353)
    assert (second.person, third.kind) == ("label_studio:11", "skip")
    assert "b@example.org" in {one.name for one in people.everyone(db)}
    units = LEASE.index("Ada") + 1  # the house takes two units of UTF-16, and one character
    span = {
        "from_name": "l",
        "to_name": "t",
        "type": "labels",
        "value": {"start": units, "end": units + 3, "text": "Ada", "labels": ["lessor"]},
    }
    wrong = copy.deepcopy(span)
    wrong["value"]["text"] = "Bob"
    relation = {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"}
    rows = [
        {"data": {"text": LEASE}, "annotations": [{"completed_by": at, "result": [one, relation]}]}
        for at, one in enumerate((span, wrong))
    ]
    (tmp_path / "spans.json").write_text(json.dumps(rows))
    got = exchange.read_file(db, TASKS, tmp_path / "spans.json", "label_studio", "parties")
    assert store.read_verdicts(db, task="parties")[0].answer == {"spans": [{"start": 9, "end": 12, "label": "lessor"}]}
    assert len(got.broken) == 1
    assert "'Bob' in the file" in got.broken[0].reason


def test_argilla_as_it_writes_itself(db: store.Engine, tmp_path: Path) -> None:
    """Records of version 2, and of version 1 with lists; users are UUIDs, drafts are none yet."""
    ids = ["8f7e0c46-0000-4000-8000-000000000001", "8f7e0c46-0000-4000-8000-000000000002"]
    second = {
        "id": "r1", "fields": {"text": "fine"}, "metadata": {"shop": "x"}, "vectors": {}, "_server_id": None,
        "suggestions": {"tone": {"value": "good", "score": 0.8, "agent": "m"}},
        "responses": {"tone": [{"value": "good", "user_id": ids[0]}, {"value": "bad", "user_id": ids[1]}]},
    }  # fmt: skip
    first = {
        "external_id": "r2", "fields": {"text": "poor"}, "metadata": {}, "suggestions": [{"question_name": "tone", "value": "bad"}],
        "responses": [
            {"user_id": ids[0], "status": "submitted", "values": {"tone": {"value": "bad"}}},
            {"user_id": ids[1], "status": "draft", "values": {"tone": {"value": "good"}}},
            {"user_id": ids[1], "status": "discarded", "values": {}},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([second, first]))
    got = exchange.read_file(db, TASKS, tmp_path / "a.json", "argilla", "tone")
    assert got == exchange.Imported(2, 0, 4, 0, 2, [])
    assert [one.payload.get("prelabel") for one in store.read_items(db)] == [
        {"labels": ["good"], "score": 0.8},
        {"labels": ["bad"]},
    ]
    found = [(one.person[-1], one.kind, one.answer) for one in store.read_verdicts(db)]
    skip = ("2", "skip", {"reason": ""})
    assert found == [
        ("1", "label", {"labels": ["good"]}),
        ("2", "label", {"labels": ["bad"]}),
        ("1", "label", {"labels": ["bad"]}),
        skip,
    ]
    ranked = {
        "fields": {"prompt": "p", "reply_1": "one", "reply_2": "two"},
        "responses": {"better": [{"value": ["b", "a"], "user_id": ids[0]}]},
    }
    (tmp_path / "b.jsonl").write_text(json.dumps(ranked))
    exchange.read_file(
        db, TASKS, tmp_path / "b.jsonl", "argilla", "better", columns=(("a", "reply_1"), ("b", "reply_2"))
    )
    assert store.read_verdicts(db, task="better")[0].answer == {"order": [["b"], ["a"]], "bad": False}


def test_plain_rows_become_items(db: store.Engine, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "a": "x", "b": "y"},
        {
            "prompt": "p",
            "candidates": ["x", "y", "z"],
            "overlap": 3,
            "gold": {"order": [["a"], ["b", "c"]], "bad": False},
        },
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert exchange.read_file(db, TASKS, tmp_path / "rows.jsonl", task="better", round=4).items == 2
    two, three = store.read_items(db)
    assert (two.round, two.overlap, two.origin["source"], two.origin["row"]) == (4, 2, "rows.jsonl", 1)
    assert [one["id"] for one in three.payload["candidates"]] == ["a", "b", "c"]
    assert (three.overlap, three.gold["order"]) == (3, [["a"], ["b", "c"]])
    chat = {"messages": [*CHAT, {"role": "assistant", "content": "In May."}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    exchange.read_file(db, TASKS, tmp_path / "chat.jsonl", task="stars")
    assert store.read_items(db, task="stars")[0].payload == {"prompt": CHAT, "answer": "In May."}


def test_broken_lines_are_listed_and_the_rest_is_there(db: store.Engine, tmp_path: Path) -> None:
    good = [json.dumps({"text": f"row {at}"}).encode() for at in range(3)]
    known = make_item(1, "tone", {"text": "row 0"}, {})
    verdict = {
        "record": "verdict",
        "id": "v",
        "item": known.id,
        "person": "p",
        "kind": "label",
        "answer": {"labels": ["good"]},
    }
    lines = [
        b"\xef\xbb\xbf" + good[0], b"not json", b'{"text": "cut', good[1], b'{"text": "\xff"}', b'{"text": ""}', b'{"nothing": 1}', b"[1, 2]",
        b'{"text": "a\\u0000b"}', b'{"text": "\\ud800"}', b'{"text": "x", "overlap": NaN}', b'{"text": "y", "overlap": 1e999}', b"[" * 100_000,
        b'{"text": "z", "gold": {"labels": ["meh"]}}', b'{"record": "verdict", "item": "nowhere"}', b"", good[2],
        *(json.dumps(verdict | more).encode() for more in (
            {}, {"id": "w", "answer": {"labels": ["meh"]}}, {"id": "x" * 65}, {"answer": {"labels": ["bad"]}}, {"id": "y", "supersedes": "v", "person": "q"},
            {"id": "z", "kind": "retract", "answer": {}}, {"id": "u", "seconds": -1}, {"id": "t", "kind": ["label"]},
        )),
        b'{"record": "item", "id": "' + known.id.encode() + b'", "task": "tone", "round": 1, "payload": {"text": "other"}, "origin": {}}',
        b'{"record": "what"}', good[0],
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join(lines))
    got = exchange.read_file(db, TASKS, tmp_path / "in.jsonl", task="tone")
    assert got[:5] == (3, 1, 1, 0, 2)
    assert [one.line for one in got.broken] == [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, *range(19, 28)]
    assert [one.payload["text"] for one in store.read_items(db)] == ["row 0", "row 1", "row 2"]
    reasons = {one.line: one.reason for one in got.broken}
    for line, part in (
        (2, "no JSON"),
        (5, "byte 11"),
        (7, "no 'text'"),
        (13, "deep"),
        (15, "neither here"),
        (21, "cannot be changed"),
        (26, "not what it was"),
    ):
        assert part in reasons[line]
    exchange.write_broken(tmp_path / "broken.jsonl", got.broken)
    listed = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in listed] == [(one.line, one.reason) for one in got.broken]


@pytest.mark.parametrize("indent", [None, 2])
def test_list_with_a_broken_element_goes_on_after_it(tmp_path: Path, indent: int | None) -> None:
    region = {"from_name": "tone", "to_name": "text", "type": "choices", "value": {"choices": ["good"]}}
    rows = [{"data": {"text": f"row {at}"}, "annotations": [{"result": [region]}]} for at in range(5)]
    text = json.dumps(rows, indent=indent)
    text = text.replace('"row 1"', '"row 1').replace("row 4", "row 4\x01")
    (tmp_path / "in.json").write_text(text)
    with store.opened(str(tmp_path / "a.db")) as db:
        got = exchange.read_file(db, TASKS, tmp_path / "in.json", "label_studio", "tone")
        assert [one.payload["text"] for one in store.read_items(db)] == ["row 0", "row 2", "row 3"]
        lines = text.split("\n")
        starts = [
            next(n for n, one in enumerate(lines, 1) if f"row {at}" in one) - (2 if indent else 0) for at in (1, 4)
        ]
        assert [one.line for one in got.broken] == starts
        (tmp_path / "cut.json").write_text(json.dumps(rows, indent=indent)[:-40])
        got = exchange.read_file(db, TASKS, tmp_path / "cut.json", "label_studio", "tone")
        assert (got.items, got.known_items, len(got.broken)) == (1, 3, 1)


@pytest.mark.parametrize("format", ["jsonl", "label_studio", "argilla"])
def test_no_damage_to_a_record_ends_the_import(tmp_path: Path, format: str) -> None:
    """Parts of good records are taken out or replaced, at random: each is imported or listed, and nothing else is raised."""
    rng, junk = (
        random.Random(0),
        [None, 7, -1.5, "x", [], {}, [1, ["a"]], {"a": {"b": []}}, True, "2021-13-45", 1 << 70],
    )
    with store.opened(str(tmp_path / "a.db")) as db:
        _filled(db)
        exchange.write_file(db, TASKS, tmp_path / "good.json", format)
    text = (tmp_path / "good.json").read_text()
    rows = json.loads(text) if format != "jsonl" else [json.loads(one) for one in text.split("\n") if one]

    def damage(value: object) -> object:
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(list(value))
            return (
                {k: v for k, v in value.items() if k != key}
                if rng.random() < 0.3
                else value | {key: damage(value[key])}
            )
        if isinstance(value, list) and value and rng.random() < 0.8:
            at = rng.randrange(len(value))
            return [*value[:at], damage(value[at]), *value[at + 1 :]]
        return rng.choice(junk)

    damaged = [damage(copy.deepcopy(rng.choice(rows))) for _ in range(1500)]
    (tmp_path / "bad.jsonl").write_text("\n".join(json.dumps(one) for one in damaged))
    with store.opened(str(tmp_path / "b.db")) as db:
        got = exchange.read_file(db, TASKS, tmp_path / "bad.jsonl", format)
        assert len(got.broken) > 200
        assert got.items > 10
        for verdict in store.read_verdicts(db, all_of_them=True):
            assert isinstance(verdict.answer, dict)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with store.opened(str(tmp_path / "a.db")) as db:
        for content in ("", "PK\x03\x04", "[]", '{"a": 1}', "[1,"):
            (tmp_path / "in").write_text(content)
            with pytest.raises(UserError, match="nothing in"):
                exchange.read_file(db, TASKS, tmp_path / "in", task="tone")
        with pytest.raises(UserError, match="cannot be read"):
            exchange.read_file(db, TASKS, tmp_path / "absent")
        (tmp_path / "in").write_text('{"text": "x"}')
        with pytest.raises(UserError, match="review.task"):
            exchange.read_file(db, TASKS, tmp_path / "in")


def test_labeling_config_is_xml_with_every_control(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    with store.opened(str(tmp_path / "a.db")) as db:
        _filled(db)
        exchange.write_file(db, TASKS, tmp_path / "a.json", "label_studio")
    tasks = json.loads((tmp_path / "a.json").read_text())
    for name in TASKS:
        tree = ElementTree.fromstring((tmp_path / f"a.{name}.xml").read_text())
        controls = {one.attrib["name"]: one.tag.lower() for one in tree.iter() if "toName" in one.attrib}
        mine = [one for one in tasks if one["meta"]["jaxtune"]["task"] == name]
        for region in (r for one in mine for a in (*one["annotations"], *one["predictions"]) for r in a["result"]):
            assert controls[region["from_name"]] == region["type"]
