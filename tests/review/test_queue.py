"""The queue: places are never given twice, leases end, gold is mixed in, seniors settle, and what was done can be taken back."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from jaxtune.review import places, queue, settling, store
from jaxtune.review.queue import Refused
from jaxtune.review.record import Item, Person, Verdict, make_item
from jaxtune.review.tasks import Task
from jaxtune.types import UserError

LABEL = Task("mood", "label", labels=("bad", "good"))


@pytest.fixture
def db(url: str) -> Iterator[store.Engine]:
    with store.opened(url) as engine:
        yield engine


def someone(db: store.Engine, name: str, role: str = "expert", skills: tuple[str, ...] = ()) -> Person:
    with store.writing(db) as connection:
        row = {"id": name, "name": name, "role": role, "skills": list(skills), "active": True, "at": 0.0}
        connection.execute(store.people.insert().values(row))
    return Person(name, name, role, skills)


def texts(number: int, task: str = "mood", **more: Any) -> list[Item]:
    return [make_item(1, task, {"text": f"{task} {i}"}, {"row": i}, **more) for i in range(number)]


def answer(given: queue.Assignment, label: str = "good", **more: Any) -> Verdict:
    verdict = Verdict(uuid.uuid4().hex, given.item.id, "", "label", {"labels": [label]}, {}, 0, 1.0)
    return verdict._replace(**more)


def give(
    db: store.Engine, person: Person, tasks: dict[str, Task], label: str = "good", **more: Any
) -> queue.Assignment:
    given = queue.assign(db, person, tasks, 1, **more)
    assert given is not None
    assert queue.submit(db, person, tasks, answer(given, label))
    return given


def test_one_after_the_other_and_never_twice(db: store.Engine) -> None:
    tasks, new = {"mood": LABEL}, texts(3, overlap=2)
    store.add_items(db, new)
    a, b = someone(db, "a"), someone(db, "b")
    first = queue.assign(db, a, tasks, 1)
    assert first is not None
    again = queue.assign(db, a, tasks, 1)
    assert again is not None
    assert again[:2] == first[:2]  # their own, as it stood
    assert again.expires >= first.expires
    assert [give(db, a, tasks).item.id for _ in range(3)] == [one.id for one in new]
    assert queue.assign(db, a, tasks, 1) is None
    assert [give(db, b, tasks).item.id for _ in range(3)] == [one.id for one in new]
    assert queue.assign(db, someone(db, "c"), tasks, 1) is None  # two places an item, both filled
    assert queue.open_items(db, tasks, 1) == {"mood": (6, 6)}
    assert queue.assign(db, someone(db, "d"), tasks, 2) is None  # of another round


def _work(url: str, numbers: range, lease_seconds: float) -> None:
    """Experts of one process, each a thread: answer until nothing is left. Some leave without an answer, some are late."""
    engine = store.connect(url)
    people = [Person(f"p{number}", f"p{number}", "expert") for number in numbers]

    def one(person: Person) -> None:
        rng, idle = random.Random(person.id), 0
        while idle < 3:
            given = queue.assign(engine, person, {"mood": LABEL}, 1, lease_seconds=lease_seconds)
            if given is None:
                idle += 1
                time.sleep(lease_seconds / 2)
                continue
            chance = rng.random()
            if chance < 0.05:
                time.sleep(lease_seconds * 1.2)  # the lease ends: it may be lost
            if chance < 0.15:
                continue
            verdict = answer(given)
            try:
                assert queue.submit(engine, person, {"mood": LABEL}, verdict)
                if rng.random() < 0.2:
                    assert not queue.submit(engine, person, {"mood": LABEL}, verdict)  # sent once more
                if rng.random() < 0.05:
                    queue.undo(engine, person, 1)
            except Refused as refused:
                if refused.reason != "lost":
                    raise

    threads = [threading.Thread(target=one, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()


def test_fifty_at_once_in_five_processes(db: store.Engine, url: str) -> None:
    """Ten experts in each of five processes: every place is filled once, nobody answers an item twice, nothing hangs."""
    store.add_items(db, texts(30, overlap=3))
    for number in range(50):
        someone(db, f"p{number}")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(url, range(at, at + 10), 1.0)) for at in range(0, 50, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 5
    counted = store.read_verdicts(db, 1)
    assert Counter(one.item for one in counted) == {one.id: 3 for one in texts(30)}
    assert max(Counter((one.item, one.person) for one in counted).values()) == 1
    retracted = [one.supersedes for one in store.read_verdicts(db, 1, all_of_them=True) if one.kind == "retract"]
    assert retracted
    assert len(set(retracted)) == len(retracted)


def test_two_submit_one_place_at_once(db: store.Engine) -> None:
    """Both had the item, the first one's lease ended: of their answers one is taken, whichever comes first."""
    tasks = {"mood": LABEL}
    for round_ in range(8):
        store.add_items(db, [make_item(1, "mood", {"text": str(round_)}, {})])
        a, b = someone(db, f"a{round_}"), someone(db, f"b{round_}")
        late = queue.assign(db, a, tasks, 1, lease_seconds=-1)
        given = queue.assign(db, b, tasks, 1, lease_seconds=-1)
        assert late is not None
        assert given is not None
        assert late.item == given.item
        results: list[Any] = []

        def send(person: Person, verdict: Verdict, results: list[Any] = results) -> None:
            try:
                results.append(queue.submit(db, person, tasks, verdict))
            except Refused as refused:
                results.append(refused.reason)

        threads = [threading.Thread(target=send, args=(who, answer(given))) for who in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results, key=str) == [True, "lost"]
    assert queue.open_items(db, tasks, 1) == {"mood": (8, 8)}


