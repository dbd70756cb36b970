"""Hugging Face model folders: safetensors streamed into sharded arrays, and back out."""

from __future__ import annotations

import json
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import sharding
from jaxtune.models import naming, quantised
from jaxtune.types import UserError, nearest
from jaxtune.weights import blocks, pack
from jaxtune.weights.shards import Shard

Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]
_IGNORED = (
    "rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    "embeddings.position_ids",
)  # buffers that old checkpoints carry
_KINDS: dict[str, type] = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ),
    int,
) | dict.fromkeys(("rope_parameters", "rope_scaling"), dict)
_SHARD_BYTES = 5_000_000_000


class Source(Protocol):
    """Tensors by Hugging Face name, read one at a time."""

    path: Path
    hf_config: dict[str, Any]

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray: ...


class Folder:
    """A Hugging Face folder with `config.json` and `model.safetensors`, or shards and their index.

    Raises:
      UserError: what is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path, self.hf_config = path, read_config(path)
        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = _json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise UserError(f"{index} has no weight_map: download it again")
        elif (path / "model.safetensors").is_file():
            files = dict.fromkeys(Shard(path / "model.safetensors").names(), "model.safetensors")
        else:
            has = ", ".join(sorted(p.name for p in path.iterdir())[:8])
            raise UserError(
                f"{path} has no model.safetensors and no model.safetensors.index.json (it has {has}): convert the weights to safetensors"
            )
        self._files: dict[str, Path] = {name: path / file for name, file in files.items()}
        for file in sorted(set(self._files.values())):
            if not file.is_file():
                raise UserError(f"{index.name} names the shard {file.name}, which is not in {path}: download it again")
        self._shard = cache(Shard)  # a file is opened when its first tensor is asked for

    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard(self._files[name]).shape(name)

    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray:
        return self._shard(self._files[name]).read(name, rows, *rest)


def read_config(path: Path) -> dict[str, Any]:
    """Reads `config.json` of a model folder."""
    file = path / "config.json"
    if not file.is_file():
        has = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "is a file"
        raise UserError(f"{path} is not a model folder: expected config.json (it has {has or 'nothing'})")
    config = _json(file)
    if "model_type" not in config:
        raise UserError(f"{file} has no model_type: it is not the config of a model")
    for key, kind in _KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise UserError(
                f"{file} has {key}={config[key]!r:.60}; expected {'a number' if kind is int else 'an object'}"
            )
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def check_names(
    source: Source, table: dict[str, tuple[naming.Weight, tuple[int, ...]]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Holds the source's tensors against the family's table, before anything is read.

    Raises:
      UserError: a weight missing, unexpected, or of the wrong shape.
    """
    have = set(source.names())
    tied = {"lm_head.weight"} if "lm_head.weight" not in table else set()  # a tied head may be stored all the same
    missing = [name for name in table if name not in have]
    extra = sorted(n for n in have - set(table) - tied if not n.endswith(_IGNORED))
    if missing:
        raise UserError(
            f"{source.path}: weight {missing[0]!r} is missing ({len(missing)} in all){nearest(missing[0], extra)}; is config.json of another model?"
        )
    if extra:
        raise UserError(
            f"{source.path}: unexpected weight {extra[0]!r} ({len(extra)} in all); is config.json of another model?"
        )
    for name, (weight, place) in table.items():
        ours = shapes[weight.ours][len(place) :]
        expected = weight.on_disk((*ours[:-2], ours[-1], ours[-2]) if weight.transpose else ours)
        if tuple(source.shape(name)) != tuple(expected):
            raise UserError(
                f"{source.path}: weight {name!r} has shape {tuple(source.shape(name))}; config.json makes it {tuple(expected)}"
            )


