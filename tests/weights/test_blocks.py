"""Tensors come from disk as they lie there, in our orientation and dtype, each byte read once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.types import UserError
from jaxtune.weights import blocks
from jaxtune.weights.shards import Shard

BF16 = np.dtype(ml_dtypes.bfloat16)


def stored(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values.flat[:3] = np.nan, np.inf, -0.0
    return values.astype(dtype)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(37, 24), (3, 37, 24), (50,)])
@pytest.mark.parametrize(
    ("kept", "wanted"), [(BF16, BF16), (BF16, "f4"), ("f4", BF16), ("f2", "f4"), ("f4", "f4")], ids=str
)
def test_regions_are_the_tensor_to_the_bit(monkeypatch, kept, wanted, shape, transpose):
    transpose &= len(shape) > 1
    values = stored(shape, np.dtype(kept))
    ours = (np.swapaxes(values, -1, -2) if transpose else values).astype(wanted)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 4 * 8 * int(np.prod(shape[1:])))  # eight rows a block
    half = ours.shape[-1] // 2
    rest = tuple((0, size) for size in ours.shape[:-1])
    bounds = [(*rest, (0, half)), (*rest, (half, ours.shape[-1]))]
    read_rows: list[int] = []

    def read(rows: slice) -> np.ndarray:
        read_rows.extend(range(rows.start, rows.stop))
        return values[rows]

    found = blocks.regions(read, shape, bounds, wanted, transpose)
    assert sorted(read_rows) == list(range(shape[0])), "each row once, whichever regions it goes to"
    for region in bounds:
        np.testing.assert_array_equal(
            found[region].view(np.uint8), np.ascontiguousarray(ours[..., slice(*region[-1])]).view(np.uint8)
        )
        assert found[region].ctypes.data % 64 == 0


def test_rows_that_nobody_holds_are_not_read(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 4 * 8 * 4)
    values, seen = stored((64, 4), np.dtype("f4")), []
    found = blocks.regions(lambda rows: seen.append(rows.start) or values[rows], (64, 4), [((16, 24), (0, 4))], "f4")
    assert seen == [16]
    np.testing.assert_array_equal(found[(16, 24), (0, 4)], values[16:24])


def test_scratch_is_used_again_and_what_a_thread_raises_is_raised(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 16)
    scratch, whole = blocks.Scratch(), ((0, 8), (0, 4))
    first = blocks.regions(lambda rows: np.ones((8, 4), "f4")[rows], (8, 4), [whole], "f4", scratch=scratch)[whole]
    second = blocks.regions(lambda rows: np.zeros((8, 4), "f4")[rows], (8, 4), [whole], "f4", scratch=scratch)[whole]
    assert first.ctypes.data == second.ctypes.data
    with pytest.raises(UserError, match="gone"):
        blocks.regions(lambda rows: (_ for _ in ()).throw(UserError("gone")), (8, 4), [whole], "f4")


def test_a_shard_gives_what_was_written(tmp_path: Path):
    kinds = ["f8", "f4", "f2", BF16, ml_dtypes.float8_e4m3fn, "i8", "u1", "i4", "i8", "?"]
    values = 9 * np.random.default_rng(0).random((5, 3))
    tensors = {f"t{n}": values.astype(kind) for n, kind in enumerate(kinds)}
    tensors |= {"scalar": np.asarray(3, np.float32), "empty": np.zeros((0, 4), np.float32)}
    save_file(tensors, tmp_path / "m.safetensors")
    shard = Shard(tmp_path / "m.safetensors")
    assert set(shard.names()) == set(tensors)
    for name, want in tensors.items():
        found = shard.read(name)
        assert (shard.shape(name), found.shape, found.dtype) == (want.shape, want.shape, want.dtype)
        assert found.tobytes() == want.tobytes()
        if want.ndim:
            assert shard.read(name, slice(1, 3)).tobytes() == want[1:3].tobytes()


def test_a_shard_that_is_damaged_is_named(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a": np.ones((64, 64), "f4")}, path)
    shard = Shard(path)
    with pytest.raises(UserError, match=r"lacks the tensor 'b'"):
        shard.shape("b")
    os.truncate(path, path.stat().st_size - 100)  # after it was opened
    with pytest.raises(UserError, match=r"m\.safetensors ends before its last tensor"):
        shard.read("a")
    with pytest.raises(UserError, match=r"m\.safetensors is not a whole safetensors file"):
        Shard(path)
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(UserError, match=r"m\.safetensors( is not a whole|: 'a' is stored as F4)"):
        Shard(path).read("a")
