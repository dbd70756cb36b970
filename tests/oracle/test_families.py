"""Every family against its reference in transformers: values, gradients, export, and adapters that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import layers, naming
from jaxtune.weights import hf, peft_read
from jaxtune.weights import peft as peft_files
from tests.families import CASES, VOCAB

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    # PEFT looks for its own patterns of ranks among modules only; they hold for parameters too.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*fan_in_fan_out:UserWarning"
    ),  # PEFT finds GPT-2's layout by itself, and says so
]

TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 24))


class Pair(NamedTuple):
    ours: Any
    torch: Any
    folder: Path


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ours: Any, config_of: Any) -> Pair:
    """A random model that transformers made and saved, biases and norms random too; jaxtune reads the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {k: v for k, v in CASES[request.param].items() if k != "model_type"}
    config = AutoConfig.for_model(CASES[request.param]["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():  # parameters, and buffers that are saved
            if value.is_floating_point():
                factor = "norm" in name or ".ln" in name or "scal" in name
                value.normal_(1.0 if factor else 0.0, 0.15)
    folder = tmp_path_factory.mktemp("family") / "model"
    model.save_pretrained(folder)
    changes = {"tune.targets": ".*(proj|router).*", "tune.rank": 3, "tune.alpha": 5.0}
    return Pair(ours(config_of(folder, changes)), model, folder)


def test_logits_and_gradients_agree(pair: Pair, apart: Any, request: pytest.FixtureRequest) -> None:
    import torch

    program, params = pair.ours.program, {p: v for p, v in pair.ours.params.items() if p in pair.ours.program.base}
    direction = np.random.default_rng(1).normal(size=(*TOKENS.shape, VOCAB)).astype(np.float32)
    where = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def ours(params: Any) -> Any:
        def total(params: Any) -> Any:
            model = layers.bind(program.inference, {**pair.ours.params, **params})
            logits = model.head(model(jnp.asarray(TOKENS), where, np.ones_like(TOKENS))[0])
            return jnp.mean(jax.nn.log_softmax(logits) * direction), logits

        (_, logits), grads = jax.value_and_grad(total, has_aux=True)(params)
        return logits, grads

    logits, grads = ours(params)
    expected = pair.torch(input_ids=torch.as_tensor(TOKENS)).logits
    worst = apart(np.asarray(logits), expected.detach().numpy(), request.node.callspec.id)
    assert worst <= TOLERANCE
    (torch.log_softmax(expected, -1) * torch.as_tensor(direction)).mean().backward()
    theirs = {name: value.grad for name, value in pair.torch.named_parameters() if value.grad is not None}
    # Gradients travel the way of the weights: put in their place, and saved by transformers under its names on disk.
    with torch.no_grad():
        for name, value in pair.torch.named_parameters():
            value.copy_(theirs.get(name, torch.zeros_like(value)))
    pair.torch.save_pretrained(pair.folder.parent / "gradients")
    saved = hf.Folder(pair.folder.parent / "gradients")
    pair.torch.load_state_dict(type(pair.torch).from_pretrained(pair.folder).state_dict())
    found = dict(hf.tensors(program.family, program.model_config, grads))
    off = {}
    for name, value in found.items():
        want = saved.read(name)
        scale = np.abs(want).max()
        ours_name = naming.hf_names(program.family.weights(program.model_config))[name][0].ours
        if "select" in ours_name or "residual_scale" in ours_name:
            continue  # the choice of experts has no gradient, a layer's fixed factor takes none
        off[name] = float(np.abs(value - want).max() / scale) if scale > 1e-9 else float(np.abs(value).max())
    bad = max(off, key=lambda name: off[name])
    print(f"{request.node.callspec.id}: worst relative gradient {off[bad]:.1e} in {bad}")
    assert off[bad] <= GRADIENT_TOLERANCE


def test_export_loads_in_transformers(pair: Pair, tmp_path: Path, from_folder: Any, theirs: Any, apart: Any) -> None:
    program = pair.ours.program
    base = {p: v for p, v in pair.ours.params.items() if p in program.base}
    hf.save(tmp_path / "out", program.hf_config, hf.tensors(program.family, program.model_config, base))
    before, after = hf.Folder(pair.folder), hf.Folder(tmp_path / "out")
    assert after.names() == [name for name in before.names() if name in after.names()]
    again = from_folder(tmp_path / "out")
    assert apart(pair.ours.logits(TOKENS), theirs(again, TOKENS), "exported") <= TOLERANCE


def test_adapter_on_all_linear_layers_loads_in_peft(
    pair: Pair, tmp_path: Path, from_folder: Any, theirs: Any, apart: Any
) -> None:
    from peft import PeftModel

    program, rng = pair.ours.program, np.random.default_rng(2)
    adapter = {p: jnp.asarray(rng.normal(0, 0.2, v.shape), jnp.float32) for p, v in program.adapter.items()}
    assert adapter
    peft_files.save(tmp_path / "adapter", program.family, program.model_config, adapter, program.lora, "")
    base = from_folder(pair.folder)
    plain = theirs(base, TOKENS)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = pair.ours.logits(TOKENS, params={**pair.ours.params, **adapter})
    assert np.abs(ours - plain).max() > 20 * TOLERANCE
    assert apart(ours, theirs(model, TOKENS), "with PEFT") <= TOLERANCE
    options, again = peft_read.load(tmp_path / "adapter", program.family, program.model_config)
    assert again.keys() == adapter.keys()
    assert all(np.array_equal(again[path], adapter[path]) for path in adapter)
    assert {path: options.scale(path) for path in again} == {path: program.lora.scale(path) for path in again}
