"""Replay: shares to the row, each source through its own epochs, and any step by its number alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jaxtune.data.batches import BatchSource, Rows
from jaxtune.data.mixture import MixtureSource, seeded

MAX = 16


def source(name: str, num_rows: int, seed: int = 0, packing: bool = True) -> BatchSource:
    rng = np.random.default_rng(len(name))
    offsets = np.cumsum([0, *rng.integers(3, 9, num_rows)])
    tokens = np.arange(offsets[-1], dtype=np.int32)
    weights = np.ones(len(tokens), np.float32)
    rows = Rows(tokens, weights, offsets.astype(np.int64), [f"{name}:{i}" for i in range(num_rows)])
    return BatchSource(rows, MAX, packing, True, seed, 8, 0)


@pytest.fixture
def mixed() -> MixtureSource:
    return MixtureSource(
        source("main", 40), [source("old", 9, seeded(0, 0)), source("older", 30, seeded(0, 1))], [0.3, 0.1]
    )


def owners(mixed: MixtureSource, step: int) -> list[str]:
    """Whose each row of a step's batch is."""
    ids = [each.rows.row_ids for each in (mixed.main, *mixed.others)]
    found = []
    for ids_T in mixed[step]["row_ids_BT"]:
        names = {mixed.row_id(number, ids).split(":")[0] for number in np.unique(ids_T) if number >= 0}
        assert len(names) == 1, "a batch row is of one source"
        found += names
    return found


def test_shares_are_kept_to_the_row(mixed: MixtureSource) -> None:
    total = Counter[str]()
    for step in range(30):
        total.update(owners(mixed, step))
        taken = (step + 1) * 8
        for name, share in (("old", 0.3), ("older", 0.1)):
            assert total[name] == int(np.floor(round(taken * share, 9)))
        assert sum(total.values()) == taken
    assert mixed.counts(30)[1]["batch_rows"] == total["old"]
    assert mixed.steps_per_epoch == pytest.approx(mixed.main.num_bins / (8 * 0.6))


def test_every_source_goes_through_its_own_epochs(mixed: MixtureSource) -> None:
    """Each batch row of a source once, before any comes again; and its order is no other's."""
    ids = [each.rows.row_ids for each in (mixed.main, *mixed.others)]
    seen: list[str] = []
    for step in range(20):
        for ids_T in mixed[step]["row_ids_BT"]:
            seen += dict.fromkeys(mixed.row_id(int(number), ids) for number in ids_T if number >= 0)
    for each in (mixed.main, *mixed.others):
        mine = [name for name in seen if name in each.rows.row_ids][: len(each.rows)]
        assert sorted(mine) == sorted(each.rows.row_ids)
    assert mixed.main._order(0).tolist()[:9] != mixed.others[0]._order(0).tolist()


def test_a_step_is_told_by_its_number_and_hosts_share_it(mixed: MixtureSource) -> None:
    whole = mixed[7]
    parts = [mixed.local(7, np.asarray(mine)) for mine in ([0, 1, 6], [2, 3, 4, 5, 7])]
    for name, array in whole.items():
        np.testing.assert_array_equal(array[[0, 1, 6]], parts[0][name])
        np.testing.assert_array_equal(array[[2, 3, 4, 5, 7]], parts[1][name])
    mixed[0]
    np.testing.assert_array_equal(mixed[7]["tokens_BT"], whole["tokens_BT"])


def test_what_is_told_of_a_step_is_what_it_has(mixed: MixtureSource) -> None:
    for step in (0, 1, 5):
        names, batch = np.asarray(owners(mixed, step)), mixed[step]
        trained = (batch["weights_BT"] != 0).sum(axis=1)
        told = mixed.told(step)
        assert told["replay_share"] == pytest.approx(np.mean(names != "main"))
        # Of each packed row the first token is no target, which a row's own count does not know.
        assert told["replay_token_share"] == pytest.approx(trained[names != "main"].sum() / trained.sum(), abs=0.05)
