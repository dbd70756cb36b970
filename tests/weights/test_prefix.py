"""Base models are stored with their prefix or without it; both are found, and heads of other tasks are left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.train import state
from jaxtune.types import UserError
from jaxtune.weights import hf
from tests.families import CASES, TASKS

pytestmark = pytest.mark.usefixtures("quick_compile")


def program_of(settings: dict[str, Any]) -> state.Program:
    config: ConfigDict = config_lib.base()
    config.tune.method = "full"
    return state.abstract(config, settings, sharding.make_mesh(config, jax.devices()[:1]), 1)


def folder_of(settings: dict[str, Any], folder: Path, rename: Any = lambda name: name) -> dict[str, np.ndarray]:
    """A folder of random weights under changed names; returns them by our paths."""
    program, rng = program_of(settings), np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in program.base.items()}
    arrays = {path: jax.numpy.asarray(value) for path, value in params.items()}
    hf.save(folder, settings, hf.tensors(program.family, program.model_config, arrays))
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors")
    return params


def loaded(settings: dict[str, Any], folder: Path, new_head: bool = False) -> dict[str, np.ndarray]:
    program = program_of(settings)
    arrays = hf.load(hf.Folder(folder), program.family, program.model_config, program.base, None, new_head)
    assert arrays.keys() == program.base.keys()
    return {path: np.asarray(value) for path, value in arrays.items()}


@pytest.mark.parametrize("case", ["gpt2", "bloom", "opt"])
def test_a_base_model_without_its_prefix(case: str, tmp_path: Path) -> None:
    prefix = {"opt": "model."}.get(case, "transformer.")
    params = folder_of(CASES[case], tmp_path, lambda name: name.removeprefix(prefix))
    for path, value in loaded(CASES[case], tmp_path).items():
        np.testing.assert_array_equal(value, params[path])


def test_a_bare_encoder_gets_a_head(tmp_path: Path) -> None:
    params = folder_of(TASKS["BertModel"], tmp_path)
    with pytest.raises(UserError, match=r"'classifier.weight' is missing"):
        loaded(TASKS["BertForSequenceClassification"], tmp_path)
    found = loaded(TASKS["BertForSequenceClassification"], tmp_path, new_head=True)
    for path, value in params.items():  # the pooler too: the classifier reads it
        np.testing.assert_array_equal(found[path], value)
    assert 0.01 < found["task_head.out.kernel"].std() < 0.03
    assert not found["task_head.out.bias"].any()


def test_another_tasks_head_is_left_behind(tmp_path: Path) -> None:
    params = folder_of(TASKS["RobertaForMaskedLM"], tmp_path)
    found = loaded(TASKS["RobertaForSequenceClassification"], tmp_path, new_head=True)
    for path, value in params.items():
        if not path.startswith("task_head."):
            np.testing.assert_array_equal(found[path], value)
    decoder = folder_of({**CASES["llama"], "architectures": ["LlamaForCausalLM"]}, tmp_path / "decoder")
    again = loaded(TASKS["LlamaForSequenceClassification"], tmp_path / "decoder", new_head=True)
    np.testing.assert_array_equal(again["layers.mlp.up_proj.kernel"], decoder["layers.mlp.up_proj.kernel"])
