"""Which of the sampled answers a round trains on, by method; and of every other one why not. Pure functions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# Reasons to refuse an answer, as refused.jsonl has them.
CUT_OFF, EMPTY = "cut_off", "empty"  # it did not end by itself; there is nothing in it
FAILED, WRONG = "reward_failed", "below_threshold"
SAME_PATH, ENOUGH = "same_path", "enough_for_prompt"
TOO_LONG = "prompt_too_long"  # of a prompt, which is then not asked


class Sample(NamedTuple):
    """One answer of the model to prompt number `prompt`; `reward` is NaN where it could not be judged."""

    prompt: int
    completion: str
    ended: bool  # by itself, not by length
    reward: float
    hinted: bool = False  # the answer stood in the prompt (STaR's rationalisation)


class Choice(NamedTuple):
    """What is trained on, and what is not, each in the order of the prompts; `refused` with its reason."""

    kept: list[Sample]
    refused: list[tuple[Sample, str]]


def choose(
    method: str, samples: Iterable[Sample], threshold: float, most: int, earlier: Iterable[Sample] = ()
) -> Choice:
    """Keeps right answers by the method.

    star (arXiv:2203.14465): of each prompt the first right one; one that needed a hint stands in where none did without.
    rft (arXiv:2308.01825): those whose `path` no other kept one of the prompt has, what `earlier` rounds kept included.
    rest_em (arXiv:2312.06585): each right one, alike or not: how often an answer is sampled is its weight.
    rewrite (arXiv:2402.13669): of each prompt the first that verifies.

    Args:
      method: star | rft | rest_em | rewrite.
      samples: a prompt's are together, those with a hint after those without.
      threshold: reward from which an answer is right.
      most: answers kept of a prompt at most (rft, rest_em); 0 = all.
      earlier: kept by the rounds before, which rft goes on from.
    """
    most = 1 if method in ("star", "rewrite") else most
    kept = list(earlier) if method == "rft" else []
    refused: list[tuple[Sample, str]] = []
    num_of, seen = Counter(sample.prompt for sample in kept), {(s.prompt, path(s.completion)) for s in kept}
    for sample in samples:
        reason, key = _why_wrong(sample, threshold), (sample.prompt, path(sample.completion))
        if not reason and method == "rft" and key in seen:
            reason = SAME_PATH
        if not reason and most and num_of[sample.prompt] >= most:
            reason = ENOUGH
        if reason:
            refused.append((sample, reason))
            continue
        kept.append(sample)
        num_of[sample.prompt] += 1
        seen.add(key)
    return Choice(sorted(kept, key=lambda sample: sample.prompt), refused)


def is_right(sample: Sample, threshold: float) -> bool:
    """Whether an answer may be trained on."""
    return not _why_wrong(sample, threshold)


def _why_wrong(sample: Sample, threshold: float) -> str:
    if not sample.completion.strip():
        return EMPTY
    if not sample.ended:
        return CUT_OFF
    if math.isnan(sample.reward):
        return FAILED
    return WRONG if sample.reward < threshold else ""


_CALCULATION = re.compile(r"[\d.,%]+(?:\s*[-+*/×÷x^=]\s*\(*[\d.,%]+\)*)+")


def path(completion: str) -> str:
    """What makes two right answers different paths: their calculations, in order; without any, their words.

    "3 + 4 = 7, so 7 apples" and "There are 3+4=7." are one path; "4 + 3 = 7" is another.
    """
    found = [re.sub(r"\s", "", one).strip(".,") for one in _CALCULATION.findall(completion)]
    return "|".join(found) or " ".join(completion.casefold().split())
