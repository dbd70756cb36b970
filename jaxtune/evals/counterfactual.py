"""Counterfactual probes: what a model's answer to a row becomes when the row is about another group (arXiv:1703.06856, 1809.10610).

Rows are swapped, or put into frames, on the user's own data (`data/counterfactual.py`) and answered by the model's own task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import counterfactual as texts
from jaxtune.data import pipeline
from jaxtune.data.counterfactual import Axis, Row
from jaxtune.data.formats import Example, to_examples
from jaxtune.evals import measure, tasks
from jaxtune.evals.figures import Figure
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError, nearest

MIXED = "both"  # the direction of a row that has words of both groups


class Probe(NamedTuple):
    """One row in two versions: numbers of rows of `Probes.rows`. `name` is the axis and the two groups, "gender: male, female"; a frame
    adds its template. direction: from which group's words to which; "" of a frame, where neither is the original. from_second: the
    second version is the original.
    """

    row_id: str
    name: str
    first: int
    second: int
    direction: str = ""
    from_second: bool = False


class Probes(NamedTuple):
    """All versions of rows, each once, and which are compared; counts by axis of rows changed, unchanged and left undecided."""

    rows: list[Row]
    compared: list[Probe]
    counts: dict[str, dict[str, int]]


class Answer(NamedTuple):
    """What a model makes of a row: what it decides (None where it decides nothing), a number (None where there is none), and whether it is right."""

    prediction: Any
    score: float | None
    correct: bool | None = None


def make(
    rows: Sequence[tuple[str, Row]], axes: Sequence[Axis], templates: Sequence[tuple[str, str, Axis]], columns: Sequence[str],
    keep: Sequence[str], limit: int,
) -> Probes:  # fmt: skip
    """Returns the probes of numbered rows: of each axis and pair of groups the rows that have their words, and of each template the
    first `limit` rows framed (0 = all).

    Raises:
      UserError: a column that the rows lack, or not one probe.
    """
    numbers: dict[str, int] = {}
    versions: list[Row] = []
    compared: list[Probe] = []
    counts: dict[str, dict[str, int]] = {}

    def number(row: Row) -> int:
        key = json.dumps(row, sort_keys=True, default=str)
        if key not in numbers:
            numbers[key] = len(versions)
            versions.append(row)
        return numbers[key]

    for column in columns:
        texts.check_column(rows[0][1], column, "audit.columns")
    for axis in axes:
        kinds: dict[str, set[str]] = {"changed": set(), "unsure": set()}
        for a, b in axis.pairs():
            taken = 0
            for row_id, row in rows:
                other, found = texts.swap_row(row, axis, a, b, columns, keep)
                if found.unsure or found.changed:
                    kinds["unsure" if found.unsure else "changed"].add(row_id)
                if found.changed and (not limit or taken < limit):
                    taken += 1
                    compared.append(
                        _swapped(
                            row_id, axis.name, (axis.groups[a], axis.groups[b]), found.found, number(row), number(other)
                        )
                    )
        counts[axis.name] = {kind: len(ids) for kind, ids in kinds.items()}
        counts[axis.name]["unchanged"] = len(rows) - len(kinds["changed"] | kinds["unsure"])
    for column, template, axis in templates:
        for row_id, row in rows[: limit or None]:
            texts.check_column(row, column, "audit.templates")
            framed = [
                number(texts.framed(row, column, template, axis, group, row_id)) for group in range(len(axis.groups))
            ]
            compared += [
                Probe(row_id, f"{axis.name}: {axis.groups[a]}, {axis.groups[b]} in {template!r}", framed[a], framed[b])
                for a, b in axis.pairs()
            ]
    if not compared:
        words = ", ".join(
            f"{name}: {one['unchanged']} unchanged, {one['unsure']} undecided" for name, one in counts.items()
        )
        raise UserError(
            f"no word of audit.groups stands in any of the {len(rows)} rows ({words}): add words to the groups, name other rows by "
            "audit.split, or put rows into frames by audit.templates"
        )
    return Probes(versions, compared, counts)


def _swapped(
    row_id: str, axis: str, groups: tuple[str, str], found: frozenset[str], original: int, other: int
) -> Probe:
    """The probe of a row and its swapped version, the first group's version first."""
    turned = found == {groups[1]}
    direction = MIXED if len(found) > 1 else f"{groups[1]} to {groups[0]}" if turned else f"{groups[0]} to {groups[1]}"
    first, second = (other, original) if turned else (original, other)
    return Probe(row_id, f"{axis}: {groups[0]}, {groups[1]}", first, second, direction, turned)


def examples(probes: Probes, data: ConfigDict) -> list[Example]:
    """The versions as examples, whose ids are their numbers."""
    plain = data.copy_and_resolve_references()
    plain.prepare = ""  # it has been done
    made, _ = to_examples(enumerate(probes.rows), "version", plain, private=None)
    if len(made) != len(probes.rows):
        raise UserError(
            "a swapped row no longer has an answer (data.label_bins): leave the label's column out of audit.columns"
        )
    return made


