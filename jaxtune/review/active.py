"""What to ask experts next, and when to stop asking: orders of unlabelled rows, and two stop rules. NumPy alone.

N rows, C classes, M models (a committee: checkpoints, or heads trained on resamples), D dims of an embedding, R rounds.
docs/active_learning.md has what the orders were worth on real human ratings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.review import store
from jaxtune.types import UserError, nearest

_TINY = 1e-12
_POWERS = np.linspace(0.05, 2.0, 40)  # of learning curves; of text classifiers they lie well within


def entropy(probabilities_NC: np.ndarray) -> np.ndarray:
    """Uncertainty: entropy of each row's prediction, in nats, 0 to log C."""
    p_NC = np.clip(probabilities_NC, _TINY, 1.0)
    return -(p_NC * np.log(p_NC)).sum(-1)


def margin(probabilities_NC: np.ndarray) -> np.ndarray:
    """Uncertainty: one less the distance of the two likeliest classes, 0 to 1 (Scheffer et al. 2001)."""
    best_N2 = np.sort(probabilities_NC, -1)[:, -2:]
    return 1.0 - (best_N2[:, 1] - best_N2[:, 0])


def vote_entropy(probabilities_MNC: np.ndarray) -> np.ndarray:
    """Disagreement: entropy of the models' votes, in nats, 0 to log min(M, C) (Dagan & Engelson 1995)."""
    num_classes = probabilities_MNC.shape[-1]
    votes_MN = probabilities_MNC.argmax(-1)
    return entropy((votes_MN[..., None] == np.arange(num_classes)).mean(0))


def mean_kl(probabilities_MNC: np.ndarray) -> np.ndarray:
    """Disagreement: mean KL divergence of each model's prediction from their mean, in nats (McCallum & Nigam 1998)."""
    p_MNC = np.clip(probabilities_MNC, _TINY, 1.0)
    return (p_MNC * (np.log(p_MNC) - np.log(p_MNC.mean(0)))).sum(-1).mean(0)


def highest(scores_N: np.ndarray, num: int) -> np.ndarray:
    """Indices of the `num` highest scores, the highest first; of equal ones the first."""
    return np.argsort(-scores_N, kind="stable")[:num]


def shuffled(num_rows: int, num: int, seed: int) -> np.ndarray:
    """Indices of `num` rows at random: the control."""
    return np.random.default_rng(seed).permutation(num_rows)[:num]


def k_center(embeddings_ND: np.ndarray, labelled_KD: np.ndarray, num: int) -> np.ndarray:
    """Diversity: indices of `num` rows, each the farthest from all labelled and all chosen ones.

    The greedy solution of k-center, within twice the best radius (Gonzalez 1985; Sener & Savarese, 1708.00489). With nothing
    labelled the first is the row nearest to the mean.
    """
    x_ND = np.asarray(embeddings_ND, np.float64)
    square_N = (x_ND**2).sum(-1)

    def away(point_D: np.ndarray) -> np.ndarray:
        return np.maximum(square_N - 2 * x_ND @ point_D + point_D @ point_D, 0.0)

    nearest_N = np.full(len(x_ND), np.inf)
    for point_D in np.asarray(labelled_KD, np.float64):
        nearest_N = np.minimum(nearest_N, away(point_D))
    chosen: list[int] = []
    for _ in range(min(num, len(x_ND))):
        first = not chosen and not len(labelled_KD)
        at = int(np.argmin(away(x_ND.mean(0)))) if first else int(np.argmax(nearest_N))
        chosen.append(at)
        nearest_N = np.minimum(nearest_N, away(x_ND[at]))
        nearest_N[at] = -1.0  # a row that is there twice has distance 0, and is still to be chosen
    return np.array(chosen, np.int64)


