"""Forward KL from the first weights: against the whole distributions of both models, position by position."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.data import pipeline
from jaxtune.train import base_kl, start, step
from jaxtune.train import rows as rows_lib
from jaxtune.weights import source


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_is_the_mean_over_trained_tokens(tiny_config: ConfigDict, method: str) -> None:
    config = tiny_config
    config.tune.method, config.protect.kl_every_steps, config.protect.kl_rows, config.train.loss_chunk_tokens = (
        method,
        1,
        12,
        40,
    )
    config.data.validation_fraction = 0.3
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    rows = rows_lib.read(config, tokenizer, pipeline.silent)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, pipeline.silent)
    first = jax.tree.map(jnp.copy, {**frozen, **state.params})
    measure = base_kl.prepare(config, rows, tokenizer, program, {**frozen, **state.params})
    assert measure is not None
    assert measure({**frozen, **state.params}) == pytest.approx(0, abs=1e-6)
    keys = jax.random.split(jax.random.key(1), len(state.params))
    noise = {
        path: 0.1 * jax.random.normal(key, state.params[path].shape)
        for path, key in zip(state.params, keys, strict=True)
    }
    # As a step does: the first weights are gone, and what was kept of them is not theirs.
    moved = jax.jit(lambda p: {path: x + noise[path] for path, x in p.items()}, donate_argnums=0)(state.params)
    found = measure({**frozen, **moved})

    total, count = 0.0, 0
    for batch in base_kl._batches(config, rows.validation, tokenizer.pad_id):
        arrays = {name: jnp.asarray(x) for name, x in batch.items()}

        def logps(params: dict, arrays: dict = arrays) -> np.ndarray:
            policy = step.policy(program, params, 1)
            return np.asarray(
                jax.nn.log_softmax(policy.head.apply(policy.head.params, policy.hidden(arrays, None))), np.float64
            )

        base, now, trained = logps(first), logps({**frozen, **moved}), batch["weights_BT"] != 0
        total += (np.exp(base) * (base - now)).sum(-1)[trained].sum()
        count += trained.sum()
    assert found == pytest.approx(total / count, rel=1e-4)
    assert found > 0.01


def test_the_choice_of_rows_is_stable(tiny_config: ConfigDict, chats: Path) -> None:
    config = tiny_config
    config.protect.kl_every_steps, config.protect.kl_rows, config.data.validation_fraction = 1, 10, 0.0
    tokenizer = source.find_tokenizer(config, source.find(config))

    def chosen() -> set[bytes]:
        rows = rows_lib.read(config, tokenizer, pipeline.silent)
        assert rows.validation is None
        batches = base_kl._batches(config, rows.train, tokenizer.pad_id)
        ids = {int(i) for batch in batches for i in np.unique(batch["row_ids_BT"]) if i >= 0}
        return {rows.train.tokens[rows.train.offsets[i] : rows.train.offsets[i + 1]].tobytes() for i in ids}

    first = chosen()
    assert len(first) == 10
    lines = chats.read_text().splitlines()
    other = Path(config.workdir).parent / "other.jsonl"
    other.write_text("\n".join(lines[::-1]) + "\n")
    config.data.train = str(other)
    assert chosen() == first


def test_it_is_measured_where_it_means_something(tiny_config: ConfigDict) -> None:
    config = tiny_config
    assert not base_kl.wanted(config)  # nobody asks
    config.protect.kl_every_steps = 5
    assert base_kl.wanted(config)
    config.tune.method = "prompt"
    assert not base_kl.wanted(config)
    config.tune.method, config.train.objective = "lora", "classify"
    assert not base_kl.wanted(config)
