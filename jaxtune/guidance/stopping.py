"""Whether more verdicts still pay, by the scores of the rounds that led here."""

from __future__ import annotations

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.evals.protected import Protected
from jaxtune.guidance.folder import Round
from jaxtune.guidance.measuring import NEW
from jaxtune.lineage import scores
from jaxtune.review import active
from jaxtune.review.active import Stop
from jaxtune.types import UserError

# Metrics that are a mean over rows of something from 0 to 1, and where a row has it.
_COLUMNS = {"accuracy": "correct", "exact_match": "correct", "pass_rate": "passed", "mean_reward": "reward"}


def told(config: ConfigDict, one: Round, held: Protected) -> Stop | None:
    """What the learning curve of the rounds before this one says (`active.no_longer_pays`); None where `guide.least_gain` is 0.

    A point is a round's model: all verdicts that led to it, and its score on each held-out row. As many verdicts as the last round
    brought are what is asked about.

    Raises:
      UserError: the metric of the held-out rows is no mean of right and wrong.
    """
    if not config.guide.least_gain:
        return None
    if held.metric not in _COLUMNS:
        raise UserError(
            f"guide.least_gain needs held-out rows that are right or wrong ({', '.join(_COLUMNS)}), and theirs is {held.metric!r}; set it to 0.0"
        )
    lines = {line["round"]: line for line in one.lines if line["kind"] == "round"}
    numbers, number = [], one.parent
    while number:
        numbers.append(number)
        number = lines[number]["parent"]
    counts, right_RN, total = [], [], 0
    for number in reversed(numbers):
        total += lines[number]["verdicts"]["verdicts"]
        known = scores.read([held], [(one.root / f"round_{number:02d}", NEW)]).get(held.name)
        if known is None:  # it was measured on other rows, or in another way
            continue
        column = _COLUMNS[held.metric]
        right_RN.append([float(row[column]) for row in sorted(known.rows, key=lambda row: str(row["row_id"]))])
        counts.append(total)
    if not counts:
        return Stop(False, np.nan, np.nan, np.nan, "0 scores; 5 are needed to tell")
    more = int(lines[one.parent]["verdicts"]["verdicts"])
    return active.no_longer_pays(
        np.array(counts), np.clip(right_RN, 0.0, 1.0), more, config.guide.least_gain, seed=config.train.seed
    )
