"""1 where the completion chooses what the row's answer is."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxtune.config import ConfigDict
from jaxtune.rewards import answers
from jaxtune.types import UserError


def check(row: answers.Row, options: ConfigDict) -> None:
    """Refuses a row without an answer, or whose answer is none of `reward.choices`.

    Raises:
      UserError: likewise.
    """
    gold, choices = answers.gold(row, options), [answers.plain(choice) for choice in options.choices]
    if choices and answers.plain(gold) not in choices:
        raise UserError(
            f"the answer {gold!r:.60} is none of reward.choices: expected one of {', '.join(map(repr, options.choices))}"
        )


def make(options: ConfigDict) -> Callable[[str, str, answers.Row], float]:
    """Returns the reward: which of `reward.choices` stands last in the completion, as a word of its own; without choices the
    completion as a whole is compared, without case and outer punctuation.
    """
    longest_first = sorted((answers.plain(choice) for choice in options.choices), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def reward(prompt: str, completion: str, row: answers.Row) -> float:
        said = answers.said(completion, options)
        if said is None:
            return 0.0
        found = pattern.findall(" ".join(said.casefold().split())) if longest_first else [answers.plain(said)]
        return float(bool(found) and found[-1] == answers.plain(answers.gold(row, options)))

    return reward