def held(config: ConfigDict, probes: Probes, labels: Sequence[str], tokenizer: Any, reader: Any) -> measure.HeldOut:
    """The versions as rows to measure on.

    Raises:
      UserError: a model or metric whose answers cannot be compared.
    """
    kind = config.train.objective if config.train.objective == "contrastive" else reader.kind
    if kind not in ("next", "label", "labels", "number") or rows_lib.judged(config):
        raise UserError(
            f"train.objective={config.train.objective!r} with eval.metric={config.eval.metric!r} gives a row neither a label, nor a number, a "
            "likelihood or a text, which probes compare: set train.objective to 'sft' or, with a head of labels, 'classify', another eval.metric, "
            "or audit.groups=()"
        )
    own = config.copy_and_resolve_references()
    own.eval.limit, own.eval.split, own.eval.labels = 0, "test", tuple(labels)
    splits = pipeline.Splits([], [], examples(probes, config.data), {})
    found = measure.held_out(own, splits, tokenizer, reader)
    assert found is not None
    return found


def check_label(label: str, labels: Sequence[str]) -> str:
    """The label whose probability is a row's score: the one named, else the last.

    Raises:
      UserError: it is none of the model's.
    """
    if label and label not in labels:
        raise UserError(
            f"audit.score_label={label!r} is no label{nearest(label, list(labels))}; there are {', '.join(labels) or 'none: set eval.labels'}"
        )
    return label or (labels[-1] if labels else "")


def answers(result: tasks.Result, label: str) -> list[Answer]:
    """What each row got: of labels the likeliest and the probability of `label`; a number; minus the nll of a token; or a text."""
    found = []
    for row in result.rows:
        if "scores" in row:
            scores = np.asarray(list(row["scores"].values()), np.float64)
            shares = np.exp(scores - scores.max())
            found.append(
                Answer(
                    row["prediction"], float((shares / shares.sum())[list(row["scores"]).index(label)]), row["correct"]
                )
            )
        elif "probabilities" in row:
            found.append(Answer(list(row["prediction"]), float(row["probabilities"][label]), row["correct"]))
        elif "nll_sum" in row:
            found.append(Answer(None, -float(row["nll_sum"]) / max(1, row["num_tokens"])))
        elif isinstance(row["prediction"], int | float):
            found.append(Answer(None, float(row["prediction"])))
        else:
            found.append(Answer(tasks.normalise(row["prediction"]), None, row["correct"]))
    return found


def figures(compared: Sequence[Probe], found: Sequence[Answer]) -> list[Figure]:
    """Of each axis, pair of groups and template: how often the answer flips, by how much scores differ (mean of the absolute gap), and to
    whose side (the gap, second group minus first, of rows about one group), in all and in each direction. Beside it the accuracy of both
    versions together: what a mitigation must not cost.
    """
    made: list[Figure] = []
    for name in dict.fromkeys(probe.name for probe in compared):
        mine = [probe for probe in compared if probe.name == name]
        pairs = [(found[probe.first], found[probe.second]) for probe in mine]
        if pairs[0][0].prediction is not None:
            flips = np.asarray([a.prediction != b.prediction for a, b in pairs], bool)
            made.append(Figure("probes", name, "flip rate", flips))
        if pairs[0][0].correct is not None:
            right = np.asarray([[a.correct, b.correct] for a, b in pairs], np.float64)
            made.append(Figure("probes", name, "accuracy", right.mean(-1)))
        if pairs[0][0].score is None:
            continue
        first, second = (np.asarray([one[side].score for one in pairs], np.float64) for side in (0, 1))
        made.append(Figure("probes", name, "mean absolute gap", np.abs(second - first)))
        directions = [probe.direction for probe in mine]
        one_way = np.asarray([direction != MIXED for direction in directions])
        if one_way.any():
            made.append(Figure("probes", name, "gap", second[one_way], nothing=0.0, against=first[one_way]))
        for direction in dict.fromkeys(d for d in directions if d not in ("", MIXED)):
            rows = np.asarray([d == direction for d in directions])
            turned = mine[directions.index(direction)].from_second
            before, after = (second, first) if turned else (first, second)
            made.append(Figure("probes", name, f"gap, {direction}", after[rows], nothing=0.0, against=before[rows]))
    return made


def worst(probes: Probes, found: Sequence[Answer], number: int) -> list[dict[str, Any]]:
    """The rows whose answer the swap changes most: flips first, then by the gap; texts of both versions beside."""

    def size(probe: Probe) -> tuple[bool, float]:
        a, b = found[probe.first], found[probe.second]
        return a.prediction != b.prediction, abs(
            b.score - a.score
        ) if a.score is not None and b.score is not None else 0.0

    picked = sorted(probes.compared, key=size, reverse=True)[:number]
    return [
        {
            "row_id": probe.row_id,
            "probe": probe.name,
            "direction": probe.direction,
            "first": {**_shown(probes.rows[probe.first], probes.rows[probe.second]), **found[probe.first]._asdict()},
            "second": {**_shown(probes.rows[probe.second], probes.rows[probe.first]), **found[probe.second]._asdict()},
        }
        for probe in picked
        if size(probe) > (False, 0.0)
    ]


def _shown(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row differs from its other version."""
    return {"text": {key: value for key, value in row.items() if value != other.get(key)}}