def test_a_lease_that_ended(db: store.Engine) -> None:
    tasks = {"mood": LABEL}
    store.add_items(db, texts(1))
    a, b = someone(db, "a"), someone(db, "b")
    late = queue.assign(db, a, tasks, 1)
    assert late is not None
    assert queue.assign(db, b, tasks, 1) is None  # it is before a
    assert queue.renew(db, a, late.item.id, lease_seconds=-1)
    taken = queue.assign(db, b, tasks, 1)
    assert taken is not None
    assert taken.item == late.item
    assert not queue.renew(db, a, late.item.id)
    with pytest.raises(Refused, match="others have answered") as refused:
        queue.submit(db, a, tasks, answer(late))
    assert refused.value.reason == "lost"
    queue.release(db, b, late.item.id)  # b leaves, so there is a place again for a's late answer
    assert queue.submit(db, a, tasks, answer(late))
    assert not queue.renew(db, a, late.item.id)  # answered
    assert not queue.renew(db, a, "no such item")


def test_refusals_and_what_the_server_decides(db: store.Engine) -> None:
    tasks = {"mood": LABEL}
    store.add_items(db, texts(2, overlap=2))
    number = store.set_guideline(db, "mood", "first")
    a, b = someone(db, "a"), someone(db, "b")
    given = queue.assign(db, a, tasks, 1)
    assert given is not None
    assert given.guideline == number
    assert store.set_guideline(db, "mood", "second") == number + 1
    claims = answer(given, person="b", shown={"prelabel": True}, guideline=9, at=5.0, adjudicates=True, seconds=1e9)
    assert queue.submit(db, a, tasks, claims)
    (kept,) = store.read_verdicts(db)
    assert (kept.person, kept.guideline, kept.adjudicates) == ("a", number, False)
    assert kept.shown == {"order": [], "prelabel": False}
    assert kept.seconds < 60
    assert kept.at > 1e9
    for verdict, reason in (
        (answer(given), "answered"),  # a new id
        (answer(given, item="elsewhere"), "unknown"),
        (answer(given, item=texts(2)[1].id), "unknown"),  # never given to a
        (answer(given, supersedes="nothing"), "unknown"),
    ):
        with pytest.raises(Refused) as refused:
            queue.submit(db, a, tasks, verdict)
        assert refused.value.reason == reason
    other = queue.assign(db, b, tasks, 1)
    assert other is not None
    assert other.guideline == number + 1
    with pytest.raises(Refused, match="another verdict's"):
        queue.submit(db, b, tasks, claims)
    with pytest.raises(UserError, match="undo"):
        queue.submit(db, b, tasks, answer(other, kind="retract", answer={}))
    with pytest.raises(UserError, match="labels="):
        queue.submit(db, b, tasks, answer(other, "neither"))
    assert len(store.read_verdicts(db, all_of_them=True)) == 1


