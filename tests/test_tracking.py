"""Every step once in metrics.jsonl, whatever happened; a bar for terminals, lines for logs."""

import errno
import io
import json
import sys
import types

import numpy as np
import pytest

from jaxtune import config, tracking
from jaxtune.types import UserError


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Goes on by `tick` seconds at each reading."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def _tracker(folder, total_steps=10, stream=None, **changes):
    arguments = {key: changes.pop(key) for key in list(changes) if not hasattr(config.base().tracking, key)}
    chosen = config.base().tracking
    chosen.update(changes)
    return tracking.Tracker(folder, chosen, total_steps=total_steps, stream=stream or io.StringIO(), **arguments)


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_with_plain_numbers(tmp_path):
    with _tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": np.float32(0.5), "trained_tokens": np.int64(7), "kind": "sft"})
        tracker.log(1, {"eval/loss": 0.25})
    assert _lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "trained_tokens": 7, "kind": "sft"},
        {"step": 1, "eval/loss": 0.25},
    ]


def test_lines_are_on_disk_before_close(tmp_path):
    tracker = _tracker(tmp_path)
    tracker.log(1, {"loss": 1.0})
    assert len(_lines(tmp_path)) == 1
    tracker.close()
    tracker.close()


def test_numbers_that_are_not_finite_keep_the_line_valid_json(tmp_path):
    with _tracker(tmp_path) as tracker:
        tracker.log(3, {"loss": float("nan"), "grad_norm": np.float32(np.inf), "learning_rate": 1e-4})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 3, "loss": None, "grad_norm": None, "learning_rate": 1e-4, "nonfinite": ["loss", "grad_norm"],
    }  # fmt: skip


def test_resume_cuts_later_lines_and_a_torn_one(tmp_path):
    with _tracker(tmp_path) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with _tracker(tmp_path, first_step=5) as tracker:
        for step in range(5, 9):
            tracker.log(step, {"loss": 2.0})
    seen = {line["step"]: line["loss"] for line in _lines(tmp_path)}
    assert list(seen) == [*range(1, 9)]
    assert list(seen.values()) == [1.0] * 4 + [2.0] * 4
    assert len(_lines(tmp_path)) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    _tracker(tmp_path).close()
    assert _lines(tmp_path) == []


def test_only_the_main_process_writes(tmp_path):
    with _tracker(tmp_path / "other", is_main=False, stream=(stream := io.StringIO())) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.say("hello")
    assert not (tmp_path / "other").exists()
    assert not stream.getvalue()


def test_a_full_disk_is_one_line_naming_the_path(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with _tracker(tmp_path) as tracker, pytest.raises(UserError, match=r"disk is full.*metrics\.jsonl") as caught:
        tracker.log(1, {"loss": 1.0})
    assert "\n" not in str(caught.value)


def test_other_io_errors_pass_through():
    with pytest.raises(PermissionError), tracking.writing("x"):
        raise PermissionError(errno.EACCES, "no")


def test_plain_lines_come_every_so_many_steps_and_at_the_end_with_the_time_left(tmp_path):
    stream = io.StringIO()
    with _tracker(tmp_path, total_steps=22, stream=stream, log_every_steps=10, clock=Clock(2.0)) as tracker:
        for step in range(22):
            facts = {"learning_rate": 2e-4, "tokens_per_second": 1234.5, "padding_share": 0.03}
            tracker.log(step, {"loss": 1 / (step + 1), **facts})
        tracker.log(21, {"eval/loss": 0.5})
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 1/22  loss 1.0000  rate 2.00e-04  1,234 tokens/s  padding 3%",
        "step 10/22  loss 0.1000  rate 2.00e-04  1,234 tokens/s  padding 3%  24s left",
        "step 20/22  loss 0.0500  rate 2.00e-04  1,234 tokens/s  padding 3%  4s left",
        "step 22/22  loss 0.0455  rate 2.00e-04  1,234 tokens/s  padding 3%",
        "step 22/22  eval/loss 0.5000",
    ]


def test_a_terminal_gets_a_bar_with_the_same_facts(tmp_path):
    with _tracker(tmp_path, stream=(stream := Terminal())) as tracker:
        tracker.log(0, {"loss": 0.75, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "padding_share": 0.03})
        tracker.log(1, {"eval/loss": 0.5})
        tracker.say("early stop")
    text = stream.getvalue()
    assert "\r" in text
    assert "0/10" in text
    assert "2/10" in text
    assert "step 2  eval/loss 0.5000\n" in text
    assert "early stop\n" in text


@pytest.mark.parametrize(("mode", "expected"), [("off", ""), ("lines", "step 1/10  loss 1.0000\n")])
def test_progress_off_and_lines_on_a_terminal(tmp_path, mode, expected):
    with _tracker(tmp_path, stream=(stream := Terminal()), progress=mode) as tracker:
        tracker.log(0, {"loss": 1.0})
    assert stream.getvalue() == expected


def test_progress_of_quick_work_is_silent_and_of_long_work_tells_the_time_left():
    quick, slow = io.StringIO(), io.StringIO()
    assert [*tracking.progress(range(5), 5, "tokenise", stream=quick, clock=Clock(0.1))] == [*range(5)]
    assert quick.getvalue() == ""
    assert [*tracking.progress(range(4), 4, "tokenise", stream=slow, clock=Clock(6.0))] == [*range(4)]
    assert slow.getvalue().splitlines() == ["tokenise 2/4 (50%)  12s left", "tokenise 4 done in 30s"]


def test_progress_on_a_terminal_is_a_bar():
    assert list(tracking.progress(iter("ab"), 2, "tokenise", stream=(stream := Terminal()))) == ["a", "b"]
    assert "tokenise" in stream.getvalue()


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with _tracker(tmp_path, tensorboard=True) as tracker:
        tracker.log(1, {"loss": 0.5, "eval/loss": 0.25, "grad_norm": float("nan")})
    data = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in data
    assert b"eval/loss" in data
    assert b"grad_norm" not in data


def test_a_missing_extra_costs_an_older_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[tensorboard\]'"):
        _tracker(tmp_path, tensorboard=True)
    assert _lines(tmp_path) == [{"step": 1}]


def test_wandb_missing_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracking.wandb='team'.*pip install 'jaxtune\[wandb\]'.*tracking.wandb=''"):
        _tracker(tmp_path, wandb="team")


def test_a_missing_extra_is_said_before_any_work(monkeypatch):
    chosen = config.base().tracking
    tracking.check(chosen)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    chosen.tensorboard = True
    with pytest.raises(UserError, match="tensorboardX, which is missing"):
        tracking.check(chosen)


def test_old_metrics_are_set_aside_under_a_free_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert tracking.set_aside(path) is None
    for text in ("first", "second"):
        path.write_text(text)
        tracking.set_aside(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "metrics.1.jsonl": "first",
        "metrics.2.jsonl": "second",
    }


def test_wandb_resumes_its_run(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(
        id="abc", log=lambda metrics, step: seen.append((step, metrics)), finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: seen.append(k["id"]) or run))
    for first_step in (0, 2):
        with _tracker(tmp_path, wandb="team", first_step=first_step, config={"name": "x"}) as tracker:
            tracker.log(2, {"loss": 1.0})
    assert seen == [None, (2, {"loss": 1.0}), "end", "abc", (2, {"loss": 1.0}), "end"]
