"""Tensors from disk into host arrays of our orientation and dtype: read once, in blocks of rows, by a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

_BLOCK_BYTES = 16 << 20  # a tensor is read in blocks of rows of about this size, as float32
_THREADS = min(4, os.cpu_count() or 1)  # reads, casts and copies release the GIL; each has one block in memory
_STRIP_ROWS = 16  # transposed together: they fill a cache line of the result, and lie in the cache themselves
_ALIGNMENT = 64  # bytes
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Bounds = tuple[tuple[int, int], ...]  # of a region: (first, last + 1) per dim


def regions(
    read: Callable[..., np.ndarray],
    on_disk: Sequence[int],
    bounds: Sequence[Bounds],
    dtype: Any,
    transpose: bool = False,
    scratch: Scratch | None = None,
) -> dict[Bounds, np.ndarray]:
    """Reads regions of one tensor, each block of rows once, whichever regions it goes to.

    Args:
      read: some rows of the tensor, as stored; and of its other dims, where further slices are given.
      on_disk: its shape there.
      bounds: of each region, in our orientation.
      dtype: of the arrays.
      transpose: whether ours has the last two dims the other way round.
      scratch: memory for the arrays, which then last until the next use of it; None = memory of their own.
    """
    shapes = {region: [last - first for first, last in region] for region in bounds}
    out = (scratch or Scratch()).arrays(shapes, dtype)
    views = []
    for region, array in out.items():
        theirs = (*region[:-2], region[-1], region[-2]) if transpose else region
        views.append((theirs, np.swapaxes(array, -1, -2) if transpose else array))
    step = max(1, _BLOCK_BYTES // max(1, 4 * int(np.prod(on_disk[1:]))))
    dims = zip(*[theirs for theirs, _ in views], strict=True)
    (begin, end), *hull = [(min(low for low, _ in dim), max(high for _, high in dim)) for dim in dims]
    wanted = [start for start in range(begin, end, step) if _met(views, start, start + step)]
    is_whole = hull == [(0, size) for size in on_disk[1:]]  # rows then lie one after the other
    rest = [] if is_whole else [slice(*span) for span in hull]

    def one(start: int) -> None:
        block = read(slice(start, min(start + step, end)), *rest)
        for theirs, view in views:
            first, last = max(start, theirs[0][0]), min(start + len(block), theirs[0][1])
            if first < last:
                columns = (slice(low - at, high - at) for (low, high), (at, _) in zip(theirs[1:], hull, strict=True))
                part = block[(slice(first - start, last - start), *columns)]
                copy(view[first - theirs[0][0] : last - theirs[0][0]], part)

    if len(wanted) == 1:
        one(wanted[0])
    else:
        list(_pool().map(one, wanted))  # a list, so that what a thread raised is raised here
    return out


def _met(views: Sequence[tuple[Bounds, Any]], start: int, stop: int) -> bool:
    return any(theirs[0][0] < stop and start < theirs[0][1] for theirs, _ in views)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, cast, an order of magnitude faster where the two lie transposed and have two bytes a number.

    NumPy copies a dtype that it does not know itself, such as bfloat16, number by number; and whole matrices along the
    wrong dim, missing the cache at each. So casts go along `values`, and copies move bits, some rows at a time.
    """
    bits, same = _BITS[out.dtype.itemsize], values.dtype == out.dtype
    if out.ndim < 2 or abs(out.strides[-1]) == out.itemsize:
        np.copyto(*(out.view(bits), values.view(bits)) if same else (out, values), casting="unsafe")
        return
    if out.ndim > 2:
        for part, value in zip(out, values, strict=True):
            copy(part, value)
        return
    target = out.T.view(bits).T
    for start in range(0, len(out), _STRIP_ROWS):
        strip = slice(start, start + _STRIP_ROWS)
        target[strip] = np.ascontiguousarray(values[strip].astype(out.dtype, copy=False)).view(bits)


class Scratch:
    """Memory that one tensor after another is read into: to ask the system for new costs as much as the reading.

    Arrays begin on 64-byte boundaries, so that JAX's CPU client takes them over without a copy.
    """

    def __init__(self) -> None:
        self._raw = np.empty(0, np.uint8)

    def arrays(self, shapes: Mapping[Bounds, Sequence[int]], dtype: Any) -> dict[Bounds, np.ndarray]:
        """Uninitialised arrays of these shapes, in the place of those that were asked for before."""
        dtype = np.dtype(dtype)
        sizes = {key: int(np.prod(shape)) * dtype.itemsize for key, shape in shapes.items()}
        total = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())
        if len(self._raw) < total + _ALIGNMENT:
            self._raw = np.empty(0, np.uint8)  # never both
            self._raw = np.empty(total + _ALIGNMENT, np.uint8)
        at, made = -self._raw.ctypes.data % _ALIGNMENT, {}
        for key, size in sizes.items():
            made[key] = self._raw[at : at + size].view(dtype).reshape(shapes[key])
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        return made