def test_a_correction_keeps_the_place(db: store.Engine) -> None:
    tasks = {"mood": LABEL}
    store.add_items(db, texts(1))
    a, b = someone(db, "a"), someone(db, "b")
    given = queue.assign(db, a, tasks, 1)
    assert given is not None
    first = answer(given)
    queue.submit(db, a, tasks, first)
    assert queue.submit(db, a, tasks, answer(given, "bad", supersedes=first.id))
    assert [one.answer for one in store.read_verdicts(db)] == [{"labels": ["bad"]}]
    assert queue.assign(db, b, tasks, 1) is None
    with pytest.raises(Refused):
        queue.submit(db, a, tasks, answer(given, "good", supersedes=first.id))  # that one counts no more
    assert [verdict.answer["labels"] for _, verdict in queue.history(db, a, 1)] == [["bad"]]


def test_undo(db: store.Engine) -> None:
    tasks, new = {"mood": LABEL}, texts(2)
    store.add_items(db, new)
    a, b = someone(db, "a"), someone(db, "b")
    assert queue.undo(db, a, 1) is None
    give(db, a, tasks)
    before = queue.assign(db, a, tasks, 1)  # the next one is on the page already
    assert before is not None
    retracted = queue.undo(db, a, 1)
    assert retracted is not None
    assert (retracted.kind, retracted.item) == ("retract", new[0].id)
    assert store.read_verdicts(db) == []
    assert len(store.read_verdicts(db, all_of_them=True)) == 2
    assert queue.assign(db, b, tasks, 1) is None  # both are before a
    assert [give(db, a, tasks).item.id for _ in range(2)] == [new[0].id, new[1].id]
    assert [item.id for item, _ in queue.history(db, a, 1)] == [new[1].id, new[0].id]
    assert queue.undo(db, a, 1) is not None
    assert queue.undo(db, a, 1) is not None
    assert queue.undo(db, a, 1) is None


def test_what_is_undone_is_theirs_for_as_long_as_the_config_says(db: store.Engine) -> None:
    tasks = {"mood": LABEL}
    store.add_items(db, texts(1))
    a = someone(db, "a")
    given = give(db, a, tasks)
    assert queue.undo(db, a, 1, lease_seconds=5000.0) is not None
    with db.connect() as connection:
        lease = places.lease_of(connection, a, given.item)
    assert lease is not None
    assert lease["expires"] - time.time() > 4000


def test_skips_fill_no_place_and_flags_leave_the_lease(db: store.Engine) -> None:
    tasks = {"mood": LABEL}
    store.add_items(db, texts(1))
    a, b = someone(db, "a"), someone(db, "b")
    given = queue.assign(db, a, tasks, 1)
    assert given is not None
    flag = answer(given, kind="flag", answer={"flags": [{"type": "harm", "group": "", "note": ""}]})
    assert queue.submit(db, a, tasks, flag)
    still = queue.assign(db, a, tasks, 1)
    assert still is not None
    assert still.item == given.item
    assert queue.submit(db, a, tasks, answer(given, kind="skip", answer={"reason": ""}))
    assert queue.assign(db, a, tasks, 1) is None
    assert give(db, b, tasks).item == given.item


def test_groups(db: store.Engine) -> None:
    tasks = {"mood": LABEL._replace(skill="legal")}
    store.add_items(db, [*texts(1), make_item(1, "mood", {"text": "for nurses"}, {}, skill="nurses")])
    anyone, lawyer, nurse = someone(db, "a"), someone(db, "b", skills=("legal",)), someone(db, "c", skills=("nurses",))
    assert queue.assign(db, anyone, tasks, 1) is None
    given = give(db, lawyer, tasks)
    assert given.item.payload == {"text": "mood 0"}
    assert queue.assign(db, lawyer, tasks, 1) is None
    assert give(db, nurse, tasks).item.payload == {"text": "for nurses"}
    with pytest.raises(UserError, match="not in the group 'legal'"):
        queue.submit(db, anyone, tasks, answer(given))
    assert queue.assign(db, lawyer._replace(active=False), tasks, 1) is None


