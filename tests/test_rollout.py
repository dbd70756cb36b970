"""Rollouts: refilled rows, rings that come round and shared prefills change nothing that the model itself would say."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import registry
from jaxtune.adapters import lora
from jaxtune.generate import logits as logits_lib
from jaxtune.generate import rollout
from jaxtune.generate.logits import Sampling, choose, restrict
from jaxtune.generate.rollout import Roller, Rollout
from jaxtune.models import FAMILIES, layers
from jaxtune.models.layers import Runtime
from jaxtune.types import UserError
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")
# Windows, ALiBi, latent attention; and with each layer by itself: a recurrence, keys and values of other layers
SCANNED, APART = ["mistral", "mpt", "deepseek_v3"], ["qwen3_5_text_tied", "gemma4_text"]
STOPS = tuple(range(12))  # of 96 tokens: some completions end early, some by their length
VOCAB = 90
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(12, VOCAB, length).tolist() for length in (5, 1, 9, 12, 3, 7, 2)]
GROUP, MOST = 2, 14
WARM = Sampling(0.9, top_k=60, top_p=0.97, min_p=1e-3)


class Tiny(NamedTuple):
    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]

    def roller(self, slots: int) -> Roller:
        return Roller(self.graphdef, STOPS, 0, VOCAB, 64, slots)


def make(name: str, adapter: lora.Options | None = None) -> Tiny:
    family = registry.load("model_type", CASES[name]["model_type"], FAMILIES)
    model = family.Model(family.from_hf(CASES[name]), Runtime(), nnx.Rngs(0))
    if adapter:
        lora.attach(model, adapter)
    graphdef, variables = layers.flatten(model)
    own = np.random.default_rng(0)
    return Tiny(
        graphdef,
        {p: jnp.asarray(own.normal(0, 0.2, v.shape) + p.endswith("scale"), jnp.float32) for p, v in variables.items()},
    )


@pytest.fixture(scope="module")
def llama() -> Tiny:
    return make("llama")


@pytest.fixture(scope="module")
def usual(llama: Tiny) -> list[Rollout]:
    return llama.roller(4)(llama.params, PROMPTS, GROUP, WARM, MOST, seed=3)


@partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _logps(graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Of each token given those before it, (B, T - 1), by a whole forward pass and the sort that `choose` avoids."""
    model = layers.bind(graphdef, params)
    where_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    logits_BTV = model.head(model(tokens_BT, where_BT, jnp.ones_like(tokens_BT))[0])
    logits_BTV = jnp.where((jnp.arange(logits_BTV.shape[2]) < VOCAB)[None, None], logits_BTV, -1e30)
    kept = jax.nn.log_softmax(jax.vmap(partial(restrict, sampling=sampling))(logits_BTV))
    return jnp.take_along_axis(kept[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]


def recomputed(tiny: Tiny, made: list[Rollout], sampling: Sampling) -> list[np.ndarray]:
    rows = [PROMPTS[one.prompt] + one.tokens.tolist() for one in made]
    padded = np.asarray([row + [0] * (32 - len(row)) for row in rows], np.int32)
    found = np.asarray(_logps(tiny.graphdef, tiny.params, padded, sampling))
    return [
        found[i, len(row) - len(one.tokens) - 1 : len(row) - 1]
        for i, (row, one) in enumerate(zip(rows, made, strict=True))
    ]


def check(tiny: Tiny, made: list[Rollout]) -> None:
    assert [one.prompt for one in made] == [i for i in range(len(PROMPTS)) for _ in range(GROUP)]
    for one, wanted in zip(made, recomputed(tiny, made, WARM), strict=True):
        np.testing.assert_allclose(one.logps, wanted, atol=1e-4)
        assert one.logps.min() > -20  # nothing that the restrictions forbid


@pytest.mark.parametrize("name", SCANNED + APART)
def test_log_probabilities_are_those_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen jobs through four rows, whose ring of 32 slots comes round."""
    tiny = make(name)
    monkeypatch.setattr(rollout, "_unrolled", lambda model: name in APART)
    check(tiny, tiny.roller(4)(tiny.params, PROMPTS, GROUP, WARM, MOST, seed=3))


def test_of_a_llama_too(llama: Tiny, usual: list[Rollout]) -> None:
    check(llama, usual)


def test_adapters_are_in_the_weights_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_unrolled", lambda model: True)
    options = lora.Options(rank=2, alpha=8.0, targets=r"layers\..*(q_proj|down_proj)", use_dora=True)
    tiny = make("llama", options)
    made = tiny.roller(4)(tiny.params, PROMPTS, GROUP, WARM, MOST, seed=3)
    check(tiny, made)
    bare = {path: value for path, value in tiny.params.items() if ".adapter." not in path}
    other = Tiny(make("llama").graphdef, bare).roller(4)(bare, PROMPTS, GROUP, WARM, MOST, seed=3)
    assert any(one.tokens.tolist() != two.tokens.tolist() for one, two in zip(made, other, strict=True))


def test_the_ring_grows_in_the_midst_of_its_rows(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of forty tokens, of which none ends early: from 32 slots to 64."""

    def rolled() -> tuple[list[Rollout], int]:
        roller, grown = Roller(llama.graphdef, (), 0, VOCAB, 64, 4), []
        longer = roller._longer
        monkeypatch.setattr(roller, "_longer", lambda rows, ring: (grown.append(ring), longer(rows, ring=ring))[1])
        return roller(llama.params, PROMPTS, 1, WARM, 40, seed=3), len(grown)

    whole, at_once = rolled()
    monkeypatch.setattr(rollout, "_BLOCK_STEPS", 4)
    parts, times = rolled()
    assert (at_once, times) == (0, 1)
    same(parts, whole)


def test_completions_end_where_they_should(usual: list[Rollout]) -> None:
    for one in usual:
        assert not np.isin(one.tokens[:-1], STOPS).any()
        assert one.ended == (one.tokens[-1] in STOPS)
        assert one.ended or len(one.tokens) == MOST
        assert one.tokens.max() < VOCAB
        assert len(one.logps) == len(one.tokens)
    assert {one.ended for one in usual} == {True, False}
    members = [one.tokens.tolist() for one in usual]
    assert all(members[i] != members[i + 1] for i in range(0, len(members), GROUP))


def same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)


