"""The gate's decisions, and the figures across stages, on results made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune import config as config_lib
from jaxtune.data.formats import Example
from jaxtune.evals import measure, protected, tasks
from jaxtune.evals.protected import Protected
from jaxtune.lineage import gate, matrix

NAMES = ("perplexity", "bits_per_byte")


def held(name: str, metric: str, tolerance: float = 0.05, num: int = 40) -> Protected:
    examples = [Example(f"{name}:{i}", text=f"text {i}") for i in range(num)]
    higher = metric == "accuracy"
    kind = "labels" if higher else "perplexity"
    return Protected(name, config_lib.base(), measure.HeldOut(kind, examples, (), []), metric, higher, tolerance)


def right(one: Protected, num_right: int, first: int = 0) -> tasks.Result:
    """A result of `num_right` right answers, from row `first` on."""
    rows = [
        {"row_id": e.row_id, "answer": "a", "prediction": "a" if first <= i < first + num_right else "b",
         "correct": first <= i < first + num_right, "label_nll": 0.5}
        for i, e in enumerate(one.held.examples)
    ]  # fmt: skip
    return tasks.measured(("accuracy",), rows)


def texts(one: Protected, bits_per_byte: float, spread: float = 0.0) -> tasks.Result:
    """A result of so many bits per byte, in rows that differ by up to `spread`."""
    nll = np.log(2) * 10 * (bits_per_byte + spread * np.linspace(-1, 1, len(one.held.examples)))
    rows = [
        {"row_id": e.row_id, "answer": None, "nll_sum": float(x), "num_tokens": 5, "text_nll_sum": float(x), "num_bytes": 10}
        for e, x in zip(one.held.examples, nll, strict=True)
    ]  # fmt: skip
    return tasks.measured(NAMES, rows)


def test_what_is_not_shown_to_be_within_the_margin_does_not_pass() -> None:
    """36 of 40 right, and then 35, though other ones: one point worse is within five, its interval is not."""
    one = held("reviews", "accuracy", 0.05)
    same = protected.judge([one], {"reviews": right(one, 36)}, {"reviews": right(one, 36)})["reviews"]
    assert gate.passes(same, "interval")
    changed = protected.judge([one], {"reviews": right(one, 36)}, {"reviews": right(one, 35, 4)})["reviews"]
    assert changed.worsening.value == pytest.approx(0.025)
    assert gate.passes(changed, "estimate")
    assert not gate.passes(changed, "interval")
    told = gate.told("reviews", changed, "interval", 40)
    needed = 40 * ((changed.worsening.high - 0.025) / (0.05 - 0.025)) ** 2
    assert told.endswith(f"not shown to be within it by 40 rows: about {int(np.ceil(needed)):,} would tell")
    worse = protected.judge([one], {"reviews": right(one, 36)}, {"reviews": right(one, 20)})["reviews"]
    assert not gate.passes(worse, "estimate")
    assert gate.told("reviews", worse, "interval", 40).endswith("margin 0.05")


def test_less_is_better_of_a_loss() -> None:
    one = held("wikipedia", "bits_per_byte", 0.02)
    for after, passed in ((1.2, False), (1.01, True), (0.8, True)):
        verdict = protected.judge([one], {"wikipedia": texts(one, 1.0)}, {"wikipedia": texts(one, after)})["wikipedia"]
        assert gate.passes(verdict, "interval") == passed
    rows = gate.worse_rows(one, texts(one, 1.0), texts(one, 1.0, spread=0.5))
    assert [row["row_id"] for row in rows] == [f"wikipedia:{i}" for i in range(39, 19, -1)], (
        "half of them, the worst first"
    )
    assert rows[0]["worse_by"] == pytest.approx(0.5)
    assert rows[0]["prompt"] == "text 39"


def test_margins_by_name() -> None:
    sets = [held("reviews", "accuracy"), held("wikipedia", "bits_per_byte")]
    assert [one.tolerance for one in gate.margins(sets, (("wikipedia", 0.5),))] == [0.05, 0.5]


def test_figures_across_stages_by_hand() -> None:
    """Two kinds of metric; a loss counts with its sign turned, so that forgetting is above 0 and transfer above 0 is good."""
    a, b, c = held("a", "accuracy"), held("b", "bits_per_byte"), held("c", "accuracy")
    cells = [
        [right(a, 10), texts(b, 2.0), right(c, 8)],
        [right(a, 36), texts(b, 1.8), None],
        [right(a, 38), texts(b, 1.0), right(c, 12)],
        [right(a, 30), texts(b, 1.3), right(c, 40)],
    ]
    made = matrix.Matrix(["base", "1", "2", "3"], [a, b, c], cells)
    found = matrix.transfer(made)
    assert found["forgetting"].value == pytest.approx(((38 - 30) / 40 + (1.3 - 1.0)) / 2)
    assert found["backward_transfer"].value == pytest.approx(((30 - 36) / 40 + (1.0 - 1.3)) / 2)
    assert found["forward_transfer"].value == pytest.approx(((2.0 - 1.8) + (12 - 8) / 40) / 2)
    for estimate in found.values():
        assert estimate.low <= estimate.value <= estimate.high
    of_a = tasks.compare(cells[1][0], cells[3][0], **measure.intervals(a.config))["accuracy"]
    width = found["backward_transfer"].value - found["backward_transfer"].low
    assert width == pytest.approx((of_a["value"] - of_a["low"]) / 2, abs=1e-6), (
        "every text changed alike: only a's rows are unsure"
    )
    assert matrix.transfer(matrix.Matrix(["base", "1"], [a], [[cells[0][0]], [cells[1][0]]])) == {}
    header, rows = matrix.table(made)
    assert header == ["After", "a (accuracy)", "b (bits_per_byte)", "c (accuracy)"]
    assert rows[1][3] == "–"
