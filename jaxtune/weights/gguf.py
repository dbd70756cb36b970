"""GGUF files read as if they were a Hugging Face folder: the same config, tensor names, orientation and layout.

One tensor at a time is dequantised out of a memory-mapped file. An architecture is one row of `ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.types import UserError, nearest

# Dequantised by the gguf package, whose authors test it against llama.cpp's C; the i-quants are left out, untested here.
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Architecture(NamedTuple):
    """How one `general.architecture` maps to Hugging Face."""

    config: Callable[[GGUFSource], dict[str, Any]]
    tensors: dict[str, str]  # GGUF name -> Hugging Face name; {n} is the layer
    rotary: dict[str, str]  # Hugging Face suffix stored for interleaved rotary -> config key of its number of heads
    optional: Callable[[dict[str, Any]], tuple[str, ...]]  # GGUF names that a file of this config may lack
    keys: tuple[str, ...]  # metadata below the architecture's name that `config` heeds or that change nothing here


class GGUFSource:
    """A GGUF file opened for reading.

    `hf_config` is what `config.json` of the same model says; names, shapes (out, in) and values are those of its
    safetensors. Values of F16 and BF16 tensors keep their type, all others are float32.

    Raises:
      UserError: not GGUF, cut short, or holding what jaxtune cannot represent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _reader(path)
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        name = self.metadata("general.architecture", "")
        if name not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise UserError(f"{path}: GGUF architecture {name!r} is unsupported; supported: {supported}")
        self._architecture = ARCHITECTURES[name]
        self._refuse_unknown_keys(name)
        self.hf_config = self._architecture.config(self)
        self._tensors = self._named()

    def metadata(self, key: str, default: Any = None) -> Any:
        """Returns the value under a metadata key, or `default`."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """Returns the value under a metadata key that must be there."""
        value = self.metadata(key)
        if value is None:
            near = nearest(key, list(self._reader.fields))
            raise UserError(
                f"{self.path} lacks the metadata {key!r}{near}; convert the model again with a newer llama.cpp"
            )
        return value

    def has(self, stored: str) -> bool:
        """Whether the file holds a tensor of this GGUF name."""
        return stored in self._stored

    def stored_shape(self, stored: str) -> tuple[int, ...]:
        """Returns the shape of the tensor of this GGUF name, outermost dim first: GGUF itself counts from the innermost."""
        if not self.has(stored):
            raise UserError(f"{self.path} lacks the tensor {stored!r}; the file is incomplete, fetch it again")
        return tuple(int(size) for size in reversed(self._stored[stored].shape))

    def values(self, stored: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns the tensor of this GGUF name as it is stored, dequantised: all of it, or rows of its outermost dim."""
        tensor = self._stored[stored]
        kind, data = tensor.tensor_type.name, tensor.data[rows]
        if kind in ("F32", "F16"):
            return np.array(data)
        if kind == "BF16":
            import ml_dtypes

            return np.array(data).view(ml_dtypes.bfloat16)
        from gguf import quants

        return quants.dequantize(data, tensor.tensor_type)

    def names(self) -> list[str]:
        """Returns the Hugging Face names of all tensors, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, (out, in) for a matrix."""
        return self.stored_shape(self._lookup(name))

    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray:
        """Returns a tensor's values, or some of its rows and columns, in Hugging Face's layout: rotary halves apart, not interleaved."""
        stored = self._lookup(name)
        for suffix, heads in self._architecture.rotary.items():
            if name.removesuffix(".weight").removesuffix(".bias").endswith(suffix):
                return split_rotary(self.values(stored), self.hf_config[heads])[(rows, *rest)]
        return self.values(stored, rows)[(slice(None), *rest)]

    def _lookup(self, name: str) -> str:
        if name not in self._tensors:
            near = nearest(name, list(self._tensors)) or "; names() lists what it has"
            raise UserError(f"{self.path} has no tensor {name!r}{near}")
        return self._tensors[name]

    def _refuse_unknown_keys(self, name: str) -> None:
        for key, field in self._reader.fields.items():
            inside = key.removeprefix(f"{name}.")
            if key != inside and inside not in self._architecture.keys and field.contents():
                raise UserError(f"{self.path}: GGUF metadata {key}={field.contents()!r} is unsupported for {name!r}")

    def _named(self) -> dict[str, str]:
        """Returns Hugging Face name -> GGUF name, or refuses a tensor too many, too few or of a type unknown."""
        layers = range(self.hf_config["num_hidden_layers"])
        table: dict[str, str] = {}
        for stored, name in self._architecture.tensors.items():
            table |= {stored.format(n=n): name.format(n=n) for n in (layers if "{n}" in stored else range(1))}
        optional = {stored.format(n=n) for stored in self._architecture.optional(self.hf_config) for n in layers}
        extra = [stored for stored in self._stored if stored not in table]
        if extra:
            raise UserError(
                f"{self.path} holds the tensor {extra[0]!r}, which jaxtune's {self.hf_config['model_type']} has not"
            )
        missing = [stored for stored in table if stored not in self._stored and stored not in optional]
        if missing:
            raise UserError(f"{self.path} lacks the tensor {missing[0]!r}; the file is incomplete, fetch it again")
        for stored, tensor in self._stored.items():
            if tensor.tensor_type.name not in TYPES:
                kind, known = tensor.tensor_type.name, ", ".join(TYPES)
                raise UserError(
                    f"{self.path}: {stored!r} is quantised as {kind}; expected one of {known}: choose such a file"
                )
        return {table[stored]: stored for stored in self._stored if table[stored]}


