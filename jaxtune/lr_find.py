"""The verb `lr_find`: a learning rate by a ramp (arXiv:1506.01186, section 3.3), on copies; nothing of a run is touched."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxtune import optim, pictures, sharding, tracking
from jaxtune.config import ConfigDict
from jaxtune.models import transformer
from jaxtune.train import fisher, references, start, step
from jaxtune.train import rows as rows_lib
from jaxtune.train.state import Params, Program, State
from jaxtune.types import Batch, UserError
from jaxtune.validation_methods import ON_POLICY
from jaxtune.weights import source
from jaxtune.workdir import shown


class Found(NamedTuple):
    """What a ramp saw, a step each; `smooth` is the running mean of the loss.

    `suggestion` is the rate at which the mean falls fastest, None where it never falls; `lowest` the one at which it is
    lowest; `diverged` says whether the ramp ended because the loss rose.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    suggestion: float | None
    lowest: float
    diverged: bool


def lr_find(config: ConfigDict, workdir: Path) -> None:
    """Ramps the learning rate on the run's own rows and model; writes lr_find.json and lr_find.png, and says what it found."""
    config = config.copy_and_resolve_references()
    config.train.steps, config.optim.ema_decay = config.lr_find.num_steps, 0.0
    if config.train.objective in ON_POLICY:
        raise UserError(
            f"lr_find ramps over rows, and the model writes those of train.objective={config.train.objective!r} itself: compare rates "
            "with sweep"
        )
    if config.train.objective == "distill" and (config.distill.mode != "online" or config.distill.on_policy):
        raise UserError(
            f"lr_find ramps over the rows that are there, and distill.mode={config.distill.mode!r} with distill.on_policy="
            f"{config.distill.on_policy} makes others: set 'online' and 0.0 for it, or compare rates with sweep"
        )
    show = partial(tracking.progress, mode=config.tracking.progress if jax.process_index() == 0 else "off")
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    reader = start.reader(config, model, tokenizer)
    rows = rows_lib.read(config, tokenizer, show, reader, start.beside(config, model, tokenizer))
    program, values = start.program(config, model)
    start.check_length(config, program)
    state, frozen = start.load(config, model, program, values, show)
    rows = references.filled(config, None, rows, tokenizer, program, {**frozen, **state.params}, show)
    frozen = fisher.with_penalties(config, None, model, tokenizer, program, state.params, frozen, show)
    batches = rows_lib.for_loop(config, rows, tokenizer, program).train(0, config.lr_find.num_steps, lambda: {})
    found = find(config, program, state, frozen, show(batches, config.lr_find.num_steps, "learning rates"))
    if jax.process_index() == 0:
        _write(config, workdir, found)


def rate(config: ConfigDict) -> optax.Schedule:
    """From `lr_find.low` to `lr_find.high`, by the same factor each step."""
    ramp = config.lr_find
    return optax.exponential_decay(ramp.low, ramp.num_steps - 1, ramp.high / ramp.low)


def find(config: ConfigDict, program: Program, state: State, frozen: Params, batches: Iterator[Batch]) -> Found:
    """Takes steps from a copy of `state`, at ever higher rates, until the loss rises or the batches end."""
    depths, ramp = partial(transformer.depths, program.model_config), rate(config)
    optimizer = optim.make(config, program.labels, config.lr_find.num_steps, depths, ramp)
    run = step.make(config, program._replace(optimizer=optimizer))
    fields, options = step.fields(config, program), config.lr_find
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    losses: list[float] = []
    smooth: list[float] = []
    mean, diverged = 0.0, False
    for batch in batches:
        arrays = sharding.to_global({name: batch[name] for name in fields}, program.mesh, config.train.batch_size)
        state, metrics = run(state, frozen, arrays)
        loss = float(metrics["loss"])
        diverged = not math.isfinite(loss)
        if diverged:
            break
        losses.append(loss)
        mean = options.smoothing * mean + (1 - options.smoothing) * loss
        smooth.append(mean / (1 - options.smoothing ** len(losses)))
        diverged = smooth[-1] > options.stop_factor * min(smooth)
        if diverged:
            break
    rates = [float(ramp(number)) for number in range(len(losses))]
    return suggest(rates, losses, smooth, diverged)


def suggest(rates: list[float], losses: list[float], smooth: list[float], diverged: bool) -> Found:
    """Reads a ramp: the steepest fall over the rate's logarithm, of the points before the lowest.

    Raises:
      UserError: the loss was not finite from the start.
    """
    if len(smooth) < 2:
        raise UserError("the loss is not finite at lr_find.low already: lower it, or mend the data or the model")
    lowest = int(np.argmin(smooth))
    slopes = np.gradient(np.asarray(smooth), np.log(rates))[: lowest + 1]
    steepest = int(np.argmin(slopes))
    suggestion = rates[steepest] if slopes[steepest] < 0 else None
    return Found(rates, losses, smooth, suggestion, rates[lowest], diverged)


def _write(config: ConfigDict, workdir: Path, found: Found) -> None:
    told: dict[str, Any] = found._asdict()
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "lr_find.json"
    with tracking.writing(path):
        path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    marks = [(found.lowest, f"lowest, {found.lowest:.2g}")]
    marks += [(found.suggestion, f"steepest, {found.suggestion:.2g}")] if found.suggestion else []
    panel = pictures.Panel(
        "Loss over a rising learning rate",
        "learning rate",
        "loss, running mean",
        found.rates,
        found.smooth,
        True,
        marks,
    )
    drawn = pictures.png(path.with_suffix(".png"), [panel])
    ended = "then it rises" if found.diverged else f"and it had not risen by lr_find.high={config.lr_find.high:g}"
    if found.suggestion is None:
        print(
            f"the loss never fell between {found.rates[0]:.2g} and {found.rates[-1]:.2g}: set another lr_find.low or .high"
        )
    else:
        print(
            f"suggested: --config.optim.learning_rate={found.suggestion:.1e} (the loss falls fastest there; it is lowest at "
            f"{found.lowest:.1e}, {ended})"
        )
    files = f"{shown(config.workdir, workdir, path)}" + (
        " and .png" if drawn else "; pip install 'jaxtune[report]' adds a plot"
    )
    print(f"{len(found.losses)} steps in {files}; no weights were changed")
