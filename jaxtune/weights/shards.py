"""Safetensors files read by position: nothing is mapped, so no page of a file stays in this process's memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxtune.types import UserError

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
_LENGTH_BYTES = 8  # of the header's length, at the start of a file
_MOST_BYTES = 1 << 30  # of one read: Linux gives no more than 2 GiB


class Shard:
    """One file: its header is read once, its tensors row by row, by any number of threads.

    Raises:
      UserError: the file is damaged, cut short, or not there.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="numpy"):  # checks the header, and that the file is whole
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._tensors, self._start = header, _LENGTH_BYTES + length

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
          UserError: there is none of this name.
        """
        if name not in self._tensors:
            raise UserError(f"{self.path} lacks the tensor {name!r} that its index places there: download it again")
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray:
        """A tensor's values, or some of its rows and, by `rest`, of its other dims, as stored.

        Raises:
          UserError: no such tensor, a dtype that is not known, or the file has become shorter.
        """
        shape, kind = self.shape(name), self._tensors[name]["dtype"]
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: {name!r} is stored as {kind}; expected one of {', '.join(_DTYPES)}")
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        offset = self._start + self._tensors[name]["data_offsets"][0]
        if rest:  # mapped for as long as the copy takes: only the pages that hold them are read
            size = int(np.prod(shape)) * _DTYPES[kind].itemsize
            if os.path.getsize(self.path) < offset + size:
                raise self._ends()
            mapped = np.memmap(self.path, np.uint8, "r", offset, (size,))
            return np.array(mapped.view(np.ndarray).view(_DTYPES[kind]).reshape(shape)[(slice(first, last), *rest)])
        out = np.empty((last - first, *shape[1:]) if shape else (), _DTYPES[kind])
        row_bytes = out.nbytes // max(1, last - first)
        self._fill(out, offset + first * row_bytes)
        return out

    def _ends(self) -> UserError:
        return UserError(f"{self.path} ends before its last tensor: download it again")

    def _fill(self, out: np.ndarray, offset: int) -> None:
        """Reads the bytes from `offset` on into `out`."""
        left = out.reshape(-1).view(np.uint8).data
        file = os.open(self.path, os.O_RDONLY)
        try:
            while len(left):
                num = os.preadv(file, [left[:_MOST_BYTES]], offset)
                if not num:
                    raise self._ends()
                left, offset = left[num:], offset + num
        finally:
            os.close(file)
