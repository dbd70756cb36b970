"""What every family must keep, over the registry: causality, segments, cache, scan, names both ways, no gradient on masks."""

from __future__ import annotations

from functools import partial
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
from tests.families import CASES, TASKS

pytestmark = pytest.mark.usefixtures("quick_compile")
ROUNDING = 3e-5  # float32, logits of about 4, sums in another order; Gemma's scaled embeddings come to 1.7e-5
ONE_EACH = sorted({case["model_type"]: name for name, case in reversed(CASES.items())}.values())  # the first of each
HEADS = ["llama", "qwen2", "gptj", "gemma2", "opt_350m"]  # untied, tied, with bias, capped, of another width


def shapes_of(family: Any, config: Any, run: Runtime) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """A model's structure and the shapes of its parameters; nothing is drawn, and nothing compiled."""
    return layers.flatten(nnx.eval_shape(lambda: family.Model(config, run, nnx.Rngs(0))))


class Tiny(NamedTuple):
    family: Any
    config: Any
    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]


@pytest.fixture(scope="module", params=ONE_EACH)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    settings = CASES[request.param]
    family = registry.load("model_type", settings["model_type"], FAMILIES)
    config = family.from_hf(settings)
    graphdef, variables = shapes_of(family, config, Runtime())
    rng = np.random.default_rng(0)
    params = {
        p: jnp.asarray(rng.normal(0, 0.2, v.shape) + p.endswith("scale"), jnp.float32) for p, v in variables.items()
    }
    return Tiny(family, config, graphdef, params)


def logits(tiny: Tiny, tokens: np.ndarray, positions=None, segments=None, run: Runtime | None = None) -> np.ndarray:
    graphdef = tiny.graphdef
    if run is not None:
        graphdef = shapes_of(tiny.family, tiny.config, run)[0]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(forward(graphdef, tiny.params, tokens, positions, segments))


@partial(jax.jit, static_argnums=0)
def forward(graphdef: nnx.GraphDef, params: Any, *batch: jax.Array) -> jax.Array:
    model = layers.bind(graphdef, params)
    return model.head(model(*batch)[0])


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
    moved = np.abs(np.asarray(jax.jit(jax.grad(at_seven))(tiny.params["embed.table"]))).sum(1)
    later = set(tokens[:, 8:].ravel()) - set(tokens[:, :8].ravel())
    assert later
    assert (moved[sorted(later)] == 0).all()
    assert (moved[sorted(set(tokens[:, :8].ravel()))] > 0).all()


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tokens: np.ndarray) -> np.ndarray:
    """Logits of two whole rows, of one segment each."""
    return logits(tiny, tokens)


def test_packed_segments_are_apart(tiny: Tiny, tokens: np.ndarray, alone: np.ndarray) -> None:
    packed = np.concatenate([tokens[0, :9], tokens[1, :11]])[None].repeat(2, 0)
    positions = np.concatenate([np.arange(9), np.arange(11)])[None].repeat(2, 0)
    segments = np.repeat([1, 2], [9, 11])[None].repeat(2, 0)
    found = logits(tiny, packed, positions, segments)
    np.testing.assert_allclose(found[0, :9], alone[0, :9], atol=ROUNDING)
    np.testing.assert_allclose(found[1, 9:], alone[1, :11], atol=ROUNDING)
    together = logits(tiny, packed, positions, np.ones_like(segments))
    assert np.abs(together[1, 9:] - alone[1, :11]).max() > 100 * ROUNDING


def test_padding_on_either_side_changes_nothing(tiny: Tiny, tokens: np.ndarray, alone: np.ndarray) -> None:
    real, pad = tokens[:, :12], np.zeros((2, 8), np.int32)
    left = logits(
        tiny,
        np.concatenate([pad, real], 1),
        np.maximum(np.arange(20) - 8, 0)[None].repeat(2, 0),
        np.repeat([[0, 1]], [8, 12], 1).repeat(2, 0),
    )
    right = logits(tiny, np.concatenate([real, pad], 1), None, np.repeat([[1, 0]], [12, 8], 1).repeat(2, 0))
    np.testing.assert_allclose(left[:, 8:], alone[:, :12], atol=ROUNDING)
    np.testing.assert_allclose(right[:, :12], alone[:, :12], atol=ROUNDING)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_cached_decode_is_the_full_forward(tiny: Tiny, tokens: np.ndarray, alone: np.ndarray) -> None:
    @jax.jit
    def further(cache, *batch):
        model = layers.bind(tiny.graphdef, tiny.params)
        hidden, cache = model(*batch, cache)
        return model.head(hidden), cache

    cache, found = layers.bind(tiny.graphdef, tiny.params).empty_cache(2, 24), []
    for start, stop in ((0, 18), (18, 19), (19, 20)):
        where = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        out, cache = further(cache, tokens[:, start:stop], where, np.ones((2, stop - start), np.int32))
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, 1), alone, atol=ROUNDING)


