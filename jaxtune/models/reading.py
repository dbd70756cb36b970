"""Reading a Hugging Face `config.json`: what most decoders share, and the refusal of what a family does not handle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtune.models import rope, spec
from jaxtune.types import UserError

# Attributes of a Hugging Face config that do not change the forward computation of any family. Dropout rates of the base
# are among them: jaxtune fine-tunes without them (`tune.dropout` is the adapter's).
HARMLESS = frozenset(
    """_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id model_type
    output_attentions output_hidden_states pad_token_id problem_type quantization_config return_dict rope_interleaved
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed use_cache
    unsloth_version max_length num_labels add_cross_attention cross_attention_hidden_size decoder_start_token_id sep_token_id
    attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout activation_dropout dropout layerdrop
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout output_router_logits router_aux_loss_coef
    init_std initializer_factor _remove_final_layer_norm prefix task_specific_params pruned_heads""".split()
)


def check_attributes(config: dict[str, Any], handled: Iterable[str], family: str) -> None:
    """Refuses, by name, a config attribute that is switched on and that the family does not handle.

    Raises:
      UserError: naming the attribute and its value.
    """
    if config.get("quantization_config"):
        raise UserError(
            "config.json has quantization_config: pre-quantised weights are not supported; use the full-precision model"
        )
    if config.get("rope_interleaved"):
        raise UserError("config.json has rope_interleaved=True: expected the half-split rotary layout of transformers")
    known = HARMLESS | set(handled)
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            raise UserError(
                f"config.json has {name}={value!r}, which the {family} family does not handle; "
                f"if it does not change the model's maths, remove it from config.json"
            )


def required(config: dict[str, Any], name: str, kind: Callable[[Any], Any] = int) -> Any:
    """Returns `config[name]` as `kind`, or raises `UserError` naming what is missing."""
    if config.get(name) is None:
        raise UserError(
            f"config.json lacks {name!r}: is this a model folder of this architecture? It has {sorted(config)[:12]}"
        )
    return kind(config[name])


# What `decoder` reads; a family adds what it reads itself.
_STANDARD = """attention_bias head_dim hidden_act hidden_activation hidden_size intermediate_size layer_types max_position_embeddings
    mlp_bias num_attention_heads num_hidden_layers num_key_value_heads partial_rotary_factor rms_norm_eps rope_parameters
    rope_scaling rope_theta sliding_window tie_word_embeddings use_sliding_window max_window_layers vocab_size""".split()


def decoder(
    hf: dict[str, Any],
    family: str,
    handled: str = "",
    *,
    attention: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    norm: dict[str, Any] | None = None,
    norms: str = "pre",
    groups: Callable[[spec.Block], tuple[spec.Group, ...]] | None = None,
    layer_types: Sequence[str] | None = None,
    tied: bool = False,
    **config: Any,
) -> spec.Config:
    """A decoder in the manner of Llama (RMSNorm, rotary, gated MLP), with a family's differences.

    `handled` names the further attributes that the family reads; `attention`, `mlp` and `norm` replace fields of those
    parts; `groups` makes the groups from the block where layers are not alike; `layer_types` is the pattern of a config
    that states none; `tied` is what an absent `tie_word_embeddings` means; the rest replaces fields of the config.
    """
    check_attributes(hf, [*_STANDARD, *handled.split()], family)
    dim, num_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    num_kv_heads = int(hf.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"config.json: {num_heads} attention heads do not divide into {num_kv_heads} key/value heads")
    head_dim, bias = int(hf.get("head_dim") or dim // num_heads), bool(hf.get("attention_bias", False))
    num_layers = required(hf, "num_hidden_layers")
    rope_dims = rotary_dims(hf, head_dim)
    a = spec.Attention(num_heads, num_kv_heads, head_dim, bias=bias, out_bias=bias, rope_dims=rope_dims)
    act = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
    m = spec.Mlp(required(hf, "intermediate_size"), act, bias=bool(hf.get("mlp_bias", False)))
    block = spec.Block(a._replace(**(attention or {})), m._replace(**(mlp or {})), norms)
    types = list(hf.get("layer_types") or layer_types or [])
    nested = isinstance(next(iter((hf.get("rope_parameters") or {}).values()), None), dict)
    whole = spec.Config(
        vocab_size=required(hf, "vocab_size"),
        dim=dim,
        groups=groups(block) if groups else spec.uniform(block, num_layers),
        norm=spec.Norm("rms", float(hf.get("rms_norm_eps", 1e-6)))._replace(**(norm or {})),
        max_positions=int(hf.get("max_position_embeddings", 2048)),
        tied_head=bool(hf.get("tie_word_embeddings", tied)),
        ropes=() if nested or "ropes" in config else (rope.from_hf(hf, rope_dims),),
        windows=windows(hf, num_layers, types),
        head=decoder_head(hf),
    )
    return whole._replace(**config)


TASKS = ("Model", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification")


def task(hf: dict[str, Any]) -> str:
    """Which of `TASKS` the first of the config's `architectures` ends in; "" where it names none.

    Raises:
      UserError: an architecture for another task.
    """
    names = hf.get("architectures") or []
    if not names:
        return ""
    found = [known for known in TASKS if str(names[0]).endswith(known)]
    if not found:
        raise UserError(f"config.json has architectures={names}; expected a name that ends in {', '.join(TASKS)}")
    return max(found, key=len)


def auto_class(hf: dict[str, Any], objective: str = "") -> str:
    """The class by which transformers loads such a model; embeddings (`contrastive`) are read without any head."""
    kind = "Model" if objective == "contrastive" else task(hf)
    return f"AutoModel{kind}" if kind.startswith("For") else "AutoModel" if kind == "Model" else "AutoModelForCausalLM"


def num_labels(hf: dict[str, Any]) -> int:
    """How many labels a classifier has; transformers takes two where nothing is said."""
    return len(hf.get("id2label") or {}) or int(hf.get("num_labels") or 2)


PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def problem(hf: dict[str, Any]) -> str:
    """Which of `PROBLEMS` a classifier of texts solves; where nothing is said, one label means a number.

    Raises:
      UserError: another `problem_type`, or a number of several parts.
    """
    if task(hf) != "ForSequenceClassification":
        return PROBLEMS[0]
    count = num_labels(hf)
    kind: str = hf.get("problem_type") or PROBLEMS[2 if count == 1 else 0]
    if kind not in PROBLEMS:
        raise UserError(f"config.json has problem_type={kind!r}; expected {', '.join(PROBLEMS)}")
    if kind == "regression" and count != 1:
        raise UserError(f"problem_type='regression' with {count} labels; expected one: name it in model.labels")
    return kind


def decoder_head(hf: dict[str, Any], token_out: str = "score") -> spec.Head | None:
    """The head of a decoder for the task that `architectures` names: a linear layer on the last token or on every one, or
    for a bare model nothing, whose last token's state then stands for a text.
    """
    kind = task(hf)
    if kind == "ForSequenceClassification":
        return spec.Head(num_labels(hf), "score", bias=False, pool="last")
    if kind == "Model":
        return spec.Head(0, pool="last")
    return spec.Head(num_labels(hf), token_out) if kind == "ForTokenClassification" else None


def rotary_dims(hf: dict[str, Any], head_dim: int) -> int:
    """How many dims of a head turn: `partial_rotary_factor` of them."""
    parameters = hf.get("rope_parameters") or {}
    factor = parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return int(head_dim * float(factor))


def windows(hf: dict[str, Any], num_layers: int, layer_types: Sequence[str]) -> tuple[int, ...]:
    """Each layer's window in tokens, 0 for none; () where no layer has one."""
    window = int(hf.get("sliding_window") or 0)
    if not window or hf.get("use_sliding_window") is False:
        return ()
    if layer_types:
        check_layer_types(layer_types, num_layers, ("sliding_attention", "full_attention"))
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return (window,) * num_layers


