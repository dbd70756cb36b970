"""What the model of the moment, its reference and its critic say of sampled tokens: a pass over a round, before it is trained on."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.data.completions import Layout
from jaxtune.objectives.logps import token_logps
from jaxtune.objectives.ops import TOKEN_FIELDS, Policy
from jaxtune.objectives.surrogate import cooled
from jaxtune.train import step
from jaxtune.train.state import Params, Program

Scorer = Callable[[Params, Layout], dict[str, np.ndarray]]


def wanted(config: ConfigDict, has_values: bool) -> tuple[str, ...]:
    """Which passes a round needs: the policy's (`rl.old_logps`), the reference's (`rl.beta`), the critic's."""
    rl = config.rl
    cut = rl.top_k > 0 or rl.top_p < 1 or rl.min_p > 0
    needs = {
        "policy": rl.old_logps == "policy" or (rl.old_logps == "auto" and cut),
        "reference": rl.beta > 0,
        "values": has_values,
    }
    return tuple(name for name, needed in needs.items() if needed)


def scorer(config: ConfigDict, program: Program, names: tuple[str, ...]) -> Scorer:
    """Returns `(all parameters, layout) -> {name: (K,) float32}`: log-probabilities of the tokens at `rl.temperature`, or values."""
    size, mesh = config.train.batch_size, program.mesh
    chunk_tokens, mine = step.chunk_tokens(config, program, size), sharding.host_rows(mesh, size)

    def logps(policy: Policy, hidden_BTD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        head = cooled(policy.head, config.rl.temperature)
        return token_logps(head, hidden_BTD, batch["targets_BT"], batch["weights_BT"])

    @jax.jit
    def run(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        if "policy" in names or "values" in names:
            policy = step.policy(program, params, chunk_tokens)
            hidden_BTD = policy.hidden(batch, None)
            if "policy" in names:
                found["policy"] = logps(policy, hidden_BTD, batch)
            if "values" in names and policy.value is not None:
                found["values"] = policy.value(hidden_BTD)
        if "reference" in names:
            base = step.reference(program, params, chunk_tokens)
            found["reference"] = logps(base, base.hidden(batch, None), batch)
        return found

    def score(params: Params, layout: Layout) -> dict[str, np.ndarray]:
        if not names:
            return {}
        made = []
        for number in range(len(layout.fields["tokens_BT"])):
            batch = layout.batch(number)
            arrays = sharding.to_global({name: batch[name][mine] for name in TOKEN_FIELDS}, mesh, size)
            made.append({name: sharding.to_host(value) for name, value in run(params, arrays).items()})
        return {name: layout.read(np.stack([one[name] for one in made])) for name in names}

    return score
