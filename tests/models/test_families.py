"""What every family must keep, over the registry: causality, segments, cache, scan, names both ways, no gradient on masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import registry
from jaxtune.models import FAMILIES, layers, naming
from jaxtune.models.layers import Runtime
from jaxtune.objectives import ops
from jaxtune.types import UserError

TINY = {
    "llama": {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip


class Tiny(NamedTuple):
    family: Any
    config: Any
    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    family = registry.load("model_type", request.param, FAMILIES)
    config = family.from_hf(TINY[request.param])
    graphdef, variables = layers.flatten(family.Model(config, Runtime(), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {
        p: jnp.asarray(rng.normal(0, 0.2, v.shape) + p.endswith("scale"), jnp.float32) for p, v in variables.items()
    }
    return Tiny(family, config, graphdef, params)


def logits(tiny: Tiny, tokens: np.ndarray, positions=None, segments=None, run: Runtime | None = None) -> np.ndarray:
    graphdef = tiny.graphdef
    if run is not None:
        graphdef = layers.flatten(tiny.family.Model(tiny.config, run, nnx.Rngs(0)))[0]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    model = layers.bind(graphdef, tiny.params)
    return np.asarray(model.head(model(tokens, positions, segments)[0]))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 96, (2, 20)).astype(np.int32)


def test_nothing_sees_ahead(tiny: Tiny, tokens: np.ndarray) -> None:
    """The gradient of the logits at t with respect to the embeddings of later tokens is exactly zero."""
    model = layers.bind(tiny.graphdef, tiny.params)
    where = np.broadcast_to(np.arange(20), tokens.shape)

    def at_seven(table):
        changed = layers.bind(tiny.graphdef, {**tiny.params, "embed.table": table})
        return jnp.sum(changed(tokens, where, np.ones_like(tokens))[0][:, 7])

    assert model is not None
    moved = np.abs(np.asarray(jax.grad(at_seven)(tiny.params["embed.table"]))).sum(1)
    later = set(tokens[:, 8:].ravel()) - set(tokens[:, :8].ravel())
    assert later
    assert (moved[sorted(later)] == 0).all()
    assert (moved[sorted(set(tokens[:, :8].ravel()))] > 0).all()


def test_packed_segments_are_apart(tiny: Tiny, tokens: np.ndarray) -> None:
    first, second = tokens[:1, :9], tokens[1:, :11]
    packed = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(11)])[None]
    segments = np.repeat([1, 2], [9, 11])[None]
    found = logits(tiny, packed, positions, segments)
    np.testing.assert_allclose(found[:, :9], logits(tiny, first), atol=1e-5)
    np.testing.assert_allclose(found[:, 9:], logits(tiny, second), atol=1e-5)


def test_padding_on_either_side_changes_nothing(tiny: Tiny, tokens: np.ndarray) -> None:
    real, pad = tokens[:, :12], np.zeros((2, 8), np.int32)
    alone = logits(tiny, real)
    left = logits(
        tiny,
        np.concatenate([pad, real], 1),
        np.maximum(np.arange(20) - 8, 0)[None].repeat(2, 0),
        np.repeat([[0, 1]], [8, 12], 1).repeat(2, 0),
    )
    right = logits(tiny, np.concatenate([real, pad], 1), None, np.repeat([[1, 0]], [12, 8], 1).repeat(2, 0))
    np.testing.assert_allclose(left[:, 8:], alone, atol=1e-5)
    np.testing.assert_allclose(right[:, :12], alone, atol=1e-5)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_cached_decode_is_the_full_forward(tiny: Tiny, tokens: np.ndarray) -> None:
    model = layers.bind(tiny.graphdef, tiny.params)
    cache, found = model.empty_cache(2, 24), []
    for start, stop in ((0, 7), (7, 8), (8, 13), (13, 20)):
        where = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        hidden, cache = model(tokens[:, start:stop], where, np.ones((2, stop - start), np.int32), cache)
        found.append(model.head(hidden))
    np.testing.assert_allclose(np.concatenate(found, 1), logits(tiny, tokens), atol=1e-5)


@pytest.mark.parametrize(
    "run", [Runtime(scan=False), Runtime(remat="block"), Runtime(remat="dots")], ids=["unrolled", "block", "dots"]
)
def test_how_it_runs_changes_nothing(tiny: Tiny, tokens: np.ndarray, run: Runtime) -> None:
    np.testing.assert_allclose(logits(tiny, tokens, run=run), logits(tiny, tokens), atol=1e-5)


def test_names_go_both_ways(tiny: Tiny) -> None:
    """Every parameter has a Hugging Face name and every name a parameter."""
    table = tiny.family.weights(tiny.config)
    assert {weight.ours for weight in table} == set(tiny.params)
    assert len({weight.hf for weight in table}) == len(table)
    assert len(naming.hf_names(table, 3)) == sum(3 if weight.stacked else 1 for weight in table)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_not_handled_is_refused_by_name(family: str) -> None:
    from_hf = registry.load("model_type", family, FAMILIES).from_hf
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        from_hf(TINY[family] | {"attn_logit_softcapping": 50.0})
    from_hf(TINY[family] | {"attn_logit_softcapping": None})
    with pytest.raises(UserError, match="'hidden_size'"):
        from_hf({k: v for k, v in TINY[family].items() if k != "hidden_size"})


def test_masked_tokens_have_no_gradient(tiny: Tiny, tokens: np.ndarray) -> None:
    """The loss's gradient with respect to the hidden state is zero where the weight is, and matches the plain formula."""
    model = layers.bind(tiny.graphdef, tiny.params)
    graphdef, head = nnx.split(model.head)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 20, 32)), jnp.float32)
    weights = jnp.asarray((rng.random((2, 20)) < 0.3) * rng.random((2, 20)), jnp.float32)

    def ours(hidden, head):
        return ops.cross_entropy(ops.Head(head, lambda p, h: nnx.merge(graphdef, p)(h), 3), hidden, tokens, weights)[0]

    def plain(hidden, head):
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, head)(hidden))
        return -jnp.sum(jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0] * weights)

    value, (d_hidden, d_head) = jax.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    expected, (e_hidden, e_head) = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, e_hidden, atol=1e-6)
    assert (np.asarray(d_hidden)[np.asarray(weights) == 0] == 0).all()
    for got, want in zip(jax.tree.leaves(d_head), jax.tree.leaves(e_head), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_gradient_exists_for_a_frozen_head(tiny: Tiny, tokens: np.ndarray) -> None:
    """The compiled gradient for a frozen head holds no array of the head's size beyond the head itself."""
    model = layers.bind(tiny.graphdef, tiny.params)
    graphdef, head = nnx.split(model.head)

    def loss(hidden):
        weights = jnp.ones((2, 20), jnp.float32)
        return ops.cross_entropy(ops.Head(head, lambda p, h: nnx.merge(graphdef, p)(h), 4), hidden, tokens, weights)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((2, 20, 32), jnp.float32)))
    assert "f32[32,96] = add" not in text
    assert "f32[96,32] = add" not in text