def check_layer_types(layer_types: Sequence[str], num_layers: int, known: Sequence[str]) -> None:
    """Raises `UserError` unless there is a known type for each layer."""
    unknown = set(layer_types) - set(known)
    if unknown or len(layer_types) != num_layers:
        raise UserError(
            f"config.json has layer_types of {len(layer_types)} layers, {sorted(set(layer_types))}; expected "
            f"{num_layers} (num_hidden_layers) of {', '.join(known)}"
        )


def ropes_by_type(
    hf: dict[str, Any], dims: dict[str, int], layer_types: Sequence[str], fallback: dict[str, dict[str, Any]]
) -> tuple[tuple[rope.Rope, ...], tuple[int, ...]]:
    """(ropes, which each layer takes), where kinds of layers turn by ropes of their own.

    `dims` says how many dims turn in each kind; `fallback` gives the parameters of a config without a table by kind.
    """
    parameters = hf.get("rope_parameters") or {}
    if not isinstance(next(iter(parameters.values()), None), dict):
        parameters = fallback
    kinds = sorted(set(layer_types))
    missing = [kind for kind in kinds if kind not in parameters]
    if missing:
        raise UserError(f"config.json: rope_parameters lacks {missing[0]!r}; it has {sorted(parameters)}")
    ropes = tuple(rope.from_hf(hf, dims[kind], parameters[kind]) for kind in kinds)
    return ropes, tuple(kinds.index(kind) for kind in layer_types)


def alternating(num_layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything, the others a window."""
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]


def runs(blocks: Sequence[spec.Block]) -> tuple[spec.Group, ...]:
    """Groups for layers that differ: the shortest repeating pattern if there is one, else runs of equal blocks."""
    n = len(blocks)
    for period in range(1, n // 2 + 1):
        repeats = n // period
        if all(blocks[i] == blocks[i % period] for i in range(n)) and len(set(blocks[:period])) <= period <= 8:
            rest = tuple(blocks[repeats * period :])
            return (spec.Group(tuple(blocks[:period]), repeats), *([spec.Group(rest, 1)] if rest else []))
    groups: list[spec.Group] = []
    for block in blocks:
        if groups and groups[-1].blocks == (block,):
            groups[-1] = spec.Group((block,), groups[-1].repeats + 1)
        else:
            groups.append(spec.Group((block,), 1))
    return tuple(groups)


def alibi_slopes(num_heads: int, odd_first: bool = False) -> tuple[float, ...]:
    """ALiBi's slopes (arXiv:2108.12409): a geometric series, filled from the next power of two's where heads are no power.

    `odd_first` is the other published order for head counts that are no power of two.
    """
    if odd_first:
        near = 2 ** math.ceil(math.log2(num_heads))
        slopes = [2.0 ** (-8.0 * (i + 1) / near) for i in range(near)]
        return tuple(slopes if near == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])
    near = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / near) for i in range(near)]
    more = [2.0 ** (-8.0 * (i + 1) / (2 * near)) for i in range(0, 2 * (num_heads - near), 2)]
    return tuple(slopes + more)
