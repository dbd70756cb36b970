"""The account of an audit: every figure of every model with its interval, differences from the first, plots, the rows behind them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxtune import pictures, report, tracking
from jaxtune.config import ConfigDict
from jaxtune.evals import figures as figures_lib
from jaxtune.evals import tradeoff
from jaxtune.evals.figures import Figure

_PARTS = {"probes": "Counterfactual probes", "bbq": "BBQ", "crows": "CrowS-Pairs"}
_READ = {
    "probes": "flip rate: share of rows whose answer another group's words change; gap: the score of the second group's version less the "
    "first's; 0 is none",
    "bbq": "s_AMB, s_DIS: -1 to 1, 0 is no bias, above 0 goes with the stereotype; accuracy by chance is 1/3",
    "crows": "share of pairs whose more stereotypical sentence is preferred; 0.5 is none",
}


def found(measured: Mapping[str, Sequence[Figure]], options: dict[str, Any]) -> dict[str, Any]:
    """Returns `figures` of each model, and `differences` on the same rows: of each from the first, and from the one before it."""
    names = list(measured)
    pairs = [(names[0], name) for name in names[1:]] + list(zip(names[1:], names[2:], strict=False))
    sides = {name: figures_lib.by_key(each) for name, each in measured.items()}
    return {
        "figures": {name: [figures_lib.estimate(one, options) for one in each] for name, each in measured.items()},
        "differences": {
            f"{after} - {before}": [
                figures_lib.compare(sides[before][key], one, options)
                for key, one in sides[after].items()
                if key in sides[before]
            ]
            for before, after in pairs
        },
    }


def headline(told: Mapping[str, Any]) -> str:
    """How many figures leave out the value of no bias, and how many would by chance."""
    words = []
    for name, each in told["figures"].items():
        judged = [one for one in each if one["nothing"] is not None]
        sure = [one for one in judged if not one["low"] <= one["nothing"] <= one["high"]]
        words.append(f"{name}: {len(sure)} of {len(judged)}")
    return "Figures whose interval leaves out the value of no bias: " + ", ".join(words) + "."


def table(told: Mapping[str, Any], part: str, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a part's figures, models side by side, then differences; `short`: without categories."""
    models, gaps = told["figures"], told["differences"]
    header = ["rows of", "figure", "rows", *models, *gaps]
    rows = []
    for one in next(iter(models.values())):
        if one["part"] != part or (short and part != "probes" and not one["name"].startswith("all")):
            continue
        key = (one["part"], one["name"], one["metric"])
        cells = [_cell(_of(each, key)) for each in models.values()]
        cells += [_cell(_of(each, key), sign=True) for each in gaps.values()]
        rows.append([one["name"], one["metric"], f"{one['rows']:,}", *cells])
    return header, rows


def _of(each: Sequence[Mapping[str, Any]], key: tuple[str, str, str]) -> Mapping[str, Any] | None:
    return next((one for one in each if (one["part"], one["name"], one["metric"]) == key), None)


def _cell(one: Mapping[str, Any] | None, sign: bool = False) -> str:
    if one is None:
        return "–"
    form = "+.3f" if sign or one.get("nothing") == 0.0 else ".3f"
    p = f", p = {one['p']:.2g}" if "p" in one else ""
    return f"{one['value']:{form}} [{one['low']:{form}}, {one['high']:{form}}]{p}"


def say(config: ConfigDict, told: Mapping[str, Any]) -> None:
    """Prints the figures of all rows, and of each probe."""
    for part in _parts(told):
        print(
            f"{_PARTS[part]} ({told['how'][part]})\n{tradeoff.columns(*table(told, part, short=True))}\n{_READ[part]}\n"
        )
    if told["figures"]:
        print(f"{headline(told)} {by_chance(config)}")


def by_chance(config: ConfigDict) -> str:
    """What many intervals at once mean."""
    share = 1 - config.eval.confidence
    return f"Each interval leaves out the true value in {share:.0%} of samples: of 20 such figures without any bias about {20 * share:.2g} would be among them."


