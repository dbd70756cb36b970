"""Consensus labels, and the quality of labels and annotators: by cleanlab's CROWDLAB where a model's probabilities are there.

CROWDLAB (Goh, Tkachenko & Mueller 2022, arXiv:2210.06812) weighs each annotator and the model by how well they agree with
others. Without probabilities the consensus is the majority's, and a label's quality the share of its annotators, smoothed.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from jaxtune.types import UserError

CROWDLAB, MAJORITY = "crowdlab", "majority"
_FEWEST = 10  # units and annotators' pairs below which weights are noise: the majority then decides


class Consensus(NamedTuple):
    """label_U: number of each unit's consensus label, -1 where nobody rated it. quality_U: how sure it is, 0 to 1. quality_R: of each
    annotator, 0 to 1; NaN where there is nothing to measure it by. method: crowdlab | majority."""

    label_U: np.ndarray
    quality_U: np.ndarray
    quality_R: np.ndarray
    method: str


def consensus(ratings_RU: np.ndarray, num_labels: int, probs_UV: np.ndarray | None = None) -> Consensus:
    """Returns the consensus of annotators (rows), whose labels are numbers from 0, NaN where missing.

    Args:
      probs_UV: a model's probability of each label for each unit, made without these labels (out of sample); NaN rows where
        there is none; None = majority.

    Raises:
      UserError: probabilities are there and cleanlab is not installed, or they are no probabilities.
    """
    ratings = np.asarray(ratings_RU, np.float64)
    rated_U = (~np.isnan(ratings)).any(0)
    plain = _majority(ratings, num_labels)
    if probs_UV is None:
        return plain
    probs = np.asarray(probs_UV, np.float64)
    used_U = np.logical_and(rated_U, ~np.isnan(probs).any(1))
    rows = probs[used_U]
    if len(rows) and (np.any(rows < 0) or not np.allclose(rows.sum(1), 1, atol=1e-3)):
        raise UserError("probabilities came that are below 0 or do not add up to 1; expected one for each label")
    several = int((~np.isnan(ratings[:, used_U])).sum(0).max(initial=0))
    if used_U.sum() < _FEWEST or several < 2 or len(ratings) < 2:
        return plain
    return _crowdlab(ratings, used_U, rows, plain)


def _crowdlab(ratings: np.ndarray, used_U: Any, probs: np.ndarray, plain: Consensus) -> Consensus:
    if importlib.util.find_spec("cleanlab") is None:
        raise UserError("label quality by a model's probabilities needs cleanlab: pip install 'jaxtune[review]'")
    from cleanlab.multiannotator import get_label_quality_multiannotator

    present_R = np.flatnonzero((~np.isnan(ratings[:, used_U])).any(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some annotators rated few: the page shows how many
        found = get_label_quality_multiannotator(
            ratings[present_R][:, used_U].T, probs / probs.sum(1, keepdims=True), verbose=False
        )
    quality = found["label_quality"]
    label_U, quality_U, quality_R = plain.label_U.copy(), plain.quality_U.copy(), np.full(len(ratings), math.nan)
    label_U[used_U] = quality["consensus_label"].to_numpy().astype(int)
    quality_U[used_U] = quality["consensus_quality_score"].to_numpy()
    stats = found["annotator_stats"]["annotator_quality"]
    for row, rater in enumerate(present_R):
        quality_R[rater] = float(stats.loc[row])
    return Consensus(label_U, quality_U, quality_R, CROWDLAB)


def _majority(ratings: np.ndarray, num_labels: int) -> Consensus:
    """The most voted label (of tied ones that which is commoner over all, then the first), and the share of its voters.

    Shares are smoothed by one vote spread over all labels. An annotator's quality is how often, weighed by the number of
    others, these others gave the same label.
    """
    votes_UV = np.stack([(ratings == label).sum(0) for label in range(num_labels)], 1).astype(np.float64)
    num_U = votes_UV.sum(1)
    common_V = votes_UV.sum(0) / max(votes_UV.sum(), 1)
    label_U = np.where(num_U > 0, (votes_UV + 1e-6 * common_V).argmax(1), -1)
    most_U = np.take_along_axis(votes_UV, np.maximum(label_U, 0)[:, None], 1)[:, 0]
    quality_U = np.where(num_U > 0, (most_U + 1 / num_labels) / (num_U + 1), math.nan)
    quality_R = np.full(len(ratings), math.nan)
    for rater, own_U in enumerate(ratings):
        at = np.flatnonzero(~np.isnan(own_U) & (num_U >= 2))
        if len(at):
            same = votes_UV[at, own_U[at].astype(int)] - 1
            quality_R[rater] = float(same.sum() / (num_U[at] - 1).sum())
    return Consensus(label_U.astype(int), quality_U, quality_R, MAJORITY)
