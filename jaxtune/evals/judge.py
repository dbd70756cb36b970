"""A reward model that was trained before, as a function of texts: a reward, a judge of two answers, a filter of data.

score = judge.load("runs/reward/adapter", config)
scores = score([("How do I reset it?", "Hold the button for ten seconds."), …])      # float32, one each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxtune import fetch
from jaxtune.config import ConfigDict, base
from jaxtune.data import pipeline, templates
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import likelihood
from jaxtune.models import reading
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import peft_read, source

Score = Callable[[Sequence[tuple[str, str]]], np.ndarray]


def load(uri: str, config: ConfigDict, tokenizer: Tokenizer | None = None) -> Score:
    """Returns `score(pairs of prompt and answer) -> (M,) float32`, higher is better.

    Args:
      uri: a model folder whose head has one label, or an adapter folder of one (its base is what the folder names).
      config: of the run that asks: its dtypes, `data.chat`, `data.max_length` and `eval.batch_size` hold.
      tokenizer: of a model whose very tokens are to be scored; None where texts go from one to the other.

    Raises:
      UserError: it is no reward model, or has another vocabulary than `tokenizer`.
    """
    own = _config(uri, config)
    model = source.find(own)
    if reading.task(model.hf_config) != "ForSequenceClassification" or reading.num_labels(model.hf_config) != 1:
        raise UserError(
            f"{uri} is no reward model: architectures={model.hf_config.get('architectures')} with "
            f"{reading.num_labels(model.hf_config)} labels; expected a head of one score (train.objective='reward')"
        )
    mine = source.find_tokenizer(own, model)
    if tokenizer is not None:
        source.check_same_tokens(mine, tokenizer, f"the reward model {uri}")
    program, values = start.program(own, model)
    state, frozen = start.load(own, model, program, values, pipeline.silent)  # type: ignore[arg-type]
    pool, options = program.model_config.head.pool, (mine.pad_id, config.eval.batch_size, pipeline.silent, "judging")
    read = likelihood.head_scorer(program.inference, {**frozen, **state.params}, pool == "mean", *options)

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        texts = [_tokens(prompt, answer, mine, own) for prompt, answer in pairs]
        at = [[len(text) - 1 if pool == "last" else 0] for text in texts]
        return np.asarray([one[0, 0] for one in read(texts, at)], np.float32)

    return score


def _config(uri: str, config: ConfigDict) -> ConfigDict:
    own, folder = base(), fetch.local(uri)
    own.model.source, own.model.head, own.train.objective = uri, "", "reward"
    if (folder / "adapter_config.json").is_file():
        adapter, _ = peft_read.read_config(folder)
        own.model.source, own.model.head, own.tune.adapter = (
            str(adapter.get("base_model_name_or_path")),
            "sequence",
            uri,
        )
        own.model.tokenizer = uri if (folder / "tokenizer.json").is_file() else ""
    for name in ("param_dtype", "compute_dtype", "attention"):
        own.model[name] = config.model[name]
    own.data.max_length, own.data.chat = config.data.max_length, config.data.chat
    own.preference.share_prompts = "never"
    own.mesh = config.mesh
    own.train.batch_size = config.train.batch_size
    return own


def _tokens(prompt: str, answer: str, tokenizer: Tokenizer, config: ConfigDict) -> list[int]:
    """What `data/preferences.py` gives a reward model of this prompt and answer: cut from the left where it is too long."""
    if config.data.chat:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        example = Example("", turns, answer=answer)
    else:
        example = Example("", prompt=prompt, answer=answer)
    encoded = templates.encode(example, tokenizer, config.data)
    if not encoded.weights.any():
        raise UserError(f"the answer to {prompt!r:.60} is empty: there is nothing to score")
    end = len(encoded.weights) - int(np.argmax(encoded.weights[::-1] != 0))
    return encoded.tokens[:end].tolist()[-config.data.max_length :]