def load(
    source: Source,
    family: ModuleType,
    model_config: Any,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
    new_head: bool = False,
    packed: quantised.Base | None = None,
) -> dict[str, jax.Array]:
    """Streams every weight into arrays of `targets`' shape, dtype and sharding; kernels of `packed` into their codes and scales.

    A base model stored without its prefix ("wte.weight" for "transformer.wte.weight"), or a prefixed one read as a bare
    model, is found all the same. With `new_head` the weights of a task head may be missing, and are then made anew
    (N(0, 0.02), biases 0), and another task's head is left behind.

    One tensor is on its way at a time, read in blocks of rows, only the regions that this process's devices hold: above
    the arrays themselves, host memory holds one tensor's shard and a block.
    """
    table = naming.hf_names(family.weights(model_config))
    source = with_prefix(source, table)
    arrays: dict[str, jax.Array] = {}
    kernels = packed.kernels if packed else {}
    targets = {**targets, **kernels}
    if new_head:
        table, source, arrays = _without_head(source, table, targets)
    check_names(source, table, {path: target.shape for path, target in targets.items()})
    scratch = blocks.Scratch()
    for name, (weight, place) in (progress or _silent)(table.items(), len(table), "loading weights"):
        target = targets[weight.ours]
        if place and weight.ours not in arrays and weight.ours not in kernels:
            arrays[weight.ours] = pack.zeros(target.shape, target.dtype, target.sharding)()
        depth = len(place)
        where = NamedSharding(target.sharding.mesh, PartitionSpec(*tuple(target.sharding.spec)[depth:]))
        tensor = _tensor(source, name, weight, target.shape[depth:], target.dtype, where, scratch if place else None)
        if packed and weight.ours in kernels:
            arrays |= pack.put(packed, weight.ours, arrays, targets, tensor, place)
            continue
        if place:
            tensor = jax.block_until_ready(_set_at(arrays[weight.ours], tensor, place))
        arrays[weight.ours] = tensor
    return arrays


class Renamed:
    """A source under other names: ours -> its own."""

    def __init__(self, source: Source, names: dict[str, str]):
        self.path, self.hf_config, self._source, self._names = source.path, source.hf_config, source, names

    def names(self) -> list[str]:
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray:
        return self._source.read(self._names[name], rows, *rest)


def with_prefix(source: Source, table: Mapping[str, Any]) -> Source:
    """The source with the base model's prefix put before its names, or taken off them, where that makes them fit."""
    have = source.names()
    body = [name for name, (weight, _) in table.items() if weight.ours == "embed.table"]
    if not body or body[0] in have:
        return source
    prefix = body[0].split(".")[0] + "."
    if body[0].removeprefix(prefix) in have:
        under = [name.removeprefix(prefix) for name in table if name.startswith(prefix)]
        return Renamed(source, {prefix + name if name in under or _is_body(name) else name: name for name in have})
    found = [name for name in have if name.endswith("." + body[0])]
    if found:
        outer = found[0].removesuffix(body[0])
        return Renamed(source, {name.removeprefix(outer): name for name in have})
    return source


def _is_body(name: str) -> bool:
    return not name.startswith(("lm_head.", "cls.", "classifier.", "score.", "vocab_", "head.", "decoder.bias"))


def _without_head(
    source: Source, table: dict[str, Any], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, Any], Source, dict[str, jax.Array]]:
    """(the table without the head's weights that are missing, the source without what is no part of the body, new arrays)."""
    have = set(source.names())
    missing = {w.ours for name, (w, _) in table.items() if w.ours.startswith("task_head.") and name not in have}
    kept = {name: entry for name, entry in table.items() if entry[0].ours not in missing}
    roots = {name.split(".")[0] for name in kept}
    known = {n: n for n in have if n in kept or (n.split(".")[0] in roots and _is_body(n) and "pooler" not in n)}

    def make(path: str) -> jax.Array:
        like, key = targets[path], jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
        value = jax.random.normal(key, like.shape, jnp.float32) * 0.02 if path.endswith(".kernel") else None
        value = jnp.full(like.shape, float(path.endswith(".scale")), jnp.float32) if value is None else value
        return jax.device_put(value.astype(like.dtype), like.sharding)

    return kept, Renamed(source, known), {path: make(path) for path in sorted(missing)}