def test_unrolled_is_scanned(tiny: Tiny, tokens: np.ndarray, alone: np.ndarray) -> None:
    np.testing.assert_allclose(logits(tiny, tokens, run=Runtime(scan=False)), alone, atol=ROUNDING)


@pytest.mark.parametrize("tiny", ["llama", "deepseek_v3", "gemma3_text"], indirect=True)
@pytest.mark.parametrize("remat", ["block", "dots"])
def test_rematerialised_gradients_are_the_same(tiny: Tiny, tokens: np.ndarray, remat: str) -> None:
    def gradient(run: Runtime) -> Any:
        graphdef = shapes_of(tiny.family, tiny.config, run)[0]
        batch = (tokens, np.broadcast_to(np.arange(20), tokens.shape), np.ones_like(tokens))
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(forward(graphdef, params, *batch)))))(tiny.params)

    plain, again = gradient(Runtime()), gradient(Runtime(remat=remat))
    for path, value in plain.items():
        np.testing.assert_allclose(again[path], value, atol=2e-4 * float(jnp.abs(value).max()) + 1e-6, err_msg=path)


def test_names_go_both_ways(tiny: Tiny) -> None:
    """Every parameter has a Hugging Face name and every name a parameter."""
    table = tiny.family.weights(tiny.config)
    assert {weight.ours for weight in table} == set(tiny.params)
    names = naming.hf_names(table)
    assert len(names) == sum(len(weight.layers) * (weight.experts or 1) if weight.stacked else 1 for weight in table)
    places = {(weight.ours, place) for weight, place in names.values()}
    assert len(places) == len(names)


def test_every_family_has_a_case() -> None:
    assert {case["model_type"] for case in [*CASES.values(), *TASKS.values()]} == set(FAMILIES)


def test_what_is_not_handled_is_refused_by_name(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    settings = CASES[request.node.callspec.params["tiny"]]
    with pytest.raises(UserError, match="flux_capacitor"):
        tiny.family.from_hf(settings | {"flux_capacitor": 50.0})
    tiny.family.from_hf(settings | {"flux_capacitor": None})
    width = next(name for name in ("hidden_size", "n_embd", "d_model") if name in settings)
    with pytest.raises(UserError, match=f"'{width}'"):
        tiny.family.from_hf({k: v for k, v in settings.items() if k != width})


# Parameters of the published checkpoints, as their model pages count them.
PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_70b": 68_976_648_192, "llama3_1_8b": 8_030_261_248, "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824, "smollm2_135m": 134_515_008, "smollm3_3b": 3_075_098_624,
    "mistral_7b_v0_1": 7_241_732_096, "mistral_7b_v0_3": 7_248_023_552, "mistral_nemo_12b": 12_247_782_400,
    "mixtral_8x7b": 46_702_792_704, "mixtral_8x22b": 140_630_071_296, "qwen2_5_0_5b": 494_032_768, "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_72b": 72_706_203_648, "qwen3_8b": 8_190_735_360, "qwen3_30b_a3b": 30_532_122_624, "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896, "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952, "phi3_mini_4k": 3_821_079_552, "phi4": 14_659_507_200, "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344, "gpt2": 124_439_808, "gpt2_xl": 1_557_611_200, "gptj_6b": 6_050_882_784,
    "pythia_160m": 162_322_944, "pythia_6_9b": 6_857_302_016, "gpt_neox_20b": 20_554_567_680, "opt_125m": 125_239_296,
    "opt_350m": 331_196_416, "bloom_560m": 559_214_592, "bloom_7b1": 7_069_016_064, "mpt_7b": 6_649_286_656,
    "falcon_7b": 6_921_720_704, "gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672, "deepseek_v3": 671_026_419_200,
    "ernie4_5_21b_a3b": 21_825_437_888, "pythia_70m": 70_426_624, "pythia_1b": 1_011_781_632, "opt_2_7b": 2_651_596_800,
    "opt_13b": 12_853_473_280, "bloom_1b1": 1_065_314_304, "bloom_3b": 3_002_557_440, "gemma3_270m": 268_098_176,
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_presets_are_the_published_models(family: str) -> None:
    module = registry.load("model_type", family, FAMILIES)
    assert module.PRESETS
    for name, settings in module.PRESETS.items():
        config = module.from_hf(settings)
        shapes = shapes_of(module, config, Runtime())[1]
        assert {weight.ours for weight in module.weights(config)} == set(shapes), name
        if name in PUBLISHED:
            assert sum(int(np.prod(v.shape)) for v in shapes.values()) == PUBLISHED[name], name


@pytest.mark.parametrize("tiny", HEADS, indirect=True)
def test_masked_tokens_have_no_gradient(tiny: Tiny, tokens: np.ndarray) -> None:
    """The loss's gradient with respect to the hidden state is zero where the weight is, and matches the plain formula."""
    model = layers.bind(tiny.graphdef, tiny.params)
    graphdef, head = nnx.split(model.head)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 20, width(tiny))), jnp.float32)
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


