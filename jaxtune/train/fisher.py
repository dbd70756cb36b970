"""The diagonal of the Fisher information of what trains, from the gradient of each row by itself (arXiv:1612.00796).

    F_i = mean over rows of (d/d theta_i of log p(labels | row))^2

A row is one example: its log-likelihood is the sum over its trained tokens. The square is taken of each row's gradient, never of
a batch's mean, whose square is smaller by as much as rows disagree. With `retain.fisher_labels="sampled"` every trained token's
label is drawn from what the model says after the row's own tokens, which makes it the Fisher information of the model
(arXiv:1412.1193, section 9.2); with "data" they are the row's own: the empirical one.

Computed once, before training, and kept in WORKDIR/fisher.safetensors, from where a resumed run and later ones read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import fetch, registry, sharding, tracking
from jaxtune.config import ConfigDict
from jaxtune.data import batches, masking
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models import reading
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.ops import Head, Objective, Policy
from jaxtune.train import beside, retention, rows, start, step
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError
from jaxtune.weights.source import Model

FILE = "fisher.safetensors"
_CLASSING = (
    "mlm",
    "classify",
    "token_classify",
)  # objectives with a likelihood of their own; of the others it is that of text


def with_penalties(
    config: ConfigDict, workdir: Path | None, model: Model, tokenizer: Tokenizer, program: Program, trained: Params, frozen: Params, show: Any
) -> Params:  # fmt: skip
    """The frozen parameters of a run that begins with `trained`: with what its penalties compare with. Without `workdir`, nothing is kept.

    Raises:
      UserError: there are no rows for the Fisher information, or an earlier one is not of these parameters.
    """

    def found() -> Mapping[str, np.ndarray]:
        return information(config, workdir, model, tokenizer, program, trained, frozen, show)

    return {**frozen, **retention.arrays(config, program, trained, found)}


def information(
    config: ConfigDict, workdir: Path | None, model: Model, tokenizer: Tokenizer, program: Program, trained: Params, frozen: Params, show: Any
) -> Mapping[str, np.ndarray]:  # fmt: skip
    """The Fisher information of each trained parameter, float32: that of `retain.fisher_data`, and of earlier tasks times its decay."""
    earlier = _earlier(config, trained) if config.retain.fisher else None
    asked, data, own = _asked(config, earlier), None, None
    if config.retain.fisher_data:
        own = _rows_config(config)
        reader = start.reader(own, model, tokenizer)
        _, data = rows.aside(own, tokenizer, show, "Fisher information", reader)
        data = masking.fixed(data, reader.masking) if reader.masking else data
        asked = hashlib.sha256((asked + data.digest).encode()).hexdigest()
    file = workdir / FILE if workdir else None
    kept = _read(file, asked) if file else None
    if kept is not None:
        return kept
    now = diagonal(own, program, trained, frozen, data, tokenizer.pad_id, show) if own is not None and data else {}
    before = {path: config.retain.fisher_decay * value for path, value in (earlier or {}).items()}
    total = {path: np.asarray(now.get(path, 0) + before.get(path, 0), np.float32) for path in trained}
    if file and jax.process_index() == 0:
        _write(file, asked, total)
    return total


def diagonal(
    config: ConfigDict, program: Program, trained: Params, frozen: Params, data: batches.Rows, pad_id: int, show: Any
) -> dict[str, np.ndarray]:
    """The diagonal over `data`, rows taken `retain.fisher_rows` at a time; `config` says how they are read and labelled."""
    found = _objective(config, program)
    sampled = config.retain.fisher_labels == "sampled"
    if sampled and "targets_BT" not in found.fields:
        raise UserError(
            "retain.fisher_labels='sampled' draws one label for a token, and this model's head scores several, or a number: set 'data'"
        )
    shards, mesh = sharding.num_batch_shards(program.mesh), program.mesh
    size = -(-config.retain.fisher_rows // shards) * shards
    chunk_tokens = max(1, config.train.loss_chunk_tokens // (size // shards))
    add, mine = _adding(program, found, chunk_tokens, sampled, config.train.seed), sharding.host_rows(mesh, size)
    sums: Params = {path: jnp.zeros_like(value, jnp.float32) for path, value in trained.items()}
    length = config.data.max_length
    steps = -(-len(data) // size)
    for number, batch in enumerate(
        show(batches.eval_batches(data, length, False, size, pad_id), steps, "Fisher information")
    ):
        arrays = sharding.to_global({name: batch[name][mine] for name in found.fields}, mesh, size)
        sums = add(sums, trained, frozen, arrays, number * size)
    return {path: sharding.to_host(value) / len(data) for path, value in sums.items()}


def _adding(program: Program, found: Objective, chunk_tokens: int, sampled: bool, seed: int) -> Any:
    """Returns the jitted (sums, trained, frozen, batch, first) -> sums, with the squared gradient of each of the batch's rows.

    `first` is the number of the first of them: what is drawn for a row depends on its number alone.
    """

    def nll(trained: Params, frozen: Params, row: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        policy = step.policy(program, {**frozen, **trained}, chunk_tokens, graphdef=program.inference)
        if sampled:
            row = row | {"targets_BT": labels(policy, row, key)}
        return found.loss(policy, {}, row, None)[0]

    def add(sums: Params, trained: Params, frozen: Params, batch: dict[str, jax.Array], first: jax.Array) -> Params:
        rows_of = {name: x[:, None] for name, x in batch.items()}  # each a batch of one
        key = jax.random.key(seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(next(iter(batch.values())).shape[0]))
        each = jax.vmap(jax.grad(nll), in_axes=(None, None, 0, 0))(trained, frozen, rows_of, keys)
        return {path: total + _squares(each[path], program.state.params[path].sharding) for path, total in sums.items()}

    return jax.jit(add, donate_argnums=0)


def _squares(grads: jax.Array, where: NamedSharding) -> jax.Array:
    """The sum over rows of squared gradients (rows, …), which lie as their parameter does: rows' devices exchange tokens instead."""
    spread = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    grads = jax.lax.with_sharding_constraint(grads, spread).astype(jnp.float32)
    return jnp.sum(grads**2, axis=0)


