"""Sections of the config that say what a run may cost the model it starts from; `config.base` puts them beside the others."""

from __future__ import annotations

from ml_collections import ConfigDict


def protect() -> ConfigDict:
    return ConfigDict()


def retain() -> ConfigDict:
    c = ConfigDict()
    c.penalties = ()  # ((name, weight), …) added to the objective: kl_base | l2_start (L2-SP) | ewc | orthogonal (O-LoRA)
    c.kl_direction = "forward"  # kl_base: forward, KL(base || model) | reverse | js | skew_forward | skew_reverse
    c.kl_temperature = (
        1.0  # kl_base: of both distributions; 2 with weight 1 is learning without forgetting (arXiv:1606.09282)
    )
    c.kl_mix = 0.5  # kl_base: beta of js, alpha of skew
    c.kl_non_target = (
        False  # kl_base: leave a token's target out of both distributions: what the data teaches is not held back
    )
    c.kl_to = "base"  # kl_base: base (the model as model.source has it) | start (as training starts: with tune.adapter, if there is one)
    c.fisher_data = ()  # ewc: rows whose Fisher information counts, (("data.train", URI), ("data.limit", 200), …); keys of `data`, the others as base() has them
    c.fisher = ""  # ewc: the Fisher information of an earlier run, by URI: its workdir, or a fisher.safetensors; added to that of fisher_data
    c.fisher_labels = "sampled"  # ewc: sampled (by the model: the true Fisher) | data (the empirical one)
    c.fisher_decay = (
        1.0  # ewc: what the earlier Fisher is multiplied by before it is added (online EWC, arXiv:1805.06370)
    )
    c.fisher_rows = 4  # ewc: rows whose gradients are held at once, rounded up to the mesh's shards of a batch
    c.earlier_adapters = ()  # PEFT folders of earlier tasks, by URI: what orthogonal keeps away from
    c.merge_earlier = (
        False  # fold them into the base before training, in their order; the result is then exported merged
    )
    c.replay = ()  # rows of other data in each batch: ((URI, share of the batch's rows, (("data.prompt", …), …)), …)
    c.rewarm = 0.0  # learning rate that the warm-up starts from: the last one of the model that training goes on from (arXiv:2403.08763)
    return c


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
    return c


def self_distill() -> ConfigDict:
    return ConfigDict()


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
