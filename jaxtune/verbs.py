"""What the verbs of `run.py` share, and the parts of `train` in the order in which it calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import checkpoint, model_card, optim, tracking, validation
from jaxtune.config import ConfigDict
from jaxtune.data import privacy, templates
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, protected, tasks
from jaxtune.train import fisher, goodput, guests, loop, references, sequences, start
from jaxtune.train import rows as rows_lib
from jaxtune.train.start import Adapter
from jaxtune.train.state import Params, Program, State
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import write_whole


def progress(config: ConfigDict) -> Callable[..., Iterator[Any]]:
    return partial(tracking.progress, mode=config.tracking.progress if jax.process_index() == 0 else "off")


def say(config: ConfigDict, text: str) -> None:
    if jax.process_index() == 0 and config.tracking.progress != "off":
        print(text, file=sys.stderr, flush=True)


def list_private(workdir: Path, splits: Sequence[tuple[str, Sequence[Example]]]) -> dict[str, Any]:
    """Lists in personal_data.csv where the rows of these splits held personal data, and returns the counts."""
    counts = privacy.counts(example.personal for _, examples in splits for example in examples)
    found = [(split, one.row_id, one.personal) for split, examples in splits for one in examples if one.personal]
    write_whole(workdir / "personal_data.csv", privacy.table(found))
    return counts


class Asked(NamedTuple):
    """What a config asks for, read and checked: nothing is on the devices yet. `values` are those of a starting adapter."""

    model: source.Model
    tokenizer: Tokenizer
    rows: rows_lib.Rows
    held: measure.HeldOut | None
    sets: list[protected.Protected]
    program: Program
    values: Adapter | None


def asked(config: ConfigDict, workdir: Path, wall: goodput.Wall) -> Asked:
    """Fetches, tokenises, plans; refuses what could not be trained, measured or exported, and says what there is."""
    show = progress(config)
    checkpoint.check_workdir(config.workdir, config.checkpoint.resume)
    tracking.check(config.tracking)
    if config.card.enabled:
        model_card.check(config.card)
    with wall("fetch"):
        model = source.find(config)
        tokenizer = source.find_tokenizer(config, model)
    with wall("tokenise"):
        reader, taught = start.reader(config, model, tokenizer), partial(sequences.taught, config, workdir, show=show)
        rows = rows_lib.read(config, tokenizer, show, reader, start.beside(config, model, tokenizer), taught)
        held = measure.held_out(config, rows.splits, tokenizer, reader)
        sets = protected.read(config, tokenizer, show, reader)
        validation.check_profile(config)
    if config.privacy.enabled and jax.process_index() == 0:
        list_private(workdir, [(name, getattr(rows.splits, name)) for name in ("train", "validation", "test")])
    if config.checkpoint.resume:
        with checkpoint.Checkpoints(config.workdir, config, rows.digest) as checkpoints:
            checkpoints.check()
    with wall("program"):
        program, values = start.program(config, model)
        start.check_length(config, program)
        start.check_export(config, program)
    measure.check(config, held, tokenizer, program)
    protected.check(sets, tokenizer, program)
    lacking = [] if held else [measure.nothing_held(config)]
    say(config, "\n".join([start.summary(model, program), rows_lib.summary(config, rows), *lacking]))
    return Asked(model, tokenizer, rows, held, sets, program, values)


def compared(
    config: ConfigDict, workdir: Path, model: source.Model, tokenizer: Tokenizer, program: Program, rows: rows_lib.Rows, state: State,
    frozen: Params, show: Any,
) -> tuple[rows_lib.Rows, Params]:  # fmt: skip
    """The rows with what a reference and a teacher say of them, and the frozen parameters with what penalties compare with."""
    rows = references.filled(config, workdir, rows, tokenizer, program, {**frozen, **state.params}, show)
    return rows, fisher.with_penalties(config, workdir, model, tokenizer, program, state.params, frozen, show)


def before(
    config: ConfigDict, workdir: Path, held: measure.HeldOut | None, tokenizer: Tokenizer, program: Program, params: Params,
    show: Any,
) -> tasks.Result | None:  # fmt: skip
    """The untuned model's result: measured once, kept in the workdir for a run that resumes and asks the same."""
    if held is None or not config.eval.before_after:
        return None
    file, asked = workdir / "before.json", measure.asked(config, held)
    if config.checkpoint.resume and jax.process_count() == 1 and file.exists():  # hosts may not see the same files
        kept = tasks.from_json(file.read_text(), asked)
        if kept is not None:
            return kept
        say(config, "what is measured has changed since the run began: the untuned model is measured again")
    result = measure.measure(config, held, tokenizer, program, params, show, "before")
    if jax.process_index() == 0:
        write_whole(file, tasks.to_json(result, asked))
    return result


