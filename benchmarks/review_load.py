"""Fifty experts at the page for two minutes, its server killed ten times meanwhile: is every acknowledged verdict there, once?

    python benchmarks/review_load.py                                             # SQLite in a temporary folder
    python benchmarks/review_load.py --server postgresql://postgres@127.0.0.1/   # PostgreSQL, in a database of its own
    python benchmarks/review_load.py --experts 50 --seconds 120 --kills 10 --think 5.0

The server is a process of its own (uvicorn on loopback, passwords and all), ended by SIGKILL at times drawn at random and started
again at once. Each expert signs in, asks for an item, waits `--think` seconds on average, and sends a label under an id of their own;
where no answer comes the same is sent again, as the page's script does. Exit code 1 if an acknowledged verdict is missing, differs or is
there twice, if anyone answered an item twice, or an item has more answers than its overlap.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxtune import config as config_lib
from jaxtune.review import people, store, tasks
from jaxtune.review.record import make_item

PASSWORD, OVERLAP = "four plain garden words", 3
LABELS = ("complaint", "request", "praise", "other")
TASKS = (("letters", (("kind", "label"), ("labels", LABELS), ("overlap", OVERLAP))),)


class Sent(NamedTuple):
    """A verdict that was acknowledged."""

    id: str
    item: str
    expert: str
    label: str
    seconds: float  # of the request that was acknowledged
    waited: float  # from the first try


class Expert(threading.Thread):
    """Works until the clock is over; keeps what was acknowledged."""

    def __init__(self, name: str, port: int, think: float, until: float, start: threading.Barrier) -> None:
        super().__init__(name=name, daemon=True)
        self.port, self.think, self.until, self.start_line = port, think, until, start
        self.random = random.Random(name)
        self.sent: list[Sent] = []
        self.tried: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.connection: http.client.HTTPConnection | None = None
        self.trouble: BaseException | None = None

    def run(self) -> None:
        try:
            self.sign_in()
            self.start_line.wait()
            self.until += time.monotonic()
            self.work()
        except BaseException as error:
            self.trouble = error
            self.start_line.abort()
        finally:
            if self.connection is not None:
                self.connection.close()

    def request(self, method: str, path: str, body: str | None, kind: str) -> tuple[int, str, Any]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            self.connection.request(method, path, body, {"content-type": kind, **self.headers})
            answer = self.connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            return 0, "", {}

    def sign_in(self) -> None:
        _, page, headers = self.request("GET", "/sign-in", None, "text/html")
        csrf = re.search(r'name="csrf" content="([^"]+)"', page)
        assert csrf, page[:300]
        self.headers["cookie"] = headers["set-cookie"].split(";")[0]
        form = urllib.parse.urlencode({"csrf": csrf[1], "name": self.name, "password": PASSWORD})
        status, page, headers = self.request("POST", "/sign-in", form, "application/x-www-form-urlencoded")
        assert status == 303, f"{self.name}: {status} {page[:300]}"
        cookies = [one.split(";")[0] for one in headers.get_all("set-cookie")]
        self.headers["cookie"] = next(one for one in cookies if one.startswith("jaxtune="))
        _, page, _ = self.request("GET", "/", None, "text/html")
        csrf = re.search(r'name="csrf" content="([^"]+)"', page)
        assert csrf, page[:300]
        self.headers["x-csrf-token"] = csrf[1]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any, float]:
        """Sends until there is an answer other than "try again"; returns it, and the seconds of its request."""
        wait = 0.1
        while True:
            began = time.monotonic()
            status, text, _ = self.request("POST", path, json.dumps(body), "application/json")
            took = time.monotonic() - began
            if status not in (0, 429, 500, 503):
                return status, json.loads(text), took
            self.outcomes[f"again: {status or 'no answer'}"] += 1
            time.sleep(wait * self.random.uniform(0.5, 1.5))
            wait = min(2 * wait, 2.0)

    def work(self) -> None:
        item = None
        while time.monotonic() < self.until:
            if item is None:
                status, found, _ = self.post("/api/next", {"task": "letters"})
                item = found.get("next") if status == 200 else None
                if item is None:
                    self.outcomes["nothing left"] += 1
                    return
            time.sleep(self.random.expovariate(1 / self.think))
            label, verdict = self.random.choice(LABELS), str(uuid.uuid4())
            body = {"id": verdict, "item": item["item"], "task": "letters", "kind": "label"}
            self.tried.add(verdict)
            began = time.monotonic()
            status, found, took = self.post("/api/verdicts", body | {"answer": {"labels": [label]}, "seconds": 1.0})
            if status == 200:
                self.sent.append(Sent(verdict, item["item"], self.name, label, took, time.monotonic() - began))
                self.outcomes["saved" if found["new"] else "saved before, its answer lost"] += 1
                item = found.get("next")
            else:
                self.outcomes[f"refused: {status} {found.get('reason', '')}"] += 1
                item = None


class Served:
    """The server as a process of its own, on one port over all its lives."""

    def __init__(self, url: str) -> None:
        self.url = url
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = int(one.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, __file__, "--serve", str(self.port), self.url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("the server does not listen")

    def kill(self, how: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(30)


def serve(port: int, url: str) -> None:
    from jaxtune.review.server import app

    config = config_lib.base()
    config.review.port, config.review.requests_per_second = port, 1000.0
    with store.opened(url) as engine:
        app.serve(config, engine, tasks.read(TASKS))


def fill(url: str, experts: int, num_items: int) -> None:
    with store.opened(url) as engine:
        for at in range(experts):
            people.add(engine, f"Expert {at}", "expert", password=PASSWORD)
        store.add_items(engine, [make_item(1, "letters", {"text": f"Letter {at}"}, {}, overlap=OVERLAP) for at in range(num_items)])  # fmt: skip


def measure(url: str, experts: int, seconds: float, kills: int, think: float) -> dict[str, Any]:
    """Runs it, and returns what was found: figures, and under "wrong" what must be empty."""
    fill(url, experts, round(experts * (seconds / think + 20) / OVERLAP))
    served = Served(url)
    served.start()
    line = threading.Barrier(experts + 1)
    working = [Expert(f"Expert {at}", served.port, think, seconds, line) for at in range(experts)]
    for one in working:
        one.start()
    try:
        try:
            line.wait(300)
        except threading.BrokenBarrierError:
            raise next((one.trouble for one in working if one.trouble), RuntimeError("no start")) from None
        began, chance = time.monotonic(), random.Random(0)
        for at in range(kills):
            due = began + seconds * (at + chance.uniform(0.2, 0.8)) / kills
            time.sleep(max(0.0, due - time.monotonic()))
            served.kill()
            served.start()
        for one in working:
            one.join(seconds + 120)
        took = time.monotonic() - began
    finally:
        served.kill(signal.SIGTERM)
    if trouble := [one for one in working if one.trouble or one.is_alive()]:
        raise trouble[0].trouble or RuntimeError(f"{trouble[0].name} never ended")
    return figures(working, took) | {"kills": kills, "wrong": wrong(url, working)}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def figures(working: list[Expert], took: float) -> dict[str, Any]:
    sent = [one for expert in working for one in expert.sent]
    outcomes: Counter[str] = Counter()
    for expert in working:
        outcomes += expert.outcomes
    found = {
        f"p{round(100 * share)}_ms": 1000 * quantile([one.seconds for one in sent], share)
        for share in (0.5, 0.95, 0.99)
    }
    found["longest_wait_seconds"] = max((one.waited for one in sent), default=float("nan"))
    return found | {"acknowledged": len(sent), "per_second": len(sent) / took, "outcomes": dict(outcomes)}


def wrong(url: str, working: list[Expert]) -> list[str]:
    """What must not be: lost, changed, doubled, invented, too many."""
    sent = {one.id: one for expert in working for one in expert.sent}
    tried = {one for expert in working for one in expert.tried}
    with store.opened(url) as engine:
        there = store.read_verdicts(engine, all_of_them=True)
        names = {one.id: one.name for one in people.everyone(engine)}
        overlap = {one.id: one.overlap for one in store.read_items(engine)}
        whole = "ok"
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                whole = str(connection.exec_driver_sql("PRAGMA integrity_check").scalar())
    kept = {one.id: one for one in there}
    told = [f"{one} was acknowledged and is lost" for one in sent if one not in kept]
    for one in sent.values():
        row = kept.get(one.id)
        if row and (row.item, names[row.person], row.answer) != (one.item, one.expert, {"labels": [one.label]}):
            told.append(f"{one.id} was changed")
    told += [f"{one} is there {count} times" for one, count in Counter(row.id for row in there).items() if count > 1]
    told += [f"{row.id} was never sent" for row in there if row.id not in tried]
    pairs = Counter((row.item, row.person) for row in there)
    told += [f"{names[person]} answered {item} {count} times" for (item, person), count in pairs.items() if count > 1]
    told += [f"{item} has {count} answers" for item, count in Counter(row.item for row in there).items() if count > overlap[item]]  # fmt: skip
    return told + ([] if whole == "ok" else [f"the database is broken: {whole}"])


def own_database(server: str) -> tuple[str, Any]:
    """A new database of a PostgreSQL server, and what drops it."""
    import sqlalchemy as sa

    name = f"jaxtune_load_{uuid.uuid4().hex[:8]}"
    url = sa.make_url(server.rstrip("/") + "/postgres").set(drivername="postgresql+pg8000")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    def say(statement: str) -> None:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    say(f"CREATE DATABASE {name}")
    return f"{server.rstrip('/')}/{name}", lambda: say(f"DROP DATABASE {name} WITH (FORCE)")


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), sys.argv[3])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="", help="URL of a PostgreSQL server, without a database's name")
    parser.add_argument("--experts", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--think", type=float, default=5.0, help="seconds between an item and its answer, on average")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url, drop = own_database(given.server) if given.server else (f"{folder}/review.db", lambda: None)
        try:
            found = measure(url, given.experts, given.seconds, given.kills, given.think)
        finally:
            drop()
    print(
        "| database | experts | seconds | kills | acknowledged | a second | p50 ms | p95 ms | p99 ms | lost, doubled, too many |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    kind = "PostgreSQL" if given.server else "SQLite"
    print(
        f"| {kind} | {given.experts} | {given.seconds:g} | {found['kills']} | {found['acknowledged']} | {found['per_second']:.1f} | "
        f"{found['p50_ms']:.0f} | {found['p95_ms']:.0f} | {found['p99_ms']:.0f} | {len(found['wrong'])} |"
    )
    print(f"longest wait over a kill: {found['longest_wait_seconds']:.1f} s; {found['outcomes']}")
    for one in found["wrong"][:20]:
        print("WRONG:", one)
    return 1 if found["wrong"] or not found["acknowledged"] else 0


if __name__ == "__main__":
    sys.exit(main())
