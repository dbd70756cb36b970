"""The page tells the truth, stands alone, and lets no text of a user's become markup."""

import html.parser
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxtune import config as config_lib
from jaxtune import report, report_plots
from jaxtune.evals import account
from jaxtune.statistics import Estimate

EVIL = "<script>alert('x')</script> & \"$\\frac{1\" 日本"

FACTS = {
    "name": "reviews",
    "about": {"Model": "tiny"},
    "notices": ["12 rows were dropped"],
    "before": {"accuracy": Estimate(0.4, 0.35, 0.45), "label_nll": Estimate(1.3, 1.2, 1.4)},
    "after": {"accuracy": Estimate(0.8, 0.75, 0.85), "label_nll": Estimate(0.4, 0.3, 0.5)},
    "difference": {
        "accuracy": {
            "value": 0.4,
            "low": 0.3,
            "high": 0.5,
            "p": 1e-9,
            "test": "exact McNemar",
            "higher_is_better": True,
        },
        "label_nll": {
            "value": -0.9,
            "low": -1.0,
            "high": -0.8,
            "p": 1e-4,
            "test": "paired permutation",
            "higher_is_better": False,
        },
    },
    "confusion": {"labels": ["no", "yes"], "before": np.array([[3, 2], [4, 1]]), "after": np.array([[5, 0], [2, 3]])},
    "examples": [{"prompt": "Good?", "answer": "yes", "before": "no", "after": "yes"}],
    "train": {
        "steps": 40,
        "trained_tokens": 812345,
        "tokens_per_second": 9412.3,
        "seconds": 415,
        "peak_memory_bytes": 3 * 2**30,
    },
    "data": {"rows": 3988, "padding_share": np.float32(0.021), "dropped": {"empty": 12}},
    "seconds": {"fetch": 3.2, "training": 340.0},
    "how_to": [("With PEFT", "model = load('adapter')")],
    "config": {"train": {"steps": 40}, "eval": {"confidence": 0.95}},
}