def width(tiny: Tiny) -> int:
    """Of the hidden states that the head reads."""
    return tiny.config.embed_dim or tiny.config.dim


@pytest.mark.parametrize("tiny", HEADS, indirect=True)
def test_no_gradient_exists_for_a_frozen_head(tiny: Tiny, tokens: np.ndarray) -> None:
    """The compiled gradient for a frozen head holds no array of the head's size beyond the head itself."""
    model = layers.bind(tiny.graphdef, tiny.params)
    graphdef, head = nnx.split(model.head)

    def loss(hidden):
        weights = jnp.ones((2, 20), jnp.float32)
        return ops.cross_entropy(ops.Head(head, lambda p, h: nnx.merge(graphdef, p)(h), 4), hidden, tokens, weights)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((2, 20, width(tiny)), jnp.float32)))
    assert f"f32[{width(tiny)},96] = add" not in text
    assert f"f32[96,{width(tiny)}] = add" not in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "windows": (0, 9), "index": jnp.int32(1)},
        {"sinks": True, "windows": (5,)},
        {"causal": False},
    ],
    ids=["causal", "softcap and a window among two", "sinks and a window", "both ways"],
)
def test_splash_attention_is_the_plain_form(options: dict[str, Any]) -> None:
    """The TPU kernel, interpreted: values and gradients, packed segments, grouped heads."""
    from jaxtune import config as config_lib
    from jaxtune import sharding
    from jaxtune.models.attention import Rule, attend

    mesh = sharding.make_mesh(config_lib.base(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, 128)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [50, 60, 18], 1).repeat(2, 0), jnp.int32)
    plain = Runtime(attention="xla")
    splash = Runtime(attention="splash", mesh=mesh, spec=sharding.spec)
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0], jnp.float32) if "sinks" in options else None
    rule = Rule(0.11, options.get("softcap"), options.get("causal", True), windows=options.get("windows", (0,)))

    def total(run):
        def value(*qkv):
            out = attend(*qkv, segments, segments, rule, run, sinks_N=sinks, window_index=options.get("index", 0))
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(q, k, v)

    (value, grads), (expected, e_grads) = total(splash), total(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for got, want in zip(grads, e_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_long_rows_attend_in_blocks() -> None:
    from jaxtune.models import attention

    rng, block = np.random.default_rng(0), attention._QUERY_BLOCK_TOKENS
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2 * block, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[1, 2]], [block + 100, block - 100], 1), jnp.int32)
    rule = attention.Rule(0.3, windows=(0, 700))
    found = attention.attend(q, k, v, segments, segments, rule, Runtime(), window_index=1)
    whole = attention._dense(rule, False, q, k, v, segments, segments, jnp.asarray(0), jnp.asarray(700), None)
    np.testing.assert_allclose(found, whole, atol=1e-5)


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