def test_neither_rows_nor_company_matter(llama: Tiny, usual: list[Rollout]) -> None:
    same(llama.roller(16)(llama.params, PROMPTS, GROUP, WARM, MOST, seed=3), usual)  # which halves as they end
    alone = llama.roller(4)(llama.params, PROMPTS[:1], GROUP, WARM, MOST, seed=3)
    same(alone, usual[:GROUP])
    other = llama.roller(4)(llama.params, PROMPTS, GROUP, WARM, MOST, seed=4)
    assert any(one.tokens.tolist() != two.tokens.tolist() for one, two in zip(other, usual, strict=True))


def test_a_group_is_its_rows_one_by_one(llama: Tiny, usual: list[Rollout]) -> None:
    apart = llama.roller(4)(llama.params, [p for p in PROMPTS for _ in range(GROUP)], 1, WARM, MOST, seed=3)
    same(apart, usual)
    assert [one.prompt for one in apart] == list(range(len(usual)))


def test_many_prompts_go_through_a_small_pool(llama: Tiny) -> None:
    many = (PROMPTS * 4)[:26]
    seen: list[int] = []

    def progress(items: Any, total: int, label: str) -> Any:
        assert total == len(many)
        for item in items:
            seen.append(item)
            yield item

    roller = llama.roller(4)
    made = roller(llama.params, many, 1, Sampling(), MOST, 0, progress)
    assert [one.prompt for one in made] == list(range(26))
    assert len(seen) >= 26
    for one, again in zip(made[: len(PROMPTS)], made[len(PROMPTS) :], strict=False):  # greedy: the same each time
        np.testing.assert_array_equal(one.tokens, again.tokens)
        assert (one.logps == 0).all()


def test_scanned_layers_and_a_mesh(llama: Tiny, usual: list[Rollout], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, rows spread over two devices and heads over two more."""
    from jaxtune import config as config_lib
    from jaxtune import sharding

    config = config_lib.base()
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    monkeypatch.setattr(rollout, "_unrolled", lambda model: False)
    params = {path: jax.device_put(value, sharding.replicated(mesh)) for path, value in llama.params.items()}
    same(Roller(llama.graphdef, STOPS, 0, VOCAB, 64, 4, mesh)(params, PROMPTS, GROUP, WARM, MOST, seed=3), usual)


def test_refusals(llama: Tiny) -> None:
    with pytest.raises(UserError, match="a prompt is empty"):
        llama.roller(4)(llama.params, [[5], []], 1, WARM, MOST, 0)
    with pytest.raises(UserError, match="12 tokens and 53 new ones exceed the model's 64"):
        llama.roller(4)(llama.params, PROMPTS, 1, WARM, 53, 0)
    assert llama.roller(4)(llama.params, [], 1, WARM, MOST, 0) == []


# ---- the draw ----


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0), Sampling(0.5, top_k=2), Sampling(2.0, top_k=300), Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=0.99),
        Sampling(0.7, min_p=0.1), Sampling(1.3, 40, 0.9, 0.02),
    ],
)  # fmt: skip
def test_choose_draws_from_the_restricted_distribution(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat rows, whose top-p needs the sort, beside steep ones, whose does not: frequencies and log-probabilities."""
    monkeypatch.setattr(logits_lib, "_FEW", 16)
    logits = np.random.default_rng(0).normal(0, [[0.3], [1], [3]], (3, 200)).astype(np.float32)
    wanted = np.asarray(jax.nn.softmax(restrict(jnp.asarray(logits), sampling)))
    num = 4000
    token, logp = jax.jit(choose, static_argnums=1)(
        jnp.repeat(logits, num, axis=0), sampling, jax.random.split(jax.random.key(0), 3 * num)
    )
    for row, (own, its) in enumerate(zip(np.split(token, 3), np.split(logp, 3), strict=True)):
        assert (wanted[row][own] > 0).all()
        np.testing.assert_allclose(its, np.log(wanted[row][own]), atol=2e-5)
        found = np.bincount(own, minlength=200) / num
        assert np.abs(found - wanted[row]).sum() < 2.5 * np.sqrt((wanted[row] > 0).sum() / num)


def test_a_cut_at_the_end_takes_a_token_of_weight() -> None:
    weights = jnp.asarray([[0.2, 0.8] + [0.0] * 8, [0.0] * 9 + [1.0]])
    for cut, wanted in ((0.0, [0, 9]), (1.0, [1, 9]), (0.19, [0, 9]), (0.21, [1, 9])):
        np.testing.assert_array_equal(logits_lib._cut(weights, jnp.full((2,), cut))[0], wanted)
