"""Log-probabilities by a reference that is not in the step: computed once, before training, and kept in the workdir."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np

from jaxtune import sharding, tracking
from jaxtune.config import ConfigDict, base
from jaxtune.data import preferences as rows_of
from jaxtune.data.batches import Rows
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.objectives.logps import token_logps
from jaxtune.train import preferences, rows, start, step, teachers
from jaxtune.train.state import Params, Program
from jaxtune.types import Batch, UserError
from jaxtune.weights import source

_FIELDS = ("tokens_BT", "targets_BT", "weights_BT", "segment_ids_BT", "positions_BT")


def filled(
    config: ConfigDict,
    workdir: Path | None,
    data: rows.Rows,
    tokenizer: Tokenizer,
    program: Program,
    params: Params,
    show: Any,
) -> rows.Rows:
    """Returns a run's rows with what the reference, or a teacher, gives each token, where the objective reads that from the batch.

    `params` are all of the model's, as training starts from. What a run that was stopped had computed is used again; without
    a `workdir` nothing is kept.

    Raises:
      UserError: another model is the reference and cannot be had, or splits text into other tokens.
    """
    if not preferences.is_precomputed(config):
        return teachers.filled(config, workdir, data, program, params, show)
    kept = {name: one for name, one in (("train", data.train), ("validation", data.validation)) if one is not None}
    file, asked = workdir and workdir / "reference.npz", _asked(config, kept)
    found = _read(file, asked) if file else None
    if found is None:
        score = _scorer(config, tokenizer, program, params, show)
        options = (config.data, config.train.batch_size, tokenizer.pad_id, show)
        made = {
            name: rows_of.with_reference(one, score, *options, f"reference, {name} rows") for name, one in kept.items()
        }
        found = {name: one.reference_logps for name, one in made.items() if one.reference_logps is not None}
        if file:
            _write(file, asked, found)
    train = replace(data.train, reference_logps=found["train"])
    validation = data.validation and replace(data.validation, reference_logps=found["validation"])
    data.batches.rows = train
    return data._replace(train=train, validation=validation)


def _asked(config: ConfigDict, kept: dict[str, Rows]) -> str:
    """A hash of all that the numbers depend on."""
    settings = {"model": config.model.to_dict(), "adapter": config.tune.adapter, "seed": config.train.seed}
    settings |= {"reference": preferences.reference(config), "rows": {name: one.digest for name, one in kept.items()}}
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()


def _read(file: Path, asked: str) -> dict[str, np.ndarray] | None:
    if jax.process_count() > 1 or not file.exists():  # hosts may not see the same files
        return None
    try:
        with file.open("rb") as opened, np.load(opened) as saved:
            found = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, BadZipFile):  # cut short
        return None
    return found if str(found.pop("asked", "")) == asked else None


def _write(file: Path, asked: str, found: dict[str, np.ndarray]) -> None:
    if jax.process_count() > 1:
        return
    partial = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tracking.writing(file), partial.open("wb") as opened:
        np.savez(opened, asked=np.asarray(asked), **found)  # type: ignore[arg-type]
    partial.replace(file)


def _scorer(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, params: Params, show: Any
) -> Callable[[Batch], np.ndarray]:
    """Returns batch -> log-probability of each token's target (B, T), 0 where nothing trains."""
    if preferences.reference(config) != "start":
        program, params = _other(config, tokenizer, show)
    num_rows, mesh = config.train.batch_size, program.mesh
    chunk_tokens, mine = step.chunk_tokens(config, program, num_rows), sharding.host_rows(mesh, num_rows)

    @jax.jit
    def run(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        policy = step.policy(program, params, chunk_tokens)
        return token_logps(policy.head, policy.hidden(batch, None), batch["targets_BT"], batch["weights_BT"])

    def score(batch: Batch) -> np.ndarray:
        arrays = sharding.to_global({name: batch[name][mine] for name in _FIELDS}, mesh, num_rows)
        return sharding.to_host(run(params, arrays))

    return score


def _other(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> tuple[Program, Params]:
    """Another model, as it stands: an adapter of rank 1 that changes nothing, so that no optimizer state is made for it."""
    uri = preferences.reference(config)
    config = config.copy_and_resolve_references()
    config.model.source, config.model.tokenizer, config.tune.adapter, config.model.keep_layers = uri, "", "", ()
    config.tune.method, config.tune.rank, config.tune.use_dora = "lora", 1, False
    config.preference.reference, config.train.beside = "adapter_off", ()
    config.retain, config.tune.freeze, config.tune.train_layers = base().retain, (), ()
    model = source.find(config)
    if model.path is not None:
        source.check_same_tokens(source.find_tokenizer(config, model), tokenizer, f"preference.reference={uri!r}")
    elif int(model.hf_config.get("vocab_size") or 0) < tokenizer.vocab_size:
        raise UserError(f"preference.reference={uri!r} knows fewer tokens than this model's tokenizer makes")
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, show)
    return program, {**frozen, **state.params}
