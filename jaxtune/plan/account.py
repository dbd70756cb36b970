"""What `plan` writes and prints: one plan, a search, a ranking of topologies, a hosted service's price."""

from __future__ import annotations

from typing import Any

from jaxtune import config as config_lib
from jaxtune.chips import Slice
from jaxtune.config import ConfigDict
from jaxtune.plan import compile as plan_compile
from jaxtune.plan import search
from jaxtune.plan.compile import Plan
from jaxtune.plan.cost import Forecast

GIB = 1 << 30
Result = tuple[dict[str, Any], str]  # what goes into plan.json, and lines for the terminal


def one(config: ConfigDict, hf_config: dict[str, Any], adapter: Any) -> Result:
    """Compiles this config for its topology."""
    plan, made, place = plan_compile.forecast(config, hf_config, adapter)
    return written(plan, made, place, config.train.steps), table(plan, made, place, config.train.steps)


def best(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, show: Any, say: Any, write: Any) -> Result:
    """Searches; `write(name, text)` gets what it finds as `planned.py`, a config to run, with `planned.json` that it starts from."""
    place, found = plan_compile.where(config), search.search(config, hf_config, adapter, show, say)
    write("planned.json", config_lib.to_json(_unplanned(config)) + "\n")
    write("planned.py", planned(config, found))
    result = written(found.plan, found.forecast, place, config.train.steps)
    result["search"] = {
        "why": found.why,
        "considered": len(found.considered),
        "candidates": [_candidate(e) for e in found.considered[:20]],
        "compiled": [_tried(t) for t in found.tried],
    }
    lines = [candidates_table(found), "", table(found.plan, found.forecast, place, config.train.steps), "", found.why]
    return result, "\n".join([*lines, "written as planned.py, a config to run, beside plan.json"])


def ranking(config: ConfigDict, hf_config: dict[str, Any], adapter: Any, show: Any, say: Any) -> Result:
    """Ranks topologies by dollars per million tokens."""
    found = search.rank(config, hf_config, adapter, show, say)
    rows, lines = (
        [],
        [_ROW.format(*"topology mesh accum. remat GiB/device tokens/s $/hour $/Mtoken limited by".split(" ", 8), "")],
    )
    for each in found:
        made = each.forecast or (each.estimate.forecast if each.estimate else None)
        row: dict[str, Any] = {"topology": each.place.name, "num_chips": each.place.num_chips, "problem": each.problem}
        row["confirmed"] = each.confirmed is not None
        if each.estimate and made:
            peak = each.confirmed.peak_hbm_bytes if each.confirmed else each.estimate.hbm_bytes
            row |= {**_candidate(each.estimate), **made._asdict(), "peak_hbm_bytes": int(peak)}
        rows.append(row)
        lines.append(_ranked_line(each, row))
    note = f"by estimate, but where compiled; {config.train.steps} steps; list prices: check yours (plan.prices)"
    return {"topologies": rows, **_money(rows)}, "\n".join([*lines, note])


