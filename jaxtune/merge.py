"""The verb `merge`: tuned models put together without training, and shares of what they learnt measured one by one.

Adapters become one adapter; whole models, adapters of DoRA, or a mixture of all become a model. With `merge.sweep` shares of
the merged update between base and tuned are measured (WiSE-FT, arXiv:2109.01903): on the task's held-out rows, on the protected
sets, and by their KL from the base. The one that `merge.pick` takes is written. WORKDIR holds the result, `merge.json` and, with
shares, `merge.png`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import pictures, registry, sharding, verbs
from jaxtune.adapters import arithmetic
from jaxtune.config import ConfigDict, base
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, protected, tasks, tradeoff
from jaxtune.models import FAMILIES, naming
from jaxtune.statistics import Estimate
from jaxtune.train import base_kl, guests, layout, start
from jaxtune.train import rows as rows_lib
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError
from jaxtune.weights import hf, merging, source
from jaxtune.workdir import check_result, shown, write_whole


class Made(NamedTuple):
    """A merge: what it is in words; the model with a share of it, ready to be measured; and how a share is written."""

    words: str
    ready: Callable[[float], tuple[Program, Params]]
    write: Callable[[float], Path]


def merge(config: ConfigDict, workdir: Path) -> None:
    """Merges `merge.adapters`, measures the shares of `merge.sweep`, and writes the result.

    Raises:
      UserError: nothing to merge, parts that do not fit together or the base, or a method that they cannot be merged by.
    """
    config = _settled(config)
    show = verbs.progress(config)
    model = source.find(config)
    tokenizer = source.find_tokenizer(config, model) if model.path or config.model.tokenizer else None
    family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
    parsed = family.from_hf(model.hf_config)
    parts = [merging.read(uri, family, parsed) for uri, _ in config.merge.adapters]
    if config.merge.check_bases:
        merging.check_bases(parts)
    whole = _makes_a_model(config, parts)
    place = Path(config.export.output or workdir / ("model" if whole or config.export.merge else "adapter"))
    check_result(place, workdir, [part.path for part in parts] + ([model.path] if model.path else []))
    config.export.output = str(place)
    made = (_model if whole else _adapter)(config, workdir, model, tokenizer, parts, show)
    verbs.say(config, made.words)
    found: dict[str, Any] = {"method": config.merge.method, "parts": [list(one) for one in config.merge.adapters]}
    share = 1.0
    if config.merge.sweep:
        if tokenizer is None:
            raise UserError(f"merge.sweep measures, and {model.uri} has no tokenizer: set model.tokenizer")
        points = _measured(config, model, tokenizer, made, show)
        share = _chosen(config, workdir, points)
        found |= {"shares": points}
    folder = made.write(share)
    if jax.process_index() == 0:
        write_whole(
            workdir / "merge.json", json.dumps({**found, "share": share, "written": str(folder)}, indent=2) + "\n"
        )
        print(f"{made.words}; share {share:g} in {shown(config.workdir, workdir, folder)}")


def _settled(config: ConfigDict) -> ConfigDict:
    """The config without what only training asks for."""
    if not config.merge.adapters:
        raise UserError("merge needs config.merge.adapters: ((URI, weight), …), PEFT adapter folders or whole models")
    if config.tune.adapter:
        raise UserError(f"tune.adapter={config.tune.adapter!r} is what training starts from: name it in merge.adapters")
    config = guests.none(config)
    config.retain, config.tune.dtype, config.tune.freeze, config.tune.train_layers = base().retain, "float32", (), ()
    return config


def _makes_a_model(config: ConfigDict, parts: list[merging.Part]) -> bool:
    """Whether the parts have to be merged as whole weights.

    Raises:
      UserError: they have, and that is not what was asked for.
    """
    models = [part for part in parts if part.tensors is not None]
    dora = [part for part in parts if part.options is not None and part.options.use_dora]
    if not models and not dora:
        return False
    if dora and not models and not config.export.merge:
        raise UserError(
            f"{dora[0].path} is an adapter with DoRA, which rescales weights: shares and sums of it are no adapter. Set "
            "export.merge=True for a merged model"
        )
    if config.merge.method not in arithmetic.DENSE_METHODS:
        raise UserError(
            f"merge.method={config.merge.method!r} looks for the factors of an adapter, and {(models or dora)[0].path} makes this a merge "
            f"of whole weights; expected one of {', '.join(arithmetic.DENSE_METHODS)}"
        )
    return True


def _options(config: ConfigDict) -> tuple[list[float], arithmetic.Options]:
    m = config.merge
    weights = [float(weight) for _, weight in m.adapters]
    return weights, arithmetic.Options(m.method, m.density, m.majority_sign, m.svd_rank, m.seed)


def _adapter(
    config: ConfigDict, workdir: Path, model: source.Model, tokenizer: Tokenizer | None, parts: list[merging.Part], show: Any
) -> Made:  # fmt: skip
    config.tune.method = "lora"
    made, arrays, partly = merging.one_adapter(parts, *_options(config))
    program = layout.program(config, model.hf_config, None, made, model.pooling)

    @cache
    def frozen() -> Params:
        return start.load(config, model, program, arrays, show)[1]

    def trained(share: float) -> Params:
        return sharding.put(merging.scaled(arrays, share), {path: program.adapter[path].sharding for path in arrays})

    def ready(share: float) -> tuple[Program, Params]:
        return program, {**frozen(), **trained(share)}

    def write(share: float) -> Path:
        below = frozen() if config.export.merge else {}
        return start.write_result(config, workdir, model, tokenizer, program, trained(share), below)

    lacking = "".join(
        f"; {linear} is of {number} of the {len(parts)} alone" for linear, number in list(partly.items())[:3]
    )
    words = (
        f"{len(parts)} adapters by {config.merge.method}, rank {made.rank} on {len(arrays) // 2} linear layers{lacking}"
    )
    return Made(words, ready, write)


def _model(
    config: ConfigDict, workdir: Path, model: source.Model, tokenizer: Tokenizer | None, parts: list[merging.Part], show: Any
) -> Made:  # fmt: skip
    if model.tensors is None:
        raise UserError(f"{model.uri} has random weights: expected the model that the parts were tuned from")
    config.tune.method, config.model.quantize, config.tune.dtype = "full", "", config.model.param_dtype
    base_tensors = model.tensors
    program, _ = start.program(config, model)
    table = naming.hf_names(program.family.weights(program.model_config))

    def merged(share: float) -> merging.Merged:
        return merging.Merged(base_tensors, table, parts, *_options(config), share)

    def ready(share: float) -> tuple[Program, Params]:
        return program, hf.load(merged(share), program.family, program.model_config, program.base, show)

    def write(share: float) -> Path:
        tensors, is_main = merged(share), jax.process_index() == 0
        dtype, place = jnp.dtype(config.export.dtype or config.model.param_dtype), Path(config.export.output)
        with hf.new_folder(place, is_main) as folder:
            named = ((name, tensors.read(name).astype(dtype)) for name in show(table, len(table), "merging"))
            hf.save(folder, start.exported(model, tokenizer), named if is_main else (), is_main)
            if is_main and tokenizer is not None:
                tokenizer.save(folder)
        return place

    merged(1.0)  # whether they fit together, before anything is measured
    return Made(f"{len(parts)} tuned models by {config.merge.method}, as weights", ready, write)


def _measured(
    config: ConfigDict, model: source.Model, tokenizer: Tokenizer, made: Made, show: Any
) -> list[dict[str, Any]]:
    """What each share does: like a report.json each, compared with the base.

    Raises:
      UserError: there is nothing to measure on.
    """
    reader = start.reader(config, model, tokenizer)
    rows = rows_lib.read(config, tokenizer, show, reader) if config.data.train else None
    held = measure.held_out(config, rows.splits, tokenizer, reader) if rows else None
    sets = protected.read(config, tokenizer, show, reader)
    if held is None:
        raise UserError(f"merge.sweep has nothing to measure gain on: {measure.nothing_held(config)}")
    program, params = made.ready(0.0)
    measure.check(config, held, tokenizer, program)
    protected.check(sets, tokenizer, program)

    def look(share: float, params: Params) -> tuple[tasks.Result, dict[str, tasks.Result]]:
        given = (tokenizer, program, params, show, f"share {share:g}")
        return measure.measure(config, held, *given), protected.measure(sets, *given)

    before, before_sets = look(0.0, params)
    divergence = base_kl.prepare(config, rows, tokenizer, program, params) if rows else None
    points = []
    for share in config.merge.sweep:
        params = made.ready(share)[1] if share else params
        after, after_sets = look(share, params) if share else (before, before_sets)
        verdicts = protected.judge(sets, before_sets, after_sets, config.protect.judge_by)
        points.append(
            {
                "share": float(share),
                "metric": config.merge.metric or tradeoff.headline(after.metrics),
                "before": {name: value._asdict() for name, value in before.metrics.items()},
                "after": {name: value._asdict() for name, value in after.metrics.items()},
                "difference": tasks.compare(before, after, **measure.intervals(config)),
                "protected": protected.account(verdicts, before_sets, after_sets),
                "base_kl": divergence(params) if divergence else None,
            }
        )
    return points


def _chosen(config: ConfigDict, workdir: Path, told: list[dict[str, Any]]) -> float:
    """The share that `merge.pick` takes; prints the table and draws the plot.

    Raises:
      UserError: no share qualifies.
    """
    points = [tradeoff.point(f"{one['share']:g}", one, config.merge.metric) for one in told]
    sets = list(told[0]["protected"])
    rows = [
        [
            point.name,
            tradeoff.shown(point.gain),
            *(tradeoff.shown(tradeoff.change(one["protected"][name])) for name in sets),
            tradeoff.shown(point.retention),
            ", ".join(point.broken) or None,
        ]
        for point, one in zip(points, told, strict=True)
    ]
    picked = tradeoff.pick(points, config.merge.pick)
    if jax.process_index() == 0:
        header = [
            "share",
            f"gain in {told[0]['metric']}",
            *(f"{name}, relative" for name in sets),
            "retention",
            "broken",
        ]
        print(tradeoff.columns(header, rows))
        none = Estimate(0.0, 0.0, 0.0)
        dots = [
            pictures.Dot(point.retention or none, point.gain, "shares", point.name, marked=point is picked)
            for point in points
        ]
        labels = ("retention: mean relative change of protected sets", f"gain in {told[0]['metric']}")
        pictures.clouds(workdir / "merge.png", [pictures.Cloud("Shares of the merged update", *labels, dots)])
    if picked is None:
        raise UserError(
            "no share of merge.sweep keeps every protected set within its tolerance: add smaller shares, or set merge.pick='knee'"
        )
    return float(told[points.index(picked)]["share"])