def test_gold_is_mixed_in_and_scored_and_stays_inside(db: store.Engine) -> None:
    tasks = {"mood": LABEL._replace(gold_every=4)}
    gold = [make_item(1, "mood", {"text": f"gold {i}"}, {}, gold={"labels": ["good"]}) for i in range(24)]
    store.add_items(db, [*gold, *texts(45, overlap=2)])
    sharp, blunt = someone(db, "sharp"), someone(db, "blunt")
    seen = {}
    for person, label in ((sharp, "good"), (blunt, "bad")):
        seen[person.id] = [give(db, person, tasks, label).item for _ in range(56)]
        assert all(one.gold is None and one.origin == {} for one in seen[person.id])
        golden = [i for i, one in enumerate(seen[person.id]) if one.payload["text"].startswith("gold")]
        assert 5 < len(golden) < 24
        assert len({later - earlier for earlier, later in zip(golden, golden[1:], strict=False)}) > 2  # not countable
        told = queue.progress(db, person, tasks, 1)
        assert (told.done, told.gold_of, told.gold_right) == (56, len(golden), len(golden) if label == "good" else 0)
    assert seen["sharp"] != seen["blunt"]
    while queue.assign(db, sharp, tasks, 1) is not None:
        give(db, sharp, tasks)
    assert queue.progress(db, sharp, tasks, 1).left == 0  # gold that is left over is asked of nobody
    assert all(item.gold is None for item, _ in queue.history(db, sharp, 1, 1000))
    assert queue.open_items(db, tasks, 1)["mood"][1] == 90


def test_a_senior_settles_what_others_disagree_about(db: store.Engine) -> None:
    tasks, new = {"mood": LABEL}, texts(3, overlap=2)
    store.add_items(db, new)
    a, b = someone(db, "a"), someone(db, "b", "senior")
    senior, owner = someone(db, "s", "senior"), someone(db, "o", "owner")
    for _ in range(2):
        give(db, a, tasks, "good")
    give(db, b, tasks, "good")
    give(db, b, tasks, "bad")
    ((item, said),) = queue.disagreements(db, tasks, 1)
    assert item.id == new[1].id
    assert [one.answer["labels"] for one in said] == [["good"], ["bad"]]
    mine = queue.assign(db, b, tasks, 1)
    assert mine is not None
    assert not mine.adjudicates  # b is senior, and answered it
    given = queue.assign(db, senior, tasks, 1)
    assert given is not None
    assert (given.item.id, given.adjudicates) == (new[1].id, True)
    assert [one.person for one in given.earlier] == ["a", "b"]
    other = queue.assign(db, owner, tasks, 1)
    assert other is not None
    assert not other.adjudicates  # it is before the other senior
    assert queue.submit(db, senior, tasks, answer(given, "bad"))
    assert store.read_verdicts(db)[-1].adjudicates
    assert queue.disagreements(db, tasks, 1) == []
    assert queue.open_items(db, tasks, 1) == {"mood": (4, 6)}
    assert queue.undo(db, senior, 1) is not None
    assert len(queue.disagreements(db, tasks, 1)) == 1
    back = queue.assign(db, senior, tasks, 1)
    assert back is not None
    assert (back.item.id, back.adjudicates) == (new[1].id, True)
    assert queue.assign(db, a, {"mood": LABEL._replace(adjudicate=False)}, 1) is None


def test_order_of_the_queue(db: store.Engine) -> None:
    new, a = texts(20), someone(db, "a")
    store.add_items(db, new)
    with store.writing(db) as connection:
        for score, one in ((1.0, new[3]), (2.0, new[5]), (3.0, new[3])):  # the last row of an item counts
            row = {"item": one.id, "score": score, "reason": "", "at": 0.0}
            connection.execute(store.priorities.insert().values(row))
    first = queue.assign(db, a, {"mood": LABEL._replace(order="priority")}, 1)
    assert first is not None
    assert first.item.id == new[3].id
    queue.release(db, a, first.item.id)
    ranked = [give(db, a, {"mood": LABEL._replace(order="priority")}).item.id for _ in range(3)]
    assert ranked == [new[3].id, new[5].id, new[0].id]
    drawn = [give(db, a, {"mood": LABEL._replace(order="random")}).item.id for _ in range(17)]
    left = [one.id for one in new if one.id not in ranked]
    assert sorted(drawn) == sorted(left)
    assert drawn != left


