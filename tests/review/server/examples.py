"""Invented questions of every kind, and a server that asks them: for tests in a browser and for the guide's pictures."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune.review import people, queue, store, tasks
from jaxtune.review.record import Item, Verdict, make_item

PASSWORD = "four plain garden words"
GUIDELINE = """\
## What counts

- **Complaint**: something went wrong, and the writer says so.
- **Request**: the writer wants something done.
- **Praise**: thanks, or a kind word.

Read the *whole* letter. Where two fit, take what the writer wants **answered first**.

> “The lamp is lovely but it arrived in two pieces” is a complaint.
"""
SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
TASKS = (
    ("letters", (("kind", "label"), ("title", "What is the letter about?"), ("question", "Choose what the writer wants answered first."),
        ("labels", ("complaint", "request", "praise", "other")), ("overlap", 2), ("prelabels", "show"))),
    ("topics", (("kind", "label"), ("title", "Topics"), ("question", "Which of these does the text touch? Choose all that fit."),
        ("multi", True), ("labels", ("delivery", "price", "quality", "staff")))),
    ("names", (("kind", "span"), ("title", "Mark names and dates"), ("question", "Mark each person, organisation and date."),
        ("labels", ("person", "organisation", "date")))),
    ("clear", (("kind", "rate"), ("title", "How clear is the answer?"), ("question", "Would a customer know what to do next?"),
        ("scale", (1.0, 5.0, 1.0)), ("scale_ends", ("cannot be followed", "perfectly clear")))),
    ("better", (("kind", "compare"), ("title", "Which answer is better?"), ("question", "Judge what a customer would be helped by. Length alone is no merit."), ("groups", ("women", "older people", "people with a disability")))),
    ("ranking", (("kind", "compare"), ("title", "Rank the summaries"), ("question", "The best first."))),
    ("mend", (("kind", "edit"), ("title", "Correct the answer"), ("question", "Change as little as makes it right."))),
    ("keep", (("kind", "accept"), ("title", "Fit for training?"), ("question", "Would you want a new colleague to learn from this pair?"))),
)  # fmt: skip
_LETTERS = (
    "The lamp is lovely, but it arrived in two pieces. I would like a new one before my mother's birthday on Friday.",
    "Thank you to the woman at the counter in Elm Street. She stayed ten minutes after closing so that I could pick up my parcel.",
    "Could you tell me whether the blue kettle also comes with a British plug? I could not find it on the page.",
    "I have called three times about the broken lock. Each time I was told that somebody would ring me back. Nobody has.",
    "Your new opening hours are a great help to those of us who work late. Please keep them!",
    "Please send the invoice for order 2214 to our office in Leeds and not to the shop.",
)
_NAMES = (
    "On 3 March 2024 Dr. Amara Boateng signed the lease with Northfield Housing. Her brother Kofi was there as a witness. 🙂 Both live in Hull.",
    "The tribunal of 17 May heard Ms. Lindqvist for Baltic Freight; Mr. O'Connor asked for a delay until 1 June.",
)
_ASKED = (
    ("How long may I keep a library book?", "Three weeks. You can renew it twice, online or at the desk, unless somebody is waiting for it."),
    ("My train was two hours late. What now?", "Delays are always unpleasant and many factors can lead to them. There are options."),
    ("Can I freeze the soup with cream in it?", "You can, but the cream may separate. Freeze the soup first and stir the cream in when you warm it up."),
)  # fmt: skip
_PAIRS = (
    ("My parcel says delivered, but it is not here. What should I do?",
     "I am sorry about that. Please look with your neighbours first: drivers often leave parcels there. If it is not found by tomorrow noon, "
     "reply with the order number and we send a new one or refund you, as you like.",
     "Parcels are delivered by our partners. Delivery times can vary. Please check the status of your parcel on the tracking page."),
    ("Can I change the delivery address after ordering?",
     "Yes, until the parcel is packed: open *My orders*, choose the order, and press “Change address”. After that, write to us at once and we will try.",
     "Yes! It is super easy to change the delivery address!! Just go to your account and change it, it works every time, for every order, always."),
    ("Is the bridge on Mill Lane open to wheelchairs?",
     "Yes. The ramp on the north side has been open since April; the south side has three steps.",
     "Wheelchair users should ask somebody to help them, as they usually do."),
)  # fmt: skip
_SUMMARIES = (
    ("The council moved the market to Thursday, from June on, because of the works on the square. Traders may cancel free of charge until the end of May.",
     ("From June the market is on Thursdays because of works on the square; traders may cancel free until the end of May.",
      "The market moves to Thursday.", "The council closed the market because traders cancelled.")),
)  # fmt: skip


def items() -> list[Item]:
    """Some of each task; ids, origins and suggestions hold what no page may show."""
    made: list[Item] = []
    for row, text in enumerate(_LETTERS):
        suggested = {"labels": ["complaint"], "score": 0.81, "model": "a-secret-model"}
        made.append(_item("letters", {"text": text, "prelabel": suggested}, row, overlap=2))
    for row, text in enumerate(
        ("Cheap, but it took nine days to arrive.", "The man in the shop knew every screw by name.")
    ):
        made.append(_item("topics", {"text": text}, row))
    made += [_item("names", {"text": text}, row) for row, text in enumerate(_NAMES)]
    made += [_item("clear", {"prompt": prompt, "answer": answer}, row) for row, (prompt, answer) in enumerate(_ASKED)]
    for row, (prompt, good, poor) in enumerate(_PAIRS):
        candidates = [{"id": "secret-old-7b", "text": poor}, {"id": "secret-new-7b", "text": good}]
        made.append(_item("better", {"prompt": prompt, "candidates": candidates}, row))
    for row, (text, answers) in enumerate(_SUMMARIES):
        candidates = [{"id": f"secret-{at}", "text": one} for at, one in enumerate(answers)]
        made.append(_item("ranking", {"prompt": f"Summarise in one sentence: {text}", "candidates": candidates}, row))
    messages = [{"role": "user", "content": "My train was two hours late. What now?"}, {"role": "assistant", "content": "Which ticket do you have?"}, {"role": "user", "content": "A return ticket, 84 pounds."}]  # fmt: skip
    made.append(_item("mend", {"prompt": messages, "answer": "You can get 25 percent back, that is 42 pounds. Send us the ticket in 28 days."}, 0))  # fmt: skip
    made.append(_item("mend", {"prompt": _ASKED[2][0], "answer": _ASKED[2][1]}, 1))
    made += [
        _item("keep", {"prompt": prompt, "answer": answer}, row) for row, (prompt, answer) in enumerate(_ASKED[:2])
    ]
    return made


def _item(task: str, payload: dict[str, Any], row: int, **more: Any) -> Item:
    origin = {"source": "secret-source.jsonl", "row": row, "models": {"a": {"checkpoint": "secret-checkpoint"}}}
    return make_item(1, task, payload, origin, **more)


def config(**values: Any) -> ConfigDict:
    made = config_lib.base()
    made.review.requests_per_second = 1000.0
    for key, value in values.items():
        made.review[key] = value
    return made


def known(guideline: Path | None = None, text: str = GUIDELINE) -> dict[str, tasks.Task]:
    """The tasks, with a guideline beside the letters if a file is given."""
    found = tasks.read(TASKS)
    if guideline is not None:
        guideline.write_text(text)
        found["letters"] = found["letters"]._replace(guideline=str(guideline))
    return found


def fill(engine: store.Engine) -> None:
    """Some people who know the password, and all items."""
    for name, role in (
        ("Olive", "owner"),
        ("Selma", "senior"),
        ("Ben", "expert"),
        ("Ada", "expert"),
        ("Cleo", "expert"),
    ):
        people.add(engine, name, role, password=PASSWORD)
    store.add_items(engine, items())


def answer(engine: store.Engine, known: dict[str, tasks.Task]) -> None:
    """Some answers, two of them at odds, and some flags."""
    flags = [{"type": "bias", "group": "older people", "note": "It takes for granted that they need help."}]
    said = (
        ("Ben", "letters", "label", {"labels": ["complaint"]}), ("Ben", "letters", "label", {"labels": ["praise"]}),
        ("Ada", "letters", "label", {"labels": ["request"]}), ("Ada", "letters", "label", {"labels": ["praise"]}),
        ("Ada", "letters", "label", {"labels": ["request"]}), ("Cleo", "letters", "label", {"labels": ["request"]}),
        ("Cleo", "keep", "accept", {"accept": False, "reason": "It does not answer the question."}),
        ("Ada", "clear", "flag", {"flags": flags}), ("Ben", "clear", "flag", {"flags": [{"type": "wrong", "group": "", "note": ""}]}),
    )  # fmt: skip
    for name, task, kind, given in said:
        person = people.named(engine, name)
        assert person is not None
        found = queue.assign(engine, person, known, 1, task)
        assert found is not None
        verdict = Verdict(uuid.uuid4().hex, found.item.id, person.id, kind, given, {}, 0, 6.5)
        queue.submit(engine, person, known, verdict)
        queue.release(engine, person, found.item.id)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serves an app on a free port of this machine, in a thread; yields its address."""
    import uvicorn

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    running = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="warning", access_log=False, ws="none", http="h11")
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(10)
