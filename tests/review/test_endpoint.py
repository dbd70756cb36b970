"""A model judge behind an endpoint: good, flaky and malformed answers, and where the key may go."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jaxtune.review import endpoint, model_judge
from jaxtune.review.record import make_item
from jaxtune.types import UserError

Reply = Callable[[dict[str, Any]], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """An endpoint on loopback; `reply` maps a request's body to status and body."""

    daemon_threads = True
    reply: Reply
    seen: list[dict[str, Any]]
    piece, pause = 1 << 20, 0.0  # bytes at once, seconds after each

    def handle_error(self, *_: Any) -> None:
        """A client that went away is what a test wants."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        status, answer = self.server.reply(body)
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        for at in range(0, len(answer), self.server.piece):
            self.wfile.write(answer[at : at + self.server.piece])
            time.sleep(self.server.pause)

    def log_message(self, *_: Any) -> None:
        pass


def says(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.seen, made.reply = [], lambda body: (200, says("A"))
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server: Server, **more: Any) -> endpoint.Ask:
    return endpoint.client(server.url, "judge-1", **{"retries": 3, "backoff": 0.01} | more)


def test_it_asks_as_such_endpoints_are_asked(server: Server) -> None:
    assert ask(server, key="secret")([{"role": "user", "content": "Which?"}]) == "A"
    (seen,) = server.seen
    assert (seen["path"], seen["key"], seen["model"]) == ("/v1/chat/completions", "Bearer secret", "judge-1")
    assert (seen["messages"], seen["temperature"]) == ([{"role": "user", "content": "Which?"}], 0)


def test_it_tries_again(server: Server) -> None:
    replies = iter([(503, b"busy"), (200, b"<html>gateway</html>"), (429, b"slow down"), (200, says("B"))])
    server.reply = lambda body: next(replies)
    assert ask(server)([]) == "B"
    assert len(server.seen) == 4
    server.reply = lambda body: (500, b"down")
    with pytest.raises(endpoint.Refused, match="HTTP 500: down"):
        ask(server)([])
    assert len(server.seen) == 8


def test_what_no_retry_mends(server: Server) -> None:
    server.reply = lambda body: (401, b"bad key: hunter2hunter2")
    with pytest.raises(UserError, match="check address, model and key") as told:
        ask(server, key="hunter2hunter2")([])
    assert "hunter2" not in str(told.value)
    server.reply = lambda body: (400, b"filtered")
    with pytest.raises(endpoint.Refused, match="filtered"):
        ask(server)([])
    server.reply = lambda body: (307, b"")
    with pytest.raises(endpoint.Refused, match="HTTP 307"):
        ask(server, key="hunter2hunter2")([])  # followed, it would have carried the key elsewhere
    assert len(server.seen) == 3


def test_settings_that_a_server_does_not_take(server: Server) -> None:
    def fussy(body: dict[str, Any]) -> tuple[int, bytes]:
        wrong = [name for name in ("max_tokens", "temperature") if name in body]
        return (400, f"unsupported parameter: '{wrong[0]}'".encode()) if wrong else (200, says("C"))

    server.reply = fussy
    own = ask(server)
    assert [own([]), own([])] == ["C", "C"]
    assert len(server.seen) == 4  # it is told twice, and remembers
    assert server.seen[-1]["max_completion_tokens"] == 512


def test_a_reply_that_drips_is_late(server: Server) -> None:
    server.piece, server.pause = 4, 0.05  # about one second in all
    with pytest.raises(endpoint.Refused, match="too slowly"):
        ask(server, timeout=0.2, retries=0)([])
    assert ask(server, timeout=30.0, retries=0)([]) == "A"


def test_nobody_listens(server: Server) -> None:
    gone = Server(("127.0.0.1", 0), Handler)
    url = gone.url
    gone.server_close()
    with pytest.raises(endpoint.Refused, match="refused"):
        endpoint.client(url, "x", retries=1, backoff=0.01)([])
    server.reply = lambda body: (threading.Event().wait(0.4), (200, says("A")))[1]
    with pytest.raises(endpoint.Refused, match="timed out"):
        ask(server, timeout=0.1, retries=0)([])


def test_where_a_key_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unencrypted"):
        endpoint.check("http://example.org/v1", "key")
    endpoint.check("http://example.org/v1", "")
    with pytest.raises(UserError, match="no endpoint"):
        endpoint.check("ftp://example.org", "")
    with pytest.raises(UserError, match="name or password"):
        endpoint.check("https://me:pass@example.org/v1", "")
    monkeypatch.setenv("JUDGE_KEY", " k \n")
    assert endpoint.key_of("JUDGE_KEY") == "k"
    assert endpoint.key_of("") == ""
    with pytest.raises(UserError, match="is not set"):
        endpoint.key_of("NO_SUCH_JUDGE_KEY")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"), (" b.\n", "B"), ("**C**", "C"), ("Answer: B", "B"), ("The better one is clear.\n\nFinal answer: A", "A"),
        ("My verdict is B.", "B"), ("(A)", "A"), ("A good question", ""), ("", ""), ("D", ""), ("AB", ""), ("Both A and B", ""),
        ("Because A is longer\nB", "B"),
    ],
)  # fmt: skip
def test_letters(reply: str, letter: str) -> None:
    assert model_judge.read_letter(reply) == letter


@pytest.mark.parametrize(
    ("reply", "letter"), [("A\n\nBecause it is right.", "A"), ("B\nOn second thought:\nA", ""), ("A\n\nAnswer: A", "A")]
)
def test_a_letter_in_the_first_line_counts_unless_the_last_one_contradicts(reply: str, letter: str) -> None:
    assert model_judge.read_letter(reply) == letter


def test_verdicts_from_two_orders() -> None:
    item = make_item(
        1, "better", {"prompt": "p", "candidates": [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]}, {}
    )
    who = model_judge.person("local", "m", "q")

    def said(forth: Any, back: Any) -> Any:
        given = model_judge.verdict(who, item, forth, back, 1.0, 0)
        return given.answer.get("order", given.kind)

    Asked = model_judge.Asked
    assert said(Asked("A"), Asked("B")) == [["a"], ["b"]]  # the same candidate in both orders
    assert said(Asked("B"), Asked("A")) == [["b"], ["a"]]
    assert said(Asked("A"), Asked("A")) == [["a", "b"]]  # the same place in both
    assert said(Asked("A"), Asked("C")) == [["a"], ["b"]]
    assert said(Asked("C"), Asked("C")) == [["a", "b"]]
    assert said(Asked("A"), Asked("", None, "no")) == "skip"
    assert said(Asked("A", 3.0), Asked("A", 1.0)) == [["a"], ["b"]]  # of log-odds the mean decides
    assert said(Asked("A", 1.0), Asked("A", 1.0)) == [["a", "b"]]


def test_texts_stay_as_they_are() -> None:
    candidates = [{"id": "a", "text": "{second} {0}"}, {"id": "b", "text": r"\g<1> {prompt}"}]
    item = make_item(1, "better", {"prompt": [{"role": "user", "content": "{first}"}], "candidates": candidates}, {})
    text = model_judge.question("P {prompt} F {first} S {second} G{guideline}", "", item, ["b", "a"])
    assert text == "P [user] {first} F \\g<1> {prompt} S {second} {0} G"
