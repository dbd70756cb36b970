"""Every file in configs/: loads, validates, and its step traces with the shapes it promises."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from jaxtune import config as config_lib
from jaxtune import config_methods, config_retention, config_review, launch, sharding, validation
from jaxtune.train import state, step
from jaxtune.weights.source import hf_preset, with_head

FILES = sorted((Path(__file__).parent.parent / "configs").rglob("*.py"))
FILES = [path for path in FILES if "def get_config" in path.read_text()]  # not what several of them share
SHAPES = {"SmolLM2-135M": "smollm2_135m", "minilm": "minilm_l6"}  # what a source names -> the preset of its shapes


def shapes(source: str) -> str:
    if source.startswith("preset:"):
        return source.removeprefix("preset:")
    return next(preset for name, preset in SHAPES.items() if name in source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_file(path: Path) -> None:
    config = launch._config_file([f"--config={path}"])
    validation.validate(config)
    assert config.is_locked
    if config.distill.teacher:
        config.distill.teacher = f"preset:{shapes(config.distill.teacher)}"
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    program = state.abstract(config, with_head(hf_preset(shapes(config.model.source)), config), mesh, 10)
    batch = step.abstract_batch(config, program)
    _, metrics = jax.eval_shape(step.make(config, program), program.state, program.frozen, batch)
    assert metrics["loss"].shape == ()
    trained, slots = state.num_params(program.state.params), jax.tree.leaves(program.state.opt_state)
    assert sum(leaf.size for leaf in slots) <= 2 * trained + 16  # Adam's two moments, for what trains and nothing else


def test_json_round_trip() -> None:
    config = config_lib.base()
    config.train.steps, config.data.columns, config.data.label_bins = 7, ("a", "b"), ((0.0, 1.0, "x"),)
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert again.is_locked


def test_every_field_is_in_base_with_a_comment_and_none_is_read_by_get() -> None:
    source = "".join(
        Path(m.__file__).read_text() for m in (config_lib, config_methods, config_retention, config_review)
    )
    for key in config_lib.keys(config_lib.base()):
        assert f".{key.split('.')[-1]} = " in source
    sections = "|".join(config_lib.base().keys())
    for path in Path(config_lib.__file__).parent.rglob("*.py"):
        assert not re.search(rf"config\.({sections})\.get\(", path.read_text()), path
