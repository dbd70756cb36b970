"""Sections of the config that say what a run may cost the model it starts from; `config.base` puts them beside the others."""

from __future__ import annotations

from ml_collections import ConfigDict


def protect() -> ConfigDict:
    c = ConfigDict()
    c.sets = ()  # what the run must not cost: ((name, ((key, value), …)), …), keys of data, eval, generate and reward as `base` has them but for these, and tolerance, judged (the metric that is)
    c.tolerance = 0.02  # of a set that names none: how much worse its metric may become, in the metric's unit
    c.judge_by = "estimate"  # a set is broken when its worsening exceeds the tolerance: estimate (as measured) | interval (all of its interval does)
    c.every_steps = 0  # sets are measured every so many steps; 0 = before and after alone
    c.on_broken = "report"  # a set is broken: report | stop (train no further) | rollback (stop, and export the last checkpoint at which none was)
    c.kl_every_steps = 0  # base_kl, forward KL from the first weights on the task's own rows, every so many steps; 0 = beside validation, and at the end
    c.kl_rows = 64  # rows that base_kl is over: of validation, else of training; 0 = it is not measured
    return c


def retain() -> ConfigDict:
    return ConfigDict()


def distill() -> ConfigDict:
    c = ConfigDict()
    c.teacher = ""  # who teaches: a model's URI, as model.source | adapter_off (this model without its adapter) | start (this model as training starts)
    c.teacher_adapter = ""  # PEFT folder on it, by URI
    c.teacher_tokenizer = ""  # URI of its tokenizer; "" = the one beside its weights
    c.teacher_quantize = ""  # storage of its linear layers' weights, as model.quantize
    c.mode = "online"  # online (in the step, sharded as the student) | precomputed (its top_k words of each token in WORKDIR/teacher, before training) | sequence (it answers the prompts before training, as the section generate says, into WORKDIR/teacher, and its answers are the rows)
    c.alpha = 0.5  # share of the divergence in the loss; 1 - alpha is cross-entropy's
    c.divergence = (
        "forward"  # forward | reverse | js | skew_forward | skew_reverse (objectives/divergences.py has the formulas)
    )
    c.temperature = 1.0  # of both distributions; the divergence is multiplied by its square
    c.mix = 0.5  # js: beta, share of the teacher in the mixture; skew_*: alpha (DistiLLM's authors take 0.1)
    c.top_k = (
        0  # compare the teacher's likeliest words, and all others as one; 0 = all words (precomputed: 64 would do)
    )
    c.non_target = False  # compare without the target, renormalised (arXiv:2203.08679)
    c.layer_map = ()  # pairs of layers to be alike: ((the student's number, the teacher's), …), from 0
    c.hidden_weight = 0.0  # weight of the distance of their hidden states
    c.hidden_loss = "mse"  # mse | cosine (objectives/matching.py has the formulas)
    c.attention_weight = (
        0.0  # weight of the divergence of their attention, whose maps exist for a pair of layers at a time
    )
    c.on_policy = 0.0  # share of the steps whose answers the student writes itself, as the section rl says how (GKD, arXiv:2306.13649); cross-entropy learns from the others alone
    c.demonstration = ""  # on_policy=1: the last turn of a prompt as the teacher sees it, a template over the row's columns, {question} (that turn) and {answer} (the gold one); "" = as the student sees it
    return c


def self_distill() -> ConfigDict:
    c = ConfigDict()
    c.rewrite_prompt = "{question}\n\nThe right answer is:\n{answer}\n\nGive this answer in your own words, and nothing else."  # self_training.method="rewrite": how the model is asked to restate a gold answer, in place of a prompt's last turn; a template over the row's columns, {question} (that turn) and {answer} (the gold one)
    c.demonstration_prompt = "{question}\n\nThis is an example of a good answer:\n{answer}\n\nNow give an answer of your own."  # self_training.method="demonstration": what the teacher sees in its place, likewise
    c.verifier = "reward"  # a rewrite is kept when it verifies: reward (section reward, from reward.threshold on) | answer (what it says last, by reward.completion_regex, is the gold answer; without that, the gold answer stands in it) | similar
    c.similarity = (
        0.5  # similar: share of words that rewrite and gold answer have in common (F1) from which it verifies
    )
    c.divergence = (
        "reverse"  # demonstration: from teacher to student, as distill.divergence, whose other fields count too
    )
    c.stop = True  # a round that breaks a protected set (section protect), or falls below entropy_floor, is the last, and the one before is the result
    c.entropy_prompts = 32  # training prompts that each round answers once at temperature 1: the mean -log p of these tokens estimates its entropy (nats per token), with these two methods or an entropy_floor; 0 = it is not measured
    c.entropy_floor = 0.0  # share of the untuned model's entropy that no round may fall below; 0 = none
    return c


def merge() -> ConfigDict:
    return ConfigDict()


def frontier() -> ConfigDict:
    return ConfigDict()


def update() -> ConfigDict:
    return ConfigDict()


SECTIONS = {
    "protect": protect,
    "retain": retain,
    "distill": distill,
    "self_distill": self_distill,
    "merge": merge,
    "frontier": frontier,
    "update": update,
}