def test_splash_attention_is_the_plain_form() -> None:
    """The TPU kernel, interpreted: values and gradients, packed segments, grouped heads."""
    from jaxtune import config as config_lib
    from jaxtune import sharding
    from jaxtune.models.attention import attend

    mesh = sharding.make_mesh(config_lib.base(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, 128)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [50, 60, 18], 1).repeat(2, 0), jnp.int32)
    plain = Runtime(attention="xla")
    splash = Runtime(attention="splash", mesh=mesh, spec=sharding.spec)

    def total(run):
        return jax.value_and_grad(
            lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, segments, segments, run))), argnums=(0, 1, 2)
        )(q, k, v)

    (value, grads), (expected, e_grads) = total(splash), total(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for got, want in zip(grads, e_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_long_rows_attend_in_blocks() -> None:
    from jaxtune.models import attention

    rng, block = np.random.default_rng(0), attention._QUERY_BLOCK_TOKENS
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2 * block, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2]], [block + 100, block - 100], 1), jnp.int32)
    found = attention.attend(q, k, v, segments, segments, Runtime())
    np.testing.assert_allclose(found, attention._dense(q, k, v, segments, segments, jnp.asarray(0)), atol=1e-5)


def test_a_folder_goes_in_and_out_unchanged(tiny_model: Path, tmp_path: Path) -> None:
    """Hugging Face folder → arrays → folder: the same names and the same bits, sharded over 8 devices or on one."""
    from safetensors.numpy import load_file

    from jaxtune import config as config_lib
    from jaxtune import sharding
    from jaxtune.train import state
    from jaxtune.weights import hf

    for devices, number in ((jax.devices(), 8), (jax.devices()[:1], 1)):
        source, config = hf.Folder(tiny_model), config_lib.base()
        program = state.abstract(config, source.hf_config, sharding.make_mesh(config, devices), 1)
        arrays = hf.load(source, program.family, program.model_config, program.base)
        hf.save(tmp_path / str(number), source.hf_config, hf.tensors(program.family, program.model_config, arrays))
        before, after = (
            load_file(tiny_model / "model.safetensors"),
            load_file(tmp_path / str(number) / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)
