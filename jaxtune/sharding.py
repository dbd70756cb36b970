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

# From the slowest to the fastest wires: what a mesh axis says to itself, it says more often the later it stands here.
AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # experts are spread over hosts of rows: each hands its tokens around
WEIGHT_AXES = ("fsdp", "expert", "context", "tensor")  # all but "data", whose devices hold replicas

# Logical axis -> mesh axes; of a weight, each mesh axis goes to the first dim that names it. What is not here is not sharded.
RULES: dict[str, tuple[str, ...]] = {
    # activations, and the batch
    "batch": BATCH_AXES,
    "head_rows": ("context", *BATCH_AXES),  # of the loss: objectives.ops.shards_as_rows
    "head_rows_gathered": (
        "context",
        "data",
        "expert",
    ),  # while the head is spread over what shards it: models.heads.gathered
    "vocab_spread": ("fsdp", "tensor"),
    "length": ("context",),
    "batch_replicas": ("data",),  # on the way from the table to the rows: see models.context.embedded
    "embed_rows": ("fsdp", "expert"),
    # weights: whatever has tokens of its own holds its share of them
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    # LoRA factors: their own axes, never their base's; small, so spread where they divide, and never over tensor
    "lora_in": ("fsdp", "expert", "context"),
    "lora_out": ("fsdp", "expert", "context"),
}
_OPTIONAL = frozenset({"lora_in", "lora_out"})  # left whole where the axis does not divide the dim
_MOVABLE = frozenset({"embed", "vocab"})  # no activation lies as these do: another dim may take the axis


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `devices` (default: all) out as the mesh of `config.mesh`; one axis may be -1, "all that is left".

    Each axis has a size within a slice and one between slices (`dcn_…`), of which it is the product. Where there are no
    slices (CPU), the devices in the order of their processes are cut into as many equal parts.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or of slices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    slices = num_slices(devices)
    between = [int(config.mesh[f"dcn_{axis}"]) for axis in AXES]
    if slices == 1 and devices[0].platform == "cpu":
        known = math.prod(size for size in between if size != -1)
        slices = known if -1 not in between else known * max(1, jax.process_count() // max(1, known))
    outer = _shape([f"dcn_{axis}" for axis in AXES], between, slices, "slices")
    if len(devices) % slices:
        raise UserError(f"mesh of {slices} slices does not fit {len(devices)} devices: expected equal slices")
    inner = _shape(list(AXES), [int(config.mesh[axis]) for axis in AXES], len(devices) // slices, "devices")
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True), AXES)
    if num_slices(devices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES)
    devices.sort(key=lambda device: (device.process_index, device.id))
    grid = np.asarray(devices, dtype=object).reshape(*outer, *inner)
    order = [dim for axis in range(len(AXES)) for dim in (axis, len(AXES) + axis)]
    return Mesh(grid.transpose(order).reshape([a * b for a, b in zip(outer, inner, strict=True)]), AXES)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices, joined by the data centre's network alone, the devices belong to."""
    return 1 if devices[0].platform == "cpu" else len({getattr(device, "slice_index", 0) for device in devices})


