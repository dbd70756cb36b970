"""What a chip is, by TPU generation. HBM as published by Google Cloud ("TPU versions" pages), read 2026-11-22."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.types import UserError, nearest


class Chip(NamedTuple):
    """`hbm_bytes` per chip; `devices` are the JAX devices a chip shows (v5p and v4 join their two cores into one)."""

    hbm_bytes: int
    devices: int = 1


_GIB = 1 << 30
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * _GIB),
    "v5e": Chip(16 * _GIB),
    "v5p": Chip(95 * _GIB),
    "v6e": Chip(32 * _GIB),
    "tpu7x": Chip(192 * _GIB, devices=2),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4".

    Raises:
      UserError: an unknown generation, or no slice shape.
    """
    generation, _, shape = topology.partition(":")
    # libtpu ends the whole process where a side is 0.
    if generation not in CHIPS or not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape):
        raise UserError(
            f"plan.topology={topology!r}{nearest(generation, list(CHIPS))}; expected GENERATION:SHAPE, e.g. v5e:4x4 or v5p:2x2x4; "
            f"generations: {', '.join(CHIPS)}"
        )
    return CHIPS[generation]
