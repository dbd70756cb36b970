"""Objectives that compare answers: shared prompts and a precomputed reference change no number; the gradient brick; a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, sharding, statistics
from jaxtune.adapters import lora
from jaxtune.data.batches import stack
from jaxtune.evals import judge
from jaxtune.objectives import logps, ops
from jaxtune.train import rows as rows_lib
from jaxtune.train import start, state, step
from jaxtune.types import UserError
from jaxtune.weights import source
from tests.conftest import WORDS, write_model

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose answers are good or bad by one word, so that a few steps teach something."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS[:-4], rng.integers(1, most)))

    made = [{"prompt": words(12), "chosen": f"good {words(5)}", "rejected": f"bad {words(5)}"} for _ in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def config_of(config: ConfigDict, pairs: Path, objective: str, **changes: Any) -> ConfigDict:
    config.data.train, config.train.objective, config.data.validation_fraction = str(pairs), objective, 0.0
    config.model.head = "sequence" if objective == "reward" else ""
    config.mesh.fsdp, config.data.shuffle = 8, False
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("objective", ["dpo", "orpo", "reward"])
def test_a_shared_prompt_changes_no_number(tiny_config: ConfigDict, pairs: Path, objective: str) -> None:
    """Loss, gradient norm and every metric of a step of 8 pairs, two of them packed into each row."""
    found = []
    for share in ("always", "never"):
        config = config_of(tiny_config.copy_and_resolve_references(), pairs, objective)
        config.preference.share_prompts, config.data.max_length, config.train.batch_size = share, 160, 4
        config.mesh.fsdp = 1
        model = source.find(config)
        tokenizer = source.find_tokenizer(config, model)
        rows = rows_lib.read(config, tokenizer, lambda items, *_: items, start.reader(config, model, tokenizer)).train
        batch = stack(rows, [(0, 1), (2, 3), (4, 5), (6, 7)], 160, tokenizer.pad_id)
        mesh = sharding.make_mesh(config, jax.devices()[:1])
        program = state.abstract(config, model.hf_config, mesh, 9)
        assert program.run.branches == (share == "always")
        current, frozen = start.load(config, model, program, None, lambda items, *_: iter(items))
        arrays = sharding.to_global({name: batch[name] for name in step.fields(config, program)}, mesh, 4)
        run_step = step.make(config, program)
        current, _ = run_step(current, frozen, arrays)
        _, metrics = run_step(current, frozen, arrays)  # the second: policy and reference are no longer the same
        found.append({name: float(value) for name, value in metrics.items()} | {"length": float(rows.lengths.sum())})
    shared, plain = found
    assert shared.pop("length") < 0.8 * plain.pop("length")
    assert shared.pop("tokens") < plain.pop("tokens")
    assert shared.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def exchange_words(folder: Path) -> None:
    """Gives two words of a tokenizer each other's number."""
    told = json.loads((folder / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(told))


def logged(config: ConfigDict) -> list[float]:
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_reference_computed_before_is_the_one_in_the_step(
    tiny_config: ConfigDict, pairs: Path, tiny_model: Path, tmp_path: Path, make_model: Any
) -> None:
    """The base model named as the reference is the model with its adapter off; what was computed is kept; others are refused."""
    off = logged(config_of(tiny_config, pairs, "dpo"))
    assert off[0] == pytest.approx(np.log(2), abs=1e-6)
    config = config_of(
        tiny_config, pairs, "dpo", **{"preference.reference": str(tiny_model), "workdir": str(tmp_path / "b")}
    )
    np.testing.assert_allclose(logged(config), off, atol=1e-5)
    kept = np.load(tmp_path / "b" / "reference.npz")
    assert (kept["train"] < 0).any()
    other = make_model(tmp_path / "other", seed=1)
    exchange_words(other)
    config.preference.reference, config.workdir = str(other), str(tmp_path / "c")
    with pytest.raises(UserError, match=r"preference\.reference=.* has another vocabulary"):
        logged(config)


def test_full_tuning_prefers_to_where_it_began(tiny_config: ConfigDict, pairs: Path) -> None:
    tiny_config.tune.method = "full"
    losses = logged(config_of(tiny_config, pairs, "dpo", **{"optim.learning_rate": 1e-3}))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.6


def test_a_reward_model_judges_texts(tiny_config: ConfigDict, pairs: Path, tmp_path: Path) -> None:
    """Trained, measured, exported as an adapter, read back: it scores as it did; another vocabulary is refused."""
    config = config_of(
        tiny_config, pairs, "reward", **{"data.test_fraction": 0.3, "train.steps": 12, "eval.before_after": True}
    )
    run.train(config, Path(config.workdir))
    folder = Path(config.workdir)
    told = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    after = np.asarray([line["after"]["scores"] for line in told])
    assert (after[:, 0] > after[:, 1]).mean() > 0.9
    score = judge.load(str(folder / "adapter"), config)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    asked = [rows[int(line["row_id"].rpartition(":")[2]) - 1] for line in told]
    for column, name in enumerate(("chosen", "rejected")):
        found = score([(row["prompt"], row[name]) for row in asked])
        np.testing.assert_allclose(found, after[:, column], atol=1e-4)
    with pytest.raises(UserError, match="no reward model"):
        judge.load(config.model.source, config)
    other = write_model(tmp_path / "other")
    exchange_words(other)
    config.model.tokenizer = str(other)
    theirs = source.find_tokenizer(config, source.find(config))
    with pytest.raises(UserError, match="has another vocabulary"):
        judge.load(str(folder / "adapter"), config, theirs)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
def test_log_probabilities_and_their_gradient(trains: str, num_shards: int) -> None:
    """Against the plain formula over full logits, for any function of the answers."""
    rng = np.random.default_rng(0)
    hidden, weights, targets = rng.normal(size=(2, 12, 5)), rng.normal(size=(5, 9)), rng.integers(0, 9, (2, 12))
    wanted, scale = (rng.random((2, 12)) < 0.6).astype(np.float32), rng.normal(size=(2, 12)).astype(np.float32)

    def chunked(hidden: Any, weights: Any) -> Any:
        head = ops.Head(weights, lambda w, h: jnp.matmul(h, w), 4, num_shards)
        found = logps.token_logps(head, hidden, jnp.asarray(targets), jnp.asarray(wanted))
        return jnp.sum(jnp.sin(found) * scale), found

    def plain(hidden: Any, weights: Any) -> Any:
        every = jax.nn.log_softmax(jnp.matmul(hidden, weights))
        found = jnp.take_along_axis(every, jnp.asarray(targets)[..., None], axis=-1)[..., 0] * wanted
        return jnp.sum(jnp.sin(found) * scale), found

    at = {"hidden": 0, "head": 1, "both": (0, 1)}[trains]
    given = (jnp.asarray(hidden, jnp.float32), jnp.asarray(weights, jnp.float32))
    ours, values = jax.jit(jax.grad(chunked, at, has_aux=True))(*given)
    theirs, expected = jax.grad(plain, at, has_aux=True)(*given)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    made = str(jax.make_jaxpr(jax.grad(chunked, at, has_aux=True))(*given))
    assert ("2,12,9" in made) is False, "full logits were kept"


def test_an_adapter_of_preferences_begins_with_a_at_zero(tiny_config: ConfigDict, pairs: Path) -> None:
    """So the first step of A has a whole gradient; SFT keeps PEFT's beginning, and a config key overrides both."""

    def zeros(objective: str, init: str) -> tuple[bool, bool]:
        config = config_of(tiny_config.copy_and_resolve_references(), pairs, objective, **{"tune.init": init})
        options = state.abstract(
            config, source.find(config).hf_config, sharding.make_mesh(config, jax.devices()), 1
        ).lora
        assert options is not None
        made = [
            lora.initial(f"x.adapter.{kind}", (6, 4), jnp.float32, jax.random.key(0), None, options.zero)
            for kind in ("lora_a", "lora_b")
        ]
        return bool((made[0] == 0).all()), bool((made[1] == 0).all())

    assert zeros("dpo", "auto") == zeros("sft", "a_zero") == (True, False)
    assert zeros("sft", "auto") == zeros("simpo", "auto") == zeros("dpo", "b_zero") == (False, True)


def test_statistics_of_preferences() -> None:
    score, right = np.asarray([0.1, 0.4, 0.4, 0.8]), np.asarray([False, True, False, True])
    assert statistics.auc(score, right) == pytest.approx((1 + 0.5 + 2) / 4)
    assert statistics.auc(np.stack([score, -score]), np.stack([right, right])).tolist() == pytest.approx([0.875, 0.125])
    sure = np.asarray([[0.9, 1], [0.9, 0], [0.6, 1], [0.6, 1]])
    assert statistics.calibration_error(sure) == pytest.approx((0.8 + 0.8) / 4)
    assert statistics.calibration_error(sure[None]).shape == (1,)
