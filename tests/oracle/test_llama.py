"""The llama family against transformers' LlamaForCausalLM: values, gradients, padding, packing, caches, every rope type."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import sharding
from jaxtune.models import layers, llama
from jaxtune.models.layers import Runtime
from jaxtune.train import step as step_lib
from jaxtune.weights import hf

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compile")]

VOCAB, TOKENS, PAD = 128, 96, 0
TOLERANCE = 1e-4  # of float32 logits that reach about ±10

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32, "rms_norm_eps": 1e-3},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"max_position_embeddings": 256}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
    "dynamic_beyond": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}, "max_position_embeddings": 40,
    },
    "dynamic_original": {  # which transformers ignores, for this type alone
        "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 20,
        }, "max_position_embeddings": 48,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        } , **LONG,
    },
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1e3}, **LONG},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "rope_theta": 1e3, "attention_factor": 1.7}, **LONG},
    "yarn_mscale": {"rope_parameters": {**YARN, "rope_theta": 1e3, "mscale": 0.7, "mscale_all_dim": 1.3}, **LONG},
    "yarn_untruncated": {"rope_parameters": {**YARN, "rope_theta": 1e3, "truncate": False}, **LONG},
    "yarn_betas": {"rope_parameters": {**YARN, "rope_theta": 1e3, "beta_fast": 8, "beta_slow": 2}, **LONG},
}  # fmt: skip


class Pair(NamedTuple):
    """One model, here and in torch, and the folder that transformers wrote and jaxtune read."""

    ours: Any
    torch: Any
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, ours: Any, config_of: Any) -> Callable[..., Pair]:
    """Makes a random model with transformers; biases and norms, which it would leave at 0 and 1, are random too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(changes: dict[str, Any], options: dict[str, Any] | None = None) -> Pair:
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.normal_(1.0 if "norm" in name else 0.0, 0.15)
        folder = tmp_path_factory.mktemp("llama") / "model"
        model.save_pretrained(folder)
        return Pair(ours(config_of(folder, {"tune.method": "full"} | (options or {}))), model, folder)

    return make


@pytest.fixture(scope="module")
def plain(pair: Any) -> Pair:
    return pair({})


def random_tokens(rows: int = 2, length: int = TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, (rows, length))


