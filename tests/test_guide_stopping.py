"""`guide.least_gain`: a round is refused once its verdicts would gain too little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxtune import guide
from jaxtune.config import base
from jaxtune.evals.tasks import Result
from jaxtune.guidance import stopping
from jaxtune.guidance.folder import Round
from jaxtune.types import UserError


def _rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: list[float], num_rows: int = 2000) -> Round:
    """Rounds of 100 verdicts each, every one from the one before, whose models have these accuracies; the next one is asked about."""
    lines: list[dict[str, Any]] = [{"kind": "base"}]
    for number in range(1, len(right) + 1):
        lines.append({"kind": "round", "round": number, "parent": number - 1, "verdicts": {"verdicts": 100}})

    def read(sets: Any, places: Any) -> dict[str, Result]:
        number = int(places[0][0].name.removeprefix("round_"))
        rows = [{"row_id": f"{at:05d}", "correct": at < right[number - 1] * num_rows} for at in range(num_rows)]
        return {"held-out": Result({}, rows[::-1])}

    monkeypatch.setattr(stopping.scores, "read", read)
    number = len(right) + 1
    return Round(number, tmp_path / f"round_{number:02d}", len(right), lines)


def _config(least_gain: float) -> Any:
    config = base()
    config.guide.least_gain, config.tracking.progress = least_gain, "off"
    return config


HELD = SimpleNamespace(name="held-out", metric="accuracy")


def test_a_flat_curve_stops_and_a_rising_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = _rounds(tmp_path, monkeypatch, [0.70, 0.79, 0.8, 0.8, 0.8, 0.8])
    with pytest.raises(UserError, match=r"round 7 is not asked: 100 more labels .* Set guide.least_gain=0.0"):
        guide._still_pays(_config(0.02), flat, HELD)
    rising = _rounds(tmp_path, monkeypatch, [0.3, 0.4, 0.48, 0.55, 0.6, 0.65])
    told = stopping.told(_config(0.02), rising, HELD)
    assert told is not None
    assert not told.stop
    assert told.value > 0.02
    guide._still_pays(_config(0.02), rising, HELD)


def test_off_or_too_few_rounds_or_another_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = _rounds(tmp_path, monkeypatch, [0.8] * 6)
    assert stopping.told(_config(0.0), flat, HELD) is None
    branched = stopping.told(_config(0.02), flat._replace(parent=3), HELD)  # from round 3: three rounds led there
    assert branched is not None
    assert (branched.stop, branched.why) == (False, "3 scores; 5 are needed to tell")
    first = stopping.told(_config(0.02), flat._replace(number=1, parent=0), HELD)
    assert first is not None
    assert not first.stop
    assert np.isnan(first.value)


def test_a_metric_that_is_no_mean_of_right_and_wrong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = _rounds(tmp_path, monkeypatch, [0.8] * 6)
    with pytest.raises(UserError, match="right or wrong .*'perplexity'"):
        stopping.told(_config(0.02), one, SimpleNamespace(name="held-out", metric="perplexity"))
