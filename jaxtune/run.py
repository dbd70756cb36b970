"""READ FIRST. One short function per verb; everything else in jaxtune is called from here.

train      fetch → tokenise → load → measure before → train → measure after → export → report
evaluate   measure a base model, or a run's best checkpoint
generate   answer a file of prompts          chat     the same, by hand
export     a run's result as PEFT adapter or Hugging Face folder
self_train rounds of sampling, judging and training on what was right
plan       what the training step needs, takes and costs on a TPU that is not here
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxtune import checkpoint, fetch, optim, tracking, validation_methods, verbs
from jaxtune import config as config_lib
from jaxtune.adapters import partition
from jaxtune.config import ConfigDict
from jaxtune.data import privacy
from jaxtune.data.formats import constant, read_examples
from jaxtune.evals import account, fewshot, judge, measure, protected, retention, tasks
from jaxtune.generate.logits import Sampling
from jaxtune.plan import utilisation
from jaxtune.selftrain import rounds as self_training
from jaxtune.train import compiled, goodput, guests, loop, rounds, start
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import shown, write_lines, write_whole


def train(config: ConfigDict, workdir: Path, began: float | None = None) -> None:
    """Fine-tunes, with a measurement before and after on the same held-out rows; exports and reports.

    `began` is `time.perf_counter()` when the process started, for the account of its time; None = now.
    """
    wall, show, is_main = goodput.Wall(began), verbs.progress(config), jax.process_index() == 0
    given = config_lib.to_json(config)  # as it stands before epochs become steps: used again, it says the same
    model, tokenizer, rows, held, sets, program, values = verbs.asked(config, workdir, wall)
    compiling = compiled.Compiling(config, program, rows.validation is not None)
    with wall("program"):  # while a thread compiles, as what follows
        counted = utilisation.of(config, program)
    with wall("load"):
        state, frozen = start.load(config, model, program, values, compiling.watching(show))
    with wall("reference"):
        rows, frozen = verbs.compared(config, workdir, model, tokenizer, program, rows, state, frozen, show)
    with wall("evaluation"):
        before = verbs.before(config, workdir, held, tokenizer, program, {**frozen, **state.params}, show)
        cost = retention.Retention(config, sets, tokenizer, show)
        cost.begin(workdir, rows, program, {**frozen, **state.params})
    with checkpoint.Checkpoints(config.workdir, config, rows.digest) as checkpoints:
        wall.redone_before = tracking.steps_logged(workdir / "metrics.jsonl") if config.checkpoint.resume else 0
        state, remembered = verbs.resumed(config, workdir, checkpoints, program, state)
        if is_main:
            write_whole(workdir / "config.json", given + "\n")
        with tracking.Tracker(
            workdir, config.tracking, total_steps=config.train.steps, first_step=int(state.step), is_main=is_main,
            log_every_steps=config.train.log_every_steps, config=privacy.without_names(config.to_dict()),
        ) as tracker:  # fmt: skip
            data = rounds.for_loop(config, workdir, rows, tokenizer, program, tracker.say, wall)
            cost.log_before(tracker, int(state.step))
            known = (tracker, checkpoints, workdir, remembered, compiling, wall, counted, cost.guard())
            outcome = loop.train(config, program, state, frozen, data, *known)
            tracker.close_console()
            with wall("evaluation"):
                params = cost.choose(
                    checkpoints, frozen, outcome, partial(verbs.best, config, checkpoints, program, outcome)
                )
            after, beside = verbs.after(config, held, tokenizer, program, {**frozen, **params}, show, wall)
            with wall("export"):
                parts = (model, tokenizer, program, params, frozen)
                folder = None if cost.refused else start.write_result(config, workdir, *parts)
            if wall.started:  # at least one step was taken
                tracker.log(outcome.steps - 1, wall.metrics())
                cost.log_after(tracker)
    if is_main:
        if after:
            tasks.write_predictions(workdir / "predictions.jsonl", before, after)
        found = (rows.splits, rows_lib.counts(config, rows, outcome.steps), held, outcome, before, after)
        account.write(config, workdir, account.Run(model, tokenizer, program, *found, wall, folder, beside, cost))
    cost.end()


def dry_run(config: ConfigDict, workdir: Path) -> None:
    """Prints the first batch row token by token with its loss weights, what trains, and the schedule; trains nothing."""
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    reader = start.reader(config, model, tokenizer)
    rows = rows_lib.read(config, tokenizer, verbs.progress(config), reader, start.beside(config, model, tokenizer))
    program, _ = start.program(config, model)
    start.check_length(config, program)
    start.check_export(config, program)
    print(config_lib.to_json(config))
    print(f"\n{rows_lib.first_row(config, rows, tokenizer, reader)}\n\n{start.summary(model, program)}; they are")
    for path, leaf in program.state.params.items():
        print(f"  {program.labels[path]:<10} {path}  {leaf.shape} {leaf.dtype}")
    last, rewarm = config.train.steps, config.retain.rewarm
    rate = optim.schedule(config.optim, last, rewarm)
    print(f"\nlearning rate over {last} steps ({config.optim.schedule}):")
    for at in sorted({0, 1, last // 10, last // 4, last // 2, 3 * last // 4, last - 1}):
        print(f"  step {at:6d}  {float(rate(at)):.3e}")


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Measures the model: a run's best checkpoint where the workdir holds one, else the base (with `tune.adapter`).

    Protected sets are measured beside, against the base.
    """
    show, model = verbs.progress(config), source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    splits = rows_lib.load(config, tokenizer, show, answers=config.train.objective not in validation_methods.ON_POLICY)
    reader = start.reader(config, model, tokenizer)
    held = measure.held_out(config, splits, tokenizer, reader)
    if held is None:
        raise UserError(
            f"eval.split={config.eval.split!r} has no rows: set data.test_fraction or data.test, or choose another eval.split"
        )
    cost = retention.Retention(config, protected.read(config, tokenizer, show, reader), tokenizer, show)
    program, params, what = verbs.ready(config, model, partial(cost.measure_base, workdir))
    measure.check(config, held, tokenizer, program)
    result = measure.measure(config, held, tokenizer, program, params, show, what)
    cost.measure_tuned(params)
    tasks.write_predictions(workdir / "evaluation.jsonl", None, result)
    metrics = {name: estimate._asdict() for name, estimate in result.metrics.items()}
    told = {"model": what, "rows": len(result.rows), "metrics": metrics} | cost.facts()
    if config.privacy.enabled:
        found = verbs.list_private(workdir, [(config.eval.split, held.examples)])
        print(f"personal data: {privacy.told(found)}")
        told["privacy"] = found
    write_whole(workdir / "evaluation.json", json.dumps(told, indent=2) + "\n")
    print(f"{what}, {len(result.rows)} rows of the {config.eval.split} split")
    print("\n".join([account.table(config, {what: result} | measure.beside(config, held)), *cost.lines()]))
    if config.meta.shots:
        trained, frozen = partition.split(params, program.labels)
        found = fewshot.measure(config, program, trained, frozen, tokenizer, splits, show, reader)
        write_whole(workdir / "fewshot.json", fewshot.to_json(config, found))
        print(fewshot.table(config, found))


