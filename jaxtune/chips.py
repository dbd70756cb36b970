"""What a chip is and costs: `chips.toml`, overridden by a user's own table; and the slices that are made of them."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.types import UserError, nearest


class Chip(NamedTuple):
    """One generation. Bytes, FLOP/s and bytes/s are of a chip; `devices` are the JAX devices that it shows.

    `flops_per_second` goes by the dtype that is multiplied. `ici_bytes_per_second` is one way, over all `ici_ports` links;
    0 where there are none. `usd_per_chip_hour` None: no price is known. `overlaps` False (a CPU): what a step multiplies and
    what it moves take turns.
    """

    name: str
    hbm_bytes: int
    hbm_bytes_per_second: float
    flops_per_second: Mapping[str, float]
    ici_bytes_per_second: float = 0.0
    ici_ports: int = 0
    wraps_at: int = 0
    dcn_bytes_per_second: float = 0.0
    devices: int = 1
    chip_config: str = ""
    device_kinds: tuple[str, ...] = ()
    named_by: str = "chips"
    slices: tuple[str, ...] = ()
    usd_per_chip_hour: float | None = None
    spec_source: str = ""
    price_source: str = ""
    overlaps: bool = True

    def peak(self, dtype: str) -> float:
        """FLOP/s of a chip that multiplies this dtype."""
        kind = "float8" if dtype.startswith("float8") else dtype
        return self.flops_per_second.get(kind, self.flops_per_second["bfloat16"])


_GIB = 1 << 30
_KEYS = {
    "hbm_gib", "hbm_gb_per_second", "tflops", "ici_gb_per_second", "ici_ports", "wraps_at", "dcn_gbit_per_second", "devices",
    "chip_config", "device_kinds", "named_by", "slices", "usd_per_chip_hour", "spec_source", "price_source",
}  # fmt: skip
_NEEDED = ("hbm_gib", "hbm_gb_per_second", "tflops")
_AT_LEAST = {
    "ici_gb_per_second": 0, "ici_ports": 0, "wraps_at": 0, "dcn_gbit_per_second": 0, "devices": 1, "usd_per_chip_hour": 0,
}  # fmt: skip
_SHAPE = r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}"


def table(prices: str = "") -> dict[str, Chip]:
    """The chips by name; `prices` is a TOML file of the user's, whose keys replace those of `chips.toml`.

    Raises:
      UserError: the file is missing, not TOML, or has a key or a value that is none.
    """
    text = resources.files("jaxtune").joinpath("chips.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = tomllib.loads(text)
    if prices:
        for name, row in _read(Path(prices).expanduser()).items():
            found[name] = {**found.get(name, {}), **row}
    return {name: _chip(name, row, prices) for name, row in found.items()}


def of_kind(device_kind: str, prices: str = "") -> Chip | None:
    """The chip that JAX calls `device_kind`; None where the table has none that does."""
    found = table(prices).values()
    named = [(kind, chip) for chip in found for kind in chip.device_kinds if device_kind.startswith(kind)]
    return max(named, key=lambda each: len(each[0]))[1] if named else None  # "TPU v5 lite" is no "TPU v5"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"plan.prices={str(path)!r}: {error}; expected a TOML file such as jaxtune/chips.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"plan.prices={str(path)!r} is not TOML: {error}") from None
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(
                f"plan.prices={str(path)!r} has {name!r} outside a table; expected [v5e] and the like above it"
            )
        wrong = next((key for key in row if key not in _KEYS), None)
        if wrong:
            raise UserError(f"plan.prices={str(path)!r}: [{name}] has {wrong!r}{nearest(wrong, sorted(_KEYS))}")
    return rows


def _chip(name: str, row: Mapping[str, Any], prices: str) -> Chip:
    missing = [key for key in _NEEDED if key not in row]
    if missing:
        raise UserError(f"plan.prices={prices!r}: [{name}] is a new chip and lacks {missing[0]!r}")
    _check(name, row, prices)
    try:
        tflops = {dtype: float(value) * 1e12 for dtype, value in row["tflops"].items()}
        price = row.get("usd_per_chip_hour")
        chip = Chip(
            name=name,
            hbm_bytes=int(row["hbm_gib"] * _GIB),
            hbm_bytes_per_second=row["hbm_gb_per_second"] * 1e9,
            flops_per_second=tflops,
            ici_bytes_per_second=row.get("ici_gb_per_second", 0) * 1e9 / 2,
            ici_ports=int(row.get("ici_ports", 0)),
            wraps_at=int(row.get("wraps_at", 0)),
            dcn_bytes_per_second=row.get("dcn_gbit_per_second", 0) * 1e9 / 8,
            devices=int(row.get("devices", 1)),
            chip_config=str(row.get("chip_config", "")),
            device_kinds=tuple(row.get("device_kinds", ())),
            named_by=str(row.get("named_by", "chips")),
            slices=tuple(row.get("slices", ())),
            usd_per_chip_hour=None if price is None else float(price),
            spec_source=str(row.get("spec_source", "")),
            price_source=str(row.get("price_source", "")),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"plan.prices={prices!r}: [{name}] has a value of a wrong type: {error}") from None
    if "bfloat16" not in tflops:
        raise UserError(f"plan.prices={prices!r}: [{name}] needs tflops.bfloat16")
    return chip


def _check(name: str, row: Mapping[str, Any], prices: str) -> None:
    """Refuses a figure that no chip has: what is divided by is above 0, nothing is below it, and all is finite."""
    tflops = row["tflops"].items() if isinstance(row["tflops"], dict) else ()
    above = {key: row[key] for key in ("hbm_gib", "hbm_gb_per_second")} | {f"tflops.{d}": v for d, v in tflops}
    for key, value in above.items():
        if not (_is_number(value) and value > 0):
            raise UserError(f"plan.prices={prices!r}: [{name}] has {key} = {value!r}; expected a number above 0")
    for key, low in _AT_LEAST.items():
        value = row.get(key, low)
        if not (_is_number(value) and value >= low):
            raise UserError(
                f"plan.prices={prices!r}: [{name}] has {key} = {value!r}; expected a number of {low} or more"
            )
    for key in ("slices", "device_kinds"):
        if not (isinstance(row.get(key, []), list) and all(isinstance(word, str) for word in row.get(key, []))):
            raise UserError(f"plan.prices={prices!r}: [{name}] has {key} = {row[key]!r}; expected a list of strings")
    for shape in row.get("slices", ()):
        if not re.fullmatch(_SHAPE, shape):
            raise UserError(f'plan.prices={prices!r}: [{name}] has a slice {shape!r}; expected shapes such as "4x4"')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Slice(NamedTuple):
    """`name` as libtpu has it, e.g. "v5e:4x4"; `num_slices` slices of this shape, joined by the data centre's network."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Of one device."""
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def ici_bytes_per_second(self) -> float:
        """What one device sends over the links that this shape uses: two a side that closes to a ring, else one; none of a
        side of one chip."""
        chip = self.chip
        links = sum(2 if chip.wraps_at and side % chip.wraps_at == 0 else 1 for side in self.shape if side > 1)
        return chip.ici_bytes_per_second * links / chip.ici_ports / chip.devices if chip.ici_ports else 0.0