def _money(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cheapest = next((r for r in rows if r.get("training_usd") is not None and not r["problem"]), None)
    return {"cheapest": cheapest["topology"], "training_usd": cheapest["training_usd"]} if cheapest else {}


def written(plan: Plan, made: Forecast, place: Slice, steps: int) -> dict[str, Any]:
    """A plan for `plan.json`."""
    chip = {"name": place.chip.name, "spec_source": place.chip.spec_source, "price_source": place.chip.price_source}
    return {**plan._asdict(), **made._asdict(), "steps": steps, "chip": chip}


def table(plan: Plan, made: Forecast, place: Slice, steps: int) -> str:
    """A plan as lines for a terminal."""
    parts = {name: size for name, size in plan.hbm_parts_bytes.items() if size >= GIB // 200}
    rows = [
        ("topology", f"{plan.topology}{f' x {plan.num_slices} slices' * (plan.num_slices > 1)}: {plan.num_chips} chips, mesh {_mesh(plan.mesh)}"),
        ("parameters", f"{plan.num_params:,}, of which {plan.num_trainable_params:,} train"),
        *((name.replace("_", " "), f"{size / GIB:6.2f} GiB") for name, size in parts.items()),
        ("peak HBM", f"{plan.peak_hbm_bytes / GIB:6.2f} of {plan.hbm_bytes / GIB:.0f} GiB per device: {'fits' if plan.fits else 'DOES NOT FIT'}"),
    ]  # fmt: skip
    if plan.host_bytes:
        rows.append(("on the host", f"{plan.host_bytes / GIB:6.2f} GiB per device"))
    again = plan.hardware_flops / plan.model_flops if plan.model_flops else 0.0
    rows.append(
        ("FLOPs a step", f"{plan.hardware_flops:.4g}, {again:.2f} x the {plan.model_flops:.4g} of the mathematics")
    )
    for kind, found in plan.collectives.items():
        rows.append(
            (kind, f"{found['times']:.0f} a step, {found['bytes'] / GIB:.2f} GiB sent per device" + _crossing(found))
        )
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in made.seconds_by_resource.items() if value)
    if place.chip.overlaps:
        share = f"; {made.efficiency:.0%} of that roof (plan.efficiency) is taken as reached"
    else:
        share = "; measured here, and added"
    rows += [
        ("seconds by", f"{seconds}{share}"),
        *((f"{name} left out", f"its speed is not known for {place.chip.name}: give it in plan.prices") for name in made.not_counted),
        ("a step", f"{made.step_seconds:.3g} s, limited by {made.limited_by}; model FLOPs utilisation {made.model_flops_utilisation:.0%}"),
        ("tokens/s", f"{made.tokens_per_second:,.0f}, {made.tokens_per_second_per_chip:,.0f} a chip"),
        (f"{steps} steps", f"{made.hours:.3g} hours" + ("" if made.training_usd is None else f", ${made.training_usd:,.2f}")),
    ]  # fmt: skip
    if made.usd_per_chip_hour is not None:
        rows.append(
            ("price", f"${made.usd_per_chip_hour:g} a chip and hour ({place.chip.price_source}); yours: plan.prices")
        )
    rows.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    return "\n".join(f"{name:>18}  {value}" for name, value in rows)


def _crossing(found: dict[str, float]) -> str:
    return f", {found['dcn_bytes'] / GIB:.2f} between slices" if found["dcn_bytes"] else ""


def _mesh(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of one device"


_ROW = "{:<13} {:<26} {:>6}  {:<12} {:>10} {:>11} {:>9} {:>9}  {:<10} {}"


def _ranked_line(each: search.Ranked, row: dict[str, Any]) -> str:
    if each.estimate is None:
        return f"{each.place.name:<13} {each.problem}"
    usd = row["usd_per_million_tokens"]
    hourly = row["usd_per_chip_hour"]
    return _ROW.format(
        each.place.name, _mesh(row["mesh"]), row["accumulation"], row["remat"], f"{row['peak_hbm_bytes'] / GIB:.2f}",
        f"{row['tokens_per_second']:,.0f}", "" if hourly is None else f"{hourly * each.place.num_chips:.2f}",
        "" if usd is None else f"{usd:.3f}", row["limited_by"], "compiled" if row["confirmed"] else each.problem,
    )  # fmt: skip


def candidates_table(found: search.Found) -> str:
    """The candidates that were compiled, estimates beside what came out."""
    form = "{:<26} {:>6}  {:<12} {:>18} {:>20}  {}"
    lines = [form.format("mesh", "accum.", "remat", "GiB est. / found", "s a step est. / found", "")]
    for t in found.tried:
        e, plan, made = t.estimate, t.plan, t.forecast
        hbm = (
            f"{e.hbm_bytes / GIB:.2f} / {plan.peak_hbm_bytes / GIB:.2f}"
            if plan
            else f"{e.hbm_bytes / GIB:.2f} / too much"
        )
        step = (
            f"{e.forecast.step_seconds:.3g} / {made.step_seconds:.3g}" if made else f"{e.forecast.step_seconds:.3g} / -"
        )
        note = "chosen" if plan is found.plan else "" if plan and plan.fits else "does not fit"
        lines.append(form.format(_mesh(e.mesh), e.accumulation, e.remat, hbm, step, note))
    return "\n".join(lines)


def _candidate(e: search.Estimate) -> dict[str, Any]:
    return {
        "mesh": e.mesh, "accumulation": e.accumulation, "remat": e.remat, "fits": e.fits,
        "estimated_hbm_bytes": int(e.hbm_bytes), "estimated_step_seconds": e.forecast.step_seconds,
    }  # fmt: skip


def _tried(t: search.Tried) -> dict[str, Any]:
    found: dict[str, Any] = {} if t.plan is None else {"peak_hbm_bytes": t.plan.peak_hbm_bytes}
    found |= {} if t.forecast is None else {"step_seconds": t.forecast.step_seconds}
    return {**_candidate(t.estimate), "fits": bool(t.plan and t.plan.fits), **found, "seconds": round(t.seconds, 1)}


def _unplanned(config: ConfigDict) -> ConfigDict:
    """The config as it was given, without the search: the planned one starts from it."""
    config = config.copy_and_resolve_references()
    config.plan.search, config.workdir = False, ""
    return config


def planned(config: ConfigDict, found: search.Found) -> str:
    """The text of `planned.py`: the given config, and what the search changed."""
    axes = [f"mesh.{of}{axis}" for axis in found.plan.mesh for of in ("", "dcn_")]
    keys = [*axes, "train.accumulation", "train.remat"]
    changed = [key for key in keys if config_lib.lookup(found.config, key) != config_lib.lookup(config, key)]
    lines = [f"    config.{key} = {config_lib.lookup(found.config, key)!r}" for key in changed]
    return (
        f'"""{config.name} as planned for {found.plan.topology}.\n\n{found.why}.\n"""\n\n'
        "from pathlib import Path\n\nfrom jaxtune import config as jaxtune_config\n\n\ndef get_config():\n"
        '    config = jaxtune_config.from_json(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))\n'
        + "".join(line + "\n" for line in lines)
        + "    return config\n"
    )


def api_table(found: dict[str, Any]) -> str:
    """A hosted service's price as lines for a terminal."""

    def words(value: Any) -> str:
        return " to ".join(f"{v:,}" for v in value) if isinstance(value, list) else f"{value:,}"

    names = {
        "training_tokens": "training tokens", "training_usd": "training, $", "monthly_tokens": "tokens a month",
        "monthly_inference_usd": "inference a month, $",
    }  # fmt: skip
    return "\n".join(["a hosted service", *(f"{names[key]:>22}  {words(value)}" for key, value in found.items())])
