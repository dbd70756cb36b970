"""REINFORCE++ (arXiv:2501.03262): PPO's clip without a critic; advantages are returns, normalised over the whole round.

With `rl.kl_in="reward"` the KL penalty of a token is a part of its reward, as in the paper. With groups of two or more, a
prompt's mean is taken off first (the paper's "baseline" form).
"""

from __future__ import annotations

from jaxtune.data import advantages
from jaxtune.objectives import grpo

OBJECTIVE = grpo.OBJECTIVE._replace(collect=advantages.normalised_returns)
