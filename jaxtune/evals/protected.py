"""What a run must not cost: sets of rows beside its task, their scores before and after, and which of them it broke.

A language model's sets are measured as any held-out rows of one are: perplexity and bits per byte of texts, a choice among
labels, generations by exact match or by rewards. Of a model with another head (words masked, labels, tags, embeddings, a
reward) a set holds rows of the very kind that trains it, and is measured by its metrics: masked words of general text, a
search that is not the new one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtune import fetch
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, privacy
from jaxtune.data.formats import read_examples
from jaxtune.data.readers import NEXT, Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure as measure_lib
from jaxtune.evals import tasks
from jaxtune.statistics import Estimate
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError, nearest
from jaxtune.validation_retention import filled

# By what kind of measurement, what a set may be judged by; the first unless it says otherwise.
_METRICS = {
    "perplexity": ("bits_per_byte", "perplexity"),
    "labels": ("accuracy", "macro_f1", "label_nll"),
    "exact_match": ("exact_match",),
    "reward": ("mean_reward", "pass_rate"),
    "retrieval": ("mrr_at_10", "recall_at_1", "recall_at_5"),
    "masked": ("masked_perplexity", "masked_accuracy"),
    "label": ("accuracy", "macro_f1", "label_nll"),
    "labels of a head": ("label_micro_f1", "label_macro_f1", "subset_accuracy"),
    "number": ("rmse", "pearson", "spearman"),
    "tags": ("tag_accuracy",),
    "rewards": ("pair_accuracy", "pair_nll", "calibration_error"),
}


def metrics_of(held: measure_lib.HeldOut) -> tuple[str, ...]:
    """What held-out rows may be judged by; the first is what they are judged by unless another is named."""
    headed = held.reader.kind != "next"
    return _METRICS["labels of a head" if headed and held.metric == "labels" else held.metric]


class Protected(NamedTuple):
    """A set of rows on which a model may become worse by `tolerance` of `metric`, in its unit, and by no more.

    `config` says how it is measured, and is its own: `base()`'s but for what the set changes.
    """

    name: str
    config: ConfigDict
    held: measure_lib.HeldOut
    metric: str
    higher_is_better: bool
    tolerance: float


class Verdict(NamedTuple):
    """What a set's score did, by its judged metric: `before`, `after`, and after minus before with a paired interval.

    `worsening` is that difference as a loss: above 0 is worse, in the metric's unit; `broken` when it exceeds the tolerance. `gaps`
    holds `tasks.compare` of every metric.
    """

    metric: str
    higher_is_better: bool
    tolerance: float
    before: Estimate
    after: Estimate
    worsening: Estimate
    gaps: dict[str, dict[str, Any]]
    broken: bool

    def told(self) -> str:
        """In words, for the terminal: "bits_per_byte 0.91 to 0.95, worse by 0.04 [0.03, 0.05], tolerance 0.02"."""
        w = self.worsening
        verb, w = ("better", Estimate(-w.value, -w.high, -w.low)) if w.value < 0 else ("worse", w)
        return (
            f"{self.metric} {self.before.value:.4g} to {self.after.value:.4g}, {verb} by {w.value:.3g} [{w.low:.3g}, {w.high:.3g}], "
            f"tolerance {self.tolerance:g}"
        )


def read(
    config: ConfigDict, tokenizer: Tokenizer, show: Any = pipeline.silent, reader: Reader = NEXT
) -> list[Protected]:
    """Fetches and reads the sets of `protect.sets`, in their order.

    `reader` is the run's own, by which sets are read of a model with another head than a language model's.

    Raises:
      UserError: naming the set: no rows, rows that its metric cannot measure, or a judged metric that it does not have.
    """
    sets = []
    for name, given in config.protect.sets:
        try:
            sets.append(_read(config, name, given, tokenizer, show, reader))
        except UserError as error:
            raise UserError(f"protect.sets, {name!r}: {error}") from None
    return sets


def _read(config: ConfigDict, name: str, given: Any, tokenizer: Tokenizer, show: Any, reader: Reader) -> Protected:
    own, beside = filled(f"protect.sets, {name!r}", given)
    own.model, own.train.seed, own.tune.adapter = config.model, config.train.seed, config.tune.adapter
    own.privacy = config.privacy
    headed = config.train.objective in (*start.HEADS, "contrastive")  # else a language model, however it is trained
    if headed:
        own.train.objective = config.train.objective
    held = measure_lib.held_out(own, _splits(own, tokenizer, show), tokenizer, reader if headed else NEXT)
    if held is None:
        raise UserError(f"has no rows of eval.split={own.eval.split!r}: name a file with some as data.test")
    names = metrics_of(held)
    metric = beside.get("judged", names[0])
    if metric not in names:
        raise UserError(f"is judged by {metric!r}; expected one of {', '.join(names)}{nearest(str(metric), names)}")
    tolerance = float(beside.get("tolerance", config.protect.tolerance))
    return Protected(name, own, held, metric, tasks.higher_is_better(metric), tolerance)


def _splits(own: ConfigDict, tokenizer: Tokenizer, show: Any) -> pipeline.Splits:
    """The set's rows by split; a file of training rows is needed only where a share of it is what is asked for."""
    answers, judged, private = own.eval.metric != "reward", rows_lib.judged(own), privacy.of(own.privacy)
    if own.data.train:
        return pipeline.load(own.data, rows_lib.paths(own), tokenizer, show, judged, answers, private=private)
    found: dict[str, list[Any]] = {"train": [], "eval": [], "test": []}
    for split in ("eval", "test"):
        if own.data[split]:
            found[split], _ = read_examples(fetch.local(own.data[split]), own.data, answers, judged, private=private)
    counts = {"train": 0, "validation": len(found["eval"]), "test": len(found["test"])}
    return pipeline.Splits(found["train"], found["eval"], found["test"], counts)


