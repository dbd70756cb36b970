"""Quantised bases: levels and codes by hand, gradients against float64, the same on every mesh, gathered as codes, never whole."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import norm

from jaxtune import config as config_lib
from jaxtune import run, sharding
from jaxtune.adapters import lora
from jaxtune.models import layers, quantised
from jaxtune.train import random_weights, start, state, step
from jaxtune.types import UserError
from jaxtune.validation import validate
from jaxtune.weights import hf, pack, source
from tests.families import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")

HALF_GAP = {"int8": 0.5 / 127, "int4": 0.5 / 7.5, "nf4": np.diff(quantised.NF4).max() / 2}  # of a scale
quantize = jax.jit(quantised.quantize, static_argnums=(1, 2))
dequantize = jax.jit(quantised.dequantize, static_argnums=1)


def normal(*shape: int, seed: int = 0, std: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, std, shape).astype(np.float32)


# ---- values ----


def test_the_levels_are_quantiles_of_a_normal() -> None:
    """As QLoRA makes them: 8 quantiles below 0 and 9 from it on, between 1 - 0.9677083 and 0.9677083, scaled to 1."""
    below = norm.ppf(np.linspace(1 - 0.9677083, 0.5, 8)[:-1])
    above = norm.ppf(np.linspace(0.5, 0.9677083, 9))
    np.testing.assert_allclose(quantised.NF4, np.concatenate([below, above]) / above[-1], atol=2e-6)


def test_codes_by_hand() -> None:
    """A block of four inputs: their codes in two bytes, the first half in the low halves."""
    kernel_IO = jnp.asarray([[0.7, 0.0], [-0.2, 0.0], [0.1, 0.0], [0.0, 0.0]])
    packed = quantize(kernel_IO, "int4", 4)
    assert packed.shape == (4, 2)
    np.testing.assert_array_equal(packed.codes, [[15 | 9 << 4, 8 | 8 << 4], [6 | 8 << 4, 8 | 8 << 4]])
    np.testing.assert_allclose(packed.columns, [[0.7, 0.0]])
    levels_IO = np.asarray([[7, 0], [-2, 0], [1, 0], [0, 0]]) / 7.5 * 0.7
    np.testing.assert_allclose(dequantize(packed, jnp.float32), levels_IO, atol=1e-7)
    packed = quantize(jnp.asarray([[-2.0], [0.5], [0.0], [2.0]]), "nf4", 4)
    np.testing.assert_array_equal(packed.codes, [[0 | 7 << 4], [10 | 15 << 4]])  # 0.25 is nearest to 0.2461
    np.testing.assert_allclose(dequantize(packed, jnp.float32)[:, 0], [-2.0, 2 * quantised.NF4[10], 0.0, 2.0])
    packed = quantize(jnp.asarray([[1.0], [-0.25], [0.01], [0.0025]]), "int8", 2)
    np.testing.assert_array_equal(packed.codes[:, 0], [127, -32, 122, 31])  # the root of 0.01 is 25.5 of 255
    np.testing.assert_array_equal(packed.scales, [[255], [26]])


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("block", [16, 64, 192])
def test_what_is_lost_is_bounded(kind: str, block: int) -> None:
    """By half a gap between levels, of a scale that its own 8 bits make a little larger."""
    kernel = normal(2, 192, 24)
    kernel[:, 64:128] *= 0.01  # scales a hundredth of their column's largest
    packed = quantize(kernel, kind, block)
    found = np.asarray(dequantize(packed, jnp.float32))
    blocks = kernel.reshape(2, -1, block, 24)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    kept = np.square(np.float32(packed.scales))[:, :, None] * np.asarray(packed.columns)[:, None] / 255**2
    too_large = 2.1 / 255 / np.sqrt(largest / largest.max(axis=1, keepdims=True))  # one step of the 8 bits, squared
    assert (kept >= largest * (1 - 1e-6)).all()
    assert (kept <= largest * (1 + too_large)).all()
    assert (np.abs(found.reshape(blocks.shape) - blocks) <= HALF_GAP[kind] * kept + 1e-7).all()
    assert packed.codes.nbytes == kernel.size * quantised.KINDS[kind] // 8
    assert packed.scales.nbytes == kernel.size // block


def test_error_of_normal_weights_is_that_of_the_paper() -> None:
    """NF4 in blocks of 64 misses normal weights by 9.1% (root mean square), a uniform grid of 4 bits by more, 8 bits by 0.6%."""
    kernel = normal(4096, 32)

    def miss(kind: str) -> float:
        found = dequantize(quantize(kernel, kind, 64), jnp.float32)
        return float(np.sqrt(np.square(found - kernel).mean() / np.square(kernel).mean()))

    assert 0.085 < miss("nf4") < 0.095 < miss("int4") < 0.105
    assert miss("int8") < 0.0065


def test_blocks_divide() -> None:
    assert [quantised.block_of(n, 64, "nf4") for n in (4096, 576, 96, 11008, 2 * 61)] == [64, 64, 48, 64, 2]
    assert quantised.block_of(4096, 0, "int4") == 4096
    assert quantised.block_of(4096, -1, "int8") == 4096
    assert quantised.block_of(61, 64, "nf4") == 0


# ---- gradients ----


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_the_gradient_is_that_of_float64(kind: str) -> None:
    packed, x, dy = quantize(normal(64, 48), kind, 16), normal(3, 5, 64, seed=1), normal(3, 5, 48, seed=2)
    axes = ("embed", "mlp")
    y, pull = jax.vjp(lambda x: quantised.matmul(x, packed, axes, layers.unconstrained), x)
    kernel = np.asarray(dequantize(packed, jnp.float32), np.float64)
    np.testing.assert_allclose(y, x.astype(np.float64) @ kernel, atol=1e-5)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dy.astype(np.float64) @ kernel.T, atol=1e-5)


# ---- whole models ----


def config_of(kind: str, mesh: dict[str, int], **changes: Any) -> ConfigDict:
    config = config_lib.base()
    config.model.quantize, config.model.quantize_block = kind, 8
    config.tune.rank, config.tune.dropout, config.train.batch_size, config.data.max_length = 3, 0.0, 8, 16
    config.tune.targets = r"layers\..*"
    config.mesh.update({"fsdp": 1} | mesh)
    config.update_from_flattened_dict(changes)
    return config


def program_of(case: dict[str, Any], config: ConfigDict) -> state.Program:
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    return state.abstract(
        config, case, sharding.make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))]), 1
    )


def values_of(program: state.Program) -> dict[str, Any]:
    """Random values of every parameter, on their shards; quantised kernels from random ones."""
    base = program.quantised
    plain = {p: v for p, v in {**program.base, **program.adapter}.items() if quantised.kernel_of(p) is None}
    near_one = ("scale", "magnitude")
    made: dict[str, Any] = {
        p: normal(*v.shape, seed=zlib.crc32(p.encode())) + np.float32(p.endswith(near_one)) for p, v in plain.items()
    }
    for path, like in base.kernels.items() if base else ():
        packed = quantize(normal(*like.shape, seed=zlib.crc32(path.encode())), base.options.kind, 8)
        made |= quantised.spread(path, packed)
    like = {**program.base, **program.adapter}
    return {p: jax.device_put(v, like[p].sharding) for p, v in made.items()}


TOKENS = np.random.default_rng(1).integers(0, 96, (8, 16)).astype(np.int32)
ONES = np.ones((8, 16), np.int32)
POSITIONS = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))


def value_and_gradients(case: dict[str, Any], config: ConfigDict, **run_changes: Any) -> tuple[np.ndarray, Any]:
    """Hidden states, and the gradient of a sum of theirs for all that trains."""
    program = program_of(case, config)
    params, graphdef = values_of(program), program.graphdef
    if run_changes:
        graphdef, _ = state._shapes(
            program.family,
            program.model_config,
            program.run._replace(**run_changes),
            program.lora,
            quantised.Options.from_config(config.model),
        )
    trained = {p: params[p] for p in program.state.params}

    def total(trained: Any, params: Any) -> Any:
        model = layers.bind(graphdef, {**params, **trained})
        hidden = model(TOKENS, POSITIONS, ONES)[0]
        return jnp.sum(jnp.sin(hidden)), hidden

    (_, hidden), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(trained, params)
    return np.asarray(hidden), {p: np.asarray(g) for p, g in grads.items()}


MIXED = {"fsdp": 2, "tensor": 2, "data": 2}
MESHES: dict[str, tuple[str, dict[str, Any], list[dict[str, int]]]] = {
    "llama": ("nf4", {"tune.use_dora": True}, [{"fsdp": 8}, MIXED]),
    "mixtral": ("int4", {}, [{"expert": 2, "fsdp": 2, "tensor": 2}]),
    "gpt_oss": ("int8", {}, [{"expert": 4, "tensor": 2}]),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_changes_nothing(case: str) -> None:
    """Nor does rematerialisation, nor a scan: values, and gradients of adapters on all layers, experts and routers too."""
    kind, changes, meshes = MESHES[case]
    hidden, grads = value_and_gradients(CASES[case], config_of(kind, {}, **changes))
    assert all(np.abs(g).max() > 1e-4 for p, g in grads.items() if "lora" in p)
    others: list[tuple[dict[str, int], dict[str, Any]]] = [(mesh, {}) for mesh in meshes]
    others += [({}, {"remat": "none"}), ({}, {"scan": False})] if case == "llama" else []
    for mesh, run_changes in others:
        spread, spread_grads = value_and_gradients(CASES[case], config_of(kind, mesh, **changes), **run_changes)
        # Experts' weights as large as these make 2e-5 of rounding 1e-4 before anything is quantised.
        np.testing.assert_allclose(spread, hidden, atol=2e-5 if case == "llama" else 3e-4)
        for path, value in grads.items():
            size = np.abs(value).max() + 1e-6
            np.testing.assert_allclose(
                spread_grads[path] / size,
                value / size,
                atol=1e-4 if case == "llama" else 1e-3,
                err_msg=f"{path}, {mesh} {run_changes}",
            )


def test_a_quantised_model_is_the_dequantised_one() -> None:
    """The same model over plain kernels that hold what codes stand for: the same hidden states and gradients."""
    changes = {"tune.use_dora": True}
    config, plain = config_of("nf4", {}, **changes), config_of("", {}, **changes)
    for case in ("llama", "mixtral"):
        quantized, whole = program_of(CASES[case], config), program_of(CASES[case], plain)
        params = values_of(quantized)
        assert quantized.quantised is not None
        assert set(quantized.quantised.kernels) == {
            p for p in whole.base if p.startswith("layers.") and p.endswith(".kernel") and "router" not in p
        }
        assert state.num_base_params(quantized) == state.num_params(whole.base)
        merged = start._Merged(quantized._replace(adapter={}), params)

        def hidden(graphdef: Any, params: Any) -> Any:
            return layers.bind(graphdef, params)(TOKENS, POSITIONS, ONES)[0]

        run_it = jax.jit(hidden, static_argnums=0)
        dequantised = {**{p: params[p] for p in whole.adapter}, **merged}
        ours = run_it(quantized.inference, params)
        np.testing.assert_allclose(ours, run_it(whole.inference, dequantised), atol=1e-5)
        folded = dict(start.merged(quantized, {}, params))
        bare = state._shapes(whole.family, whole.model_config, whole.run, None, None)[0]
        np.testing.assert_allclose(ours, run_it(bare, folded), atol=2e-4)


# ---- memory and traffic ----


def compiled_text(kind: str, mesh: dict[str, int], num_layers: int = 3, **changes: Any) -> tuple[state.Program, str]:
    """The optimised program of a training step, whose layers' dims occur nowhere else."""
    case = CASES["llama"] | {"num_hidden_layers": num_layers, "hidden_size": 64, "intermediate_size": 112}
    config = config_of(kind, mesh, **changes)
    program = program_of(case, config)
    lowered = step.make(config, program).lower(program.state, program.frozen, step.abstract_batch(config, program))
    return program, lowered.compile().as_text()


