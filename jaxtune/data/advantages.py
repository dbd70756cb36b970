"""What a completion, or each token of it, is worth beyond what was to be expected: from rewards alone, or with a critic's values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxtune.config import ConfigDict

_EPS = 1e-4  # beside a standard deviation, as TRL has it


class Judged(NamedTuple):
    """N completions, K tokens of theirs end to end.

    `groups_N`: number of each one's prompt; `rewards_N`: NaN for one that is not to be learned from; `lengths_N`: tokens;
    `penalty_K`: what each token costs (beta times its KL divergence, where that is a part of the reward, else 0); `values_K`:
    what a critic expected before each token, where there is one; `ended_N`: by themselves, not by length.
    """

    groups_N: np.ndarray
    rewards_N: np.ndarray
    lengths_N: np.ndarray
    penalty_K: np.ndarray
    values_K: np.ndarray | None
    ended_N: np.ndarray

    @property
    def owners_K(self) -> np.ndarray:
        """The number of each token's completion."""
        return np.repeat(np.arange(len(self.lengths_N)), self.lengths_N)

    @property
    def net_N(self) -> np.ndarray:
        """Rewards less what the completions' tokens cost."""
        costs_N = np.bincount(self.owners_K, self.penalty_K, len(self.lengths_N))
        return np.asarray(self.rewards_N - costs_N, np.float64)


class Worth(NamedTuple):
    """The advantage of each token; what a critic should have said before it, where there is one. float32, 0 where NaN was the reward."""

    advantages_K: np.ndarray
    returns_K: np.ndarray | None = None


def is_flat(rewards_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Whether each completion's group has one reward only (N,): nothing in it is better than the rest. NaN do not count."""
    most, least = (_by_group(how, rewards_N, groups_N) for how in (np.fmax, np.fmin))
    return ~(np.abs(most - least) > 1e-8)


def group_relative(judged: Judged, rl: ConfigDict) -> Worth:
    """(reward - mean of its group) / standard deviation: of its group, of the round, or 1, by `rl.scale_rewards`."""
    net_N = judged.net_N
    centred_N = net_N - _mean(net_N, judged.groups_N)
    if rl.scale_rewards == "group":
        centred_N = centred_N / (_std(net_N, judged.groups_N) + _EPS)
    elif rl.scale_rewards == "batch":
        centred_N = centred_N / (_std(net_N, np.zeros_like(judged.groups_N)) + _EPS)
    return _each(centred_N, judged)


def leave_one_out(judged: Judged, rl: ConfigDict) -> Worth:
    """reward - mean of the others of its group; 0 where there are none."""
    net_N, groups_N = judged.net_N, judged.groups_N
    num_N = _sum(np.isfinite(net_N).astype(np.float64), groups_N)
    others_N = (_sum(np.nan_to_num(net_N), groups_N) - net_N) / np.maximum(num_N - 1, 1)
    return _each(np.where(num_N > 1, net_N - others_N, 0.0), judged)


def normalised_returns(judged: Judged, rl: ConfigDict) -> Worth:
    """Of each token, the reward less the costs from it on; mean 0 and standard deviation 1 over the round's tokens.

    Groups of two or more have their mean reward taken off first.
    """
    rewards_N = judged.rewards_N.astype(np.float64)
    if rl.group_size > 1:
        rewards_N = rewards_N - _mean(rewards_N, judged.groups_N)
    return Worth(_normalised(rewards_N[judged.owners_K] - _to_come(judged.penalty_K, judged, 1.0)))


def generalised(judged: Judged, rl: ConfigDict) -> Worth:
    """Generalised advantage estimation (arXiv:1506.02438), then mean 0 and standard deviation 1 over the round's tokens.

    With d_t = reward_t + gamma V_(t+1) - V_t: A_t = sum over s >= t of (gamma lambda)^(s - t) d_s, and return_t = A_t + V_t. The
    reward comes with the last token, after which V is 0.
    """
    assert judged.values_K is not None
    values_K, last_N = judged.values_K.astype(np.float64), np.cumsum(judged.lengths_N) - 1
    gains_K = -judged.penalty_K.astype(np.float64)
    gains_K[last_N] += judged.rewards_N
    next_K = np.append(values_K[1:], 0.0)
    next_K[last_N] = 0.0
    advantages_K = _to_come(gains_K + rl.gamma * next_K - values_K, judged, rl.gamma * rl.gae_lambda)
    returns_K = np.nan_to_num(advantages_K + values_K).astype(np.float32)
    return Worth(_normalised(advantages_K), returns_K)


def _to_come(values_K: np.ndarray, judged: Judged, decay: float) -> np.ndarray:
    """sum over s >= t, within a completion, of decay^(s - t) values_s."""
    padded_NT = np.zeros((len(judged.lengths_N), int(judged.lengths_N.max(initial=0))))
    inside_NT = np.arange(padded_NT.shape[1]) < judged.lengths_N[:, None]
    padded_NT[inside_NT] = values_K
    for t in reversed(range(padded_NT.shape[1] - 1)):
        padded_NT[:, t] += decay * padded_NT[:, t + 1]
    return np.asarray(padded_NT[inside_NT])


def _normalised(values_K: np.ndarray) -> np.ndarray:
    real = np.isfinite(values_K)
    if not real.any():
        return np.zeros(len(values_K), np.float32)
    spread = values_K[real].std(ddof=1) if real.sum() > 1 else 0.0
    return np.nan_to_num((values_K - values_K[real].mean()) / (spread + _EPS)).astype(np.float32)


def _each(values_N: np.ndarray, judged: Judged) -> Worth:
    return Worth(np.nan_to_num(values_N).astype(np.float32)[judged.owners_K])


def _sum(values_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    return np.asarray(np.bincount(groups_N, values_N)[groups_N])


def _mean(values_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Of each completion's group, NaN left out."""
    real_N = np.isfinite(values_N).astype(np.float64)
    return _sum(np.nan_to_num(values_N), groups_N) / np.maximum(_sum(real_N, groups_N), 1)


def _std(values_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Of each completion's group, NaN left out, with one degree of freedom taken off; 0 for one alone."""
    num_N = _sum(np.isfinite(values_N).astype(np.float64), groups_N)
    squares_N = np.nan_to_num((values_N - _mean(values_N, groups_N)) ** 2)
    return np.asarray(np.sqrt(_sum(squares_N, groups_N) / np.maximum(num_N - 1, 1)))


def _by_group(how: np.ufunc, values_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    found = np.full(int(groups_N.max(initial=-1)) + 1, np.nan)
    how.at(found, groups_N, values_N)
    return np.asarray(found[groups_N])
