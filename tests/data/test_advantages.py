"""What completions are worth: by hand, and what a completion without a reward leaves untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxtune import config as config_lib
from jaxtune.data import advantages
from jaxtune.data.advantages import Judged


def judged(rewards: list[float], groups: list[int], lengths: list[int], **more: Any) -> Judged:
    tokens = sum(lengths)
    return Judged(
        np.asarray(groups), np.asarray(rewards, np.float32), np.asarray(lengths),
        np.asarray(more.get("penalty", np.zeros(tokens)), np.float32), more.get("values"), np.ones(len(rewards), bool),
    )  # fmt: skip


def options(**changes: Any) -> Any:
    rl = config_lib.base().rl
    rl.update(changes)
    return rl


def test_group_relative() -> None:
    given = judged([1, 0, 0, 5, 5, 5], [0, 0, 0, 1, 1, 1], [2, 1, 1, 1, 1, 1])
    found = advantages.group_relative(given, options()).advantages_K
    spread = np.std([1, 0, 0], ddof=1) + 1e-4
    np.testing.assert_allclose(found[:4], np.asarray([2, 2, -1, -1]) / 3 / spread, rtol=1e-5)
    assert (found[4:] == 0).all()  # a group of one reward teaches nothing
    plain = advantages.group_relative(given, options(scale_rewards="none")).advantages_K
    np.testing.assert_allclose(plain[:4], np.asarray([2, 2, -1, -1]) / 3, rtol=1e-6)
    whole = np.std([1, 0, 0, 5, 5, 5], ddof=1) + 1e-4
    batch = advantages.group_relative(given, options(scale_rewards="batch")).advantages_K
    np.testing.assert_allclose(batch[:4], plain[:4] / whole, rtol=1e-5)


def test_a_completion_without_a_reward_changes_no_other() -> None:
    with_it = judged([1, 0, np.nan, 0.5], [0, 0, 0, 0], [1, 1, 1, 1])
    without = judged([1, 0, 0.5], [0, 0, 0], [1, 1, 1])
    for collect in (advantages.group_relative, advantages.leave_one_out, advantages.normalised_returns):
        found, expected = (collect(one, options()).advantages_K for one in (with_it, without))
        np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-5)
        assert found[2] == 0
    assert not advantages.is_flat(with_it.rewards_N, with_it.groups_N).any()
    assert advantages.is_flat(np.asarray([np.nan, 2.0, 2.0]), np.zeros(3, int)).all()


def test_leave_one_out_takes_the_mean_of_the_others() -> None:
    given = judged([3, 1, 2], [0, 0, 0], [1, 1, 2], penalty=[0, 0, 0.25, 0.25])
    found = advantages.leave_one_out(given, options(group_size=3)).advantages_K
    np.testing.assert_allclose(found, [3 - (1 + 1.5) / 2, 1 - (3 + 1.5) / 2, 1.5 - 2, 1.5 - 2], rtol=1e-6)


def test_returns_are_normalised_over_tokens_and_hold_what_is_to_come() -> None:
    given = judged([1, 0], [0, 1], [2, 2], penalty=[0.1, 0.2, 0.3, 0.4])
    found = advantages.normalised_returns(given, options(group_size=1)).advantages_K
    raw = np.asarray([1 - 0.3, 1 - 0.2, -0.7, -0.4])
    np.testing.assert_allclose(found, (raw - raw.mean()) / (raw.std(ddof=1) + 1e-4), rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_generalised_advantages(lam: float) -> None:
    """By the definition, token by token; with lambda 1 the return is the discounted reward, whatever the critic says."""
    rewards, lengths, gamma = [2.0, -1.0], [3, 2], 0.9
    penalty, values = np.asarray([0.1, 0.2, 0.3, 0.1, 0.0]), np.asarray([0.5, 0.6, 0.7, -0.2, 0.1])
    given = judged(rewards, [0, 1], lengths, penalty=penalty, values=values)
    found = advantages.generalised(given, options(gamma=gamma, gae_lambda=lam))
    raw, at = [], 0
    for reward, length in zip(rewards, lengths, strict=True):
        gains = -penalty[at : at + length] + np.eye(length)[-1] * reward
        v = np.append(values[at : at + length], 0.0)
        deltas = gains + gamma * v[1:] - v[:-1]
        raw += [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
        if lam == 1:
            to_come = [sum(gamma ** (s - t) * gains[s] for s in range(t, length)) for t in range(length)]
            assert found.returns_K is not None
            np.testing.assert_allclose(found.returns_K[at : at + length], to_come, atol=1e-6)
        at += length
    np.testing.assert_allclose(found.returns_K, np.asarray(raw) + values, atol=1e-6)
    np.testing.assert_allclose(found.advantages_K, (raw - np.mean(raw)) / (np.std(raw, ddof=1) + 1e-4), rtol=1e-5)
