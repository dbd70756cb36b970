"""The contrastive loss: its formula, what is no negative, and that neither mesh nor neighbours change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import sharding
from jaxtune.evals import retrieval
from jaxtune.objectives import contrastive, ops
from jaxtune.train import rows as rows_lib
from jaxtune.train import start, state, step
from jaxtune.weights import source
from tests.conftest import WORDS

B, Q, T, U, D, VOCAB = 6, 2, 5, 7, 4, 30
TABLE_VD = np.random.default_rng(0).normal(size=(VOCAB, D)).astype(np.float32)


def lookup(table_VD: Any, pool: str = "mean") -> ops.Policy:
    """A model whose state of a token is its row of a table; on padding it is not even a number."""

    def hidden(batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        return jnp.asarray(table_VD)[batch["tokens_BT"]]

    return ops.Policy(hidden, None, pool)  # type: ignore[arg-type]


def batch_of(passage_ids_BQ: Any, query_ids_B: Any) -> dict[str, np.ndarray]:
    """Random texts of many lengths; equal numbers are equal texts, -1 is no text."""
    rng = np.random.default_rng(1)
    passage_ids_BQ, query_ids_B = np.asarray(passage_ids_BQ), np.asarray(query_ids_B)
    lengths = rng.integers(1, (T + 1, U + 1), (20, 2))
    texts = rng.integers(1, VOCAB, (20, 2, U))
    at_T, at_U = np.arange(T), np.arange(U)
    segments_BT = ((at_T < lengths[query_ids_B, 0][:, None]) & (query_ids_B >= 0)[:, None]).astype(np.int32)
    segments_BQU = ((at_U < lengths[passage_ids_BQ, 1][..., None]) & (passage_ids_BQ >= 0)[..., None]).astype(np.int32)
    return {
        "tokens_BT": np.where(segments_BT, texts[query_ids_B, 0, :T], 0),
        "segment_ids_BT": segments_BT,
        "positions_BT": np.broadcast_to(at_T, segments_BT.shape),
        "weights_BT": (segments_BT * (at_T == 0)).astype(np.float32),
        "query_ids_B": query_ids_B,
        "passage_tokens_BQU": np.where(segments_BQU, texts[passage_ids_BQ, 1], 0),
        "passage_segment_ids_BQU": segments_BQU,
        "passage_ids_BQ": passage_ids_BQ,
    }


# Rows 0 and 2 share a passage, rows 1 and 3 a query; rows 3 and 5 have no negative; row 4's is row 0's passage; 5 fills up.
MIXED = batch_of([[0, 5], [1, 6], [0, 7], [2, -1], [3, 0], [-1, -1]], [0, 1, 2, 1, 4, -1])


def by_hand(batch: dict[str, np.ndarray], pool: str, temperature: float, symmetric: bool) -> tuple[float, float, float]:
    """(sum, weight, right ones) in float64, pair by pair."""

    def embedded(tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        states = TABLE_VD.astype(np.float64)[tokens[segments != 0]]
        vector = {"first": states[0], "last": states[-1], "mean": states.mean(0)}[pool]
        return vector / np.linalg.norm(vector)

    rows = [i for i in range(B) if batch["query_ids_B"][i] >= 0]
    queries = {i: embedded(batch["tokens_BT"][i], batch["segment_ids_BT"][i]) for i in rows}
    ids, of_query = batch["passage_ids_BQ"], batch["query_ids_B"]
    passages = {
        (j, q): embedded(batch["passage_tokens_BQU"][j, q], batch["passage_segment_ids_BQU"][j, q])
        for j in rows for q in range(Q) if ids[j, q] >= 0
    }  # fmt: skip
    total, right = 0.0, 0.0
    for i in rows:
        own = queries[i] @ passages[i, 0] / temperature
        others = [
            queries[i] @ vector / temperature
            for (j, q), vector in passages.items()
            if ids[j, q] != ids[i, 0] and not (q == 0 and of_query[j] == of_query[i])
        ]
        asked = [
            queries[j] @ passages[i, 0] / temperature
            for j in rows
            if ids[j, 0] != ids[i, 0] and of_query[j] != of_query[i]
        ]
        forward = np.log(np.exp(own) + np.sum(np.exp(others))) - own
        backward = np.log(np.exp(own) + np.sum(np.exp(asked))) - own
        total += (forward + backward) / 2 if symmetric else forward
        right += own >= max(others)
    return total, float(len(rows)), right


@pytest.mark.parametrize(("pool", "symmetric"), [("first", False), ("last", False), ("mean", False), ("mean", True)])
def test_the_loss_is_its_formula(pool: str, symmetric: bool) -> None:
    table = TABLE_VD.copy()
    table[0] = 1e6  # the state on padding, which must not be read
    found, weight, metrics = contrastive.loss(
        lookup(table, pool), {}, MIXED, None, temperature=0.3, symmetric=symmetric
    )
    total, rows, right = by_hand(MIXED, pool, 0.3, symmetric)
    np.testing.assert_allclose(float(found), total, rtol=1e-5)
    assert (float(weight), float(metrics["accuracy"][0])) == (rows, right)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_equal_passage_and_an_equal_query_are_no_negatives(symmetric: bool) -> None:
    for passages, queries in (([[0, -1]] * B, range(B)), ([[i, -1] for i in range(B)], [3] * B)):
        batch = batch_of(passages, list(queries))
        found, weight, _ = contrastive.loss(lookup(TABLE_VD), {}, batch, None, temperature=0.05, symmetric=symmetric)
        assert float(weight) == B
        np.testing.assert_allclose(float(found), 0, atol=1e-5)  # a pair is compared with itself alone


def test_what_is_masked_has_no_gradient() -> None:
    def total(vectors: jax.Array, batch: dict[str, Any]) -> jax.Array:
        return contrastive.loss(lookup(vectors), {}, batch, None, temperature=0.1, symmetric=True)[0]

    batch = batch_of([[i, -1] for i in range(B - 1)] + [[-1, -1]], [*range(B - 1), -1])
    batch["tokens_BT"] = np.where(batch["segment_ids_BT"], batch["tokens_BT"], 0)
    grads_VD = np.asarray(jax.grad(total)(jnp.asarray(TABLE_VD), batch))
    assert np.isfinite(grads_VD).all()
    assert not grads_VD[0].any(), "padding and filling rows are read"
    used = np.unique(np.r_[batch["tokens_BT"].ravel(), batch["passage_tokens_BQU"].ravel()])
    assert all(grads_VD[token].any() for token in used if token)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 questions, each the first words of the passage that answers it."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(48):
            words = [str(word) for word in rng.choice(WORDS, rng.integers(4, 14))]
            row = {"question": f"{number} {' '.join(words[:3])}", "passage": " ".join(words), "wrong": "the hill"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def contrastive_config(tiny_config: ConfigDict, pairs_file: Path) -> ConfigDict:
    config = tiny_config
    config.data.train, config.data.negative = str(pairs_file), "{wrong}"
    config.data.max_length, config.data.max_passage_length = 24, 32
    config.train.objective, config.tune.method = "contrastive", "full"
    config.optim.name, config.optim.clip_norm, config.optim.learning_rate = "sgd", 0.0, 1.0
    config.optim.warmup_steps = 0.0
    return config


def one_step(config: ConfigDict, num_devices: int) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a step, and by how much it moved each weight: with SGD at rate 1, the gradient."""
    model, mesh = source.find(config), sharding.make_mesh(config, jax.devices()[:num_devices])
    tokenizer = source.find_tokenizer(config, model)
    rows = rows_lib.read(config, tokenizer, lambda items, total, label: items)
    program = state.abstract(config, model.hf_config, mesh, config.train.steps)
    current, frozen = start.load(config, model, program, None, lambda items, total, label: iter(items))
    before = {path: sharding.to_host(value) for path, value in current.params.items()}
    batch = {name: rows.batches[0][name] for name in step.fields(config, program)}
    arrays = sharding.to_global(batch, mesh, config.train.batch_size)
    current, metrics = step.make(config, program)(current, frozen, arrays)
    return float(metrics["loss"]), {p: sharding.to_host(v) - before[p] for p, v in current.params.items()}


