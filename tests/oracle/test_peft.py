"""PEFT adapters and Hugging Face folders, out and in: what jaxtune writes torch loads, what PEFT writes jaxtune loads."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, sharding
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.train import start
from jaxtune.train import step as step_lib
from jaxtune.weights import peft as peft_files

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    # PEFT 0.21 asks transformers 5.23 by an old name, and says what it stores beside the adapter of an output head.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TOLERANCE = 1e-4  # of float32 logits
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def some_tokens(vocab: int, rows: int = 2, length: int = 48) -> np.ndarray:
    return np.random.default_rng(5).integers(4, vocab, (rows, length))


def write_random_adapter(base: Any, folder: Path, **options: Any) -> Any:
    """Lets PEFT make an adapter whose every tensor is random, and save it; returns PEFT's model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(torch.empty_like(value).uniform_(0.6, 1.5))
            elif "lora_" in name:
                value.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


# ---- jaxtune -> torch ----

EXPORTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora_subset": {"tune.use_rslora": True, "tune.targets": r"layers\.attn\.(q|v)_proj|layers\.mlp\.down_proj"},
    "dora": {"tune.use_dora": True, "tune.rank": 3},
    "some_layers": {"tune.train_layers": (1,)},
    "some_layers_and_head": {"tune.train_layers": (0,), "tune.targets": r".*(q_proj|lm_head)"},
    "dora_rslora_head": {"tune.targets": r".*(proj|lm_head)", "tune.use_dora": True, "tune.use_rslora": True},
}


@pytest.mark.parametrize("changes", EXPORTS.values(), ids=EXPORTS)
def test_trained_adapter_loads_in_peft(
    tiny_config: ConfigDict,
    from_folder: Any,
    trained: Any,
    theirs: Any,
    apart: Any,
    same_tokenizer: Any,
    changes: dict[str, Any],
    request: Any,
) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    config = tiny_config
    config.update_from_flattened_dict(changes)
    config.data.validation_fraction = 0.0
    run.train(config, Path(config.workdir))
    folder, base = Path(config.workdir) / "adapter", from_folder(Path(config.model.source))
    mine = trained(config)
    tokens = some_tokens(mine.program.model_config.vocab_size)
    untuned = theirs(base, tokens)
    model = PeftModel.from_pretrained(base, folder).eval()
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == config.model.source
    logits = mine.logits(tokens)
    assert np.abs(logits - untuned).max() > 100 * TOLERANCE, "training moved nothing: the comparison would be empty"
    assert apart(logits, theirs(model, tokens), request.node.callspec.id) <= TOLERANCE
    same_tokenizer(AutoTokenizer.from_pretrained(folder), Tokenizer.load(config.model.source))


# ---- PEFT -> jaxtune -> PEFT ----

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ALL_LINEAR},
    "two_modules": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 2, "mlp.up_proj": 6},
        "alpha_pattern": {"q_proj": 3, "down_proj": 20},
    },
    "rslora": {"r": 9, "lora_alpha": 5, "target_modules": ["k_proj", "gate_proj"], "use_rslora": True},
    "rslora_patterns": {
        "r": 4, "lora_alpha": 5, "target_modules": ["k_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 9},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "use_dora": True},
    "dora_rslora_patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True,
        "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3},
    },
    "all_linear_regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "lm_head"]},
    "some_layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_adapter_goes_in_and_out(
    tiny_model: Path, from_folder: Any, config_of: Any, ours: Any, theirs: Any, apart: Any, tmp_path: Path, options: dict[str, Any],
    request: Any,
) -> None:  # fmt: skip
    from peft import PeftModel
    from safetensors.numpy import load_file

    model = write_random_adapter(from_folder(tiny_model), tmp_path / "made", **options)
    mine = ours(config_of(tiny_model, {"tune.adapter": str(tmp_path / "made")}))
    tokens = some_tokens(mine.program.model_config.vocab_size)
    expected = theirs(model, tokens)
    assert apart(mine.logits(tokens), expected, request.node.callspec.id) <= TOLERANCE
    mine.config.workdir = str(tmp_path / "run")
    folder = start.write_result(
        mine.config, Path(mine.config.workdir), mine.model, None, mine.program, mine.state.params, mine.frozen
    )
    made, written = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "made", folder))
    made.pop("base_model.model.lm_head.base_layer.weight", None)  # PEFT's copy of the frozen head: not the adapter's
    assert made.keys() == written.keys()
    assert all(np.array_equal(made[name], written[name]) and made[name].dtype == written[name].dtype for name in made)
    again = PeftModel.from_pretrained(from_folder(tiny_model), folder).eval()
    assert np.array_equal(theirs(again, tokens), expected)


@pytest.mark.parametrize("name", ["patterns", "dora_rslora_patterns"])
def test_peft_merges_what_jaxtune_merges(
    tiny_model: Path, from_folder: Any, config_of: Any, ours: Any, tmp_path: Path, name: str
) -> None:
    model = write_random_adapter(from_folder(tiny_model), tmp_path / "made", **ADAPTERS[name])
    mine = ours(config_of(tiny_model, {"tune.adapter": str(tmp_path / "made"), "export.merge": True}))
    mine.config.workdir = str(tmp_path / "run")
    folder = start.write_result(
        mine.config, Path(mine.config.workdir), mine.model, None, mine.program, mine.state.params, mine.frozen
    )
    expected, merged = model.merge_and_unload().state_dict(), from_folder(folder).state_dict()
    assert expected.keys() == merged.keys()
    for key, value in expected.items():
        assert np.abs(value.numpy() - merged[key].numpy()).max() <= 1e-5 * np.abs(value.numpy()).max(), key