def best(
    config: ConfigDict,
    checkpoints: checkpoint.Checkpoints,
    program: Program,
    outcome: loop.Outcome,
    step: int | None = None,
) -> Params:
    """The trained parameters of `step`; by default of that with the lowest validation loss, the last where none was measured."""
    best_step = outcome.progress.best_step if step is None else step
    best = checkpoints.restore(program.state, best_step) if best_step not in (0, outcome.steps) else None
    return optim.in_use(config.optim, best.state if best else outcome.state)


def after(
    config: ConfigDict, held: measure.HeldOut | None, tokenizer: Tokenizer, program: Program, params: Params, show: Any,
    wall: goodput.Wall,
) -> tuple[tasks.Result | None, dict[str, tasks.Result]]:  # fmt: skip
    """The trained model's result on the held-out rows, and what others make of them."""
    if held is None:
        return None, {}
    with wall("evaluation"):
        after = measure.measure(config, held, tokenizer, program, params, show, "after")
        return after, measure.beside(config, held)


def resumed(
    config: ConfigDict, workdir: Path, checkpoints: checkpoint.Checkpoints, program: Program, state: State
) -> tuple[State, loop.Progress]:
    """What training goes on from: with `checkpoint.resume` the newest checkpoint, else the first state."""
    restored = checkpoints.restore(program.state) if config.checkpoint.resume else None
    if restored is not None:
        checkpoints.forget_after(restored.step)
        say(config, f"resuming after step {restored.step} of {config.train.steps}")
        return restored.state, loop.Progress(**restored.progress)
    if config.checkpoint.resume:
        kept = tracking.set_aside(workdir / "metrics.jsonl") if jax.process_index() == 0 else None
        note = f"; the steps that metrics.jsonl holds were lost, and are in {kept.name}" if kept else ""
        say(config, f"{config.workdir} has no checkpoint to resume from: starting at step 0{note}")
    return state, loop.Progress()


def trained(config: ConfigDict, program: Program) -> tuple[int, Params] | None:
    """(step, trainable parameters) of the checkpoint that `export.checkpoint` names; None where there are none."""
    wanted = config.export.checkpoint
    if not checkpoint.is_used(config.workdir):
        return None
    if wanted not in ("best", "latest") and not wanted.isdigit():
        raise UserError(f"export.checkpoint={wanted!r}; expected 'best', 'latest' or a step number")
    with checkpoint.Checkpoints(config.workdir, config, resuming=False) as checkpoints:
        step = checkpoints.best_step() if wanted == "best" else int(wanted) if wanted.isdigit() else None
        if step == 0 and wanted == "best":
            raise UserError(
                f"{config.workdir}: every checkpoint breaks a protected set; export.checkpoint='latest' takes the last all the same"
            )
        restored = checkpoints.restore(program.state, step)
    return (restored.step, optim.in_use(config.optim, restored.state)) if restored else None


def ready(
    config: ConfigDict, model: source.Model, first: Callable[[Program, Params], None] | None = None
) -> tuple[Program, Params, str]:
    """A model ready to be used: (program, parameters, what it is in words). `first` sees what training started from."""
    program, values = start.program(guests.none(config), model)
    state, frozen = start.load(config, model, program, values, progress(config))
    if first:
        first(program, {**frozen, **state.params})
    restored = trained(config, program)
    if restored:
        return program, {**frozen, **restored[1]}, f"{config.name} after step {restored[0]}"
    with_adapter = f" with {config.tune.adapter}" if config.tune.adapter else ""
    return program, {**frozen, **state.params}, model.uri + with_adapter


def answered(config: ConfigDict, examples: Sequence[Example]) -> tuple[list[str], list[str], str]:
    """What the config's model says to each prompt, as `generate` says: (answers, prompts as the model read them, the model in words).

    Raises:
      UserError: the model writes no text, or a prompt is too long for it.
    """
    model = source.find(config)
    source.check_writes(model)
    tokenizer = source.find_tokenizer(config, model)
    program, params, what = ready(config, model)
    prompts = [templates.prompt_ids(example, tokenizer) for example in examples]
    measure.check_prompts(config, program, [example.row_id for example in examples], prompts)
    texts = measure.generator(config, tokenizer, program, params, progress(config), f"answering, {what}")(prompts)
    return texts, [tokenizer.decode(ids, skip_special=False) for ids in prompts], what
