"""Sections of the config that belong to one way of training each; `config.base()` holds them all."""

from __future__ import annotations

from ml_collections import ConfigDict


def rl() -> ConfigDict:
    """Reinforcement: completions by the model itself, judged by the section `reward`."""
    c = ConfigDict()
    c.prompts_per_round = 8  # prompts that are answered before weights change
    c.group_size = 8  # completions of each
    c.minibatches = 1  # parts of a round's completions, an optimizer step each
    c.passes = 1  # times that each of them is trained on
    c.temperature = 1.0  # that completions are drawn with, and their probabilities are taken at
    c.top_k = 0  # 0 = off
    c.top_p = 1.0  # 1 = off
    c.min_p = 0.0  # 0 = off
    c.max_prompt_length = 256  # tokens; longer prompts are dropped, and counted
    c.max_new_tokens = 256  # of a completion
    c.slots = 64  # completions that are written side by side
    c.loss_type = "dapo"  # how tokens are averaged: grpo | dr_grpo | bnpo | dapo (objectives/surrogate.py has the formulas); rloo has its own
    c.importance_level = "token"  # what the ratio is of: token | sequence (GSPO); rloo has its own
    c.clip_low = 0.2  # ratios count from 1 - clip_low
    c.clip_high = 0.2  # to 1 + clip_high (DAPO: 0.28)
    c.delta = 0.0  # upper bound of the ratio where the advantage is negative, above 1 + clip_high; 0 = none
    c.beta = 0.0  # weight of the KL divergence to the model with its adapter off; 0 = none
    c.kl_estimator = "k3"  # k1 | k2 | k3 (objectives/surrogate.py has the formulas)
    c.kl_unbiased = True  # in the loss, times the ratio, so that its gradient is the divergence's own (arXiv:2512.02556); False = as GRPO's paper has it
    c.kl_in = "loss"  # the divergence is a part of the loss (loss) or of the reward (reward)
    c.entropy_weight = 0.0  # of the mean entropy of a token, which is added to what is maximised
    c.scale_rewards = "group"  # grpo: advantages are divided by the standard deviation of the group | of the round (batch) | by 1 (none, Dr. GRPO)
    c.old_logps = "auto"  # a token's probability when it was drawn: sampler (what the sampler said) | policy (by a pass of the training model) | auto (policy where top_k, top_p or min_p cut the distribution)
    c.mask_truncated = False  # do not learn from completions that ran into max_new_tokens (DAPO)
    c.resample = 0  # replace prompts whose completions all have one reward, at most so many times a round (DAPO's dynamic sampling); 0 = never
    c.gamma = 1.0  # ppo: discount of what comes later
    c.gae_lambda = 0.95  # ppo: GAE's lambda
    c.value_weight = 0.1  # ppo: weight of the value loss
    c.value_clip = 0.2  # ppo: values count so far from what they were; 0 = however far
    c.keep_rounds = 0  # rounds kept in WORKDIR/rollouts, from which a resumed run goes on in mid-round; 0 = all
    c.samples = 4  # completions of each round written to WORKDIR/samples.jsonl
    return c