def slice_of(topology: str, chips: Mapping[str, Chip], num_slices: int = 1) -> Slice:
    """The slice that "v5e:4x4", or its name "v5e-16", stands for.

    Raises:
      UserError: an unknown generation, no shape, or a name that no slice has.
    """
    generation, sep, shape = topology.partition(":")
    if not sep and "-" in topology:
        generation, _, number = topology.rpartition("-")
        if generation in chips:
            shape = _shape_named(topology, chips[generation], number)
    near = "" if generation in chips else nearest(generation.lower(), list(chips))
    # libtpu ends the whole process where a side is 0.
    if generation not in chips or not re.fullmatch(_SHAPE, shape):
        raise UserError(
            f"plan.topology={topology!r}{near}; expected GENERATION:SHAPE, e.g. v5e:4x4 or v5p:2x2x4 "
            f"(or a name such as v5e-16), or cpu; generations: {', '.join(chips)}"
        )
    chip = chips[generation]
    return Slice(f"{generation}:{shape}", chip, tuple(int(side) for side in shape.split("x")), num_slices)


def _shape_named(topology: str, chip: Chip, number: str) -> str:
    each = 2 if chip.named_by == "cores" else 1
    sizes = {math.prod(map(int, shape.split("x"))) * each: shape for shape in reversed(chip.slices)}
    if not number.isdecimal() or int(number) not in sizes:
        known = ", ".join(f"{chip.name}-{size}" for size in sorted(sizes))
        raise UserError(f"plan.topology={topology!r}: no slice of {chip.name} has that name; there are {known}")
    return sizes[int(number)]
