"""Completions in batches: each token's values stand where the token is predicted; every completion comes once."""

from __future__ import annotations

import numpy as np

from jaxtune import config as config_lib
from jaxtune import validation, validation_methods
from jaxtune.data.completions import lay_out
from jaxtune.objectives import OBJECTIVES
from jaxtune.registry import load


def test_what_belongs_to_a_token_stands_where_it_is_predicted() -> None:
    rng = np.random.default_rng(0)
    prompts = [list(rng.integers(1, 50, rng.integers(1, 7))) for _ in range(6)]
    completions = [rng.integers(50, 99, rng.integers(1, 9)).astype(np.int32) for _ in prompts]
    order = rng.permutation(6)
    layout = lay_out(prompts, completions, range(10, 16), order, 2, batch_size=2, max_length=32, pad_id=0)
    tokens_K = np.concatenate(completions)
    assert (layout.read(layout.fields["targets_BT"]) == tokens_K).all()
    np.testing.assert_array_equal(
        layout.lay(tokens_K), layout.fields["targets_BT"] * (layout.fields["weights_BT"] != 0)
    )
    assert layout.fields["weights_BT"].sum() == len(tokens_K)
    owners_K = np.repeat(np.arange(6), [len(one) for one in completions])
    assert (layout.read(layout.fields["row_ids_BT"]) == 10 + owners_K).all()
    for part, chosen in enumerate(np.split(order, 2)):
        assert set(layout.minibatch_K[np.isin(owners_K, chosen)]) == {part}
    # A completion goes on from its own prompt, at the positions that follow it.
    for i, prompt in enumerate(prompts):
        first = int(np.flatnonzero(owners_K == i)[0])
        place = (layout.minibatch_K[first], layout.row_K[first])
        start = layout.column_K[first] - len(prompt) + 1
        row = {name: array[place] for name, array in layout.fields.items()}
        stop = start + len(prompt) + len(completions[i])
        assert row["tokens_BT"][start:stop].tolist() == [*prompt, *completions[i].tolist()]
        assert row["positions_BT"][start:stop].tolist() == list(range(stop - start))
        assert len(set(row["segment_ids_BT"][start:stop])) == 1


def test_on_policy_objectives_are_those_that_collect() -> None:
    collecting = [name for name in OBJECTIVES if load("objective", name, OBJECTIVES).OBJECTIVE.collect is not None]
    assert sorted(validation_methods.ON_POLICY) == sorted(collecting)
    assert config_lib.base().rl.loss_type in validation.CHOICES["rl.loss_type"]