def check(sets: list[Protected], tokenizer: Tokenizer, program: Program) -> None:
    """Refuses sets that cannot be measured on this model, before anything is trained.

    Raises:
      UserError: naming the set, and its first row that is too long for the model.
    """
    for one in sets:
        try:
            measure_lib.check(one.config, one.held, tokenizer, program)
        except UserError as error:
            raise UserError(f"protect.sets, {one.name!r}: {error}") from None


def measure(
    sets: list[Protected], tokenizer: Tokenizer, program: Program, params: Params, show: Any, what: str
) -> dict[str, tasks.Result]:
    """Measures one model, of all these parameters, on every set; `what` names it where progress is shown."""
    return {
        one.name: measure_lib.measure(one.config, one.held, tokenizer, program, params, show, f"{one.name}, {what}")
        for one in sets
    }


def judge(
    sets: list[Protected], before: dict[str, tasks.Result], after: dict[str, tasks.Result], by: str = "estimate"
) -> dict[str, Verdict]:
    """Compares two models on the same sets, each with the paired intervals and tests of `tasks.compare`.

    A set is broken where its worsening exceeds its tolerance: as measured (`by` "estimate"), or with the whole of its interval
    ("interval"), so that chance alone breaks few. A worsening that is no number breaks it.
    """
    verdicts = {}
    for one in sets:
        first, second = before[one.name], after[one.name]
        gaps = tasks.compare(first, second, **measure_lib.intervals(one.config))
        gap = gaps[one.metric]
        value, low, high = gap["value"], gap["low"], gap["high"]
        # 0 less it, not minus it: what stays the same is worse by 0, and not by -0.
        worse = Estimate(0 - value, 0 - high, 0 - low) if one.higher_is_better else Estimate(value, low, high)
        broken = not (worse.low if by == "interval" else worse.value) <= one.tolerance
        sides = (first.metrics[one.metric], second.metrics[one.metric])
        verdicts[one.name] = Verdict(one.metric, one.higher_is_better, one.tolerance, *sides, worse, gaps, broken)
    return verdicts


def account(
    verdicts: dict[str, Verdict], before: dict[str, tasks.Result], after: dict[str, tasks.Result]
) -> dict[str, Any]:
    """What report.json says of the sets, by name."""
    return {
        name: {
            "metric": verdict.metric,
            "higher_is_better": verdict.higher_is_better,
            "tolerance": verdict.tolerance,
            "before": {metric: e._asdict() for metric, e in before[name].metrics.items()},
            "after": {metric: e._asdict() for metric, e in after[name].metrics.items()},
            "difference": verdict.gaps,
            "broken": verdict.broken,
        }
        for name, verdict in verdicts.items()
    }
