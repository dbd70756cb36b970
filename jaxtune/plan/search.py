"""Finds the mesh, micro-batch and remat that train fastest of those that fit: estimates prune, real compilations decide."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune import chips, sharding
from jaxtune.chips import Slice
from jaxtune.config import ConfigDict
from jaxtune.models import FAMILIES
from jaxtune.plan import estimate
from jaxtune.plan.compile import Plan, compile_step, devices_of, program_of, where
from jaxtune.plan.cost import Forecast, forecast, work_of
from jaxtune.plan.estimate import Estimate
from jaxtune.registry import load
from jaxtune.types import UserError
from jaxtune.validation import CHOICES

GIB = 1 << 30
Show = Callable[..., Iterator[Any]]
Say = Callable[[str], None]

# Of a row on one device at least, where a row is split: shorter stretches keep the attention kernel from its speed.
_CONTEXT_TOKENS = 4096


class Tried(NamedTuple):
    """A candidate that was compiled: `plan` None means that the compiler found it too large. `forecast` is the compiled step's."""

    estimate: Estimate
    plan: Plan | None
    forecast: Forecast | None
    seconds: float


class Found(NamedTuple):
    """`considered` estimates in order, best first; `tried` in the order compiled; the best of them that fits, and why."""

    config: ConfigDict
    plan: Plan
    forecast: Forecast
    considered: list[Estimate]
    tried: list[Tried]
    why: str


