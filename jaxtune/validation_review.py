"""Checks of the fields about people; `validation.validate` calls them."""

from __future__ import annotations

import math

from jaxtune.config import ConfigDict
from jaxtune.types import UserError, nearest

FLAGS = ("bias", "privacy", "harm", "wrong", "off_guideline")  # as review/record.py has them


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_review(config)
    _check_guide(config)
    _check_judging(config)
    _check_privacy(config)
    _check_audit(config)


def _check_review(config: ConfigDict) -> None:
    pass


def _check_guide(config: ConfigDict) -> None:
    guide = config.guide
    for key, allowed in (("answers", ("outputs", "rows")), ("edits", ("majority", "each"))):
        if guide[key] not in allowed:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected one of {', '.join(map(repr, allowed))}")
    lowest = {
        "round": 1,
        "start_from": -1,
        "rows": 0,
        "candidates": 1,
        "max_new_tokens": 1,
        "slots": 1,
        "compare_rows": 0,
    }
    for key, low in lowest.items():
        if guide[key] < low:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected {low} or more")
    for key, low, high in (("enough", 0.0, 1.0), ("top_p", 0.0, 1.0), ("temperature", 0.0, 100.0)):
        if not low <= guide[key] <= high:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected a number from {low:g} to {high:g}")
    if guide.candidates > 26:
        raise UserError(f"config.guide.candidates is {guide.candidates}; expected 26 or fewer")
    if not guide.poll_seconds > 0:
        raise UserError(f"config.guide.poll_seconds is {guide.poll_seconds!r}; expected seconds, more than 0")
    if guide.start_from >= guide.round:
        raise UserError(
            f"config.guide.start_from is {guide.start_from}; expected a round before guide.round={guide.round}, 0 for the first model"
        )
    wrong = next((one for one in guide.keep_flagged if one not in FLAGS), None)
    if wrong is not None:
        raise UserError(
            f"config.guide.keep_flagged has {wrong!r}{nearest(str(wrong), FLAGS)}; expected types of {', '.join(FLAGS)}"
        )
    for entry in guide.trust:
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if (
            not pair
            or isinstance(entry[1], bool)
            or not isinstance(entry[1], int | float)
            or not 0 <= entry[1] < math.inf
        ):
            raise UserError(f"config.guide.trust has {entry!r:.80}; expected (name, weight), a weight of 0 or more")


def _check_judging(config: ConfigDict) -> None:
    pass


def _check_privacy(config: ConfigDict) -> None:
    pass


def _check_audit(config: ConfigDict) -> None:
    pass
