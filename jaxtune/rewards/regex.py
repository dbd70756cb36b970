"""1 where the completion has the form that a pattern asks for."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxtune.config import ConfigDict
from jaxtune.rewards import answers
from jaxtune.types import UserError


def make(options: ConfigDict) -> Callable[[str, str, answers.Row], float]:
    r"""Returns the reward: 1 where `reward.regex` is found in the completion; `\A` and `\Z` bind it to the whole.

    Raises:
      UserError: there is no pattern.
    """
    if not options.regex:
        raise UserError("reward 'regex' needs a pattern: set reward.regex, for example '\\\\AAnswer: .*\\\\Z'")
    pattern = re.compile(options.regex)

    def reward(prompt: str, completion: str, row: answers.Row) -> float:
        return float(pattern.search(completion) is not None)

    return reward
