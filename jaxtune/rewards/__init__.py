"""Reward functions: `make(options) -> (prompt, completion, row) -> float`, by name; users' own are named where they are used.

A module may have `check(row, options)`, which refuses a row that its reward cannot judge. None of them imports jax.
"""

REWARDS = {
    "exact_answer": "jaxtune.rewards.exact_answer",
    "choice": "jaxtune.rewards.choice",
    "json_schema": "jaxtune.rewards.json_schema",
    "regex": "jaxtune.rewards.regex",
    "length": "jaxtune.rewards.length",
}
