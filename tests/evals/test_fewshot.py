"""k-shot curves: what is shown or adapted to changes the answers as it should, and the intervals know about draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import run, validation
from jaxtune.data import tasks, templates
from jaxtune.evals import fewshot
from jaxtune.models import layers
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def config(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    rng, words = np.random.default_rng(0), ("cat", "dog", "bird", "mat", "hill")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(90):
            row = {
                "text": " ".join(rng.choice(words, 3)) + f" {i}",
                "kind": f"task {i % 3}",
                "answer": ("good", "bad")[i % 2],
            }
            file.write(json.dumps(row) + "\n")
    c = tiny_config
    c.data.train, c.data.format, c.data.prompt = str(tmp_path / "rows.jsonl"), "labelled", "{text} is"
    c.data.label_column, c.data.chat, c.data.test_fraction = "answer", False, 0.3
    c.meta.task_column, c.meta.held_out, c.meta.shots, c.meta.draws = "kind", ("task 1",), (0, 2), 2
    c.meta.adapt_steps, c.meta.adapt_rate, c.meta.inner_optimizer = 2, 0.5, "sgd"
    c.eval.limit, c.eval.batch_size, c.train.steps = 6, 4, 1
    return c


def test_accuracy_and_gap_by_hand() -> None:
    config = config_lib.base()
    right = {"a": np.asarray([[1, 1, 0, 0], [1, 0, 0, 0]]), "b": np.asarray([[1, 1, 1, 1]])}
    found = fewshot.accuracy(config, right)
    assert found.value == (3 / 8 + 1) / 2
    assert 0.5 <= found.low < found.value < found.high <= 0.95
    sure = fewshot.accuracy(config, {"b": right["b"]})
    assert (sure.low, sure.high) == (1, 1)
    same = fewshot.gap(config, right, right)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # Draws that differ widen the interval: with one draw of the same mean there is less to be unsure of.
    apart, alike = np.repeat([[1], [0]], 40, axis=1), np.tile([1, 0], 20)[None]
    wide, narrow = (fewshot.accuracy(config, {"a": x}) for x in (apart, alike))
    assert wide.value == narrow.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_both_ways_by_hand(config: ConfigDict) -> None:
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    splits = rows_lib.load(config, tokenizer, lambda items, total, label: items)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, total, label: iter(items))
    params = jax.jit(lambda params: {path: value + 0.02 for path, value in params.items()})(state.params)
    given = (config, program, params, frozen, tokenizer, splits)
    found = fewshot.measure(*given, lambda items, total, label: iter(items))
    assert set(found) == {"shown", "adapted"}
    assert np.array_equal(found["shown"][0]["task 1"], found["adapted"][0]["task 1"])
    assert found["shown"][2]["task 1"].shape == (2, 6)

    @jax.jit
    def nll(params: Any, tokens_BT: Any, trains_BT: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        network = layers.bind(program.inference, {**frozen, **params})
        hidden, _ = network(tokens_BT, places, jnp.ones_like(tokens_BT))
        logps = jax.nn.log_softmax(network.head(hidden[:, :-1]))
        return -jnp.sum(jnp.take_along_axis(logps, tokens_BT[:, 1:, None], 2)[..., 0] * trains_BT[:, 1:], axis=1)

    def padded(pairs: Any) -> Any:
        """(tokens, whether each trains), two rows of 96 each: what follows a row's end changes nothing before it."""
        arrays = np.zeros((2, 2, 96), np.int32)
        for row, (ids, trains) in enumerate(pairs):
            arrays[0, row, : len(ids)], arrays[1, row, : len(ids)] = ids, trains
        return arrays

    def best(question: Any, own: Any) -> str:
        prompt, candidates = templates.continuations(question, ("bad", "good"), tokenizer)
        losses = nll(own, *padded((prompt + ids, [0] * len(prompt) + [1] * len(ids)) for ids in candidates))
        return ("bad", "good")[int(np.argmin(losses))]

    asked = fewshot.questions(config, splits)["task 1"][0]
    shown = tasks.drawn(tasks.by_name(splits.support)["task 1"], 2, config.train.seed, 1)
    by_hand = [best(tasks.demonstrated(shown, q), params) == q.answer for q in asked]
    assert by_hand == found["shown"][2]["task 1"][1].tolist()

    batch = padded((e.tokens, e.weights != 0) for e in (templates.encode(r, tokenizer, config.data) for r in shown))

    @jax.jit
    def descend(params: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum(nll(p, *batch)) / batch[1].sum())(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    own = descend(descend(params))
    by_hand = [best(q, own) == q.answer for q in asked]
    assert by_hand == found["adapted"][2]["task 1"][1].tolist()
    assert max(np.abs(np.asarray(own[path]) - np.asarray(params[path])).max() for path in own) > 1e-3


@pytest.mark.parametrize("objective", ["sft", "classify"])
def test_evaluate_writes_the_curves(config: ConfigDict, objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    config.meta.ways, config.train.objective = ("adapted",), objective
    if objective == "classify":
        config.model.head, config.model.labels = "sequence", ("good", "bad")
    validation.validate(config)
    run.evaluate(config, Path(config.workdir))
    found = json.loads((Path(config.workdir) / "fewshot.json").read_text())
    assert list(found["accuracy"]) == ["adapted"]
    assert list(found["accuracy"]["adapted"]) == ["0", "2"]
    assert np.shape(found["right"]["adapted"]["2"]["task 1"]) == (2, 6)
    assert "tasks never trained on (task 1)" in capsys.readouterr().out


def test_mistakes_are_refused(config: ConfigDict) -> None:
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    splits = rows_lib.load(config, tokenizer, lambda items, total, label: items)
    config.meta.shots = (0, 40)
    with pytest.raises(UserError, match=r"needs test rows, and 40 others to draw from"):
        fewshot.questions(config, splits)
    config.meta.shots = (0, 1)
    alone = [example._replace(answer="good") for example in splits.test]
    with pytest.raises(UserError, match="'task 1' has 1 different answers"):
        fewshot.questions(config, splits._replace(test=alone, support=alone))