def generate(config: ConfigDict, workdir: Path) -> None:
    """Answers every prompt of `generate.input`; writes a JSON line each, in order."""
    if not config.generate.input:
        raise UserError(
            "generate needs --config.generate.input=FILE: prompts or chats, in any format that data.format reads"
        )
    private = privacy.of(config.privacy)
    examples, _ = read_examples(fetch.local(config.generate.input), config.data, answers=False, private=private)
    texts, prompts, what = verbs.answered(config, examples)
    output = Path(config.generate.output or workdir / "generations.jsonl")
    lines = [
        {"row_id": e.row_id, "prompt": p, "generation": t} for e, p, t in zip(examples, prompts, texts, strict=True)
    ]
    write_lines(output, lines)
    print(f"{len(lines)} answers by {what} in {shown(config.workdir, workdir, output)}")
    if private:
        print(f"personal data: {privacy.told(verbs.list_private(workdir, [('input', examples)]))}")


def chat(config: ConfigDict, workdir: Path) -> None:
    """Talks in the terminal, streaming; /reset forgets, /quit or end of input leaves."""
    model = source.find(config)
    source.check_writes(model)
    tokenizer = source.find_tokenizer(config, model)
    program, params, what = verbs.ready(config, model)
    sampler, options = measure.sampler(tokenizer, program, params), config.generate
    settings = (Sampling.from_config(options), options.max_new_tokens, options.seed, options.stop)
    system = constant(config.data.system)  # a turn that every row was trained with
    opening = [{"role": "system", "content": system}] * bool(system)
    messages = opening
    print(f"{what}. /reset starts over, /quit leaves.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            messages = opening
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                pieces = []
                ids = tokenizer.encode(tokenizer.render(asked, add_generation_prompt=True))
                for piece in sampler.stream_text([*tokenizer.virtual_ids, *ids], *settings):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                print()
                messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
            except UserError as error:
                print(f"error: {error} (/reset starts over)")


def export(config: ConfigDict, workdir: Path) -> None:
    """Writes a checkpoint of the workdir as a PEFT adapter, or (`export.merge`, full fine-tuning) as a model folder."""
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model)
    program, values = start.program(guests.none(config), model)
    _, frozen = start.load(config, model, program, values, verbs.progress(config))
    restored = verbs.trained(config, program)
    if restored is None:
        raise UserError(f"{config.workdir} holds no checkpoint: name the --workdir of a finished run")
    step, params = restored
    folder = start.write_result(config, workdir, model, tokenizer, program, params, frozen)
    if config.card.enabled and jax.process_index() == 0:
        account.card(config, workdir, folder)
    print(f"step {step} written to {shown(config.workdir, workdir, folder)}")


