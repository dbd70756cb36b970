"""A prompt shared by several answers: each sees it and itself, as if it stood alone with it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.attention import Rule, attend
from jaxtune.models.layers import Runtime
from jaxtune.types import BRANCH_BITS


def test_each_branch_is_as_if_alone_with_its_prompt() -> None:
    prompt, answers, rng = 5, (4, 7), np.random.default_rng(0)
    length = prompt + sum(answers)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    branches = np.repeat([0, 1, 2], [prompt, *answers])
    segments = jnp.asarray(3 | branches << BRANCH_BITS)[None]
    rule = Rule(scale=0.5)

    def attended(at: np.ndarray, run: Runtime, segments: jax.Array) -> jax.Array:
        return attend(q[:, at], k[:, at], v[:, at], segments[:, at], segments[:, at], rule, run)[0]

    together = attended(np.arange(length), Runtime(branches=True), segments)
    for branch in (1, 2):
        alone = np.flatnonzero((branches == 0) | (branches == branch))
        expected = attended(alone, Runtime(), jnp.ones_like(segments))
        np.testing.assert_allclose(together[alone], expected, atol=1e-6)
    apart = attended(np.arange(length), Runtime(), segments)  # off, equal ids alone see each other
    assert not np.allclose(apart[prompt:], together[prompt:], atol=1e-3)
