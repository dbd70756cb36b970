"""What a teacher that is not in the step says of the training rows: computed once, before training, streamed to WORKDIR/teacher.

Of each token that trains, the teacher's likeliest words and their log-probabilities. A run that was stopped goes on where it was,
and the next one reads what is there. The figures depend on the teacher, the rows and how both are compared: a folder
that was made of others is refused, for it may have cost hours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import sharding, tracking
from jaxtune.config import ConfigDict
from jaxtune.data.batches import BatchSource, Rows, TeacherWords, eval_batches, make_bins
from jaxtune.objectives.divergences import Form, Likeliest, likeliest
from jaxtune.objectives.ops import TOKEN_FIELDS
from jaxtune.train import guests, rows, start, state, step
from jaxtune.train.state import Params, Program
from jaxtune.types import Batch, UserError
from jaxtune.workdir import write_whole

_FLUSH_BATCHES = 16  # what a kill costs at most
_TOLD = {"rows": "other rows", "teacher": "another teacher", "form": "another distill.top_k, temperature or non_target"}


def filled(
    config: ConfigDict, workdir: Path | None, data: rows.Rows, program: Program, params: Params, show: Any
) -> rows.Rows:
    """Returns a run's rows with the teacher's likeliest words of each token, where `distill.mode` has them precomputed.

    `params` are all of the model's, as training starts.

    Raises:
      UserError: the folder is of other rows or another teacher; the teacher is not to be had; the disk is full.
    """
    if config.train.objective != "distill" or config.distill.mode != "precomputed":
        return data
    assert workdir is not None
    assert isinstance(data.batches, BatchSource)
    host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
    folder = workdir / f"teacher{host}"
    kept = {name: one for name, one in (("train", data.train), ("validation", data.validation)) if one is not None}
    about = _about(config, kept)
    done = _done(folder, about)
    say = None
    found = {}
    for name, one in kept.items():
        number = len(make_bins(one, config.data.max_length, config.data.packing))
        number = -(-number // config.train.batch_size)
        if done.get(name, 0) < number:
            say = say or _speaker(config, program, params, show)
            _write(config, folder, name, one, say, about, done, data.batches.pad_id, show)
        found[name] = replace(one, teacher=_words(folder, name, one, config.distill.top_k, "r"))
    data.batches.rows = found["train"]
    return data._replace(train=found["train"], validation=found.get("validation"))


def _about(config: ConfigDict, kept: dict[str, Rows]) -> dict[str, Any]:
    """What the figures depend on, in the words of `_TOLD`."""
    distill, data = config.distill, config.data
    teacher: list[Any] = [distill.teacher, distill.teacher_adapter, distill.teacher_quantize, config.model.param_dtype]
    if distill.teacher in guests.SELVES:
        teacher += [config.model.source, list(config.model.keep_layers), config.tune.adapter, config.train.seed]
    laid_out = [data.max_length, data.packing, config.train.batch_size]
    about = {
        "rows": [{name: one.digest for name, one in kept.items()}, laid_out],
        "teacher": teacher,
        "form": [distill.temperature, distill.top_k, distill.non_target],
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def _done(folder: Path, about: dict[str, Any]) -> dict[str, int]:
    """How many batches of each split are there."""
    file = folder / "about.json"
    if not file.exists():
        return {}
    told = json.loads(file.read_text())
    changed = next((what for name, what in _TOLD.items() if told.get(name) != about[name]), None)
    if changed:
        raise UserError(
            f"{folder} holds what a teacher said of {changed}: choose another --workdir, or delete that folder to have it said anew"
        )
    done: dict[str, int] = told["done"]
    return done


def _words(folder: Path, name: str, one: Rows, top_k: int, mode: Any) -> TeacherWords:
    """The arrays of one split as files, of `mode` r or w+."""
    trained = one.weights != 0
    shape = (int(trained.sum()), top_k + 1)

    def mapped(kind: str, dtype: Any) -> np.ndarray:
        file = folder / f"{name}_{kind}.npy"
        if mode == "w+" and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return np.lib.format.open_memmap(file, "w+", dtype, shape)
        return np.lib.format.open_memmap(file, "r" if mode == "r" else "r+")

    at = np.where(trained, np.cumsum(trained) - 1, -1)
    return TeacherWords(mapped("logps", np.float32), mapped("ids", np.int32), at)


def _write(
    config: ConfigDict, folder: Path, name: str, one: Rows, say: Callable[[Batch], Likeliest], about: dict[str, Any],
    done: dict[str, int], pad_id: int, show: Any,
) -> None:  # fmt: skip
    """Has the teacher say what is lacking of one split."""
    size, data = config.train.batch_size, config.data
    bins = make_bins(one, data.max_length, data.packing)
    starts = range(0, len(bins), size)
    with tracking.writing(folder / "about.json"):
        words = _words(folder, name, one, config.distill.top_k, "w+")
        batches = eval_batches(one, data.max_length, data.packing, size, pad_id)
        for number, (first, batch) in enumerate(
            zip(show(starts, len(starts), f"teacher, {name} rows"), batches, strict=True)
        ):
            if number < done.get(name, 0):
                continue
            words.take(say(batch), one.offsets, bins[first : first + size])
            if (number + 1) % _FLUSH_BATCHES == 0 or number + 1 == len(starts):
                words.flush()
                done[name] = number + 1
                write_whole(folder / "about.json", json.dumps(about | {"done": done}))


def _speaker(config: ConfigDict, program: Program, params: Params, show: Any) -> Callable[[Batch], Likeliest]:
    """Returns batch -> the teacher's likeliest words of each token, on the host."""
    distill, num_rows, mesh = config.distill, config.train.batch_size, program.mesh
    form = Form(temperature=distill.temperature, top_k=distill.top_k, non_target=distill.non_target)
    chunk_tokens, mine = step.chunk_tokens(config, program, num_rows), sharding.host_rows(mesh, num_rows)
    num_words = program.model_config.vocab_size
    if distill.teacher not in guests.SELVES:
        program = guests.teacher(config, program, state.abstract)
        params = guests.loaded(config, program, start.load, show)
    make = step.reference if distill.teacher == "adapter_off" else step.policy

    @jax.jit
    def run(params: Params, batch: dict[str, jax.Array]) -> Likeliest:
        teacher = make(program, params, chunk_tokens)
        return likeliest(teacher.head, teacher.hidden(batch, None), batch["targets_BT"], form, num_words)

    def say(batch: Batch) -> Likeliest:
        arrays = sharding.to_global({name: batch[name][mine] for name in TOKEN_FIELDS}, mesh, num_rows)
        found: Likeliest = jax.tree.map(sharding.to_host, run(params, arrays))
        return found

    return say
