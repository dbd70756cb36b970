"""Soft prompts: in front of every segment of a packed row, trained alone, used in every verb, refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, validation
from jaxtune.adapters.prompt import PATH
from jaxtune.models import layers
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.train.state import num_params
from jaxtune.types import UserError
from jaxtune.weights import source

pytestmark = pytest.mark.usefixtures("quick_compile")
PROMPTED = {"tune.method": "prompt", "tune.virtual_tokens": 5}


@pytest.fixture
def config(tiny_config: ConfigDict) -> ConfigDict:
    tiny_config.update_from_flattened_dict(PROMPTED)
    tiny_config.optim.learning_rate = 0.1
    return tiny_config


def loaded(config: ConfigDict) -> Any:
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, total, label: iter(items))
    return program, state, frozen, tokenizer


def test_every_segment_has_its_own_and_nothing_else_trains(config: ConfigDict) -> None:
    program, state, frozen, tokenizer = loaded(config)
    assert list(state.params) == [PATH]
    assert num_params(program.state.params) == 5 * 64
    vocab = program.model_config.vocab_size
    batch = rows_lib.read(config, tokenizer, lambda items, total, label: items).batches[0]
    packed = [row for row in range(8) if batch["segment_ids_BT"][row].max() > 1]
    assert packed
    for row in range(8):
        for segment in range(1, batch["segment_ids_BT"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids_BT"][row] == segment)
            assert batch["tokens_BT"][row][at[:5]].tolist() == list(range(vocab, vocab + 5))
            assert batch["tokens_BT"][row][at[5:]].max() < vocab
            assert not batch["weights_BT"][row][at[:5]].any()
            assert batch["positions_BT"][row][at].tolist() == list(range(len(at)))

    # By hand: the vectors laid before each text alone give what the packed row gives.
    row = packed[0]
    at = np.flatnonzero(batch["segment_ids_BT"][row] == 2)
    model = layers.bind(program.inference, {**frozen, **state.params})
    together, _ = model(*(batch[name][[row]] for name in ("tokens_BT", "positions_BT", "segment_ids_BT")))
    table, prompt = np.asarray(frozen["embed.table"]), np.asarray(state.params[PATH])
    vectors = np.concatenate([prompt, table[batch["tokens_BT"][row][at[5:]]]])
    model.embed.table[...] = jax.numpy.asarray(np.concatenate([vectors, table])[: len(table)])
    model.virtual_tokens.adapter = None
    places = np.arange(len(at))[None]
    alone, _ = model(places, places, np.ones_like(places))
    np.testing.assert_allclose(np.asarray(together[0, at]), alone[0], atol=2e-5)


@pytest.mark.parametrize("init", ["vocabulary", "text", "random"])
def test_where_the_vectors_start(config: ConfigDict, init: str) -> None:
    config.tune.virtual_init, config.tune.virtual_text = init, "the cat" if init == "text" else ""
    validation.validate(config)
    _, state, frozen, tokenizer = loaded(config)
    table, prompt = np.asarray(frozen["embed.table"]), np.asarray(state.params[PATH])
    if init == "text":
        ids = (tokenizer.encode("the cat") * 5)[:5]
        assert np.array_equal(prompt, table[ids])
    elif init == "vocabulary":
        assert all((table == row).all(1).any() for row in prompt)
        assert len({row.tobytes() for row in prompt}) > 1
    else:
        assert 0.7 < prompt.std() / table.std() < 1.4
        assert not any((table == row).all(1).any() for row in prompt)


def test_a_run_learns_evaluates_generates_and_goes_on(config: ConfigDict, chats: Path, tmp_path: Path) -> None:
    config.data.test_fraction, config.eval.limit, config.train.steps, config.generate.max_new_tokens = 0.2, 8, 12, 4
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    config.generate.input = str(chats)
    run.generate(config, Path(config.workdir))
    made = (Path(config.workdir) / "generations.jsonl").read_text().splitlines()
    assert len(made) == 96
    assert json.loads(made[0])["prompt"].startswith("<|im_start|>user")  # virtual tokens have no text
    run.evaluate(config, Path(config.workdir))
    found = json.loads((Path(config.workdir) / "evaluation.json").read_text())["metrics"]

    # The exported folder, started from again, is measured the same.
    config.tune.adapter, config.tune.virtual_tokens = str(Path(config.workdir) / "adapter"), 3
    config.workdir = str(tmp_path / "again")
    run.evaluate(config, Path(config.workdir))
    again = json.loads((Path(config.workdir) / "evaluation.json").read_text())["metrics"]
    assert found["perplexity"]["value"] == pytest.approx(again["perplexity"]["value"], rel=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "text without one": ({"tune.virtual_init": "text"}, "a text goes with 'text', and 'text' with a text"),
    "text for nothing": ({"tune.virtual_text": "say"}, "a text goes with 'text'"),
    "none": ({"tune.virtual_tokens": 0}, "expected at least 1"),
    "no room": ({"tune.virtual_tokens": 64}, "leaves no room in data.max_length=64"),
    "merged": ({"export.merge": True}, "virtual tokens stand in front of each text, and fold into no weight"),
    "a head of labels": ({"model.head": "sequence", "model.labels": ("a", "b"), "train.objective": "classify"}, "use 'lora'"),
    "no folder": ({"tune.adapter": "."}, "is not a PEFT adapter folder"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_refused(config: ConfigDict, changes: dict[str, Any], message: str) -> None:
    config.update_from_flattened_dict(changes)

    def begin() -> None:
        validation.validate(config)
        program, *_ = loaded(config)
        start.check_export(config, program)

    with pytest.raises(UserError, match=message):
        begin()