def _shape(names: list[str], sizes: list[int], number: int, of: str) -> tuple[int, ...]:
    asked = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {asked}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if number % known or (-1 not in sizes and known != number):
        raise UserError(f"mesh {asked} does not fit {number} {of}: the sizes must multiply to {number} (one may be -1)")
    return tuple(number // known if size == -1 else size for size in sizes)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes, one per dim -> the mesh axes of `RULES`, each of them once: the first dim that names it has it."""
    parts: list[tuple[str, ...] | None] = []
    for axis in axes:
        used = {name for part in parts for name in part or ()}
        parts.append(tuple(name for name in RULES.get(axis, ()) if name not in used) or None if axis else None)
    return PartitionSpec(*parts)


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

    Where a mesh axis does not divide the dim that the rules give it, the largest other dim that it divides takes it, and
    where there is none the weight stays whole on that axis; heads and feed-forward dims, which activations share, do not
    give way.

    Raises:
      UserError: a mesh axis does not divide the dim that it would split.
    """
    for pattern, asked in overrides:
        if re.fullmatch(pattern, path):
            return _asked(path, shape, mesh, pattern, asked)
    lead = len(shape) - len(axes)  # stacked layers: leading dims stay whole
    parts: list[list[str]] = [[] for _ in shape]
    used: set[str] = set()
    moved: list[str] = []

    def fits(dim: int, axis: str) -> bool:
        return shape[dim] % math.prod(mesh.shape[each] for each in (*parts[dim], axis)) == 0

    for dim, logical in enumerate(axes, lead):
        for axis in RULES.get(logical, ()) if logical else ():
            if axis in used:
                continue
            used.add(axis)
            if fits(dim, axis):
                parts[dim].append(axis)
            elif logical in _MOVABLE:
                moved.append(axis)
            elif logical not in _OPTIONAL:
                raise _does_not_divide(path, shape, dim, (axis,), mesh)
    for axis in moved:
        dims = sorted(range(lead, len(shape)), key=lambda dim: -shape[dim])
        found = next((dim for dim in dims if fits(dim, axis)), None)
        if found is not None:
            parts[found].append(axis)
    return NamedSharding(mesh, PartitionSpec(*[tuple(part) or None for part in parts]))


def _asked(path: str, shape: tuple[int, ...], mesh: Mesh, pattern: str, asked: Sequence[str]) -> NamedSharding:
    if len(asked) != len(shape) or any(axis and axis not in AXES for axis in asked):
        raise UserError(
            f"mesh.rules {pattern!r}: {path} has {len(shape)} dims {shape}; give one of {AXES} or '' for each"
        )
    for dim, axis in enumerate(asked):
        if axis and shape[dim] % mesh.shape[axis]:
            raise _does_not_divide(path, shape, dim, (axis,), mesh)
    return NamedSharding(mesh, PartitionSpec(*[axis or None for axis in asked]))


def _does_not_divide(path: str, shape: tuple[int, ...], dim: int, axes: tuple[str, ...], mesh: Mesh) -> UserError:
    ways = math.prod(mesh.shape[axis] for axis in axes)
    return UserError(
        f"mesh axis {'x'.join(axes)}={ways} does not divide dim {dim} of {path}, shape {shape}: choose a divisor of "
        f"{shape[dim]}, or override with mesh.rules"
    )


def check_sharded(matrices: Mapping[str, jax.ShapeDtypeStruct], total: int, mesh: Mesh, options: ConfigDict) -> None:
    """Refuses a mesh that leaves more than `mesh.max_unsharded` of a model's `total` parameters whole on every device, unasked.

    `matrices`: what is to be sharded, with its sharding: no vectors, no adapter. What `mesh.rules` names is asked for.

    Raises:
      UserError: naming the largest of them, and what to do.
    """
    axes = {axis: mesh.shape[axis] for axis in WEIGHT_AXES if mesh.shape[axis] > 1}

    def is_whole(path: str, like: jax.ShapeDtypeStruct) -> bool:
        asked = any(re.fullmatch(pattern, path) for pattern, _ in options.rules)
        return not asked and cast(NamedSharding, like.sharding).shard_shape(like.shape) == like.shape

    whole = {path: like for path, like in matrices.items() if is_whole(path, like)} if axes else {}
    share = sum(like.size for like in whole.values()) / max(1, total)
    if share > options.max_unsharded:
        largest = sorted(whole, key=lambda path: -whole[path].size)[:3]
        named = ", ".join(f"{path} {whole[path].shape}" for path in largest)
        raise UserError(
            f"mesh {', '.join(f'{axis}={size}' for axis, size in axes.items())} leaves {share:.0%} of the parameters whole on every "
            f"device, more than mesh.max_unsharded={options.max_unsharded:.0%}: {named}{', …' * (len(whole) > 3)}. Choose sizes that "
            "divide their dims, give devices to mesh.fsdp, name these weights in mesh.rules, or raise mesh.max_unsharded"
        )


def moved(shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh, where: NamedSharding) -> bool:
    """Whether a weight lies along another dim than `RULES` say, for a mesh axis does not divide theirs."""

    def names(part: Any) -> set[str]:
        return {axis for axis in ((part,) if isinstance(part, str) else part or ()) if mesh.shape[axis] > 1}

    lies = tuple(where.spec)[len(shape) - len(axes) :]
    return any(not names(own) <= names(rule) for own, rule in zip(lies, spec(axes), strict=True))


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


def batch_axes(name: str) -> tuple[str | None, ...]:
    """The logical axes of a batch field, whose name ends in its dims: rows are "batch", the tokens of a row "length"."""
    return tuple({"B": "batch", "T": "length"}.get(dim) for dim in name.rsplit("_", 1)[1])


def batch_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Where a batch field lies: rows over `BATCH_AXES`, tokens of a row over "context", every other dim whole."""
    return NamedSharding(mesh, spec(batch_axes(name)))


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


def check_tokens(mesh: Mesh, **lengths: int) -> None:
    """Refuses rows whose tokens the context axis does not divide.

    Raises:
      UserError: with the length's key in the config, and the nearest that fits.
    """
    ways = mesh.shape["context"]
    for key, length in lengths.items():
        if length % ways:
            raise UserError(
                f"data.{key}={length} does not divide by mesh.context={ways}: use a multiple, e.g. {-(-length // ways) * ways}"
            )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch, ascending, that this process's devices hold all or a part of: those it must read."""
    slices = batch_sharding(mesh, "rows_B").addressable_devices_indices_map((batch_size,)).values()
    rows = {row for index in slices if index for row in range(*index[0].indices(batch_size))}
    return np.asarray(sorted(rows), np.int64)


def to_global(batch: Batch, mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays (batch_size, …) of this host's rows, which are whole and lie in `host_rows` order."""
    rows = host_rows(mesh, batch_size)

    def one(name: str, local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[(slice(first, first + stop - start), *index[1:])]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, name), shard)

    return {name: one(name, array) for name, array in batch.items()}


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
