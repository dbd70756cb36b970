"""This machine as a chip: `plan.topology="cpu"`. What it can do is measured, in a few seconds, and not looked up.

Multiplications are timed at the very shapes that the step has (`dot_seconds`); everything else by how fast XLA's own
elementwise loops move arrays of the step's sizes through memory. On a CPU the two take turns, so their times add up.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.chips import Chip, Slice
from jaxtune.plan import flops
from jaxtune.types import UserError

_PEAK_SIZE = 1536  # of the square matrices that the peak is measured on
_REPEATS = 5
_MOVED_BYTES = 48 << 20  # arrays that do not fit the caches
_SHARE = 0.98  # of the FLOPs whose shapes are timed; the rest runs at their mean speed


def is_cpu(topology: str) -> bool:
    return topology.partition(":")[0] == "cpu"


@functools.cache
def machine(topology: str) -> Slice:
    """This machine, with its peaks measured; "cpu:N" as N devices, which share it.

    Raises:
      UserError: the number is none, or JAX has fewer CPU devices and can make no more.
    """
    name, _, number = topology.partition(":")
    if number and not (number.isdecimal() and 0 < int(number) <= 1024):
        raise UserError(f"plan.topology={topology!r}; expected cpu, or cpu:N with a number of devices")
    count = int(number) if number else 0
    if count:
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
            jax.config.update("jax_num_cpu_devices", count)
    there = len(jax.local_devices(backend="cpu"))
    if count > there:
        raise UserError(
            f"plan.topology={topology!r}: this process has {there} CPU devices; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    count = count or there
    peaks = {dtype: measured_peak(dtype) for dtype in ("float32", "bfloat16")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = Chip(name, memory, measured_bandwidth(), peaks, devices=count, overlaps=False, spec_source="measured here")
    return Slice(f"cpu:{count}", chip, (1,))


def devices(place: Slice) -> list[Any]:
    return list(jax.local_devices(backend="cpu")[: place.num_devices])


def resident_bytes() -> int:
    """What this process holds of the machine's memory now, freed memory given back first."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _best_seconds(compute: Callable[..., jax.Array], *arrays: jax.Array) -> float:
    """The best time of `compute(*arrays)`, which writes where it wrote before, as a step does: no memory is asked for anew."""
    again = jax.jit(lambda result, *given: compute(*given), donate_argnums=0, keep_unused=True)
    result, best = jax.jit(compute)(*arrays), float("inf")
    for _ in range(_REPEATS + 1):
        jax.block_until_ready(result)
        began = time.perf_counter()
        result = again(result, *arrays)
        jax.block_until_ready(result)
        best = min(best, time.perf_counter() - began)
    return best


def _filled(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.device_put(jnp.full(shape, 0.5, dtype), jax.local_devices(backend="cpu")[0])


def measured_peak(dtype: str) -> float:
    """The best FLOP/s of a square matmul of this dtype."""
    x = _filled((_PEAK_SIZE, _PEAK_SIZE), dtype)
    return 2 * _PEAK_SIZE**3 / _best_seconds(jnp.matmul, x, x)


def measured_bandwidth(size_bytes: int = _MOVED_BYTES) -> float:
    """Bytes/s of XLA's elementwise loops over arrays of this size: a gated activation, two read and one written."""
    x, y = (_filled((max(size_bytes // 4, 1),), jnp.float32) for _ in range(2))
    return 3 * x.nbytes / _best_seconds(lambda x, y: x * jax.nn.sigmoid(x) * y, x, y)


def as_measured(place: Slice, dots: flops.Dots) -> Slice:
    """This machine, with the bandwidth of arrays as large as those that the step multiplies most."""
    most = max(dots, key=lambda dot: dot.flops * dots[dot])
    size = most.batch * most.m * max(most.n, most.k) * 4
    return place._replace(chip=place.chip._replace(hbm_bytes_per_second=measured_bandwidth(size)))


def dot_seconds(dots: flops.Dots) -> float:
    """How long this machine multiplies what a step does, each shape timed by itself and taken as often as it comes."""
    wanted = flops.total(dots)
    timed = seconds = 0.0
    for dot, count in sorted(dots.items(), key=lambda item: -item[0].flops * item[1]):
        if timed >= _SHARE * wanted:
            break
        lead = (dot.batch,) if dot.batch > 1 else ()
        a, b = _filled((*lead, dot.m, dot.k), dot.dtype), _filled((*lead, dot.k, dot.n), dot.dtype)
        seconds += _best_seconds(jnp.matmul, a, b) * count
        timed += dot.flops * count
    return seconds * wanted / timed if timed else 0.0