def gathered(text: str) -> set[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text)
    return {(kind, tuple(size for size in map(int, dims.split(",")) if size > 1)) for kind, dims in found}


@pytest.mark.parametrize(("kind", "dtype", "rows"), [("nf4", "u8", 32), ("int8", "s8", 64)])
def test_devices_hand_each_other_codes(kind: str, dtype: str, rows: int) -> None:
    _, text = compiled_text(kind, {"fsdp": 8})
    found = gathered(text)
    assert (dtype, (rows, 112)) in found
    assert (dtype, (rows * 112 // 64, 64)) in found
    assert not {(name, size) for name, size in found if name[0] in "bf" and set(size) == {64, 112}}


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_stack_is_never_dequantised_whole(remat: str) -> None:
    """Not before the scan, nor for the backward pass after it: no float array of the program has all layers' weights."""
    program, text = compiled_text("nf4", {}, **{"train.remat": remat})
    kernel = next(like for path, like in program.quantised.kernels.items() if path.endswith("up_proj.kernel"))
    assert kernel.shape == (3, 64, 112)
    assert "u8[3,32,112]" in text
    assert "f32[64,112]" in text
    assert "f32[3,64,112]" not in text
    assert "f32[3,8,2,4,112]" not in text


# ---- loading ----


def loaded(config: ConfigDict, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[state.Program, Any, list[int]]:
    model = source.find(config)
    program, _ = start.program(config, model)
    sizes: list[int] = []
    put = pack.put

    def seen(*given: Any) -> Any:
        tensor = given[4]
        sizes.append(sum(a.shape == tensor.shape and a.dtype == tensor.dtype for a in jax.live_arrays()))
        return put(*given)

    if monkeypatch:
        monkeypatch.setattr(pack, "put", seen)
    base = hf.load(model.tensors, program.family, program.model_config, program.base, None, False, program.quantised)
    return program, base, sizes


def test_weights_are_quantised_as_they_come(tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor alone is ever whole; the codes are those of the whole weights, wherever they lie."""
    _, whole, _ = loaded(tiny_config)
    arrays = {path: np.asarray(array) for path, array in whole.items()}
    del whole
    tiny_config.model.quantize = "nf4"
    for mesh in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        tiny_config.mesh.update(mesh)
        program, base, sizes = loaded(tiny_config, monkeypatch)
        assert set(sizes) == {1}
        assert base.keys() == program.base.keys()
        for path, like in program.base.items():
            assert base[path].shape == like.shape
            assert base[path].dtype == like.dtype
            assert base[path].sharding.is_equivalent_to(like.sharding, len(like.shape))
        for path in program.quantised.kernels:
            block = quantised.block_of(arrays[path].shape[-2], 64, "nf4")
            expected = quantised.spread(path, quantize(arrays[path], "nf4", block))
            for leaf, array in expected.items():
                np.testing.assert_array_equal(base[leaf], array, err_msg=leaf)
        plain = {path for path in base if quantised.kernel_of(path) is None}
        assert plain == arrays.keys() - program.quantised.kernels.keys()
        assert all(np.array_equal(base[path], arrays[path]) for path in plain)


def test_a_preset_is_random_in_codes() -> None:
    config = config_of("nf4", {"fsdp": 2})
    program = program_of(CASES["mixtral"], config)
    made = random_weights.random_base(program, 0)
    assert made.keys() == program.base.keys()
    kernel = "layers.mlp.experts.down_proj.kernel"
    found = dequantize(program.quantised.packed(made, kernel), jnp.float32)
    assert found.shape == program.quantised.kernels[kernel].shape
    assert 0.018 < np.std(found) < 0.022
    assert not np.array_equal(found[0], found[1])


# ---- runs ----


def test_dora_begins_where_the_base_is(tiny_config: ConfigDict) -> None:
    tiny_config.model.quantize, tiny_config.tune.use_dora, tiny_config.mesh.fsdp = "int4", True, 8
    model = source.find(tiny_config)
    program, values = start.program(tiny_config, model)
    first, frozen = start.load(tiny_config, model, program, values, None)
    linear = "layers.mlp.down_proj"
    packed = program.quantised.packed(frozen, f"{linear}.kernel")
    norms = np.linalg.norm(np.asarray(dequantize(packed, jnp.float32), np.float64), axis=-2)
    np.testing.assert_allclose(first.params[f"{linear}.adapter.magnitude"], norms, rtol=1e-5)


def test_a_run_resumes_to_the_bit(tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in 4 bits, measures and generates; stopped and resumed on another mesh's restart it gives the same adapter."""
    import json
    import shutil

    config = tiny_config
    config.model.quantize, config.checkpoint.every_steps, config.data.validation_fraction = "nf4", 3, 0.0
    config.eval.metric, config.data.test_fraction, config.eval.limit = "exact_match", 0.1, 2
    config.generate.max_new_tokens, config.eval.bootstrap_samples = 4, 20
    workdir = Path(config.workdir)
    run.train(config.copy_and_resolve_references(), workdir)
    files = ("adapter/adapter_model.safetensors", "predictions.jsonl")
    first = [(workdir / file).read_bytes() for file in files]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    shutil.rmtree(workdir / "checkpoints" / "6")
    config.checkpoint.resume = True
    run.train(config.copy_and_resolve_references(), workdir)
    assert [(workdir / file).read_bytes() for file in files] == first
    config.model.quantize = "int8"
    with pytest.raises(UserError, match=r"model\.quantize"):
        run.train(config, workdir)


# ---- refusals ----


def test_bad_input_is_refused() -> None:
    def refused(match: str, case: str = "llama", **changes: Any) -> None:
        changed = config_of("nf4", {"data": 1}, **changes)
        with pytest.raises(UserError, match=match):
            program_of(CASES[case], changed)

    refused(
        r"tune\.method='full' trains layers\..*model\.quantize='nf4'.*tune\.method='lora'", **{"tune.method": "full"}
    )
    refused(r"quantize_targets='lm_head' matches no linear layer of a block", **{"model.quantize_targets": "lm_head"})
    refused(
        r"mesh\.tensor=2 does not divide the 1 blocks of 48 inputs of layers\.mlp\.experts\.down_proj",
        "mixtral",
        **{"mesh.tensor": 2, "model.quantize_block": 0},
    )
    for key, value, match in (
        ("model.quantize", "int3", r"model\.quantize is 'int3'; expected one of '', 'int8', 'int4', 'nf4'"),
        ("model.quantize_block", -2, r"quantize_block is -2; expected at least -1"),
        ("model.quantize_targets", "(", r"quantize_targets has '\(', which is not a regular expression"),
    ):
        changed = config_of("nf4", {})
        changed.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=match):
            validate(changed)


def test_odd_inputs_are_refused_at_four_bits() -> None:
    from flax import nnx

    linear = layers.Linear(61, 8, ("embed", "mlp"), layers.Runtime(), nnx.Rngs(0))
    with pytest.raises(UserError, match=r"layers\.mlp has 61 inputs, which is odd.*'int8'"):
        quantised.attach({"layers.mlp": linear}, quantised.Options("nf4", 64, ".*"))
    quantised.attach({"layers.mlp": linear}, quantised.Options("int8", 64, ".*"))
    assert linear(jnp.ones((2, 61))).shape == (2, 8)
    assert lora.linears(linear)