class Page(html.parser.HTMLParser):
    """Collects what a browser would see: tags, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words = Counter(), Counter(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids[dict(attrs).get("id")] += 1
        assert tag not in ("script", "link", "img", "iframe")
        if tag == "svg":
            assert dict(attrs)["role"] == "img"
            assert dict(attrs)["aria-labelledby"]
        if tag == "th" and dict(attrs).get("scope") is None:
            pytest.fail("a table header without scope")

    def handle_data(self, data):
        self.words.append(data)


def _write(folder, facts, steps=40):
    lines = [
        {"step": s, "loss": 2 / s, "learning_rate": 1e-4, "tokens_per_second": 9.0, "eval/loss": 1 / s}
        for s in range(1, steps + 1)
    ]
    lines[3:3] = [{"step": 3, "loss": None, "nonfinite": ["loss"]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(folder, facts)
    return (folder / "report.html").read_text("utf-8")


def test_page_has_every_part_and_asks_nobody_for_anything(tmp_path):
    text = _write(tmp_path, FACTS)
    page = Page(text)
    assert page.tags["svg"] == 6  # intervals, two confusions, loss, rate, tokens/s
    assert all(num == 1 for name, num in page.ids.items() if name)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    words = " ".join(page.words)
    for part in ("Accuracy improved from 40.0% to 80.0% (+40.0 points, 95% interval +30.0 to +50.0; p < 0.0001).",
                 "12 rows were dropped", "exact McNemar", "3.00 GiB", "6 min 55 s", "812,345", "2.1%", "With PEFT",
                 '"confidence": 0.95', "Confusion after: 8 of 10 right", "Good?"):  # fmt: skip
        assert part in words, part


def test_every_second_has_a_cause_on_the_page(tmp_path):
    wall = {"training": 75.0, "data": 5.0, "start": 20.0}
    start = {"seconds": {"start": 20.0, "load": 3.0, "compile": 1.5, "first_step": 0.5}, "compile_seconds": 4.5,
             "compile_overlapped_seconds": 3.0, "from_cache": True}  # fmt: skip
    words = " ".join(Page(_write(tmp_path, FACTS | {"wall": wall, "start": start})).words)
    for part in ("Goodput 75.0% of 1 min 40 s", "Waiting for data", "5.0%", "To the end of the first step", "25.0 s",
                 "from the cache", "4.5 s, 3.0 s of it meanwhile"):  # fmt: skip
        assert part in words, part
    assert "5 min 40 s" not in words, "the wall time takes the place of the run's parts"
    assert json.loads((tmp_path / "report.json").read_text())["wall"] == wall


def test_json_holds_plain_numbers(tmp_path):
    _write(tmp_path, FACTS | {"after": {"accuracy": Estimate(0.8, float("nan"), 0.85)}})
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["before"]["accuracy"] == {"value": 0.4, "low": 0.35, "high": 0.45}
    assert found["after"]["accuracy"] == {"value": 0.8, "low": None, "high": 0.85}
    assert found["confusion"]["after"] == [[5, 0], [2, 3]]
    assert set(found["train"]) == {"steps", "trained_tokens", "tokens_per_second", "seconds", "peak_memory_bytes"}


def test_text_of_users_is_escaped_everywhere(tmp_path):
    facts = FACTS | {
        "name": EVIL, "about": {EVIL: EVIL}, "notices": [EVIL], "how_to": [(EVIL, EVIL)], "config": {EVIL: EVIL},
        "headline": EVIL, "examples": [dict.fromkeys(("prompt", "answer", "before", "after"), EVIL)],
        "confusion": FACTS["confusion"] | {"labels": ["no", EVIL]}, "seconds": {EVIL: 1.0},
        "before": {EVIL: Estimate(1, 0, 2)}, "data": {EVIL: 1, "dropped": {EVIL: 1}},
    }  # fmt: skip
    text = _write(tmp_path, facts)
    assert "<script" not in Page(text).tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10


@pytest.mark.parametrize(
    ("gap", "sentence"),
    [
        (
            {"value": 0.02, "low": -0.01, "high": 0.05, "p": 0.2},
            "went from 40.0% to 80.0%: a change this size may be chance",
        ),
        ({"value": -0.1, "low": -0.2, "high": -0.05, "p": 0.01}, "got worse from 40.0% to 80.0% (−10.0 points"),
    ],
)
def test_headline_claims_no_more_than_the_test(tmp_path, gap, sentence):
    gap = gap | {"test": "exact McNemar", "higher_is_better": True}
    assert sentence in _write(tmp_path, FACTS | {"difference": {"accuracy": gap}})


def test_one_side_alone_has_a_headline_too(tmp_path):
    text = _write(tmp_path, {"after": {"accuracy": FACTS["after"]["accuracy"]}})
    assert "Accuracy is 80.0% (interval 75.0% to 85.0%)." in text


def test_lower_is_better_reads_as_an_improvement(tmp_path):
    assert "Label NLL (nats) improved from 1.3 to 0.4 (−0.9," in _write(tmp_path, FACTS | {"metric": "label_nll"})


def test_every_part_may_be_missing(tmp_path):
    report.write(tmp_path, {})
    Page((tmp_path / "report.html").read_text("utf-8"))
    assert set(json.loads((tmp_path / "report.json").read_text())) == {"before", "after", "difference", "train", "data"}
    for key in ("before", "difference", "confusion", "config", "train"):
        _write(tmp_path, {k: v for k, v in FACTS.items() if k != key}, steps=3)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html", "report.json"}


def test_smoothing_keeps_a_straight_line_and_does_not_lag():
    line = np.linspace(3, 1, 200)
    np.testing.assert_allclose(report_plots._smooth(line)[10:-10], line[10:-10])
    assert np.std(report_plots._smooth(np.random.default_rng(0).normal(size=400))) < 0.35


def test_without_matplotlib_the_page_says_so_and_has_tables(tmp_path):
    code = (
        "import sys, importlib.util as u, json; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "sys.modules['matplotlib'] = None\n"
        "from jaxtune import report\n"
        "report.write(sys.argv[1], json.loads(sys.argv[2]))\n"
    )
    root = Path(report.__file__).parents[1]
    facts = json.dumps(report._plain(FACTS))
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path), facts], check=True, cwd=root)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    words = " ".join(page.words)
    assert page.tags["svg"] == 0
    assert "No plots: matplotlib is not installed" in words
    assert "Confusion after" in words
    assert "80.0%" in words


def test_rewards_are_drawn_by_function_and_only_where_there_are_any() -> None:
    lines = [
        {
            "step": step,
            "loss": 0.1,
            "reward": 0.1 * step,
            "rewards/right": 0.2 * step,
            "rewards/short": 0.0,
            "entropy": 0.5,
        }
        for step in range(0, 8, 2)
    ]
    drawn = report_plots.training(lines)
    assert "Mean reward of each round, from 0 to 0.6" in drawn[0]
    assert ">right<" in drawn[0]
    assert ">short<" in drawn[0]
    assert "Entropy (nats a token) over steps" in drawn[1]
    plain = report_plots.training([{"step": 0, "loss": 0.1, "rewards/chosen": 1.0}])
    assert not any("reward" in plot for plot in plain)


def test_a_page_says_what_the_loss_is_a_sum_of() -> None:
    config = config_lib.base()
    assert account._learnt(config) == {"Objective": "sft"}
    config.train.objective, config.train.beside = "dpo", (("distill", 0.5, "more.jsonl"),)
    config.distill.teacher, config.retain.penalties = "hf:owner/larger", (("kl_base", 0.1), ("ewc", 100.0))
    assert account._learnt(config) == {
        "Objective": "dpo + 0.5 x distill",
        "Teacher": "hf:owner/larger, online",
        "Penalties": "0.1 x kl_base + 100 x ewc",
    }