@pytest.mark.usefixtures("quick_compile")
def test_negatives_are_those_of_the_whole_batch_on_any_mesh(contrastive_config: ConfigDict) -> None:
    """On eight devices each holds one pair, so every negative of its query is another's."""
    config = contrastive_config
    config.mesh.fsdp = 1
    loss, moved = one_step(config, 1)
    config.mesh.data, config.mesh.fsdp = 2, 4
    again, moved_again = one_step(config, 8)
    assert loss > 1
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert "lm_head.kernel" not in moved, "no head is read, so none trains"
    for path, value in moved.items():
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(moved_again[path], value, atol=1e-5 * np.abs(value).max() + 1e-7, err_msg=path)


@pytest.mark.usefixtures("quick_compile")
def test_an_embedding_does_not_depend_on_its_neighbours(contrastive_config: ConfigDict) -> None:
    config = contrastive_config
    config.mesh.fsdp = -1
    model = source.find(config)
    program, _ = start.program(config, model)
    assert program.pool == "last", "a decoder's last token has read all"
    current, frozen = start.load(config, model, program, None, lambda items, total, label: iter(items))
    texts = [list(np.random.default_rng(n).integers(4, 300, n)) for n in (3, 9, 14, 2)]

    def embed(texts: list[list[int]], pool: str) -> np.ndarray:
        silent = (lambda items, total, label: items, "")
        return retrieval.embed(program.inference, {**frozen, **current.params}, pool, texts, 0, 4, *silent)

    for pool in ("last", "mean"):
        together = embed(texts, pool)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 0.01
        for text, vector in zip(texts, together, strict=True):
            np.testing.assert_allclose(embed([text], pool)[0], vector, atol=1e-5)