def _silent(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    return iter(items)


@partial(jax.jit, donate_argnums=0)
def _set_at(stacked: jax.Array, tensor: jax.Array, place: tuple[int, ...]) -> jax.Array:
    def put(stacked: jax.Array, tensor: jax.Array, *place: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(stacked, tensor[(None,) * len(place)], (*place, *[0] * tensor.ndim))

    def put_bits(stacked: jax.Array, tensor: jax.Array, *place: Any) -> jax.Array:
        as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        return jax.lax.bitcast_convert_type(put(as_bits(stacked), as_bits(tensor), *place), stacked.dtype)

    # A CPU has no bfloat16 to XLA, which turns the numbers into float32 and back: 16 times slower than moving their bits.
    on_cpu = put_bits if stacked.dtype == jnp.bfloat16 else put
    return jax.lax.platform_dependent(stacked, tensor, *place, cpu=on_cpu, default=put)


def _tensor(
    source: Source, name: str, weight: naming.Weight, shape: tuple[int, ...], dtype: Any, where: NamedSharding,
    scratch: blocks.Scratch | None = None,
) -> jax.Array:  # fmt: skip
    """One tensor as an array in our orientation; of each region that this process's devices hold, one copy is read.

    In `scratch` it lasts until the next one.
    """

    def bounds(index: Any) -> blocks.Bounds:
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

    if weight.shape:  # dims of size 1, in small tensors
        whole = source.read(name).reshape(shape).astype(dtype)
        return jax.make_array_from_callback(shape, where, lambda index: whole[index])
    wanted = dict.fromkeys(map(bounds, where.addressable_devices_indices_map(shape).values()))
    found = blocks.regions(
        partial(source.read, name), source.shape(name), list(wanted), dtype, weight.transpose, scratch
    )
    return jax.make_array_from_callback(shape, where, lambda index: found[bounds(index)])


def tensors(
    family: ModuleType, model_config: Any, params: Mapping[str, jax.Array], dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, host array) one tensor at a time; every process of a multi-host run must iterate."""
    for name, (weight, place) in naming.hf_names(family.weights(model_config)).items():
        array = sharding.to_host(params[weight.ours][place] if place else params[weight.ours])
        array = np.swapaxes(array, -1, -2) if weight.transpose else array
        array = array.reshape(weight.on_disk(array.shape))
        yield name, np.ascontiguousarray(array.astype(dtype) if dtype else array)


@contextmanager
def new_folder(folder: Path, write: bool = True) -> Iterator[Path]:
    """Yields a folder to fill, which takes the place of `folder` at the end; after an error nothing of it is left.

    Where `folder` is a symbolic link, what it points to is replaced. With `write` False (processes other than the first)
    nothing is made or moved.
    """
    folder = folder.resolve()
    # A name of its own, for nobody's folder may be taken; not by tempfile, whose folders only their owner can read. The
    # workdir's copy in Cloud Storage leaves out what ends in ".tmp".
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    if not write:
        yield temporary
        return
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save(folder: Path, hf_config: dict[str, Any], named: Iterable[tuple[str, np.ndarray]], write: bool = True) -> None:
    """Writes `config.json`, `generation_config.json` and safetensors shards (at most 5 GB each, with an index).

    Use `new_folder` for a folder that appears whole or not at all. With `write` False only the iteration runs
    (processes other than the first).
    """
    from safetensors.numpy import save_file

    if write:
        folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    sizes, total, dtype = [0], 0, np.dtype(np.float32)
    files: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        path = folder / f"part-{len(files):05d}.safetensors"
        if write:
            save_file(shards[0], path, metadata={"format": "pt"})
        files.append((path, list(shards[0])))
        shards[0], sizes[0] = {}, 0

    for name, array in named:
        if sizes[0] and sizes[0] + array.nbytes > _SHARD_BYTES:
            flush()
        shards[0][name] = array
        sizes[0], total, dtype = sizes[0] + array.nbytes, total + array.nbytes, array.dtype
    flush()
    if not write:
        return
    _name_shards(folder, files, total)
    config = {k: v for k, v in hf_config.items() if k not in ("torch_dtype", "dtype", "_name_or_path")} | {
        "torch_dtype": dtype.name
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, **generation}, indent=2) + "\n"
    )


def _name_shards(folder: Path, files: list[tuple[Path, list[str]]], total: int) -> None:
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
