"""From a found model to a program and its arrays; and from trained arrays to the folder that users take away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import registry, sharding
from jaxtune.adapters import kinds, lora, prompt
from jaxtune.config import ConfigDict
from jaxtune.data import pairs, readers
from jaxtune.data.masking import Masking
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models import FAMILIES, flash, quantised, reading, splash
from jaxtune.train import beside as beside_lib
from jaxtune.train import guests, layout, preferences, random_weights, retention, step
from jaxtune.train import state as state_lib
from jaxtune.train.state import Params, Program, State
from jaxtune.types import UserError
from jaxtune.validation_methods import ON_POLICY
from jaxtune.weights import embedder, hf, peft, peft_prompt, peft_read, source
from jaxtune.weights.source import Model

Adapter = Mapping[str, np.ndarray]


def program(config: ConfigDict, model: Model) -> tuple[Program, Adapter | None]:
    """The training program on this machine's devices, and the starting adapter's values if there is one."""
    check_head(config, model)
    options, values = adapter(config, model)
    return layout.program(config, model.hf_config, None, options, model.pooling), values


# Objectives that train what stands on a model for one task: (that task, what makes it).
HEADS = {
    "mlm": ("ForMaskedLM", "model.head='lm' on an encoder"),
    "classify": ("ForSequenceClassification", "model.head='sequence'"),
    "token_classify": ("ForTokenClassification", "model.head='token'"),
    "reward": ("ForSequenceClassification", "model.head='sequence'"),
}


def check_head(config: ConfigDict, model: Model) -> None:
    """Refuses an objective that the model has no head for, and a head that the objective does not train.

    Raises:
      UserError: with what goes together; also for an objective that is none.
    """
    objective = step.objective(config, model.hf_config)
    name, kind = config.train.objective, reading.task(model.hf_config)
    retention.check(config, name, objective.fields, kind)
    if config.tune.method == "prompt" and (
        name in (*HEADS, "contrastive") or reading.auto_class(model.hf_config) != "AutoModelForCausalLM"
    ):
        raise UserError(
            f"tune.method='prompt' puts virtual tokens before what a language model goes on with, and train.objective={name!r} "
            f"on a model with architectures={model.hf_config.get('architectures')} is none: use 'lora'"
        )
    if config.tune.method == "prompt" and "reference" in objective.frozen:
        raise UserError(
            f"train.objective={name!r} compares with the model without its adapter, and tune.method='prompt' puts tokens before each "
            "text that this model does not know: use 'lora'"
        )
    if HEADS[name][0] != kind if name in HEADS else kind in [task for task, _ in HEADS.values()]:
        together = ", ".join(f"{objective!r} with {head}" for objective, (_, head) in HEADS.items())
        raise UserError(
            f"train.objective={name!r} on a model with architectures={model.hf_config.get('architectures')}; what goes together: "
            f"{together}"
        )
    weights, labels = config.train.class_weights, source.labels(model) if config.train.class_weights else ()
    if len(weights) != len(labels):
        raise UserError(
            f"train.class_weights has {len(weights)} numbers; expected one for each label: {', '.join(labels)}"
        )
    if name == "reward" and reading.num_labels(model.hf_config) != 1:
        raise UserError(
            f"train.objective='reward' learns one score, and this model's head has {reading.num_labels(model.hf_config)} labels: set "
            "model.head='sequence' and model.labels=('reward',)"
        )


def reader(config: ConfigDict, model: Model, tokenizer: Tokenizer) -> readers.Reader:
    """How the objective reads an example, on this model.

    Raises:
      UserError: head and objective do not go together, or there is no token to mask with.
    """
    check_head(config, model)
    name, kind = config.train.objective, reading.task(model.hf_config)
    if kind == "Model" and name in ("sft", "distill", *preferences.READERS, *ON_POLICY):
        raise UserError(
            f"train.objective={name!r} on a model with architectures={model.hf_config.get('architectures')}, which gives hidden states "
            f"alone: set model.head='lm'"
        )
    if name in preferences.READERS:
        family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
        parsed = family.from_hf(model.hf_config)
        share = preferences.shares_prompts(config, parsed, jax.default_backend())
        pool = parsed.head.pool if parsed.head and name == "reward" else ""
        return readers.Reader(preferences.READERS[name], pool=pool, share=share, group=config.train.batch_size)
    if name == "mlm":
        return readers.Reader("masked", masking=_masking(config, tokenizer))
    if name == "token_classify":
        return readers.Reader("tags", source.labels(model))
    if name == "classify":
        family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
        kinds = dict(zip(reading.PROBLEMS, ("label", "labels", "number"), strict=True))
        pool = family.from_hf(model.hf_config).head.pool
        return readers.Reader(kinds[reading.problem(model.hf_config)], source.labels(model), pool)
    return readers.NEXT


def beside(config: ConfigDict, model: Model, tokenizer: Tokenizer) -> list[tuple[ConfigDict, readers.Reader]]:
    """Of each objective of `train.beside`, the config that says what its rows are, and how it reads them.

    Raises:
      UserError: as `reader`.
    """
    return [(one, reader(one, model, tokenizer)) for one in beside_lib.beside(config)]


def _masking(config: ConfigDict, tokenizer: Tokenizer) -> Masking:
    data = config.data
    if tokenizer.mask_id is None:
        raise UserError(
            "train.objective='mlm': the tokenizer has no mask token; use an encoder's own (model.tokenizer)"
        )
    shares = (data.mask_fraction, data.mask_token_share, data.mask_random_share)
    return Masking(tokenizer.mask_id, tokenizer.vocab_size, *shares, config.train.seed)


def adapter(config: ConfigDict, model: Model) -> tuple[kinds.Options | None, Adapter | None]:
    """The options and values of the adapter that `tune.adapter` names; None where there is none.

    A prompt that starts from a text has options of its own too: the text's tokens.
    """
    if config.tune.method == "prompt" and model.adapter is not None:
        return peft_prompt.load(model.adapter, config.tune.dtype)
    if config.tune.method == "prompt" and config.tune.virtual_init == "text":
        ids = source.find_tokenizer(config, model).encode(config.tune.virtual_text)
        return prompt.Options.from_config(config.tune, tuple(ids)), None
    if model.adapter is None:
        return None, None
    family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
    options, values = peft_read.load(model.adapter, family, family.from_hf(model.hf_config), config.tune.dtype)
    return options._replace(dropout=config.tune.dropout), values


def check_length(config: ConfigDict, program: Program) -> None:
    """Refuses training rows of a length that the model, or its attention kernel, cannot take.

    Raises:
      UserError: with the lengths.
    """
    max_length, max_positions = config.data.max_length, program.model_config.max_positions
    key = "max_length"
    if config.train.objective == "contrastive" and config.data.max_passage_length > max_length:
        key, max_length = "max_passage_length", config.data.max_passage_length
    if max_length > max_positions:
        raise UserError(
            f"data.{key}={max_length} exceeds the model's {max_positions} positions (max_position_embeddings): "
            f"lower it, or give the model's config.json a rope_scaling that reaches so far"
        )
    passages = {"max_passage_length": config.data.max_passage_length}
    rows = {"max_length": config.data.max_length}
    sharding.check_tokens(program.mesh, **rows | (passages if config.train.objective == "contrastive" else {}))
    kind, num_shards = config.model.attention, program.mesh.shape["context"]
    tile = {"splash": splash.TILE_TOKENS * num_shards, "flash": flash.TILE_TOKENS}.get(kind, 1)
    if max_length % tile:
        shards = f" times mesh.context={num_shards}" if kind == "splash" and num_shards > 1 else ""
        raise UserError(
            f"data.{key}={max_length} is no multiple of {tile}, the tile of model.attention={kind!r}{shards}: make it "
            f"{-(-max_length // tile) * tile}, or set model.attention='auto'"
        )
    for one in beside_lib.beside(config):
        check_length(one, program)


def check_export(config: ConfigDict, program: Program) -> None:
    """Refuses, before anything is trained, an adapter that could not be written.

    Raises:
      UserError: as `peft.check`, or a soft prompt is to be merged.
    """
    if program.prompt is not None and config.export.merge:
        raise UserError(
            "export.merge=True: virtual tokens stand in front of each text, and fold into no weight; set export.merge=False"
        )
    if program.lora is not None and not config.export.merge:
        linears = sorted({path.split(".adapter.")[0] for path in program.adapter})
        peft.check(program.family, program.model_config, linears, program.lora)


def load(
    config: ConfigDict, model: Model, program: Program, values: Adapter | None, progress: hf.Progress
) -> tuple[State, Params]:
    """Streams the weights onto the mesh (random ones for a preset); returns the first state and the frozen params."""
    if model.tensors is None:
        base = random_weights.random_base(program, config.train.seed)
    else:
        new_head = bool(config.model.head)
        own = {path: like for path, like in program.base.items() if path.startswith("value_head.")}  # no model has one
        stored = {path: like for path, like in program.base.items() if path not in own}
        found = (program.family, program.model_config, stored)
        base = hf.load(model.tensors, *found, progress, new_head, program.quantised)
        base |= sharding.put(
            {path: np.zeros(like.shape, like.dtype) for path, like in own.items()}, state_lib.shardings(own)
        )
    base = retention.with_earlier(config, program, base)
    state, frozen = state_lib.create(program, base, config.train.seed, values)
    return state, frozen | guests.load(config, program, state.params, load, progress)


def write_result(
    config: ConfigDict,
    workdir: Path,
    model: Model,
    tokenizer: Tokenizer | None,
    program: Program,
    params: Params,
    frozen: Params,
) -> Path:
    """Writes what was trained: a PEFT adapter folder, or with `export.merge`, full or head tuning a model folder.

    Both carry the tokenizer and its chat template, and appear whole or not at all. Every process must call it; the first
    writes.
    """
    check_export(config, program)
    write, adapter = jax.process_index() == 0, None if config.export.merge else program.lora
    base = str(model.path or model.uri)
    place = Path(config.export.output or workdir / ("adapter" if adapter or program.prompt else "model"))
    with hf.new_folder(place, write) as folder:
        if program.prompt:
            learnt_PD = sharding.to_host(params[prompt.PATH])
            if write:
                peft_prompt.save(folder, program.model_config, learnt_PD, base)
        elif adapter:
            labels = (
                source.labels(model) if program.model_config.head and program.model_config.head.scores_labels else ()
            )
            auto = reading.auto_class(model.hf_config, config.train.objective)
            peft.save(folder, program.family, program.model_config, params, adapter, base, write, labels, auto)
        else:
            dtype = np.dtype(config.export.dtype) if config.export.dtype else None
            named = hf.tensors(program.family, program.model_config, merged(program, params, frozen), dtype)
            hf.save(folder, exported(model, tokenizer), named, write)
        if write and tokenizer is not None:
            tokenizer.save(folder)
        if write and config.train.objective == "contrastive":
            data, dim = config.data, program.model_config.embed_dim or program.model_config.dim
            prompts = {"query": pairs.prefix(data.prompt), "document": pairs.prefix(data.passage)}
            embedder.save(folder, program.pool, dim, max(data.max_length, data.max_passage_length), prompts)
    return place


def exported(model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The model's config; with a padding token for a decoder that classes texts: transformers finds their ends by it."""
    config = model.hf_config
    if tokenizer and config.get("pad_token_id") is None and reading.task(config) == "ForSequenceClassification":
        return {**config, "pad_token_id": tokenizer.pad_id}
    return config