def open_gguf(path: str | Path) -> GGUFSource:
    """Opens a GGUF file, memory-mapped; only its header is read."""
    return GGUFSource(Path(path))


def split_rotary(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders rows (N·H, …) from llama.cpp's pairs (0, 1), (2, 3) … to Hugging Face's (0, H/2), (1, H/2 + 1) …."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"reading {path} needs the gguf package: pip install 'jaxtune[gguf]'") from error
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the path of a GGUF file") from error
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    try:
        reader = _plain_reader(gguf)(path)
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > reader.data.nbytes:
                raise ValueError(f"{tensor.name!r} ends past the end of the file")
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise UserError(f"{path} is cut short or damaged: {error}; fetch it again") from error
    return reader


def _plain_reader(gguf: Any) -> Any:
    """gguf's reader over a plain array: each of its 100,000 little slices of a memmap would make another memmap, slowly."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = np.asarray(mapped)

    return Reader


# ---- llama ----


def _llama_config(source: GGUFSource) -> dict[str, Any]:
    heads, hidden = source.need("llama.attention.head_count"), source.need("llama.embedding_length")
    kv_heads = source.metadata("llama.attention.head_count_kv", heads)
    head_dim = source.metadata("llama.attention.key_length", hidden // heads if isinstance(heads, int) else 0)
    width = source.need("llama.feed_forward_length")
    if not all(isinstance(number, int) for number in (heads, kv_heads, width)):
        raise UserError(f"{source.path}: heads or feed-forward widths differ between layers; expected one number each")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if source.metadata(key, head_dim) != head_dim:
            raise UserError(
                f"{source.path}: {key}={source.metadata(key)} is unsupported; expected the head dim, {head_dim}"
            )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": source.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": source.stored_shape("token_embd.weight")[0],
        "max_position_embeddings": source.need("llama.context_length"),
        # Stored as float32: the shortest decimal that is the same float32 is what config.json says, 1e-05.
        "rms_norm_eps": float(str(np.float32(source.need("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(str(np.float32(source.metadata("llama.rope.freq_base", 10000.0)))),
        "rope_scaling": _llama_rope_scaling(source, head_dim),
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "mlp_bias": source.has("blk.0.ffn_gate.bias"),
        "tie_word_embeddings": not source.has("output.weight"),
    }
    for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[key] = source.metadata(f"tokenizer.ggml.{token}_token_id")
    return config


def _llama_rope_scaling(source: GGUFSource, head_dim: int) -> dict[str, Any] | None:
    kind, factor = source.metadata("llama.rope.scaling.type", "none"), source.metadata("llama.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise UserError(f"{source.path}: rope scaling {kind!r} is unsupported; expected none, linear or Llama 3's")
    if source.has("rope_freqs.weight"):
        if kind != "none":
            raise UserError(f"{source.path} has both {kind} rope scaling and a rope_freqs tensor; expected one of them")
        return _llama3_scaling(source, head_dim)
    return {"rope_type": "linear", "factor": float(factor)} if kind == "linear" and factor != 1.0 else None


def llama3_divisors(theta: float, head_dim: int, factor: float, original_tokens: int) -> np.ndarray:
    """Returns what Llama 3.1 divides each rotary frequency by, (H/2,); its low and high frequency factors are 1 and 4."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_tokens / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_scaling(source: GGUFSource, head_dim: int) -> dict[str, Any] | None:
    """Finds Llama 3's scaling back: the file keeps only its outcome, one divisor per frequency."""
    divisors = source.values("rope_freqs.weight").astype(np.float64).reshape(-1)
    if np.all(divisors == 1.0):
        return None
    theta, factor = source.metadata("llama.rope.freq_base", 10000.0), float(divisors.max())
    for original_tokens in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
        wanted = llama3_divisors(theta, head_dim, factor, original_tokens)
        if wanted.shape == divisors.shape and np.allclose(wanted, divisors, rtol=1e-5, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original_tokens,
            }
    raise UserError(
        f"{source.path}: its rope_freqs tensor is not Llama 3's scaling; use the model's safetensors instead"
    )


def _llama_optional(config: dict[str, Any]) -> tuple[str, ...]:
    """Biases are there for all of a block's projections or for none: no Llama config says otherwise."""
    absent = [".attn_"] * (not config["attention_bias"]) + [".ffn_"] * (not config["mlp_bias"])
    biases = [name for name in _LLAMA_TENSORS if name.endswith(".bias") and any(part in name for part in absent)]
    return ("output.weight", "rope_freqs.weight", *biases)


def _projections(stored: str, name: str) -> dict[str, str]:
    return {f"blk.{{n}}.{stored}.{part}": f"model.layers.{{n}}.{name}.{part}" for part in ("weight", "bias")}


_LLAMA_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "",  # goes into the config
    "blk.{n}.attn_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "blk.{n}.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    **_projections("attn_q", "self_attn.q_proj"),
    **_projections("attn_k", "self_attn.k_proj"),
    **_projections("attn_v", "self_attn.v_proj"),
    **_projections("attn_output", "self_attn.o_proj"),
    **_projections("ffn_gate", "mlp.gate_proj"),
    **_projections("ffn_up", "mlp.up_proj"),
    **_projections("ffn_down", "mlp.down_proj"),
}

_LLAMA_KEYS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        config=_llama_config,
        tensors=_LLAMA_TENSORS,
        rotary={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
        optional=_llama_optional,
        keys=_LLAMA_KEYS,
    ),
}
