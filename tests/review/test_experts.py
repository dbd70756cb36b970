"""The verb `review`: what its actions do and print, and that none starts a device."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jaxtune import experts, validation
from jaxtune.review import people, store
from jaxtune.types import UserError
from tests.review.conftest import free_port

CONFIG = """
from jaxtune import config as config_lib

def get_config():
    config = config_lib.base()
    config.name = "experts"
    config.review.tasks = (("tone", (("kind", "label"), ("labels", ("good", "bad")), ("skill", "legal"))),)
    return config
"""


@pytest.fixture
def config(tmp_path: Path):
    (tmp_path / "config.py").write_text(CONFIG)
    space: dict = {}
    exec(CONFIG, space)
    made = space["get_config"]()
    made.workdir = str(tmp_path)
    return made


def _do(config, workdir: Path, action: str, **fields) -> None:
    config.review.action = action
    for key, value in fields.items():
        config.review[key] = value
    validation.validate(config)
    experts.review(config, workdir)


def test_invite_import_export(config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config.review.address = "https://review.example.org/"
    _do(config, tmp_path, "invite", person="Ann Lee", role="senior", skills=("legal",))
    told = capsys.readouterr().out
    token = re.search(r"https://review\.example\.org/invite/(\S{43})\n", told).group(1)
    with store.opened(str(tmp_path / "review.db")) as db:
        assert people.accept_invite(db, token, None)[1:] == ("Ann Lee", "senior", ("legal",), True)
    _do(config, tmp_path, "invite", person="ann lee", role="expert")
    assert "Ann Lee, senior, who has an account" in capsys.readouterr().out
    with pytest.raises(UserError, match="no task needs the skill 'medical'"):
        _do(config, tmp_path, "invite", person="Bo", skills=("medical",))
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\nbroken\n{"text": "poor"}\n')
    _do(config, tmp_path, "import", file=str(tmp_path / "rows.jsonl"))
    told = capsys.readouterr().out
    assert "2 items are new" in told
    assert "line 2: no JSON" in told
    assert json.loads((tmp_path / "rows.jsonl.broken.jsonl").read_text())["line"] == 2
    _do(config, tmp_path, "export", file="")
    assert "2 items and 0 verdicts" in capsys.readouterr().out
    assert len((tmp_path / "export.jsonl").read_text().splitlines()) == 3
    with store.opened(str(tmp_path / "review.db")) as db:
        assert [line["action"] for line in people.audit_log(db)][:2] == ["export", "import"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("action", "server", "did you mean 'serve'"),
        ("role", "boss", "expected one of expert, senior, owner"),
        ("format", "json", "did you mean 'jsonl'"),
        ("columns", ("text",), "pairs"),
        ("round", 0, "review.round"),
        ("host", "0.0.0.0", "tls_cert"),
        ("tls_cert", "cert.pem", "go together"),
    ],
)
def test_config_is_checked(config, field: str, value: object, said: str) -> None:
    config.review[field] = value
    with pytest.raises(UserError, match=said):
        validation.validate(config)


def test_what_is_missing_is_said(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for action, said in (("invite", "person=NAME"), ("import", "file=FILE")):
        with pytest.raises(UserError, match=said):
            _do(config, tmp_path, action)
    config.review.tasks = ()
    with pytest.raises(UserError, match="review.tasks is empty"):
        _do(config, tmp_path, "serve")
    config.workdir = "gs://bucket/run"
    with pytest.raises(UserError, match="cannot be in Cloud Storage"):
        experts._database(config, tmp_path)
    monkeypatch.setitem(experts._NEEDS, "no_such_module_here", "Nothing")
    with pytest.raises(UserError, match=r"needs Nothing: pip install 'jaxtune\[review\]'"):
        _do(config, tmp_path, "serve")


def test_report_stands_where_the_page_looks(config, tmp_path: Path) -> None:
    pytest.importorskip("jaxtune.review.insight")
    _do(config, tmp_path, "report")
    assert (tmp_path / "review_report.html").read_text() == (tmp_path / "review" / "report.html").read_text()


def test_serves_without_a_device_until_it_is_told_to_stop(tmp_path: Path, config, capsys) -> None:
    """The first start prints a link for an owner, and so does the next, as long as none has a password."""
    code = (
        "import sys; from jaxtune import launch; code = launch.main(sys.argv[1:]); import jax; from jax._src import xla_bridge; "
        "print('devices', xla_bridge.backends_are_initialized(), jax.config.jax_compilation_cache_dir); sys.exit(code)"
    )
    port = free_port()
    flags = [f"--config={tmp_path / 'config.py'}", f"--config.review.port={port}", f"--workdir={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    command = [sys.executable, "-u", "-c", code, "review", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        first = _link_in(process.stdout.readline())
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        answer = _get(first)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "owner" in answer
    assert process.returncode == 0, errors
    assert "devices False None" in said


def test_link_for_an_owner_is_printed_until_one_has_a_password(config, tmp_path: Path, capsys, monkeypatch) -> None:
    from jaxtune.review.server import app

    monkeypatch.setattr(app, "serve", lambda *_: print("served"))
    links = []
    for _ in range(2):
        _do(config, tmp_path, "serve")
        links.append(_link_in(capsys.readouterr().out))
    with store.opened(str(tmp_path / "review.db")) as db:
        assert [(one.name, one.role) for one in people.everyone(db)] == [("owner", "owner")]
        with pytest.raises(UserError, match="expired"):
            people.invited(db, links[0].rsplit("/", 1)[1])
        people.accept_invite(db, links[1].rsplit("/", 1)[1], "correct horse battery")
    _do(config, tmp_path, "serve")
    assert capsys.readouterr().out == "served\n"


def _link_in(said: str) -> str:
    return re.search(r"sign in as 'owner' by this link, which is good once: (\S+)", said).group(1)


def _get(url: str) -> str:
    for _ in range(200):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.05)
    raise AssertionError("it does not answer")


def test_a_port_that_is_taken_and_a_certificate_that_is_none(config, tmp_path: Path) -> None:
    told = r"127\.0\.0\.1:\d+ cannot be listened on: Address already in use"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match=told):
        _do(config, tmp_path, "serve", port=other.getsockname()[1])
    (tmp_path / "bad.pem").write_text("none")
    for name in ("bad.pem", "nowhere.pem"):
        with pytest.raises(UserError, match=rf"tls_cert='.*{name}' and its key cannot be read"):
            _do(config, tmp_path, "serve", tls_cert=str(tmp_path / name), tls_key=str(tmp_path / name))
