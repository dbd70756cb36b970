"""The verb `merge`: what is written is what the formula says, shares are measured, and what does not add up is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import launch, merge, validation
from jaxtune.adapters import arithmetic, lora
from jaxtune.models import llama, naming
from jaxtune.types import UserError
from jaxtune.validation_merging import MERGES
from jaxtune.weights import hf, merging, peft, peft_read

QV = r"layers\.attn\.(q|v)_proj"


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    source = hf.Folder(folder)
    return {name: source.read(name) for name in source.names()}


@pytest.fixture
def make_adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT folder of random factors; a DoRA's magnitudes are those of the weights times 1.2."""
    parsed = llama.from_hf(hf.read_config(tiny_model))
    kernels = hf.Folder(tiny_model)

    def make(name: str, linears: tuple[str, ...] = ("attn.q_proj", "mlp.up_proj"), seed: int = 0, base: str = "tiny", **options: Any) -> Path:  # fmt: skip
        rng, arrays = np.random.default_rng(seed), {}
        made = lora.Options("", **{"rank": 3, "alpha": 5.0, **options})
        names = naming.hf_names(llama.weights(parsed))
        for linear in linears:
            own = [n for n, (w, _) in names.items() if w.ours == f"layers.{linear}.kernel"]
            out_dim, in_dim = kernels.shape(own[0])
            path = f"layers.{linear}.adapter"
            arrays[f"{path}.lora_a"] = rng.normal(0, 0.2, (2, in_dim, made.rank)).astype(np.float32)
            arrays[f"{path}.lora_b"] = rng.normal(0, 0.2, (2, made.rank, out_dim)).astype(np.float32)
            if made.use_dora:
                norms = [np.linalg.norm(kernels.read(n), axis=1) for n in own]
                arrays[f"{path}.magnitude"] = np.stack(norms).astype(np.float32) * 1.2
        folder = tmp_path / name
        peft.save(folder, llama, parsed, {k: _Host(v) for k, v in arrays.items()}, made, base)
        return folder

    return make


class _Host(np.ndarray):
    """A host array where `peft.save` expects one of a device."""

    is_fully_addressable = True

    def __new__(cls, array: np.ndarray) -> _Host:
        return array.view(cls)


def updates(folder: Path, tiny_model: Path) -> dict[str, np.ndarray]:
    options, arrays = peft_read.load(folder, llama, llama.from_hf(hf.read_config(tiny_model)))
    part = merging.Part("", folder, options, arrays, None)
    return {linear: update.dense for linear, update in part.factors().items()}


def test_names_are_one_list() -> None:
    assert set(MERGES) == set(arithmetic.METHODS)