def test_half_of_the_suggestions_are_shown(db: store.Engine) -> None:
    """Within each item and within each expert about half: both comparisons of shown with hidden are there. Hidden stays inside."""
    tasks = {"mood": LABEL._replace(prelabels="half")}
    asked = [make_item(1, "mood", {"text": str(i), "prelabel": {"labels": ["bad"]}}, {}, overlap=6) for i in range(14)]
    store.add_items(db, asked)
    people = [someone(db, f"p{i}") for i in range(6)]
    for person in people:
        for _ in range(14):
            given = give(db, person, tasks)
            assert ("prelabel" in given.item.payload) == given.shown["prelabel"]
    counted = store.read_verdicts(db)
    shares = [
        [one.shown["prelabel"] for one in counted if getattr(one, key) == value]
        for key, value in [*(("person", person.id) for person in people), *(("item", one.id) for one in asked)]
    ]
    assert 28 < sum(one.shown["prelabel"] for one in counted) < 56
    assert all(0 < sum(share) < len(share) for share in shares[:6])
    assert sum(0 < sum(share) < len(share) for share in shares[6:]) >= 12


def test_sides_are_swapped_by_item_and_person() -> None:
    task = Task("better", "compare")
    payload = {"prompt": "?", "candidates": [{"id": "a", "text": "1"}, {"id": "b", "text": "2"}]}
    orders = [
        settling.shown(task, make_item(1, "better", payload | {"prompt": str(i)}, {}), f"p{j}")["order"]
        for i in range(20)
        for j in range(20)
    ]
    assert 160 < sum(order == ["a", "b"] for order in orders) < 240  # 4 standard deviations
    assert {tuple(order) for order in orders} == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize(
    ("kind", "same", "other"),
    [
        ("rate", ({"rating": 3.0}, {"rating": 4.0}), ({"rating": 3.0}, {"rating": 5.0})),
        ("edit", ({"text": "a  b\n"}, {"text": "a b"}), ({"text": "a b"}, {"text": "ab"})),
        ("accept", ({"accept": True, "reason": "x"}, {"accept": True}), ({"accept": True}, {"accept": False})),
        (
            "compare",
            ({"order": [["b", "a"]], "bad": False}, {"order": [["a", "b"]]}),
            ({"order": [["a", "b"]], "bad": False}, {"order": [["a", "b"]], "bad": True}),
        ),
        (
            "span",
            ({"spans": []}, {"spans": []}),
            ({"spans": [{"start": 0, "end": 2, "label": "x"}]}, {"spans": [{"start": 0, "end": 3, "label": "x"}]}),
        ),
    ],
)
def test_what_differs(kind: str, same: Any, other: Any) -> None:
    task = Task("t", kind)
    assert not settling.differ(task, same)
    assert settling.differ(task, other)


def test_a_long_queue(db: store.Engine) -> None:
    """Nine in ten of its items are answered: the next is found at once."""
    new = [make_item(1, "mood", {"text": str(i)}, {}) for i in range(4_000)]
    someone(db, "a")
    rows = [one._asdict() | {"at": 0.0} for one in new]
    done = [Verdict(one.id, one.id, "a", "label", {"labels": ["good"]}, {}, 0, 1.0)._asdict() for one in new[:3_600]]
    with store.writing(db) as connection:
        connection.execute(sa.insert(store.items), rows)
        connection.execute(sa.insert(store.verdicts), done)
    b = someone(db, "b")
    start = time.perf_counter()
    given = queue.assign(db, b, {"mood": LABEL}, 1)
    took = time.perf_counter() - start
    assert given is not None
    assert given.item.id == new[3_600].id
    assert took < 2.0, took  # 0.05 s where nothing else runs
