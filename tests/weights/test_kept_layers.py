"""Students of some of a model's layers: the layers are those that were named, and config.json says what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.types import UserError
from jaxtune.validation import validate
from jaxtune.weights import hf, kept_layers, source
from tests.families import CASES


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


def test_a_student_has_the_layers_and_is_exported_as_it_is(tiny_config: ConfigDict, deep: Path) -> None:
    """Its tensors are the base's, numbered anew; after a step with a rate of 0 the folder written holds the same."""
    tiny_config.model.source, tiny_config.model.keep_layers = str(deep), (1, 3)
    tiny_config.tune.method, tiny_config.optim.learning_rate, tiny_config.train.steps = "full", 0.0, 1
    student, whole = source.find(tiny_config), hf.Folder(deep)
    assert student.tensors is not None
    run.train(tiny_config, Path(tiny_config.workdir))
    written = hf.Folder(Path(tiny_config.workdir) / "model")
    assert written.hf_config["num_hidden_layers"] == student.hf_config["num_hidden_layers"] == 2
    assert written.names() == student.tensors.names()
    for name in written.names():
        base = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        np.testing.assert_array_equal(written.read(name), whole.read(base))


def test_lists_by_layer_are_cut() -> None:
    case = {**CASES["gemma3_text"], "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    made = kept_layers.config(case, (1, 2))
    assert made["layer_types"] == ["full_attention", "sliding_attention"]
    assert made["num_hidden_layers"] == 2
    assert kept_layers.config(CASES["gpt2"], (0, 2))["n_layer"] == 2


@pytest.mark.parametrize(
    ("case", "keep", "message"),
    [
        ({}, (0, 4), "has 4, and the model has 4 layers, 0 to 3"),
        ({}, (2, 1), "ascending, none twice"),
        ({}, (1, 1), "ascending, none twice"),
        ({}, (-1, 1), "ascending, none twice"),
        ({"method": "lora"}, (0, 1), "export.merge=True"),
    ],
)
def test_mistakes_are_told(
    tiny_config: ConfigDict, deep: Path, case: dict[str, Any], keep: tuple[int, ...], message: str
) -> None:
    tiny_config.model.source, tiny_config.model.keep_layers = str(deep), keep
    tiny_config.tune.method = case.get("method", "full")

    def asked() -> None:
        validate(tiny_config)
        source.find(tiny_config)

    with pytest.raises(UserError, match=message):
        asked()


def test_a_layer_that_would_become_another_is_refused() -> None:
    """Qwen 2's windows begin at a layer by number, which a student's config would say of another layer."""
    with pytest.raises(UserError, match=r"leaves layer \d where config.json would make it another"):
        kept_layers.config(CASES["qwen2"], (1, 2))