@pytest.mark.parametrize("name", ["plain", "rslora_patterns", "dora"])
def test_gradients_of_a_peft_adapter_agree(
    tiny_model: Path, from_folder: Any, config_of: Any, ours: Any, tmp_path: Path, name: str
) -> None:
    """One SGD step at learning rate 1 subtracts the gradient: of A, B and DoRA's magnitude, as autograd has it."""
    import torch

    model = write_random_adapter(from_folder(tiny_model), tmp_path / "made", **ADAPTERS[name])
    changes = {
        "tune.adapter": str(tmp_path / "made"), "optim.name": "sgd", "optim.learning_rate": 1.0, "train.steps": 1,
        "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.clip_norm": 0.0, "data.max_length": 48,
    }  # fmt: skip
    mine = ours(config_of(tiny_model, changes))
    tokens = some_tokens(mine.program.model_config.vocab_size, 8, 49).astype(np.int32)
    ones = np.ones((8, 48), np.int32)
    batch = {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": ones.astype(np.float32),
        "segment_ids_BT": ones, "positions_BT": np.broadcast_to(np.arange(48, dtype=np.int32), (8, 48)),
    }  # fmt: skip
    before = {path: np.asarray(value) for path, value in mine.state.params.items()}
    arrays = sharding.to_global(batch, mine.program.mesh, 8)
    state, _ = step_lib.make(mine.config, mine.program)(mine.state, mine.frozen, arrays)
    moved = {path: jnp.asarray(before[path] - np.asarray(value)) for path, value in state.params.items()}
    program = mine.program
    peft_files.save(tmp_path / "moved", program.family, program.model_config, moved, program.lora, "")
    from safetensors.numpy import load_file

    gradients = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    for parameter_name, value in model.named_parameters():
        value.requires_grad_("lora_" in parameter_name)
    ids = torch.as_tensor(tokens, dtype=torch.long)
    logits = model(input_ids=ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {
        key.replace(".default", "").removesuffix(".weight"): value.grad.numpy()
        for key, value in model.named_parameters() if value.grad is not None
    }  # fmt: skip
    gradients = {key.removesuffix(".weight"): value for key, value in gradients.items()}
    assert gradients.keys() == expected.keys()
    worst = max(np.abs(gradients[key] - value).max() / np.abs(value).max() for key, value in expected.items())
    print(f"{name}: worst relative gradient Δ {worst:.2e}")
    assert worst <= 1e-3


# ---- whole models ----


# A tied head is not tuned alone: jaxtune refuses what would train the embedding too.
@pytest.mark.parametrize(
    ("method", "tied"),
    [("lora", False), ("lora", True), ("dora", True), ("full", False), ("full", True), ("head", False)],
)
def test_merged_and_full_models_load_in_transformers(
    tiny_config: ConfigDict, make_model: Callable[..., Path], tmp_path: Path, from_folder: Any, trained: Any, theirs: Any, apart: Any, same_tokenizer: Any, method: str, tied: bool,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    config = tiny_config
    config.model.source = str(make_model(tmp_path / "base", tie_word_embeddings=tied))
    config.tune.method, config.tune.use_dora = "lora" if method == "dora" else method, method == "dora"
    config.tune.targets = r"layers\..*" if tied else r".*(proj|lm_head)"
    config.export.merge, config.data.validation_fraction = True, 0.0
    run.train(config, Path(config.workdir))
    folder, mine = Path(config.workdir) / "model", trained(config)
    model = from_folder(folder)
    assert model.config.tie_word_embeddings == tied
    tokens = some_tokens(mine.program.model_config.vocab_size)
    logits, untuned = mine.logits(tokens), theirs(from_folder(tmp_path / "base"), tokens)
    assert np.abs(logits - untuned).max() > 100 * TOLERANCE
    assert apart(logits, theirs(model, tokens), f"{method}, {'tied' if tied else 'untied'}") <= TOLERANCE
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 3
    same_tokenizer(AutoTokenizer.from_pretrained(folder), Tokenizer.load(tmp_path / "base"))


# ---- initial values ----


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_initial_values_follow_pefts_distribution(
    tiny_model: Path, from_folder: Any, config_of: Any, ours: Any, use_dora: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from scipy.stats import ks_2samp

    torch.manual_seed(0)
    options = {"r": 32, "lora_alpha": 8, "target_modules": ALL_LINEAR, "use_dora": use_dora}
    peft_model = get_peft_model(from_folder(tiny_model), LoraConfig(task_type="CAUSAL_LM", **options))
    expected = {name: value.detach().numpy() for name, value in peft_model.named_parameters() if "lora_" in name}
    mine = ours(config_of(tiny_model, {"tune.rank": 32, "tune.use_dora": use_dora}))
    for path, array in mine.state.params.items():
        linear, kind = path.rsplit(".", 1)
        values, module = np.asarray(array), f".{linear.split('.')[2]}."
        like = [
            value
            for name, value in expected.items()
            if module in name and f"{kind.replace('_a', '_A').replace('_b', '_B')}" in name
        ]
        assert len(like) == values.shape[0], path
        if kind == "lora_a":
            bound = 1 / math.sqrt(values.shape[1])
            for sample in (values, np.stack(like)):
                assert 0.99 * bound < np.abs(sample).max() <= bound
            assert ks_2samp(values.ravel(), np.stack(like).ravel()).pvalue > 1e-3
            assert not np.array_equal(values[0], values[1]), "layers start alike"
        elif kind == "lora_b":
            assert not values.any()
            assert not np.stack(like).any()
        else:
            np.testing.assert_allclose(values, np.stack(like), rtol=1e-5)