def merged(program: Program, params: Params, frozen: Params) -> Mapping[str, jax.Array]:
    """Base weights with what was trained in their place: adapters folded into their kernels, codes dequantised."""
    return _Merged(program, {**frozen, **params})


class _Merged(Mapping[str, jax.Array]):
    """Made as they are asked for, the last one kept: a dequantised model is never whole."""

    def __init__(self, program: Program, everything: Params):
        self._program, self._everything = program, everything
        self._fold = jax.jit(lora.merged, static_argnames=("scale", "dtype"))
        self._last: tuple[str, Any] = ("", None)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(quantised.kernel_of(path) or path for path in self._program.base))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, path: str) -> jax.Array:
        if path != self._last[0]:
            self._last = ("", None)
            self._last = (path, self._made(path))
        return self._last[1]

    def _made(self, path: str) -> jax.Array:
        program, params, linear = self._program, self._everything, path.removesuffix(".kernel")
        base = program.quantised if program.quantised and path in program.quantised.kernels else None
        kernel: Any = base.packed(params, path) if base else params[path]
        dtype = program.run.param_dtype if base else kernel.dtype
        if program.lora is None or f"{linear}.adapter.lora_a" not in program.adapter:
            whole: jax.Array = _dequantized(kernel, dtype) if base else kernel
            return whole
        factors = [params.get(f"{linear}.adapter.{kind}") for kind in ("lora_a", "lora_b", "magnitude")]
        return self._fold(kernel, *factors, scale=program.lora.scale(linear), dtype=dtype)


@partial(jax.jit, static_argnames="dtype")
def _dequantized(packed: quantised.Packed, dtype: Any) -> jax.Array:
    return quantised.of_layers(lambda layer: quantised.dequantize(layer, dtype), packed)


def summary(model: Model, program: Program) -> str:
    """One line on what trains, for the terminal."""
    total, trained = state_lib.num_base_params(program), state_lib.num_params(program.state.params)
    mesh = " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
    kept = ""
    if program.quantised:
        weights = sum(like.size for like in program.quantised.kernels.values())
        leaves = [like for path, like in program.base.items() if quantised.kernel_of(path)]
        bits = 8 * sum(like.size * like.dtype.itemsize for like in leaves) / weights
        kept = f", {weights:,} of them in {program.quantised.options.kind} ({bits:.2f} bits each)"
    why = f" ({program.layout})" if program.layout else ""
    return f"{model.uri}: {total:,} parameters{kept}, {trained:,} trained ({trained / total:.2%}); mesh {mesh}{why}"