def badge(probabilities_NC: np.ndarray, embeddings_ND: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Uncertainty and diversity in one: indices of `num` rows whose gradients are long and unlike each other.

    A row's gradient in the last layer, were the likeliest class the right one, is g = (p − onehot(ŷ)) ⊗ h. Rows are drawn as
    k-means++ draws its centers: the next with a chance in proportion to its squared distance from those drawn, the first to
    its squared length (Ash et al., 1906.03671). g is never made: ⟨g, g'⟩ = ⟨p − onehot, p' − onehot'⟩ ⟨h, h'⟩.
    """
    rng, num_rows = np.random.default_rng(seed), len(embeddings_ND)
    a_NC = probabilities_NC - (probabilities_NC.argmax(-1)[:, None] == np.arange(probabilities_NC.shape[-1]))
    h_ND = np.asarray(embeddings_ND, np.float64)
    square_N = (a_NC**2).sum(-1) * (h_ND**2).sum(-1)
    weight_N, chosen = square_N.copy(), np.zeros(num_rows, np.bool_)
    order: list[int] = []
    for _ in range(min(num, num_rows)):
        weight_N[chosen] = 0.0
        total = weight_N.sum()
        even_N = (~chosen).astype(np.float64) / (num_rows - chosen.sum())  # nothing tells those that are left apart
        at = int(rng.choice(num_rows, p=weight_N / total if total > 0 else even_N))
        chosen[at] = True
        order.append(at)
        away_N = square_N + square_N[at] - 2 * (a_NC @ a_NC[at]) * (h_ND @ h_ND[at])
        weight_N = np.minimum(weight_N, np.maximum(away_N, 0.0))
    return np.array(order, np.int64)


class Pool(NamedTuple):
    """What is known of the rows that may be asked about: a committee's predictions, embeddings, and those of labelled rows."""

    probabilities_MNC: np.ndarray
    embeddings_ND: np.ndarray
    labelled_KD: np.ndarray


ORDERS: dict[str, Callable[[Pool, int, int], np.ndarray]] = {
    "random": lambda pool, num, seed: shuffled(len(pool.embeddings_ND), num, seed),
    "entropy": lambda pool, num, seed: highest(entropy(pool.probabilities_MNC.mean(0)), num),
    "margin": lambda pool, num, seed: highest(margin(pool.probabilities_MNC.mean(0)), num),
    "vote_entropy": lambda pool, num, seed: highest(  # votes are often equal: among those the less sure mean
        vote_entropy(pool.probabilities_MNC) + 1e-6 * entropy(pool.probabilities_MNC.mean(0)), num
    ),
    "mean_kl": lambda pool, num, seed: highest(mean_kl(pool.probabilities_MNC), num),
    "diversity": lambda pool, num, seed: k_center(pool.embeddings_ND, pool.labelled_KD, num),
    "combined": lambda pool, num, seed: badge(pool.probabilities_MNC.mean(0), pool.embeddings_ND, num, seed),
}


def order(name: str, pool: Pool, num: int, seed: int) -> np.ndarray:
    """Indices of the `num` rows of the pool to ask about, the first first, by one of ORDERS.

    Raises:
      UserError: there is no such order, or it needs two models and there is one.
    """
    if name not in ORDERS:
        raise UserError(f"there is no order {name!r}; expected one of {', '.join(ORDERS)}{nearest(name, list(ORDERS))}")
    if name in ("vote_entropy", "mean_kl") and len(pool.probabilities_MNC) < 2:
        raise UserError(f"the order {name!r} is by the disagreement of models, and there is one; give two or more")
    return ORDERS[name](pool, num, seed)


def write(engine: store.Engine, ids: Sequence[str], scores: Sequence[float], reason: str) -> None:
    """Puts items of these ids into the queue's order (a task's order="priority"): the highest score is asked first.

    Of an item the last score counts. `reason` stays in the database beside it: the order's name, and the model it is by.
    """
    if not np.isfinite(np.asarray(scores, np.float64)).all():
        raise UserError("a score that is no number came for the queue's order; expected finite ones")
    told = {"reason": reason, "at": time.time()}
    rows = [{"item": one, "score": float(score), **told} for one, score in zip(ids, scores, strict=True)]
    with store.writing(engine) as connection:
        if rows:
            connection.execute(store.priorities.insert(), rows)


class Stop(NamedTuple):
    """Whether to stop asking, and the figure that says so."""

    stop: bool
    value: float
    low: float
    high: float
    why: str


def stabilised(predictions_RN: np.ndarray, threshold: float = 0.99, window: int = 3) -> Stop:
    """Stop when predictions no longer change: the mean Cohen's κ of the last `window` pairs of successive models ≥ threshold.

    Bloodgood & Vijay-Shanker, 1409.5165 (CoNLL 2009); two models with κ ≥ T differ in F by 4(1 − T)/T at most
    (Bloodgood & Grothendieck, 1504.06329). Needs no labels.

    Args:
      predictions_RN: classes of a fixed set of rows by the model after each round; the rows need not be labelled, 2,000 are plenty.
    """
    if len(predictions_RN) <= window:
        return Stop(False, np.nan, np.nan, np.nan, f"{len(predictions_RN)} models; {window + 1} are needed to tell")
    pairs = zip(predictions_RN[-window - 1 : -1], predictions_RN[-window:], strict=True)
    kappas = [_kappa(before_N, after_N) for before_N, after_N in pairs]
    mean = float(np.mean(kappas))
    why = f"successive models agree with a mean kappa of {mean:.4f} over the last {window} rounds; threshold {threshold:g}"
    return Stop(mean >= threshold, mean, min(kappas), max(kappas), why)


def _kappa(a_N: np.ndarray, b_N: np.ndarray) -> float:
    classes = np.union1d(a_N, b_N)
    chance = sum(float(np.mean(a_N == one) * np.mean(b_N == one)) for one in classes)
    return 1.0 if chance >= 1.0 else float((np.mean(a_N == b_N) - chance) / (1.0 - chance))


def no_longer_pays(
    labels_R: np.ndarray,
    correct_RN: np.ndarray,
    more: int,
    least_gain: float,
    groups_N: np.ndarray | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Stop:
    """Stop when even the most that `more` labels may gain in the held-out score is less than `least_gain`.

    error(n) = a + b n⁻ᶜ, a, b ≥ 0, is fitted to the held-out scores by least squares, later points weighing more (by n;
    Figueroa et al. 2012, doi:10.1186/1472-6947-12-8). The gain is b (n⁻ᶜ − (n + more)⁻ᶜ) from the last n, with a
    95% interval from fits to resampled held-out rows, the same rows at every n.

    Args:
      labels_R: how many labels each model had, rising; five points or more tell.
      correct_RN: its score on each held-out row, 0 to 1.
      groups_N: rows of one group (a document's sentences) are resampled together.
    """
    if len(labels_R) < 5:
        return Stop(False, np.nan, np.nan, np.nan, f"{len(labels_R)} scores; 5 are needed to tell")
    rng, num_rows = np.random.default_rng(seed), correct_RN.shape[1]
    _, group_N = np.unique(np.arange(num_rows) if groups_N is None else groups_N, return_inverse=True)
    num_groups = int(group_N.max()) + 1
    counts_BG = rng.multinomial(num_groups, np.full(num_groups, 1.0 / num_groups), size=resamples)
    weights_BN = np.concatenate([np.ones((1, num_rows)), counts_BG[:, group_N]])
    error_BR = 1.0 - weights_BN @ correct_RN.T / weights_BN.sum(-1, keepdims=True)
    gain_B = _gain(np.asarray(labels_R, np.float64), error_BR, more)
    low, high = (float(one) for one in np.quantile(gain_B[1:], (0.025, 0.975)))
    why = f"{more} more labels are expected to gain {gain_B[0]:.4f} [{low:.4f}, {high:.4f}]; least gain {least_gain:g}"
    return Stop(high < least_gain, float(gain_B[0]), low, high, why)


def _gain(labels_R: np.ndarray, error_BR: np.ndarray, more: int) -> np.ndarray:
    """What the power law fitted to each row of errors says that more labels gain."""
    weight_R = labels_R / labels_R.sum()
    best_B, gain_B = np.full(len(error_BR), np.inf), np.zeros(len(error_BR))
    mean_B = error_BR @ weight_R
    for power in _POWERS:
        x_R = labels_R**-power
        centred_R = x_R - weight_R @ x_R
        slope_B = error_BR @ (weight_R * centred_R) / (weight_R @ centred_R**2)
        slope_B = np.clip(slope_B, 0.0, mean_B / (weight_R @ x_R))  # b ≥ 0, and a ≥ 0
        left_BR = error_BR - mean_B[:, None] - slope_B[:, None] * centred_R
        square_B = left_BR**2 @ weight_R
        better_B = square_B < best_B - 1e-15
        best_B = np.where(better_B, square_B, best_B)
        gain_B = np.where(better_B, slope_B * (x_R[-1] - (labels_R[-1] + more) ** -power), gain_B)
    return gain_B
