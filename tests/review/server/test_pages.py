"""What pages say and hide: scripts stay text, names of models stay here, headers, cookies, sizes, rates, and errors people understand."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient

from jaxtune.review import people, queue, store
from jaxtune.review.record import make_item
from jaxtune.review.server import app, guard
from jaxtune.types import UserError
from tests.review.server import examples
from tests.review.server.conftest import Visitor, csrf_of
from tests.review.server.test_access import give

Visit = Callable[..., Visitor]
PAGES = ("/", "/history", "/adjudicate", "/round", "/people", "/flags", "/audit", "/report", "/nowhere", *(f"/work/{name}" for name, _ in examples.TASKS))  # fmt: skip


def test_stored_script_stays_text(visit: Visit, engine: store.Engine) -> None:
    evil = examples.SCRIPT
    new = [
        make_item(1, "clear", {"prompt": [{"role": evil, "content": evil}], "answer": evil}, {}),
        make_item(1, "letters", {"text": evil}, {}, overlap=2),
    ]
    store.add_items(engine, new)
    people.add(engine, f"Eve {evil}", "owner", [evil], examples.PASSWORD)
    eve, ben = visit(f"Eve {evil}"), visit("Ben")
    for visitor, labels in ((eve, "praise"), (ben, "other")):
        while (item := visitor.next("letters")) is not None:
            give(visitor, item, "flag", {"flags": [{"type": "bias", "group": evil, "note": evil}]})
            give(visitor, item, "label", {"labels": [labels]})
    while (item := ben.next("clear")) is not None:
        give(ben, item, "skip", {"reason": evil})
    for visitor in (eve, ben):
        for path in PAGES:
            answer = visitor.get(path)
            assert "<script>document" not in answer.text, path
            assert "<img" not in answer.text, path
    seen = eve.get("/flags").text + eve.get("/adjudicate").text + ben.get("/history").text + eve.get("/people").text
    assert seen.count("&lt;script&gt;document") > 4  # it was there, as text
    rules = eve.get("/api/guidelines/1").json()["html"]
    assert "<script" not in rules
    assert "&lt;script&gt;" in rules


def test_models_checkpoints_origin_and_gold_never_reach_a_page(visit: Visit, engine: store.Engine) -> None:
    store.add_items(engine, [make_item(1, "clear", {"text": "gold one"}, {"source": "secret-x"}, gold={"rating": 2.0})])
    ben, olive = visit("Ben"), visit("Olive")
    texts = [visitor.get(path).text for visitor in (ben, olive) for path in PAGES]
    for name, pairs in examples.TASKS:
        kind = dict(pairs)["kind"]
        answers: dict[Any, dict[str, Any]] = {
            "label": {"labels": [dict(pairs).get("labels", ("",))[0]]}, "span": {"spans": []}, "rate": {"rating": 2.0},
            "edit": {"text": "x"}, "accept": {"accept": True, "reason": ""},
        }  # fmt: skip
        found = ben.api("next", task=name)
        for _ in range(9):
            texts.append(found.text)
            item = found.json().get("next")
            if item is None:
                break
            assert set(item["payload"]) <= {"text", "prompt", "answer", "candidates"}
            order = [[one["id"]] for one in item["payload"].get("candidates", ())]
            found = give(ben, item, kind, {"order": order, "bad": False} if kind == "compare" else answers[kind])
            assert found.status_code == 200
            texts.append(ben.api("undo", task=name).text)
            found = give(ben, item, kind, {"order": order, "bad": False} if kind == "compare" else answers[kind])
    texts += [ben.get("/history").text] + [ben.get(f"/history/{one.id}").text for one in store.read_verdicts(engine)]
    assert not [one for one in texts if "secret" in one]
    assert '"gold"' not in "".join(texts)
    compared = [one for one in store.read_verdicts(engine, task="better") if one.kind == "compare"]
    assert len(compared) == 3
    for one in compared:  # the page's places became the record's ids, in the order in which they stood
        assert one.answer["order"] == [[name] for name in one.shown["order"]]
        assert sorted(one.shown["order"]) == ["secret-new-7b", "secret-old-7b"]


def test_headers_on_every_kind_of_answer(visit: Visit) -> None:
    ben = visit("Ben")
    for answer in (ben.get("/"), ben.get("/nowhere"), ben.get("/people"), ben.get("/static/style.css"), ben.api("next", task="no"), visit().get("/")):  # fmt: skip
        for key, value in guard.HEADERS.items():
            assert answer.headers[key] == value
        assert "unsafe" not in answer.headers["content-security-policy"]
    assert ben.get("/").headers["cache-control"] == "no-store"
    assert "style=" not in ben.get("/round").text
    assert "onclick=" not in ben.get("/work/letters").text


def test_cookies(visit: Visit, engine: store.Engine) -> None:
    nobody = visit()
    answer = nobody.form("/sign-in", name="Ben", password=examples.PASSWORD)
    (cookie,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith("jaxtune=")]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    over_tls = app.make(engine, examples.known(), examples.config(behind_proxy=True))
    with TestClient(over_tls, base_url="https://localhost", follow_redirects=False) as client:
        csrf = csrf_of(client.get("/sign-in").text)
        answer = client.post("/sign-in", data={"csrf": csrf, "name": "Ben", "password": examples.PASSWORD})
        (cookie,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith("__Host-jaxtune=")]
        assert "Secure" in cookie
        assert "strict-transport-security" in answer.headers
        assert client.get("/").status_code == 200


def test_a_sign_in_takes_a_new_session_and_ends_the_old(visit: Visit) -> None:
    ben = visit("Ben")
    before = ben.client.cookies["jaxtune"]
    ben.client.cookies.set("jaxtune_form", "f" * 43)
    assert ben.client.post("/sign-in", data={"csrf": "f" * 43, "name": "Ada", "password": examples.PASSWORD}).status_code == 303  # fmt: skip
    assert ben.client.cookies["jaxtune"] != before
    ben.client.cookies.clear()
    ben.client.cookies.set("jaxtune", before)
    assert ben.get("/").status_code == 303


def test_signing_out_on_all_devices(visit: Visit) -> None:
    here, there, other = visit("Ben"), visit("Ben"), visit("Ada")
    assert here.form("/sign-out/everywhere").headers["location"] == "/sign-in"
    assert [one.get("/").status_code for one in (here, there, other)] == [303, 303, 200]


def test_an_unknown_name_and_a_wrong_password_read_alike(visit: Visit) -> None:
    nobody = visit()
    texts = []
    for name, password in (("Ben", "a wrong password"), ("Nobody", "a wrong password"), ("Ben", "")):
        answer = nobody.form("/sign-in", name=name, password=password)
        assert answer.status_code == 401
        texts.append(answer.text.replace(f'value="{name}"', ""))
    assert texts[0] == texts[1] == texts[2]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the limits, which stands still until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(guard, "monotonic", lambda: now[0])
    return now


def test_sign_ins_are_limited_by_name_and_by_address(visit: Visit, made: FastAPI, stopped: list[float]) -> None:
    nobody = visit()
    codes = [nobody.form("/sign-in", name="Ben", password=f"wrong {at}").status_code for at in range(12)]
    assert codes == [401] * 10 + [429] * 2
    assert nobody.form("/sign-in", name="Ben", password=examples.PASSWORD).status_code == 429  # right, but too late
    with TestClient(made, base_url="http://localhost", client=("10.0.0.9", 1), follow_redirects=False) as other:
        csrf = csrf_of(other.get("/sign-in").text)
        tries = {name: other.post("/sign-in", data={"csrf": csrf, "name": name, "password": examples.PASSWORD}).status_code for name in ("Ben", "Ada")}  # fmt: skip
    assert tries == {"Ben": 429, "Ada": 303}
    for at in range(60):
        last = nobody.form("/sign-in", name=f"Nobody {at}", password="wrong")
    assert last.status_code == 429
    assert "Wait" in last.text
    assert visit().get(f"/invite/{'x' * 43}").status_code == 429
    stopped[0] += 15.0
    assert nobody.form("/sign-in", name="Ben", password=examples.PASSWORD).status_code == 303


def test_requests_are_limited(engine: store.Engine, stopped: list[float]) -> None:
    made = app.make(engine, examples.known(), examples.config(requests_per_second=1.0))
    with TestClient(made, base_url="http://localhost") as client:
        codes = [client.get("/sign-in").status_code for _ in range(60)]
        assert codes == [200] * 50 + [429] * 10
        stopped[0] += 0.5  # ten a second for one address
        assert [client.get("/sign-in").status_code for _ in range(6)] == [200] * 5 + [429]


@pytest.mark.parametrize(
    "to", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/x\n/y"]
)
def test_a_sign_in_leads_to_these_pages_alone(visit: Visit, to: str) -> None:
    nobody = visit()
    answer = nobody.form("/sign-in", name="Ben", password=examples.PASSWORD, to=to)
    assert answer.headers["location"] == "/"


def test_invites_are_used_once(visit: Visit, engine: store.Engine) -> None:
    olive, new = visit("Olive"), visit()
    shown = olive.form("/people", name="Noor", role="expert", skills="legal, tax")
    link = shown.text.split('value="http://localhost')[1].split('"')[0]
    page = new.get(link)
    assert "Noor" in page.text
    new.csrf = csrf_of(page.text)
    assert "differ" in new.form(link, password="long enough words", again="other words here").text
    weak = new.form(link, password="short", again="short")
    assert weak.status_code == 400
    assert "expected 12" in weak.text
    assert new.form(link, password="long enough words", again="long enough words").headers["location"] == "/"
    assert new.get("/").status_code == 200
    again = visit()
    assert again.get(link).status_code == 400
    assert "used" in again.get(link).text
    assert again.form(link, password="other long words", again="other long words").status_code == 400
    noor = people.named(engine, "Noor")
    assert noor is not None
    assert noor.skills == ("legal", "tax")


def test_links_alone_where_passwords_are_off(engine: store.Engine) -> None:
    made = app.make(engine, examples.known(), examples.config(passwords=False, session_hours=3.0))
    ben = people.named(engine, "Ben")
    assert ben is not None
    token = people.invite(engine, ben.id)
    with TestClient(made, base_url="http://localhost", follow_redirects=False) as client:
        page = client.get(f"/invite/{token}")
        assert "3 hours" in page.text
        assert client.post(f"/invite/{token}", data={"csrf": csrf_of(page.text)}).status_code == 303
        assert client.get("/").status_code == 200


def test_owners_manage_people(visit: Visit, engine: store.Engine) -> None:
    olive, ben = visit("Olive"), visit("Ben")
    person = people.named(engine, "Ben")
    own = people.named(engine, "Olive")
    assert person is not None
    assert own is not None
    assert olive.form(f"/people/{person.id}", role="senior", skills="tax").status_code == 303
    assert ben.get("/adjudicate").status_code == 200
    assert olive.form(f"/people/{person.id}/sign-out").status_code == 303
    assert ben.get("/").status_code == 303
    assert olive.form(f"/people/{person.id}/close").status_code == 303
    assert visit().form("/sign-in", name="Ben", password=examples.PASSWORD).status_code == 401
    assert olive.form(f"/people/{person.id}/open").status_code == 303
    assert olive.form("/people/nobody/close").status_code == 404
    alone = olive.form(f"/people/{own.id}/close")
    assert alone.status_code == 400
    assert "only owner" in alone.text
    assert "is someone of the name" in olive.form("/people", name="ben", role="expert").text
    told = olive.get("/audit").text
    assert "sessions_ended" in told


def test_what_is_too_large_is_refused(visit: Visit, made: FastAPI) -> None:
    ben = visit("Ben")
    item = ben.next("mend")
    assert give(ben, item, "edit", {"text": "x" * 1_100_000}).status_code == 413

    def endless() -> Any:
        for _ in range(30):
            yield b"x" * 50_000

    headers = {"x-csrf-token": ben.csrf, "content-type": "application/json"}
    assert ben.client.post("/api/verdicts", content=endless(), headers=headers).status_code == 413
    assert give(ben, item, "edit", {"text": "é" * 100_000}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"id": 1}', b"\xff\xfe", b'{"id":"x","item":"y","task":"t","kind":"k","answer":{},"seconds":NaN}']
)  # fmt: skip
def test_nonsense_is_answered_as_such(visit: Visit, body: bytes) -> None:
    ben = visit("Ben")
    headers = {"x-csrf-token": ben.csrf, "content-type": "application/json"}
    answer = ben.client.post("/api/verdicts", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]


def test_values_that_no_database_holds(visit: Visit, engine: store.Engine) -> None:
    ben, olive = visit("Ben"), visit("Olive")
    item = ben.next("letters")
    for supersedes in ("a\x00b", "\u2028", "x" * 65):
        assert give(ben, item, "skip", {"reason": ""}, supersedes=supersedes).status_code == 422, supersedes
    assert olive.get(f"/audit?before={10**20}").status_code == 422
    to = visit().get("/work/a%26b%20c").headers["location"]  # a task may be called so
    assert to == "/sign-in?to=/work/a%26b%20c"
    assert 'value="/work/a&amp;b c"' in visit().get(to).text


def test_answers_that_are_none(visit: Visit, engine: store.Engine) -> None:
    ben = visit("Ben")
    item = ben.next("letters")
    for kind, answer in (("label", {"labels": ["nonsense"]}), ("rate", {"rating": 1}), ("label", {}), ("retract", {}), ("flag", {"flags": []}), ("compare", {"order": 3})):  # fmt: skip
        assert give(ben, item, kind, answer).status_code == 400, kind
    assert store.read_verdicts(engine) == []
    half = {"labels": ["praise"]}
    raw = '{"id":"%s","item":"%s","task":"letters","kind":"skip","answer":{"reason":"lone \\ud800 half \\u0000 zero"}}'
    headers = {"x-csrf-token": ben.csrf, "content-type": "application/json"}
    answer = ben.client.post("/api/verdicts", content=(raw % (uuid.uuid4(), item["item"])).encode(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert store.read_verdicts(engine)[0].answer == {"reason": "lone ? half  zero"}
    assert give(ben, item, "label", half).status_code == 409
    assert "My answers" in give(ben, item, "label", half).json()["error"]


def test_sent_twice_is_saved_once(visit: Visit, engine: store.Engine) -> None:
    ben = visit("Ben")
    item, same = ben.next("letters"), str(uuid.uuid4())
    first = give(ben, item, "label", {"labels": ["praise"]}, id=same).json()
    again = give(ben, item, "label", {"labels": ["praise"]}, id=same.upper()).json()
    assert (first["new"], again["new"]) == (True, False)
    assert first["next"]["item"] == again["next"]["item"] != item["item"]
    assert len(store.read_verdicts(engine)) == 1


def test_two_experts_and_one_place(visit: Visit, engine: store.Engine, made: FastAPI) -> None:
    ben, ada = visit("Ben"), visit("Ada")
    item = ben.next("keep")
    with store.writing(engine) as connection:
        connection.execute(store.leases.update().values(expires=0.0))  # Ben's time is over
    same = ada.next("keep")
    assert same["item"] == item["item"]
    assert give(ada, same, "accept", {"accept": True}).status_code == 200
    late = give(ben, item, "accept", {"accept": False})
    assert late.status_code == 409
    assert late.json()["reason"] == "lost"
    assert "Others have answered" in late.json()["error"]


@pytest.mark.parametrize("kind", ["full", "gone"])
def test_a_disk_that_is_full_or_a_database_that_is_gone(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ben = visit("Ben")
    item = ben.next("letters")

    def failing(*_: Any) -> bool:
        if kind == "full":
            raise UserError("the disk that holds the review database is full; nothing of this was written")
        raise sa.exc.OperationalError("INSERT", {}, Exception("the database is gone"))

    monkeypatch.setattr(queue, "submit", failing)
    answer = give(ben, item, "label", {"labels": ["praise"]})
    assert answer.status_code == {"full": 507, "gone": 503}[kind]
    assert ("not saved" in answer.json()["error"]) == (kind == "full")
    assert "INSERT" not in answer.text


def test_what_is_saved_is_acknowledged_even_if_the_next_item_fails(visit: Visit, engine: store.Engine, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    ben = visit("Ben")
    item = ben.next("letters")

    def failing(*_: Any) -> None:
        raise RuntimeError("no next one")

    monkeypatch.setattr(queue, "assign", failing)
    assert give(ben, item, "label", {"labels": ["praise"]}).json() == {"saved": True, "new": True}
    assert len(store.read_verdicts(engine)) == 1
    broken = ben.api("next", task="letters")
    assert broken.status_code == 500
    assert "not your fault" in broken.json()["error"]
    assert broken.headers["x-frame-options"] == "DENY"


def test_a_guideline_that_changes_is_in_force_from_the_next_item(visit: Visit, engine: store.Engine, made: FastAPI, tmp_path: Path) -> None:  # fmt: skip
    ben = visit("Ben")
    first = ben.next("letters")
    made.state.server.watcher.look(0.0)
    path = tmp_path / "letters.md"
    path.write_text("A new rule.")
    import os

    os.utime(path, (1, 1))
    made.state.server.watcher.look(0.0)
    second = give(ben, first, "label", {"labels": ["praise"]}).json()["next"]
    assert second["guideline"] == first["guideline"] + 1
    assert store.read_verdicts(engine)[0].guideline == first["guideline"]
    assert ben.get(f"/api/guidelines/{second['guideline']}").json() == {"version": 2, "html": "<p>A new rule.</p>\n"}
    path.unlink()
    made.state.server.watcher.look(0.0)  # gone: the version in force stays
    assert "A new rule" in ben.get("/work/letters").text


def test_the_report_is_shown_where_it_was_written(visit: Visit, tmp_path: Path) -> None:
    olive = visit("Olive")
    assert olive.get("/report").status_code == 404
    assert 'href="/report"' not in olive.get("/round").text
    (tmp_path / app.REPORT).write_text("<style>p{}</style><p>alpha 0.8</p>")
    assert 'href="/report"' in olive.get("/round").text
    answer = olive.get("/report")
    assert "alpha" in answer.text
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]


def test_errors_are_pages(visit: Visit) -> None:
    ben = visit("Ben")
    for path, code, words in (("/nowhere", 404, "no such page"), ("/people", 403, "role of owner"), ("/work/none", 404, "no such task")):  # fmt: skip
        answer = ben.get(path)
        assert answer.status_code == code
        assert words in answer.text
        assert "<h1>" in answer.text
    assert visit().get("/work/letters").headers["location"] == "/sign-in?to=/work/letters"


def test_an_answer_that_waited_while_the_round_changed_is_saved(
    visit: Visit, engine: store.Engine, made: FastAPI
) -> None:
    """It stood in a browser's outbox, which promises to send it; the next question is of the new round."""
    ben = visit("Ben")
    item = ben.next("letters")
    made.state.server = made.state.server._replace(round=2)
    told = give(ben, item, "label", {"labels": ["praise"]})
    assert told.status_code == 200, told.text
    assert (told.json()["saved"], told.json()["next"]) == (True, None)
    assert [one.item for one in store.read_verdicts(engine, 1)] == [item["item"]]