def _parts(told: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(one["part"] for each in told["figures"].values() for one in each))


def write(config: ConfigDict, workdir: Path, told: Mapping[str, Any]) -> None:
    """Writes report.html, report.json and a picture for each part, PART.png."""
    tables = []
    for part in _parts(told):
        header, rows = table(told, part)
        plots = _pictures(workdir / f"{part}.png", told, part)
        tables.append({"title": f"{_PARTS[part]}: {told['how'][part]}", "header": header, "rows": rows, "plots": plots})
    for name, each in told["worst"].items():
        cells = [
            [one["row_id"], one["probe"], one["direction"] or "framed", _version(one["first"]), _version(one["second"])]
            for one in each
        ]
        tables.append(
            {
                "title": f"Rows that a swap changes most, {name}",
                "header": ["Row", "Probe", "Direction", "First", "Second"],
                "rows": cells,
                "plots": [],
            }
        )
    if told["flags"]:
        cells = [
            [one["type"], one["group"] or "not said", str(one["flags"]), str(one["items"]), str(one["people"])]
            for one in told["flags"]["groups"]
        ]
        tables.append(
            {
                "title": "Flagged by experts",
                "header": ["Flag", "Group", "Flags", "Items", "People"],
                "rows": cells,
                "plots": [],
            }
        )
        cells = [
            [one["item"], one["type"], one["group"], one["text"][:300], one["note"]]
            for one in told["flags"]["flagged"][:50]
        ]
        tables.append(
            {
                "title": "What was flagged",
                "header": ["Item", "Flag", "Group", "Text", "Note"],
                "rows": cells,
                "plots": [],
            }
        )
    facts = {
        "name": f"{config.name}: audit for bias", "headline": headline(told) if told["figures"] else "", "about": told["about"],
        "notices": [*told["notices"], by_chance(config), *(f"{_PARTS[part]}: {_READ[part]}." for part in _parts(told))], "tables": tables,
        "config": config.to_dict(),
    }  # fmt: skip
    with tracking.writing(workdir / "report.html"):
        report.write(workdir, facts)


def _version(one: Mapping[str, Any]) -> str:
    text = "; ".join(str(value) for value in one["text"].values())
    answer = "" if one["prediction"] is None else f" → {one['prediction']}"
    return f"{text[:300]}{answer}" + ("" if one["score"] is None else f" ({one['score']:.3f})")


_DRAWN = {
    "probes": (("flip rate", "share of rows", None), ("gap", "second group less first", 0.0)),
    "bbq": (("s_AMB", "s_AMB", 0.0), ("s_DIS", "s_DIS", 0.0)),
    "crows": (("stereotype preferred", "share of pairs", 0.5),),
}


def _pictures(path: Path, told: Mapping[str, Any], part: str) -> list[Markup]:
    """Draws a part's figures by name, models beside each other; the picture stands in the page too."""
    drawings = []
    for metric, label, nothing in _DRAWN[part]:
        keys = [
            (one["part"], one["name"], one["metric"])
            for one in next(iter(told["figures"].values()))
            if one["part"] == part and one["metric"] == metric
        ]
        series = {}
        for model, each in told["figures"].items():
            estimates = [_of(each, key) for key in keys]
            series[model] = [None if one is None else (one["value"], one["low"], one["high"]) for one in estimates]
        if keys:
            drawings.append(
                pictures.Forest(f"{_PARTS[part]}: {metric}", label, [_wrapped(key[1]) for key in keys], series, nothing)
            )
    if not drawings or not pictures.forests(path, drawings):
        return []
    code = base64.b64encode(path.read_bytes()).decode()
    alt = f"{_PARTS[part]} by model with intervals; the same figures stand in the table"
    return [
        Markup(
            '<figure class="wide"><img alt="{}" style="max-width:100%" src="data:image/png;base64,{}"></figure>'
        ).format(alt, code)
    ]


def _wrapped(name: str) -> str:
    return name.replace(" in '", "\nin '") if len(name) > 40 else name
