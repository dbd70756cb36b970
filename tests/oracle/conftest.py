"""The same model on both sides: in jaxtune, read as a run reads it, and in torch, as transformers reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import checkpoint
from jaxtune import config as config_lib
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models import layers
from jaxtune.train import start
from jaxtune.train.state import Params, Program, State
from jaxtune.weights import source

CHAT = [
    {"role": "user", "content": "who sat on the red mat?"},
    {"role": "assistant", "content": "the cat, 3 times – été"},
    {"role": "user", "content": "<|im_end|> fine"},
]


@dataclass(repr=False)
class Ours:
    """A model loaded by jaxtune. `params` are all of its parameters, frozen and trained."""

    config: ConfigDict
    model: source.Model
    program: Program
    state: State
    frozen: Params

    @property
    def params(self) -> Params:
        return {**self.frozen, **self.state.params}

    @cached_property
    def _run(self) -> Any:
        def logits(params: Params, *batch: jax.Array) -> jax.Array:
            model = layers.bind(self.program.inference, params)
            return model.head(model(*batch)[0])

        return jax.jit(logits)

    def logits(self, tokens: Any, positions: Any = None, segments: Any = None, params: Any = None) -> np.ndarray:
        """float32 logits (B, T, V); whole rows of one segment each unless told otherwise."""
        tokens_BT = np.asarray(tokens, np.int32)
        positions = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape) if positions is None else positions
        segments = np.ones_like(tokens_BT) if segments is None else segments
        arrays = (tokens_BT, np.asarray(positions, np.int32), np.asarray(segments, np.int32))
        return np.asarray(self._run(params or self.params, *arrays))


def load_ours(config: ConfigDict) -> Ours:
    model = source.find(config)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, lambda items, total, label: iter(items))
    return Ours(config, model, program, state, frozen)


@pytest.fixture(scope="session")
def ours() -> Callable[[ConfigDict], Ours]:
    """Loads the model that a config names."""
    return load_ours


@pytest.fixture(scope="session")
def trained() -> Callable[[ConfigDict], Ours]:
    """The model of a finished run as its own last checkpoint has it: nothing that was exported is read."""

    def load(config: ConfigDict) -> Ours:
        loaded = load_ours(config)
        with checkpoint.Checkpoints(config.workdir, config) as checkpoints:
            restored = checkpoints.restore(loaded.program.state, config.train.steps)
        loaded.state = restored.state
        return loaded

    return load


@pytest.fixture(scope="session")
def same_tokenizer() -> Callable[[Any, Tokenizer], None]:
    """Asserts that a tokenizer of transformers renders chats and encodes text exactly as ours."""

    def check(theirs: Any, ours: Tokenizer) -> None:
        rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert rendered == ours.render(CHAT, add_generation_prompt=True)
        for text in (rendered, "the cat  sat\n\n on mat 123 ", "naïve 東京 <|im_start|>x"):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.eos_token_id == ours.eos_id

    return check


@pytest.fixture(scope="session")
def config_of() -> Callable[..., ConfigDict]:
    """The base config of a model folder or file, float32, quiet, with fields changed: `config_of(path, {"tune.rank": 4})`."""

    def make(path: Path, changes: dict[str, Any] | None = None) -> ConfigDict:
        config = config_lib.base()
        config.model.source, config.tune.dropout, config.data.max_length = str(path), 0.0, 32
        config.tracking.progress, config.tracking.report, config.eval.before_after = "off", False, False
        for key, value in (changes or {}).items():
            config.update_from_flattened_dict({key: value})
        return config

    return make


@pytest.fixture(scope="session")
def theirs() -> Callable[..., np.ndarray]:
    """The logits of a torch model, as NumPy."""
    import torch

    def logits(model: Any, tokens: Any, **more: Any) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.as_tensor(np.asarray(tokens), dtype=torch.long), **more).logits.float().numpy()

    return logits


@pytest.fixture(scope="session")
def apart() -> Callable[[np.ndarray, np.ndarray, str], float]:
    """The largest difference of two arrays, printed too (`pytest -s`)."""

    def measure(ours: np.ndarray, theirs: np.ndarray, what: str) -> float:
        assert ours.shape == theirs.shape
        worst = float(np.abs(ours - theirs).max())
        print(f"{what}: max |Δ| {worst:.2e} of {np.abs(theirs).max():.1f}")
        return worst

    return measure


@pytest.fixture(scope="session")
def from_folder() -> Callable[[Path], Any]:
    """A float32 causal model of transformers, from a folder that must fit its config to the last weight."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # tiny matrices: threads that wait for each other cost more than they bring

    def load(folder: Path) -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), f"{folder} does not fit its config: {info}"
        return model.eval()

    return load


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_gguf: Path) -> Any:
    """The real SmolLM2 as transformers reads the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="session")
def smollm2_ours(smollm2_gguf: Path, config_of: Any) -> Ours:
    """The real SmolLM2 as jaxtune reads it; its new adapter (B = 0) does nothing."""
    return load_ours(config_of(smollm2_gguf, {"tune.rank": 1}))
