"""Checkpoints by orbax: state, data position and config together; written in the background, whole or not at all.

Which are kept: the latest two (temporary, by time), every n-th step (permanent), the best by validation loss, and the one that a
broken protected set would roll the run back to.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from jaxtune.config import ConfigDict, base, keys
from jaxtune.types import UserError
from jaxtune.validation_methods import ON_POLICY

# Fields that may differ between a checkpoint and the run that resumes it: none of them changes what is computed (`free`).
FREE = (
    "name", "workdir", "mesh.", "tracking.", "eval.", "generate.", "export.", "plan.", "checkpoint.", "model.attention",
    "data.prefetch_batches", "train.log_every_steps", "train.eval_", "train.patience", "train.remat", "train.save", "train.offload",
    "train.loss_chunk_tokens", "train.on_nonfinite", "train.max_skipped_steps", "compile_cache", "lr_find.", "sweep.", "optim.use_ema",
    "reward.", "protect.", "self_training.", "lineage.", "meta.shots", "meta.ways", "meta.draws", "meta.adapt_", "retain.fisher_rows",
    "merge.", "frontier.", "self_distill.", "review.", "guide.", "judging.", "audit.", "privacy.key_", "card.",
)  # fmt: skip
_REWARDS = ("reward.",)  # but where rewards are what is learned from
# May differ where a checkpoint is only used.
_STEERING = (
    "data.", "optim.", "train.", "meta.", "retain.penalties", "retain.kl_", "retain.fisher", "retain.replay", "retain.rewarm", "privacy.",
)  # fmt: skip
_LATEST = 2  # so that a damaged newest one has another before it


class Restored(NamedTuple):
    step: int
    state: Any
    progress: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Keep(checkpoint_managers.PreservationPolicy):
    """Keeps the latest, the last `keep` of every `every_steps`, the one with the lowest validation loss, and those of `held`."""

    every_steps: int
    keep: int
    held: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = set(steps[-_LATEST:]) | self.held
        if self.every_steps:
            kept |= set([step for step in steps if step % self.every_steps == 0][-self.keep :])
        measured = [info for info in checkpoints if info.metrics]
        if measured:
            kept.add(min(measured, key=lambda info: info.metrics["loss"]).step)
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager, or `close()`: a save may still be on its way."""

    def __init__(self, workdir: str, config: ConfigDict, data: str = "", resuming: bool = True):
        """`data` is a hash of the training rows. `resuming` asks that it and everything that steers training is as it was; else
        only what shapes the parameters.
        """
        # Orbax narrates every save, and prints a failed one's traceback from each thread, beside raising it.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._resuming, self._data = resuming, data
        self._held: set[int] = set()
        self._config, self.folder = config, epath.Path(workdir) / "checkpoints"
        self._back = epath.Path(workdir) / "rolled_back.json"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(config.checkpoint.every_steps, config.checkpoint.keep, self._held),
            cleanup_tmp_directories=True,
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
        )
        self._manager = ocp.CheckpointManager(
            self.folder.resolve() if "://" not in workdir else self.folder, options=options
        )

    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step that the run was rolled back to (0: there is none to use), else that with the lowest validation loss; None when
        none was measured."""
        if self._back.exists():
            return int(json.loads(self._back.read_text())["step"])
        return self._manager.best_step()

    def roll_back(self, step: int | None) -> None:
        """Makes `step` the best, whatever its validation loss; 0 = no checkpoint is; None = the validation loss decides."""
        if jax.process_index() == 0 and step is not None:
            self._back.write_text(json.dumps({"step": step}))
        elif jax.process_index() == 0:
            self._back.unlink(missing_ok=True)

    def save(self, step: int, state: Any, progress: dict[str, Any], loss: float | None = None) -> None:
        """Starts saving; returns once the arrays may be donated. `progress` is what the loop itself must remember.

        Raises:
          UserError: the disk is full.
        """
        if step in self._manager.all_steps():
            return
        self._held.clear()
        if self._config.protect.on_broken == "rollback":
            self._held.add(progress.get("within_step", 0))
        meta = {
            "config": json.loads(_config_json(self._config)),
            "progress": progress,
            "data_position_steps": step,
            "data": self._data,
            "checksums": _checksums(_storable(state)),
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(_storable(state)), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})
        except (OSError, ValueError, RuntimeError) as error:
            _raise_if_full(error, self.folder)
            raise

    def restore(self, shapes: Any, step: int | None = None) -> Restored | None:
        """Restores into `shapes` (with shardings, of any mesh): `step`, or the newest that is whole; None if there is none.

        A damaged checkpoint is named on stderr and the one before it is taken.

        Raises:
          UserError: the checkpoint is of another config, the step does not exist, or every checkpoint is damaged.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {steps or 'none'}")
        candidates = [step] if step is not None else steps[::-1]
        for candidate in candidates:
            try:
                meta = self._meta(candidate)
                self._check_meta(meta, candidate)
                args = ocp.args.Composite(state=ocp.args.StandardRestore(_storable(shapes)))
                state = self._manager.restore(candidate, args=args)["state"]
                if _checksums(state) != meta["checksums"]:
                    raise ValueError("its values are not those that were saved")
                return Restored(candidate, _usable(state, shapes), meta["progress"])
            except UserError:
                raise
            except Exception as error:  # whatever a broken file raises, in orbax, tensorstore or JSON
                reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
                print(
                    f"WARNING: checkpoint {self.folder / str(candidate)} is damaged ({reason})",
                    file=sys.stderr,
                    flush=True,
                )
                if candidate != candidates[-1]:
                    print("WARNING: falling back to the checkpoint before it", file=sys.stderr, flush=True)
        if candidates:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged (steps {candidates[::-1]}): start anew in another --workdir"
            )
        return None

    def check(self) -> None:
        """Refuses, before anything is loaded, a run that the newest checkpoint does not belong to.

        Raises:
          UserError: the checkpoint is of another config or of other training rows.
        """
        for step in self.steps()[-1:]:
            try:
                meta = self._meta(step)
            except Exception:  # damaged: `restore` names it, and looks at the one before
                return
            self._check_meta(meta, step)

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`: damaged ones that a resumed run will write again."""
        for newer in [s for s in self.steps() if s > step]:
            self._manager.delete(newer)

    def wait(self) -> None:
        """Returns when everything started is on disk.

        Raises:
          UserError: the disk is full.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            _raise_if_full(error, self.folder)
            raise

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _meta(self, step: int) -> dict[str, Any]:
        meta: dict[str, Any] = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return meta

    def _check_meta(self, meta: dict[str, Any], step: int) -> None:
        freed = free(self._config) if self._resuming else FREE + _STEERING
        changed = first_change(meta["config"], self._config, freed)
        if changed:
            key, then, value = changed
            raise UserError(
                f"checkpoint {self.folder / str(step)} is of another config: {key} was {then!r} and is now {value!r}; "
                f"set it back to resume, or start in another --workdir"
            )
        if self._resuming and self._data and meta.get("data", self._data) != self._data:
            raise UserError(
                f"checkpoint {self.folder / str(step)} was trained on other rows: data.train ({self._config.data.train}), its "
                "tokenizer or its chat template has changed since; put it back to resume, or start in another --workdir"
            )


def free(config: ConfigDict) -> tuple[str, ...]:
    """How the names of fields begin that may differ where a run of this config is resumed."""
    learns = config.train.objective in ON_POLICY
    return tuple(name for name in FREE if not (learns and name in _REWARDS))


def first_change(saved: dict[str, Any], config: ConfigDict, free: tuple[str, ...]) -> tuple[str, Any, Any] | None:
    """(field, what it was, what it is) of the first field that differs from a saved config; None where none does.

    Fields whose names begin like one of `free` may differ.
    """
    now = json.loads(_config_json(config))
    for key in keys(config):
        if key.startswith(free):
            continue
        then, value = saved, now
        try:
            for part in key.split("."):
                then, value = then[part], value[part]
        except KeyError:
            continue  # a field that the saved config's jaxtune did not have
        if then != value:
            return key, then, value
    return None


def _config_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), default=list)


@jax.jit
def _sums(tree: Any) -> list[jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32), dtype=jnp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def _checksums(tree: Any) -> list[int]:
    """The sum of each leaf's bits, as whole numbers modulo 2^32: the same on every mesh. Storage keeps none of its own."""
    return [int(value) for value in _sums(tree)]


def _storable(state: Any) -> Any:
    """Typed PRNG keys as their raw data: what orbax's standard handler stores."""

    def one(leaf: Any) -> Any:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)

    return jax.tree.map(one, state)


def _usable(stored: Any, shapes: Any) -> Any:
    def one(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        is_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(leaf) if is_key else leaf

    return jax.tree.map(one, stored, shapes)


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on a file's size is used up; libraries in C++ and Rust say it in words alone."""
    words = ("No space left on device", "Disk quota exceeded", "File too large")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(error) for word in words
    )


def _raise_if_full(error: Exception, folder: Any) -> None:
    if is_full(error) or "RESOURCE_EXHAUSTED" in str(error):
        raise UserError(
            f"disk full while saving to {folder}: free space, then run again with --config.checkpoint.resume=True"
        ) from None


def is_used(workdir: str) -> bool:
    """Whether a training run has taken a step in this workdir; one that failed before has left nothing to lose."""
    folder = epath.Path(workdir)
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    return (
        (folder / "predictions.jsonl").exists()
        or (metrics.exists() and metrics.stat().length > 0)
        or (checkpoints.exists() and any(path.name.isdigit() for path in checkpoints.iterdir()))
    )


def check_workdir(workdir: str, resume: bool) -> None:
    """Refuses a workdir where training would overwrite what is somebody's: an earlier run, or a model's own config.

    Raises:
      UserError: saying what is there.
    """
    if not resume and is_used(workdir):
        raise UserError(
            f"workdir {workdir} holds an earlier run: add --config.checkpoint.resume=True to go on with it, or choose another "
            "--workdir"
        )
    file = epath.Path(workdir) / "config.json"
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(found) <= set(base()):
        raise UserError(
            f"workdir {workdir} holds a config.json that is not a run's (a model's?), which training would overwrite; choose "
            "another --workdir"
        )
