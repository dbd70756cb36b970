"""The mesh, and how logical axes lie on it: rules as data. NumPy rows become global `jax.Array`s here, and only here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.config import ConfigDict
from jaxtune.types import Batch, UserError, nearest

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # experts are spread over hosts of rows: each hands its tokens around

# Logical axis -> mesh axes. A logical axis that is not here is not sharded.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    # weights
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    # LoRA factors: their own axes, never their base's; small, so spread over fsdp alone where they divide
    "lora_in": ("fsdp",),
    "lora_out": ("fsdp",),
}
_OPTIONAL = frozenset({"lora_in", "lora_out"})  # left whole where the axis does not divide the dim


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `devices` (default: all) out as the mesh of `config.mesh`; one axis may be -1, "all that is left".

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(config.mesh[axis]) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {asked}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh {asked} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)} (one may be -1)"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes, one per dim -> the mesh axes of `RULES`."""
    return PartitionSpec(*[RULES.get(axis) if axis else None for axis in axes])


def constrain_on(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """Returns `constrain(x, logical axes)`, which pins an activation's sharding on `mesh`."""
    if mesh.size == 1:
        return lambda x, axes: x

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))

    return constrain


def check_dims(mesh: Mesh, **dims: int) -> None:
    """Refuses a tensor axis that would split a head or a feed-forward block unevenly.

    Raises:
      UserError: naming the dim, its size and the axis.
    """
    for name, size in dims.items():
        if size % mesh.shape["tensor"]:
            raise UserError(
                f"mesh.tensor={mesh.shape['tensor']} does not divide the model's {size} {name}: choose a divisor of {size}"
            )


def param_sharding(
    path: str,
    shape: tuple[int, ...],
    axes: Sequence[str | None],
    mesh: Mesh,
    overrides: Sequence[tuple[str, Sequence[str]]] = (),
) -> NamedSharding:
    """The sharding of one parameter, by its logical axes or by the first override whose regex matches its path.

    Raises:
      UserError: a mesh axis does not divide the dim that it would split.
    """
    axes = (*[None] * (len(shape) - len(axes)), *axes)  # stacked layers: leading dims stay whole
    parts: list[tuple[str, ...] | None] = [RULES.get(axis) if axis else None for axis in axes]
    for pattern, mesh_axes in overrides:
        if re.fullmatch(pattern, path):
            if len(mesh_axes) != len(shape) or any(a and a not in AXES for a in mesh_axes):
                raise UserError(
                    f"mesh.rules {pattern!r}: {path} has {len(shape)} dims {shape}; give one of {AXES} or '' for each"
                )
            parts = [(a,) if a else None for a in mesh_axes]
            axes = ("",) * len(shape)
            break
    for dim, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        ways = math.prod(mesh.shape[a] for a in part) if part else 1
        if shape[dim] % ways:
            if axis in _OPTIONAL:
                parts[dim] = None
                continue
            raise UserError(
                f"mesh axis {'x'.join(part or ())}={ways} does not divide dim {dim} of {path}, shape {shape}: choose a divisor of "
                f"{shape[dim]}, or override with mesh.rules"
            )
    return NamedSharding(mesh, PartitionSpec(*parts))


def fitting(where: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """`where` for an array of another shape: a dim that its mesh axes do not divide stays whole."""
    parts = [*where.spec, *[None] * (len(shape) - len(where.spec))]

    def ways(part: Any) -> int:
        return math.prod(where.mesh.shape[axis] for axis in ((part,) if isinstance(part, str) else part or ()))

    kept = [part if size % ways(part) == 0 else None for part, size in zip(parts, shape, strict=True)]
    return NamedSharding(where.mesh, PartitionSpec(*kept))


def check_rules(overrides: Sequence[tuple[str, Sequence[str]]], paths: Sequence[str]) -> None:
    """Refuses an override whose regex matches no parameter.

    Raises:
      UserError: naming the regex and the nearest paths.
    """
    for pattern, _ in overrides:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = nearest(pattern.replace("\\", ""), list(paths)) or f"; there are {', '.join(sorted(paths)[:4])}, …"
            raise UserError(f"mesh.rules {pattern!r} matches no parameter{near} The regex must match a whole path")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`, every other dim whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Refuses a batch that does not divide over the mesh.

    Raises:
      UserError: with the sizes and the nearest that fits.
    """
    ways = num_batch_shards(mesh) * accumulation
    if batch_size % ways:
        up = -(-batch_size // ways) * ways
        raise UserError(
            f"train.batch_size={batch_size} does not divide by {' x '.join(BATCH_AXES)} x accumulation = "
            f"{' x '.join(str(mesh.shape[axis]) for axis in BATCH_AXES)} x {accumulation} = {ways}: use a multiple, e.g. {up}"
        )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch, ascending, that this process's devices hold: those it must read."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for index in slices if index for row in range(*index[0].indices(batch_size))}
    return np.asarray(sorted(rows), np.int64)


def to_global(batch: Batch, mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays (batch_size, …) of this host's rows, which lie in `host_rows` order."""
    sharding, rows = batch_sharding(mesh), host_rows(mesh, batch_size)

    def one(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: one(array) for name, array in batch.items()}


def put(values: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Host arrays, whole on every process -> global arrays."""

    def one(name: str) -> jax.Array:
        value = values[name]
        return jax.make_array_from_callback(value.shape, shardings[name], lambda index: value[index])

    return {name: one(name) for name in values}


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a (possibly sharded) array, on every process; all processes must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    gathered = jax.jit(
        lambda x: x, out_shardings=NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec())
    )(array)
    return np.asarray(gathered.addressable_data(0))
