"""1 where the completion is as long as asked, falling to 0 at nothing and at twice the most."""

from __future__ import annotations

from collections.abc import Callable

from jaxtune.config import ConfigDict
from jaxtune.rewards import answers
from jaxtune.types import UserError


def make(options: ConfigDict) -> Callable[[str, str, answers.Row], float]:
    """Returns the reward: n characters against `reward.length_characters` = (low, high).

    n / low below low, 1 from low to high, 2 - n / high above, and never less than 0.

    Raises:
      UserError: the bounds are not two numbers, 0 <= low <= high, 1 <= high.
    """
    bounds = tuple(options.length_characters)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] or bounds[1] < 1:
        raise UserError(
            f"reward 'length' has reward.length_characters={bounds}; expected (low, high), such as (1, 400)"
        )
    low, high = bounds

    def reward(prompt: str, completion: str, row: answers.Row) -> float:
        length = len(completion)
        return length / low if length < low else max(0.0, min(1.0, 2 - length / high))

    return reward
