"""1 where the completion's final answer equals the row's: as mathematics (1/2 = 0.5), else as text. Extra: rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jaxtune.config import ConfigDict
from jaxtune.rewards import answers
from jaxtune.types import UserError

check = answers.check


def make(options: ConfigDict) -> Callable[[str, str, answers.Row], float]:
    """Returns the reward.

    Answers that math-verify can read (numbers, fractions, LaTeX, sets; of a completion the boxed or last one) are compared
    as mathematics; where the row's is no mathematics, the texts are compared without case and outer punctuation.

    Raises:
      UserError: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError:
        raise UserError(
            "reward 'exact_answer' needs math-verify: pip install 'jaxtune[rewards]', or choose another of reward.functions"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that the time limit is the caller's

    def parse(text: str) -> list[Any]:
        parsed: list[Any] = math_verify.parse(text, parsing_timeout=None)
        return parsed

    @lru_cache(maxsize=4096)
    def wanted(text: str) -> tuple[Any, ...]:
        return tuple(parse(text) or (parse(f"${text}$") if any(c in text for c in "^_\\{=") else ()))

    def reward(prompt: str, completion: str, row: answers.Row) -> float:
        gold, said = answers.gold(row, options), answers.said(completion, options)
        if said is None:
            return 0.0
        mathematics = wanted(gold)
        if mathematics:
            return float(math_verify.verify(list(mathematics), parse(said), timeout_seconds=None))
        return float(answers.plain(gold) == answers.plain(said))

    return reward