def labels(policy: Policy, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """(B, T) int32: for each token a label drawn from what the model says of it, a chunk of the projection at a time."""
    head: Head = policy.head
    hidden_BTD = policy.hidden(batch, None)
    B, T, D = hidden_BTD.shape
    chunk = min(head.chunk_tokens, T)
    pad = -T % chunk
    chunks_NBTD = jnp.moveaxis(
        jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, (T + pad) // chunk, chunk, D), 1, 0
    )
    # A key for each token, so that neither chunks nor a mesh change what is drawn.
    keys_NT = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(T + pad)).reshape(-1, chunk)

    def draw(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits_BTV = head.apply(head.params, xs[0])
        return jax.vmap(jax.random.categorical, (0, 1), 1)(xs[1], logits_BTV)

    drawn = jax.lax.map(draw, (chunks_NBTD, keys_NT))
    return jax.lax.stop_gradient(jnp.moveaxis(drawn, 0, 1).reshape(B, T + pad)[:, :T].astype(jnp.int32))


def _objective(config: ConfigDict, program: Program) -> Objective:
    """What the log-likelihood of a row is, plain: shaped losses are no likelihoods."""
    found: Objective = registry.load("objective", config.train.objective, OBJECTIVES).OBJECTIVE
    return found.problems.get(reading.problem(program.hf_config), found)


def _rows_config(config: ConfigDict) -> ConfigDict:
    own = beside.with_data(config, config.retain.fisher_data)
    own.train.objective = config.train.objective if config.train.objective in _CLASSING else "sft"
    own.train.beside, own.train.class_weights = (), ()
    return own


# ---- kept ----


def _asked(config: ConfigDict, earlier: Mapping[str, np.ndarray] | None) -> str:
    """A hash of all that the information depends on, rows apart."""
    retain = {key: value for key, value in config.retain.items() if key.startswith("fisher") and key != "fisher_rows"}
    settings = {
        "model": config.model.to_dict(),
        "tune": config.tune.to_dict(),
        "seed": config.train.seed,
        "retain": retain,
    }
    settings["merged"] = (config.retain.merge_earlier, config.retain.earlier_adapters)
    hashed = hashlib.sha256(json.dumps(settings, default=str).encode())
    for path in sorted(earlier or {}):
        hashed.update(np.ascontiguousarray((earlier or {})[path]).data)
    return hashed.hexdigest()


def _earlier(config: ConfigDict, trained: Params) -> dict[str, np.ndarray]:
    """The information that `retain.fisher` names.

    Raises:
      UserError: there is none, or it is not of these parameters.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    place = fetch.local(config.retain.fisher)
    file = place / FILE if place.is_dir() else place
    try:
        found: dict[str, np.ndarray] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"retain.fisher={config.retain.fisher!r}: cannot read {file} ({error}); expected the workdir of a run with the penalty 'ewc', "
            f"or its {FILE}"
        ) from None
    for path in sorted({*found, *trained}):
        theirs, ours = found.get(path), trained.get(path)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            sides = [None if side is None else tuple(side.shape) for side in (theirs, ours)]
            raise UserError(
                f"retain.fisher={config.retain.fisher!r} is of other parameters: {path} is {sides[0] or 'not there'}, and here "
                f"{sides[1] or 'nothing that trains'}; expected a run of the same model, tune.method, tune.rank and tune.targets"
            )
    return found


def _read(file: Path, asked: str) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError, safe_open

    if jax.process_count() > 1 or not file.exists():  # hosts may not see the same files
        return None
    try:
        with safe_open(file, "np") as opened:
            if (opened.metadata() or {}).get("asked") != asked:
                return None
            return {path: opened.get_tensor(path) for path in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):  # cut short
        return None


def _write(file: Path, asked: str, found: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    partial = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tracking.writing(file):
        save_file(dict(found), partial, metadata={"asked": asked})
        partial.replace(file)
