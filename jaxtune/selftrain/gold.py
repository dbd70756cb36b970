"""Methods that start from gold answers: the model restates them, or is taught on answers of its own by itself, which sees them.

rewrite (SDFT, arXiv:2402.13669): y' ~ P(. | question, gold answer) by the model of the round before; y' is learned where it
verifies, else the gold answer. What is learned is then likelier under the model than gold is, and moves it less.

demonstration (arXiv:2601.19897): y ~ Q(. | question) by the student, who learns

    sum over its tokens t of D(P(. | question, gold answer, y_<t), Q(. | question, y_<t))

from the teacher P, the model of the round before, with D by default the reverse divergence KL(Q || P), over all words. The gradient is
that of D at the tokens that are there, not of how likely they were to be drawn, and P has none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import contexts
from jaxtune.data.formats import Example
from jaxtune.rewards import answers, scoring
from jaxtune.types import UserError
from jaxtune.validation_retention import GOLD

PROMPTS = {"rewrite": "rewrite_prompt", "demonstration": "demonstration_prompt"}
Verify = Callable[[Example, str], float]  # (example, completion) -> score


def asked(config: ConfigDict, example: Example) -> Example:
    """The example as the method shows it to the model that knows the answer; as it is, where it does not."""
    key = PROMPTS.get(config.self_training.method)
    return contexts.told(example, config.self_distill[key], f"self_distill.{key}") if key else example


def check_rows(config: ConfigDict, examples: Sequence[Example]) -> None:
    """Refuses rows without a gold answer, where the method starts from it, or without one that its verifier can find.

    Raises:
      UserError: naming the first one.
    """
    method = config.self_training.method
    lacking = [example.row_id for example in examples if example.answer is None]
    if method in GOLD and lacking:
        raise UserError(
            f"{lacking[0]}: self_training.method={method!r} starts from gold answers, and {len(lacking)} of {len(examples)} rows have none: "
            "give every row its answer, or choose 'star', 'rft' or 'rest_em', which need none"
        )
    if method == "rewrite" and config.self_distill.verifier == "answer":
        for example in examples:
            try:
                answers.check(scoring.row_of(example), config.reward)
            except UserError as error:
                raise UserError(f"{example.row_id}: {error}") from None


def judges_itself(config: ConfigDict) -> bool:
    """Whether no reward judges what is sampled."""
    method = config.self_training.method
    return method == "demonstration" or (method == "rewrite" and config.self_distill.verifier != "reward")


def threshold(config: ConfigDict) -> float:
    """The score from which a sample is right."""
    if not judges_itself(config):
        return float(config.reward.threshold)
    return float(config.self_distill.similarity) if config.self_distill.verifier == "similar" else 0.5


def judge(config: ConfigDict) -> Callable[[Sequence[Example], Sequence[str]], Any]:
    """Scores rewrites by `self_distill.verifier`, as `sampling.Judge` does."""
    reward = config.reward

    def by_answer(example: Example, completion: str) -> float:
        gold = answers.plain(answers.gold(scoring.row_of(example), reward))
        if reward.completion_regex:
            said = answers.said(completion, reward)
            return float(said is not None and answers.plain(said) == gold)
        return float(bool(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", " ".join(completion.casefold().split()))))

    def by_words(example: Example, completion: str) -> float:
        return overlap(example.answer or "", completion)

    verify = by_answer if config.self_distill.verifier == "answer" else by_words

    def scores(examples: Sequence[Example], completions: Sequence[str]) -> Any:
        found = [verify(example, text) for example, text in zip(examples, completions, strict=True)]
        return np.asarray(found, np.float32), {}, {}

    return scores


def overlap(gold: str, text: str) -> float:
    """F1 of the words that two texts have in common, each as often as it stands in both; 0 where either has none."""
    one, other = (Counter(re.findall(r"\w+", each.casefold())) for each in (gold, text))
    shared = sum((one & other).values())
    return 2 * shared / (sum(one.values()) + sum(other.values())) if shared else 0.0


def distilling(config: ConfigDict, made: ConfigDict) -> None:
    """Makes a round's run, on gold rows, one that is taught by the model that it starts from."""
    chosen, options = config.self_training, config.self_distill
    made.train.objective, made.data.packing = "distill", False
    taught, rl = made.distill, made.rl
    taught.teacher, taught.mode, taught.alpha, taught.on_policy = "start", "online", 1.0, 1.0
    taught.teacher_adapter, taught.teacher_tokenizer, taught.teacher_quantize = "", "", ""
    taught.layer_map, taught.hidden_weight, taught.attention_weight = (), 0.0, 0.0
    taught.divergence, taught.demonstration = options.divergence, options.demonstration_prompt
    rl.temperature, rl.top_k, rl.top_p, rl.min_p = chosen.temperature, chosen.top_k, chosen.top_p, 0.0
    rl.max_new_tokens, rl.slots = chosen.max_new_tokens, chosen.slots