def lay(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Sets a mesh by the whole size of each axis; slices split its "data"."""
    slices = config.plan.num_slices
    for axis, size in sizes.items():
        config.mesh[axis], config.mesh[f"dcn_{axis}"] = (size // slices, slices) if axis == "data" else (size, 1)


def changed(config: ConfigDict, choice: Estimate) -> ConfigDict:
    """This config with a candidate's mesh, accumulation and remat."""
    config = config.copy_and_resolve_references()
    lay(config, choice.mesh)
    config.train.accumulation, config.train.remat = choice.accumulation, choice.remat
    return config


def search(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, show: Show, say: Say) -> Found:
    """Looks for the fastest of the candidates that fit `plan.topology`; compiles at most `plan.confirm` of them.

    Raises:
      UserError: nothing fits; the message says what comes nearest.
    """
    if not config.plan.confirm:
        raise UserError("plan.confirm=0 compiles nothing, and a search is confirmed by compiling: set it to 1 or more")
    place = where(config)
    table = Table(config, hf_config, adapter, place, show)
    tried: list[Tried] = []
    correction, best = 1.0, None
    while len(tried) < config.plan.confirm:
        done = {_key(t.estimate) for t in tried}
        left = [e for e in table.ranked(correction) if e.fits and _key(e) not in done]
        if not left or (best and _step_seconds(best) <= left[0].forecast.step_seconds):
            break
        say(_progress(tried, left[0], config.plan.confirm))
        tried.append(_compiled(config, hf_config, adapter, left[0], place))
        correction = _correction(tried, correction)
        fitting = [t for t in tried if t.plan and t.plan.fits]
        best = min(fitting, key=_step_seconds, default=None)
    considered = table.ranked(correction)
    if best is None or best.plan is None or best.forecast is None:
        raise UserError(_nothing(place, considered, tried))
    fitting_count = sum(e.fits for e in considered)
    why = (
        f"{_words(best.estimate)}: the fastest that fits, by compilation, of {len(considered)} candidates ({fitting_count} fit by "
        f"estimate, {len(tried)} compiled): {best.plan.peak_hbm_bytes / GIB:.2f} of {place.hbm_bytes / GIB:.0f} GiB, "
        f"{best.forecast.tokens_per_second:,.0f} tokens/s, limited by {best.forecast.limited_by}"
    )
    return Found(changed(config, best.estimate), best.plan, best.forecast, considered, tried, why)


class Ranked(NamedTuple):
    """A topology with its best estimate, or None and why there is none; `confirmed` once its step was compiled and fitted."""

    place: Slice
    estimate: Estimate | None
    problem: str
    confirmed: Plan | None = None
    forecast: Forecast | None = None


def rank(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, show: Show, say: Say) -> list[Ranked]:
    """The topologies of `plan.topologies`, cheapest first by $ per million tokens; confirms the cheapest that fits by compiling.

    At most `plan.confirm` are compiled. One without a known price stands after those with one.
    """
    known, found = chips.table(config.plan.prices), []
    names = config.plan.topologies
    names = _one_each(known) if tuple(names) == ("all",) else names
    for name in show(names, len(names), "topologies"):
        place = chips.slice_of(name, known, config.plan.num_slices)
        try:
            fitting = [e for e in Table(config, hf_config, adapter, place, _quiet).ranked(1.0) if e.fits]
            found.append(Ranked(place, fitting[0] if fitting else None, "" if fitting else "nothing fits"))
        except UserError as error:
            found.append(Ranked(place, None, str(error)))
    found.sort(key=_price)
    for number, each in enumerate(found[: config.plan.confirm], 1):
        if each.estimate is None:
            break
        say(f"confirming {each.place.name} by compilation ({number} of at most {config.plan.confirm}) …")
        tried = _compiled(config, hf_config, adapter, each.estimate, each.place)
        if tried.plan and tried.plan.fits:
            found[found.index(each)] = each._replace(confirmed=tried.plan, forecast=tried.forecast)
            break
        found[found.index(each)] = each._replace(problem="compiled: does not fit")
    return sorted(found, key=_price)


def _one_each(known: dict[str, chips.Chip]) -> list[str]:
    """A slice of sixteen devices of each generation, or the nearest below."""
    best = []
    for name, chip in known.items():
        sizes = {math.prod(map(int, shape.split("x"))) * chip.devices: shape for shape in chip.slices}
        fitting = [size for size in sizes if size <= 16]
        if fitting:
            best.append(f"{name}:{sizes[max(fitting)]}")
    return best


def _price(ranked: Ranked) -> tuple[bool, bool, float, str]:
    made = ranked.forecast or (ranked.estimate.forecast if ranked.estimate else None)
    usd = made.usd_per_million_tokens if made else None
    failed = ranked.estimate is None or (bool(ranked.problem) and ranked.confirmed is None)
    return failed, usd is None, usd or 0.0, ranked.place.name


class Table:
    """All candidates of a config on a slice, with what is needed to estimate each."""

    def __init__(self, config: ConfigDict, hf_config: dict[str, Any], adapter: Any, place: Slice, show: Show):
        self.config, self.place = config, place
        devices = devices_of(place)
        choices = CHOICES["train.remat"]
        self.traces = {}
        for remat in show(choices, len(choices), "tracing"):
            one = config.copy_and_resolve_references()
            one.train.remat = remat
            self.traces[remat] = estimate.traced(one, hf_config, adapter, devices[0])
        self.most = max(self.traces.values(), key=lambda t: t.saved_bytes)
        self.programs, self.problems = {}, []
        family = load("model_type", str(hf_config.get("model_type")), FAMILIES)
        shapes = list(meshes(config, family.from_hf(hf_config), place))
        for mesh in show(shapes, len(shapes), "meshes"):
            one = config.copy_and_resolve_references()
            one.train.accumulation = 1
            lay(one, mesh)
            try:
                program = program_of(one, hf_config, adapter, devices)
            except UserError as error:
                self.problems.append(f"{mesh}: {error}")
                continue
            self.programs[tuple(mesh.items())] = program, estimate.weights(one, program, self.most.num_rounds)
        if not self.programs:
            why = self.problems[0] if self.problems else f"{place.num_devices} devices make no mesh for this model"
            raise UserError(f"{place.name}: no mesh takes this batch and model: {why}")

    def ranked(self, correction: float) -> list[Estimate]:
        """Every candidate: those that fit first, fastest first, of equals the one that moves and holds least."""
        found = []
        for (program, held), remat in itertools.product(self.programs.values(), self.traces):
            for accumulation in accumulations(self.config, program):
                choice = (accumulation, remat, self.traces[remat])
                found.append(estimate.estimate(self.config, program, held, *choice, self.most, self.place, correction))
        return sorted(found, key=_order)


def _order(e: Estimate) -> tuple[Any, ...]:
    made = e.forecast
    return not e.fits, round(made.step_seconds, 9), round(sum(made.seconds_by_resource.values()), 9), e.hbm_bytes


def meshes(config: ConfigDict, model_config: Any, place: Slice) -> Iterator[dict[str, int]]:
    """Sizes of the mesh's axes that multiply to the slice's devices, and that this model and batch can take."""
    experts = max((block.experts.num_experts for block, _ in model_config.blocks if block.experts), default=1)
    heads = math.gcd(model_config.num_heads, model_config.num_kv_heads)
    limits = {"tensor": heads, "expert": experts, "context": config.data.max_length // _CONTEXT_TOKENS or 1}
    sizes = [_divisors(math.gcd(place.num_devices, limits.get(axis, place.num_devices))) for axis in sharding.AXES]
    for combination in itertools.product(*sizes):
        mesh = dict(zip(sharding.AXES, combination, strict=True))
        shards = math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
        whole = math.prod(combination) == place.num_devices and mesh["data"] % place.num_slices == 0
        if whole and config.train.batch_size % shards == 0:
            yield mesh


def accumulations(config: ConfigDict, program: Any) -> list[int]:
    """Into how many micro-batches a device's rows divide; one where the objective compares all rows of a batch."""
    from jaxtune.train import step

    whole = config.copy_and_resolve_references()
    whole.train.accumulation = 1
    if any(part.objective.whole_batch for part in step.parts(whole, program.hf_config)):
        return [1]
    return _divisors(config.train.batch_size // sharding.num_batch_shards(program.mesh))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _compiled(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, choice: Estimate, place: Slice) -> Tried:
    config, began = changed(config, choice), time.perf_counter()
    config.plan.topology = place.name
    try:
        plan = compile_step(config, hf_config, adapter)
    except UserError as error:
        if "does not fit" not in str(error):
            raise
        return Tried(choice, None, None, time.perf_counter() - began)
    made = forecast(work_of(plan), place, max(1, config.train.steps), config.plan.efficiency)
    return Tried(choice, plan, made, time.perf_counter() - began)


def _step_seconds(t: Tried) -> float:
    return t.forecast.step_seconds if t.forecast else math.inf


def _correction(tried: list[Tried], before: float) -> float:
    """What the last compiled step needed of temporaries, over what was estimated before any correction; more after one that
    did not fit."""
    last = tried[-1]
    if last.plan is None:
        return before * 1.25
    return min(max(last.plan.temporary_bytes / (last.estimate.temporary_bytes / before), 0.25), 4.0)


def _progress(tried: list[Tried], choice: Estimate, most: int) -> str:
    mean = sum(t.seconds for t in tried) / len(tried) if tried else 0.0
    left = f", at most {mean * (most - len(tried)):.0f} s left" if tried else ""
    return f"compiling candidate {len(tried) + 1} of at most {most}: {_words(choice)}{left} …"


def _key(e: Estimate) -> tuple[Any, ...]:
    return tuple(e.mesh.items()), e.accumulation, e.remat


def _words(e: Estimate) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in e.mesh.items() if size > 1) or "one device"
    return f"{mesh}, accumulation {e.accumulation}, remat {e.remat}"


def _nothing(place: Slice, considered: list[Estimate], tried: list[Tried]) -> str:
    least = min(considered, key=lambda e: e.hbm_bytes)
    return (
        f"{place.name}: no candidate fits ({len(considered)} estimated, {len(tried)} compiled); the smallest needs about "
        f"{least.hbm_bytes / GIB:.1f} of {place.hbm_bytes / GIB:.0f} GiB per device ({_words(least)}): choose a larger slice, "
        f"shorter rows, a bfloat16 or quantised base, or raise plan.confirm={len(tried)}"
    )


def _quiet(items: Any, total: int | None, label: str) -> Iterator[Any]:
    yield from items
