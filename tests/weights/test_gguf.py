"""GGUF against transformers' own reading, against the gguf package per type, and against files that must be refused."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxtune.types import UserError
from jaxtune.weights.gguf import TYPES, llama3_divisors, open_gguf, split_rotary

gguf = pytest.importorskip("gguf")

D, F, V, N, K, H = 256, 512, 32, 4, 2, 64


def tensors(seed: int = 0, tied: bool = True) -> dict[str, np.ndarray]:
    """A one-layer llama, by GGUF name, (out, in)."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    shapes |= {"blk.0.attn_norm.weight": (D,), "blk.0.ffn_norm.weight": (D,)}
    shapes |= {"blk.0.attn_q.weight": (N * H, D), "blk.0.attn_k.weight": (K * H, D), "blk.0.attn_v.weight": (K * H, D)}
    shapes |= {"blk.0.attn_output.weight": (D, N * H), "blk.0.ffn_down.weight": (D, F)}
    shapes |= {"blk.0.ffn_gate.weight": (F, D), "blk.0.ffn_up.weight": (F, D)}
    shapes |= {} if tied else {"output.weight": (V, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path, values: dict[str, np.ndarray], kind: str = "F32", keys: dict[str, object] | None = None, arch="llama"
):
    """Writes a GGUF file whose matrices are stored as `kind`; returns their raw bytes by name."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = (
            writer.add_string
            if isinstance(value, str)
            else writer.add_float32
            if isinstance(value, float)
            else writer.add_uint32
        )
        add(key, value)
    raw: dict[str, np.ndarray] = {}
    for name, value in values.items():
        stored = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        raw[name] = quantise(value, stored)
        writer.add_tensor(name, raw[name], raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


def quantise(value: np.ndarray, kind) -> np.ndarray:
    if kind.name in ("F32", "F16"):
        return value.astype(np.float32 if kind.name == "F32" else np.float16)
    try:
        return gguf.quants.quantize(value, kind)
    except NotImplementedError:  # the K-quants have no quantiser in Python: random blocks with sane scales
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = value.shape
        raw = np.random.default_rng(3).integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
        for at in scales:
            raw[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_reads_as_the_gguf_package_says(tmp_path, kind):
    raw = write(tmp_path / "m.gguf", tensors(), kind)
    source = open_gguf(tmp_path / "m.gguf")
    value = source.read("model.layers.0.mlp.down_proj.weight")
    wanted = gguf.quants.dequantize(raw["blk.0.ffn_down.weight"], gguf.GGMLQuantizationType[kind])
    assert value.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert source.shape("model.layers.0.mlp.down_proj.weight") == value.shape == (D, F)
    np.testing.assert_array_equal(value.astype(np.float32), wanted.astype(np.float32))
    assert np.isfinite(wanted).all()


def test_q4_k_by_hand(tmp_path):
    """Written from ggml's block layout, value by value: d, dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles."""
    raw = write(tmp_path / "m.gguf", tensors(), "Q4_K")["blk.0.ffn_down.weight"]
    block = raw[5, 144:288].tobytes()  # row 5, second block: columns 256 to 511
    d, dmin = struct.unpack("<ee", block[:4])
    packed, nibbles = block[4:16], block[16:]
    wanted = []
    for j in range(8):
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            low = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        for i in range(32):
            byte = nibbles[32 * (j // 2) + i]
            wanted.append(d * scale * (byte & 15 if j % 2 == 0 else byte >> 4) - dmin * low)
    value = open_gguf(tmp_path / "m.gguf").read("model.layers.0.mlp.down_proj.weight")[5, 256:512]
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)  # float32 against Python's float64


def test_config(tmp_path):
    write(tmp_path / "m.gguf", tensors(tied=False))
    config = open_gguf(tmp_path / "m.gguf").hf_config
    expected = {
        "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": N,
        "num_key_value_heads": K, "head_dim": H, "vocab_size": V, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "hidden_act": "silu",
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    assert config == expected
    write(tmp_path / "tied.gguf", tensors())
    assert open_gguf(tmp_path / "tied.gguf").hf_config["tie_word_embeddings"] is True


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter."""
    return (
        rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )


def test_rotary_rows_and_biases_are_put_back(tmp_path):
    rng = np.random.default_rng(1)
    values = tensors()
    q, k = values["blk.0.attn_q.weight"], values["blk.0.attn_k.weight"]
    bias = {
        n: rng.standard_normal(s).astype(np.float32)
        for n, s in (("q", N * H), ("k", K * H), ("v", K * H), ("output", D))
    }
    stored = values | {f"blk.0.attn_{n}.bias": b for n, b in bias.items()}
    stored |= {"blk.0.attn_q.weight": interleave(q, N), "blk.0.attn_k.weight": interleave(k, K)}
    stored |= {"blk.0.attn_q.bias": interleave(bias["q"], N), "blk.0.attn_k.bias": interleave(bias["k"], K)}
    write(tmp_path / "m.gguf", stored)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.hf_config["attention_bias"] is True
    for name, wanted in {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "q_proj.bias": bias["q"],
        "k_proj.bias": bias["k"],
    }.items():
        np.testing.assert_array_equal(source.read(f"model.layers.0.self_attn.{name}"), wanted)
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.v_proj.weight"), values["blk.0.attn_v.weight"])
    np.testing.assert_array_equal(split_rotary(interleave(q, N), N), q)


@pytest.mark.parametrize(("factor", "original_tokens"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_scaling_is_found_from_its_frequencies(tmp_path, factor, original_tokens):
    freqs = llama3_divisors(500000.0, H, factor, original_tokens).astype(np.float32)
    write(tmp_path / "m.gguf", tensors() | {"rope_freqs.weight": freqs})
    source = open_gguf(tmp_path / "m.gguf")
    scaling = source.hf_config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == factor
    assert scaling["original_max_position_embeddings"] == original_tokens
    assert not any("rope" in name for name in source.names())


@pytest.mark.oracle
def test_llama3_divisors_are_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(500000.0, 128, 8.0, 8192), frequencies.numpy(), rtol=1e-5)


def test_linear_scaling(tmp_path):
    write(tmp_path / "m.gguf", tensors(), keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_gguf(tmp_path / "m.gguf").hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is unsupported"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is unsupported"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window=4096 is unsupported"),
        ({"llama.rope.dimension_count": 32}, "expected the head dim, 64"),
    ],
)
def test_metadata_that_jaxtune_cannot_honour_is_refused(tmp_path, keys, message):
    write(tmp_path / "m.gguf", tensors(), keys=keys)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_metadata_that_says_nothing_is_fine(tmp_path):
    write(tmp_path / "m.gguf", tensors(), keys={"llama.expert_count": 0})
    assert open_gguf(tmp_path / "m.gguf").hf_config["model_type"] == "llama"


def test_tensors_too_many_too_few_or_unknown(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, tensors() | {"blk.0.attn_q_norm.weight": np.ones(H, np.float32)})
    with pytest.raises(UserError, match="holds the tensor 'blk.0.attn_q_norm.weight'"):
        open_gguf(path)
    write(path, {name: value for name, value in tensors().items() if "ffn_up" not in name})
    with pytest.raises(UserError, match="lacks the tensor 'blk.0.ffn_up.weight'"):
        open_gguf(path)
    write(path, tensors() | {"blk.0.attn_q.bias": np.ones(N * H, np.float32)})
    with pytest.raises(UserError, match="lacks the tensor 'blk.0.attn_k.bias'"):
        open_gguf(path)
    write(path, tensors() | {"rope_freqs.weight": np.linspace(1, 9, H // 2, dtype=np.float32)})
    with pytest.raises(UserError, match="rope_freqs tensor is not Llama 3's"):
        open_gguf(path)
    write(path, tensors(), "TQ1_0")
    with pytest.raises(UserError, match="quantised as TQ1_0; expected one of F32"):
        open_gguf(path)
    write(path, tensors())
    with pytest.raises(UserError, match=r"has no tensor 'model.norm.wieght'; did you mean 'model.norm.weight'"):
        open_gguf(path).read("model.norm.wieght")


def test_other_architecture_names_the_supported(tmp_path):
    write(tmp_path / "m.gguf", tensors(), arch="bloom")
    with pytest.raises(UserError, match="'bloom' is unsupported; supported: llama"):
        open_gguf(tmp_path / "m.gguf")


def test_not_gguf_and_cut_short(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, tensors())
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 600, 100, 20, 4):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short or damaged"):
            open_gguf(path)
    for wrong in (b"", b"PK\x03\x04 a zip"):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="is not a GGUF file"):
            open_gguf(path)
    with pytest.raises(UserError, match="expected the path of a GGUF file"):
        open_gguf(tmp_path)


def test_without_the_gguf_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[gguf\]'"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.samples
def test_smollm2_config(smollm2_gguf):
    config = open_gguf(smollm2_gguf).hf_config
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"], config["vocab_size"]) == (
        30,
        576,
        64,
        49152,
    )
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 100000.0, True)


@pytest.mark.oracle
@pytest.mark.samples
def test_smollm2_equals_transformers(smollm2_gguf):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = Path(smollm2_gguf)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted = {name: value for name, value in oracle.state_dict().items() if name != "lm_head.weight"}  # tied
    source = open_gguf(path)
    assert sorted(source.names()) == sorted(wanted)
    for name, value in wanted.items():
        assert source.shape(name) == tuple(value.shape), name
        np.testing.assert_allclose(source.read(name), value.numpy(), rtol=0, atol=1e-6, err_msg=name)