def self_train(config: ConfigDict, workdir: Path) -> None:
    """Rounds of sampling, judging and training on what was right, measured each, beside as many gold answers."""
    hands = self_training.Hands(train, account.compare_runs, judge.load)
    self_training.run(config, workdir, hands, verbs.progress(config), partial(verbs.say, config))


def plan(config: ConfigDict, workdir: Path) -> None:
    """Says what the training step needs, how long it takes and what it costs, where none of it is; writes `plan.json`.

    With `plan.search` it finds the best mesh, micro-batch and remat; with `plan.topologies` it ranks slices; a hosted
    service's price needs neither a model nor libtpu.
    """
    from jaxtune.plan import account, cost, counted, cpu

    result: dict[str, Any] = {}
    lines, show = [], partial(tracking.progress, mode=config.tracking.progress)
    priced, steps = cost.wants_api(config), config.train.steps
    counts = bool(config.plan.api_training_usd_per_1k_tokens) and not config.plan.api_training_tokens
    compared = config.plan.search or bool(config.plan.topologies)
    planned = not priced or compared or bool(config.model.source and config.plan.topology)
    # On this machine's CPU what training's process would hold is part of the forecast, and its rows are.
    needs_rows = counts or (planned and (cpu.is_cpu(config.plan.topology) or not steps))
    rows = counted.rows(config, show) if needs_rows else None
    if planned:
        model = source.find(config)
        start.check_head(config, model)
        where = ", ".join(config.plan.topologies) or config.plan.topology
        print(f"compiling {model.uri} for {where} …", file=sys.stderr, flush=True)
        config.train.steps = config.train.steps or 1000
        given = (config, model.hf_config, start.adapter(config, model)[0])
        say = partial(print, file=sys.stderr, flush=True)
        if config.plan.topologies:
            result, text = account.ranking(*given, show, say)
        elif config.plan.search:
            result, text = account.best(*given, show, say, lambda name, text: write_whole(workdir / name, text))
        else:
            result, text = account.one(*given)
        lines.append(text)
    if priced:
        found = cost.api(config, counted.training_tokens(config, steps, rows) if counts else None)
        known = {
            key: value for key, value in result.items() if value is not None
        }  # no price of chips hides a service's
        result = {**result, **found, **known, "api": found}
        lines.append(account.api_table(found))
    write_whole(workdir / "plan.json", json.dumps(result, indent=2) + "\n")
    print("\n\n".join(lines))