def test_cat_is_the_exact_sum_of_what_adapters_do(
    make_adapter: Any, tiny_model: Path, tiny_config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other ranks, alphas and scalings, and a linear that one of them leaves alone."""
    one = make_adapter("one")
    other = make_adapter("other", ("attn.q_proj",), seed=1, rank=4, alpha=3.0, use_rslora=True)
    tiny_config.merge.adapters, workdir = ((str(one), 0.5), (str(other), -2.0)), Path(tiny_config.workdir)
    merge.merge(tiny_config, workdir)
    first, second, merged = (updates(folder, tiny_model) for folder in (one, other, workdir / "adapter"))
    assert merged.keys() == first.keys()
    wanted = 0.5 * first["layers.attn.q_proj"] - 2.0 * second["layers.attn.q_proj"]
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(merged["layers.attn.q_proj"], wanted, atol=1e-6)
    np.testing.assert_allclose(merged["layers.mlp.up_proj"], 0.5 * first["layers.mlp.up_proj"], atol=1e-6)
    told = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (7, 7.0, False)
    assert "layers.mlp.up_proj is of 1 of the 2 alone" in capsys.readouterr().out


def test_adapters_of_some_layers_make_one_of_their_layers(
    make_adapter: Any, tiny_model: Path, tiny_config: ConfigDict
) -> None:
    first = make_adapter("first", ("attn.q_proj",), layers=(0,))
    tiny_config.merge.adapters, workdir = ((str(first), 2.0),), Path(tiny_config.workdir)
    merge.merge(tiny_config, workdir)
    told = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert told["layers_to_transform"] == [0]
    one, merged = (updates(folder, tiny_model)["layers.attn.q_proj"] for folder in (first, workdir / "adapter"))
    np.testing.assert_allclose(merged[0], 2.0 * one[0], atol=1e-6)
    assert not merged[1].any()


def test_nothing_that_only_training_asks_for_is_asked_of_a_merge(tiny_config: ConfigDict) -> None:
    """The config of a run that froze and held what it trained merges adapters of others."""
    tiny_config.tune.freeze, tiny_config.tune.train_layers = (r"embed\..*",), (1,)
    tiny_config.retain.penalties, tiny_config.merge.adapters = (("l2_start", 1.0),), (("a", 1.0),)
    settled = merge._settled(tiny_config)
    assert (settled.tune.freeze, settled.tune.train_layers, settled.retain.penalties) == ((), (), ())


def test_slerp_turns_one_update_into_the_other() -> None:
    rng = np.random.default_rng(0)
    pair = [arithmetic.Factors(rng.normal(size=(1, 6, 2)), rng.normal(size=(1, 2, 5)), s) for s in (0.5, 2.0)]
    first, second = (update.dense[0] for update in pair)
    options = arithmetic.Options("slerp")
    for t in (0.0, 0.3, 1.0):
        found = arithmetic.factors(pair, (1 - t, t), options, "w").dense[0]
        u, v = (x / np.linalg.norm(x) for x in (first, second))
        angle = np.arccos(np.sum(u * v))
        wanted = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        np.testing.assert_allclose(arithmetic.dense([first, second], (1 - t, t), options, "w"), wanted, atol=1e-12)
    assert arithmetic.turning(1.0, 2.0, 2.0, 0.25) == (0.75, 0.25)  # one direction: a straight line
    assert arithmetic.turning(0.0, 2.0, 0.0, 0.25) == (0.75, 0.25)
    half = arithmetic.turning(1.0, 1.0, 0.0, 0.5)
    assert np.hypot(*half) == pytest.approx(1.0)  # the arc, not the chord: the norm stays


def test_dare_keeps_the_expectation() -> None:
    """Of many draws the mean is the update itself; the seed and the weight's name alone decide a draw."""
    update, options = np.full((20, 20), 3.0), arithmetic.Options("dare_linear", density=0.2)
    draws = [arithmetic.dense([update], [1.0], options._replace(seed=s), "w") for s in range(50)]
    assert set(np.unique(draws)) == {0.0, 15.0}
    share = np.mean(np.asarray(draws) > 0)
    assert abs(share - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 20_000)  # four standard errors
    assert np.array_equal(draws[3], arithmetic.dense([update], [1.0], options._replace(seed=3), "w"))
    assert not np.array_equal(draws[0], arithmetic.dense([update], [1.0], options, "v"))


def test_whole_models_add_up_by_task_vectors(
    make_adapter: Any, make_model: Any, tiny_model: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    """A fully tuned model, and an adapter with DoRA, whose whole effect is taken."""
    tuned, base = make_model(tmp_path / "tuned", seed=7), weights_of(tiny_model)
    dora = make_adapter("dora", ("attn.q_proj",), use_dora=True)
    tiny_config.merge.adapters, workdir = ((str(tuned), 0.3), (str(dora), 0.5)), Path(tiny_config.workdir)
    merge.merge(tiny_config, workdir)
    found, theirs = weights_of(workdir / "model"), weights_of(tuned)
    name = "model.layers.1.self_attn.q_proj.weight"
    options, arrays = peft_read.load(dora, llama, llama.from_hf(hf.read_config(tiny_model)))
    factors = [arrays[f"layers.attn.q_proj.adapter.{kind}"][1] for kind in ("lora_a", "lora_b", "magnitude")]
    effective = np.asarray(
        lora.merged(jnp.asarray(base[name].T), *factors, scale=options.scale("layers.attn.q_proj"))
    ).T
    wanted = base[name] + 0.3 * (theirs[name] - base[name]) + 0.5 * (effective - base[name])
    np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    plain = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(found[plain], 0.7 * base[plain] + 0.3 * theirs[plain], atol=1e-6)
    assert json.loads((workdir / "model" / "config.json").read_text())["model_type"] == "llama"
    assert (workdir / "model" / "tokenizer.json").exists()


def test_shares_are_measured_and_the_best_that_breaks_nothing_is_written(
    make_adapter: Any, tiny_model: Path, tiny_config: ConfigDict, chats: Path, capsys: pytest.CaptureFixture[str],
    quick_compile: None,
) -> None:  # fmt: skip
    adapter = make_adapter("one")
    tiny_config.merge.adapters, tiny_config.merge.sweep = ((str(adapter), 1.0),), (0.0, 0.5, -1.0)
    tiny_config.data.test_fraction, tiny_config.eval.bootstrap_samples = 0.2, 50
    text = (("data.test", str(chats)), ("eval.metric", "perplexity"), ("eval.limit", 20), ("tolerance", 0.0))
    tiny_config.protect.sets = (("chats", text),)
    workdir = Path(tiny_config.workdir)
    merge.merge(tiny_config, workdir)
    told = json.loads((workdir / "merge.json").read_text())
    none, half, other = told["shares"]
    assert [one["share"] for one in told["shares"]] == [0.0, 0.5, -1.0]
    assert none["difference"]["perplexity"]["value"] == 0
    assert not none["protected"]["chats"]["broken"]
    assert none["base_kl"] == pytest.approx(0.0, abs=1e-6)
    assert half["base_kl"] > 0.001
    # What is measured is the adapter's own share: the same rows, by another run of it.
    assert half["after"]["perplexity"]["value"] != other["after"]["perplexity"]["value"]
    whole = [one for one in told["shares"] if not one["protected"]["chats"]["broken"]]
    best = min(whole, key=lambda one: one["after"]["perplexity"]["value"])
    assert told["share"] == best["share"]
    merged, first = updates(workdir / "adapter", tiny_model), updates(adapter, tiny_model)
    for linear, update in merged.items():
        np.testing.assert_allclose(update, best["share"] * first[linear], atol=1e-6)
    assert (workdir / "merge.png").read_bytes()[:4] == b"\x89PNG"
    assert "share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, make, tmp: None, "merge needs config.merge.adapters"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(tmp), 1.0),)}), "neither a PEFT adapter folder"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(make("a")), 1.0), (str(make("b", base="other")), 1.0))}), "'tiny' and .* on 'other'"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(make("a")), 1.0), (str(make("b", rank=2)), 1.0)), "method": "ties"}), r"ranks on layers\.\S+ are \[2, 3\].*'cat'"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(make("a")), 0.5), (str(make("b", ("attn.k_proj",))), 0.5)), "method": "slerp"}), "only one of the adapters changes"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(make("a", use_dora=True)), 1.0),)}), "DoRA.*export.merge=True"),
        (lambda c, make, tmp: (c.merge.update({"adapters": ((str(make("a", use_dora=True)), 1.0),), "method": "svd"}), c.export.update({"merge": True})), "merge of whole weights"),
        (lambda c, make, tmp: (c.merge.update({"adapters": ((str(make("a")), 1.0),)}), c.tune.update({"adapter": str(tmp / "a")})), "name it in merge.adapters"),
        (lambda c, make, tmp: c.merge.update({"adapters": ((str(make("a")), 1.0),), "sweep": (0.5,)}), "nothing to measure gain on"),
        (lambda c, make, tmp: (c.merge.update({"adapters": ((str(make("a")), 1.0),)}), c.export.update({"output": str(tmp / "a")})), "is what the run starts from"),
        (lambda c, make, tmp: (c.merge.update({"adapters": ((str(make("a")), 1.0),)}), (tmp / "a" / "adapter_model.safetensors").write_bytes(b"no")), "cannot be read"),
        (lambda c, make, tmp: c.merge.update({"method": "tie"}), "did you mean 'ties'"),
        (lambda c, make, tmp: c.merge.update({"density": 0.0}), "density is 0.0; expected above 0"),
        (lambda c, make, tmp: c.merge.update({"density": 1.5}), "density is 1.5; expected 0 to 1"),
        (lambda c, make, tmp: c.merge.update({"adapters": (("a", "b"),)}), r"expected \(URI, weight\)"),
        (lambda c, make, tmp: c.merge.update({"adapters": (("a", 0.0),)}), "no weight but 0"),
        (lambda c, make, tmp: c.merge.update({"adapters": (("a", 0.5), ("b", 1.0)), "method": "slerp"}), "expected two, 1 - t"),
        (lambda c, make, tmp: c.merge.update({"sweep": (0.5, 0.5)}), "each share once"),
        (lambda c, make, tmp: c.merge.update({"sweep": ("all",)}), "expected shares"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(
    change: Any, says: str, make_adapter: Any, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    change(tiny_config, make_adapter, tmp_path)
    with pytest.raises(UserError, match=says):  # noqa: PT012
        validation.validate(tiny_config)
        merge.merge(tiny_config, Path(tiny_config.workdir))
    assert not any((Path(tiny_config.workdir) / name).exists() for name in ("adapter", "model", "merge.json"))


def test_a_model_of_another_shape_is_refused(make_model: Any, tiny_config: ConfigDict, tmp_path: Path) -> None:
    other = make_model(tmp_path / "wide", intermediate_size=104)
    tiny_config.merge.adapters = ((str(other), 1.0),)
    with pytest.raises(UserError, match=r"(gate|up|down)_proj.* of shape .*104.*, and the base .*96"):
        merge.merge(tiny_config, Path(tiny_config.workdir))


def test_the_command_line_says_what_was_wrong(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(tiny_config))
    given = ["merge", f"--config={path}", f"--workdir={tmp_path / 'merged'}"]
    assert launch.main([*given, f"--config.merge.adapters=(('{tmp_path}/nowhere', 1.0),)"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert launch.main([*given, "--config.merge.adapters=a,b"]) == 2
    assert "expected (URI, weight)" in capsys.readouterr().err
    assert not (tmp_path / "merged" / "adapter").exists()
