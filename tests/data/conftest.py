"""Tiny tokenizers and templates, written here: byte-level BPE over a few lines, and chats of four kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxtune.config import base
from jaxtune.data.tokenizer import Tokenizer

LINES = ["the cat sat on the mat", "a good film, a bad film", "user assistant system tool", "Hello, how are you?"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]

CHATML = (
    "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips contents, puts a space before the answer, ends only the assistant's turns: the shape of Llama 2.
STRIPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[Q] {{ m.content | trim }} [/Q]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} </s>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# BOS from the template, headers, white space after them: the shape of Llama 3.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# Treats the last turn differently and moves thinking about: the shape of Qwen 3.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{% set answer = m.content.split('</think>')[-1].strip() %}"
    "{% if loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}"
    "\n</think>\n\n{% endif %}{{ answer }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "stripping": STRIPPING, "headers": HEADERS, "thinking": THINKING}


def make_tokenizer(template: str | None, eos: str = "</s>", adds_bos: bool = False) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 3, trainer)
    # The usual byte-level post-processor trims spaces off the offsets: the tests must hold in spite of it.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    wrapped.chat_template = template
    return Tokenizer(wrapped)


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Tokenizer]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    eos = {"chatml": "<|im_end|>", "thinking": "<|im_end|>"}
    made = {name: make_tokenizer(t, eos.get(name, "</s>"), name == "headers") for name, t in TEMPLATES.items()}
    return made | {"plain": make_tokenizer(None), "plain_bos": make_tokenizer(None, adds_bos=True)}


@pytest.fixture
def chatml(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["chatml"]


@pytest.fixture
def data() -> ConfigDict:
    return base().data