@pytest.mark.parametrize("changes", [*SHAPES.values(), *ROPES.values()], ids=[*SHAPES, *ROPES])
def test_logits_agree(
    pair: Any, theirs: Any, apart: Any, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    both, tokens = pair(changes), random_tokens()
    assert apart(both.ours.logits(tokens), theirs(both.torch, tokens), request.node.callspec.id) <= TOLERANCE


def test_rope_types_differ(theirs: Any, pair: Any) -> None:
    """The comparisons above tell rope types apart: any two differ by far more than the tolerance."""
    seen = {name: theirs(pair(changes).torch, random_tokens()) for name, changes in ROPES.items()}
    for one, other in itertools.combinations(seen, 2):
        assert np.abs(seen[one] - seen[other]).max() > 100 * TOLERANCE, f"{one} is like {other}"


@pytest.mark.parametrize("name", ["llama3", "yarn_betas", "dynamic_beyond"])
def test_version_4_config_reads_the_same(pair: Any, ours: Any, config_of: Any, tmp_path: Path, name: str) -> None:
    """`rope_theta` beside `rope_scaling`, as transformers 4 wrote config.json, means the same as `rope_parameters`."""
    both = pair(ROPES[name])
    config = json.loads((both.folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(both.folder / "model.safetensors")
    again = ours(config_of(tmp_path, {"tune.method": "full"}))
    assert again.program.model_config == both.ours.program.model_config


def random_batch(rows: int) -> dict[str, np.ndarray]:
    """Right-padded rows of many lengths; about half of the real targets train, with weight 1."""
    rng = np.random.default_rng(1)
    tokens = random_tokens(rows, TOKENS + 1, seed=1)
    lengths = rng.integers(8, TOKENS, rows)
    real = np.arange(TOKENS)[None, :] < lengths[:, None]
    return {
        "tokens_BT": np.where(real, tokens[:, :-1], PAD).astype(np.int32),
        "targets_BT": np.where(real, tokens[:, 1:], 0).astype(np.int32),
        "weights_BT": (real & (rng.random(real.shape) < 0.5)).astype(np.float32),
        "segment_ids_BT": real.astype(np.int32),
        "positions_BT": np.where(real, np.arange(TOKENS), 0).astype(np.int32),
    }


def our_gradients(model: Any, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the gradients by Hugging Face name: SGD at learning rate 1 subtracts exactly the gradient."""
    before = {path: np.asarray(value) for path, value in model.params.items()}
    config, program = model.config, model.program
    arrays = sharding.to_global(batch, program.mesh, config.train.batch_size)
    state, metrics = step_lib.make(config, program)(model.state, model.frozen, arrays)
    moved = {path: jnp.asarray(before[path] - np.asarray(value)) for path, value in state.params.items()}
    return float(metrics["loss"]), dict(hf.tensors(program.family, program.model_config, moved))


def their_gradients(model: Any, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    tensors = {name: torch.as_tensor(value) for name, value in batch.items()}
    out = model(input_ids=tensors["tokens_BT"].long(), attention_mask=tensors["segment_ids_BT"].long()).logits
    nll = torch.nn.functional.cross_entropy(out.flatten(0, 1), tensors["targets_BT"].long().flatten(), reduction="none")
    weights = tensors["weights_BT"].flatten()
    loss = (nll * weights).sum() / weights.sum()
    loss.backward()
    return loss.item(), {name: value.grad.numpy() for name, value in model.named_parameters()}


@pytest.mark.parametrize(("name", "accumulation"), [("gqa", 1), ("all_biases_tied", 2), ("yarn_mscale", 1)])
def test_gradients_of_all_weights_agree(pair: Any, name: str, accumulation: int) -> None:
    """Full fine-tuning's own step, with block remat and the chunked loss, against autograd through the full logits."""
    options = {
        "optim.name": "sgd", "optim.learning_rate": 1.0, "optim.schedule": "constant", "optim.warmup_steps": 0,
        "optim.clip_norm": 0.0, "train.batch_size": 8 * accumulation, "train.accumulation": accumulation,
        "train.steps": 1, "train.loss_chunk_tokens": 32, "data.max_length": TOKENS,
    }  # fmt: skip
    both = pair((SHAPES | ROPES)[name], options)
    batch = random_batch(8 * accumulation)
    loss, ours = our_gradients(both.ours, batch)
    expected_loss, expected = their_gradients(both.torch, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert ours.keys() == expected.keys()
    off = {key: np.abs(ours[key] - value).max() / np.abs(value).max() for key, value in expected.items()}
    worst = max(off, key=lambda key: off[key])
    print(
        f"{name}, accumulation {accumulation}: loss Δ {abs(loss - expected_loss):.1e}; worst relative gradient Δ {off[worst]:.2e} in {worst}"
    )
    assert off[worst] <= 1e-3


def test_left_padding_changes_nothing(plain: Pair, theirs: Any, apart: Any) -> None:
    tokens, lengths = random_tokens(3), (TOKENS, 40, 7)
    padded = np.full((3, TOKENS), PAD)
    for row, length in enumerate(lengths):
        padded[row, TOKENS - length :] = tokens[row, :length]
    index = np.arange(TOKENS)[None, :] - (TOKENS - np.asarray(lengths))[:, None]
    logits = plain.ours.logits(padded, np.maximum(index, 0), index >= 0)
    for row, length in enumerate(lengths):
        expected = theirs(plain.torch, tokens[row : row + 1, :length])
        assert apart(logits[row : row + 1, TOKENS - length :], expected, f"left-padded {length}") <= TOLERANCE


def test_packed_rows_do_not_see_each_other(plain: Pair, theirs: Any, apart: Any) -> None:
    lengths = (33, 1, 50)  # and padding to the end
    tokens, packed = random_tokens(3), np.full((1, TOKENS), PAD)
    segments, positions = np.zeros((1, TOKENS)), np.zeros((1, TOKENS))
    starts = np.cumsum((0, *lengths))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        where = slice(start, start + length)
        packed[0, where], segments[0, where] = tokens[row, :length], row + 1
        positions[0, where] = np.arange(length)
    logits = plain.ours.logits(packed, positions, segments)
    together = plain.ours.logits(packed, positions, segments > 0)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        expected = theirs(plain.torch, tokens[row : row + 1, :length])
        assert apart(logits[:, start : start + length], expected, f"packed {length}") <= TOLERANCE
        contaminated = np.abs(together[:, start : start + length] - expected).max()
        assert (contaminated > 100 * TOLERANCE) == (row > 0), (
            "one segment for all must show, or this test proves nothing"
        )


@pytest.mark.parametrize("name", ["gqa", "llama3", "yarn"])
def test_cached_decode_is_the_full_forward(pair: Any, theirs: Any, apart: Any, name: str) -> None:
    """Prompts of unlike lengths, left-padded and prefilled together, then one token at a time."""
    both, tokens = pair((SHAPES | ROPES)[name]), random_tokens(2, 40)
    graphdef, params, width, lengths = both.ours.program.inference, both.ours.params, 24, np.asarray([24, 11])

    @jax.jit
    def forward(cache: Any, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> Any:
        model = layers.bind(graphdef, params)
        hidden_BTD, cache = model(tokens_BT, positions_BT, segments_BT, cache)
        return model.head(hidden_BTD), cache

    index = np.arange(width)[None, :] - (width - lengths)[:, None]
    prompt = np.stack([np.r_[np.full(width - n, PAD), row[:n]] for row, n in zip(tokens, lengths, strict=True)])
    cache = layers.bind(graphdef, params).empty_cache(2, 64)
    out, cache = forward(cache, jnp.asarray(prompt), jnp.asarray(np.maximum(index, 0)), jnp.asarray(index >= 0, int))
    last = [np.asarray(out[:, -1:])]
    for step in range(12):
        at = lengths + step
        token = jnp.asarray(tokens[np.arange(2), at])[:, None]
        out, cache = forward(cache, token, jnp.asarray(at)[:, None], jnp.ones((2, 1), int))
        last.append(np.asarray(out))
    made = np.concatenate(last, axis=1)
    for row, length in enumerate(lengths):
        expected = theirs(both.torch, tokens[row : row + 1])[:, length - 1 : length + 12]
        assert apart(made[row : row + 1], expected, f"{name}, cached from {length}") <= TOLERANCE


def test_unrolled_is_scanned(plain: Pair, apart: Any) -> None:
    config, tokens = plain.ours.program.model_config, random_tokens()
    model = nnx.eval_shape(lambda: llama.Model(config, Runtime(scan=False), nnx.Rngs(0)))
    graphdef, _ = layers.flatten(model)
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)

    @jax.jit
    def unrolled(params: Any) -> jax.Array:
        bound = layers.bind(graphdef, params)
        return bound.head(bound(jnp.asarray(tokens), positions, ones)[0])

    assert (
        apart(np.asarray(unrolled(plain.ours.params)), plain.ours.logits(tokens), "unrolled") <= 1e-5
    )  # the same operations; only their fusion may differ
