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
    c = ConfigDict()
    c.adapters = ()  # what is merged: ((URI, weight), …), PEFT adapter folders, or whole models tuned from model.source
    c.method = "cat"  # cat (the exact sum; ranks add up) | linear | svd | magnitude_prune | ties | dare_linear | dare_ties, factor by factor, or with _svd behind the name on whole updates | slerp (two, of weights 1 - t and t)
    c.density = 0.5  # magnitude_prune, ties, dare: share of an update's numbers that is kept
    c.majority_sign = (
        "total"  # ties: a number's sign is elected by the sum of the values (total) or of the signs (frequency)
    )
    c.svd_rank = 0  # svd and names with _svd: rank of the result; 0 = the largest of its parts
    c.seed = 0  # of what dare drops
    c.check_bases = True  # adapters must name one base (base_model_name_or_path)
    c.sweep = ()  # shares of the merged update to measure, e.g. (0.0, 0.25, 0.5, 0.75, 1.0): 0 is the base, 1 all of it (WiSE-FT, arXiv:2109.01903)
    c.pick = "within"  # which share is written: within (most gain with no protected set broken) | gain | knee
    c.metric = ""  # of the task, by which gain is measured; "" = the one that a report shows first
    return c


def frontier() -> ConfigDict:
    c = ConfigDict()
    c.methods = ()  # what is compared: ((name, ((config key, value), …), (strength key, (value, …))), …); merge.sweep as strength key interpolates a finished run
    c.interpolates = (
        ""  # run whose weights those methods take, by its name; "" = the last of the first method that trains
    )
    c.workers = 1  # runs at a time, each a process
    c.environments = ()  # of each worker, environment variables that give it devices of its own: (((name, value), …), …)
    c.metric = ""  # of the task, by which gain is measured; "" = the one that a report shows first
    c.pick = "within"  # which run is named, and its config written: within (most gain with no protected set broken) | gain | knee
    return c


def lineage() -> ConfigDict:
    c = ConfigDict()
    c.folder = ""  # `update`: folder that holds a model's releases and their ledger; one that is not there begins with the base
    c.replay_share = (
        0.2  # share of each batch's rows that are earlier stages' training rows, alike for each stage; 0 = none
    )
    c.on_changed_data = "refuse"  # an earlier stage's file that is no longer what the ledger says: refuse | note (go on with what it holds now)
    c.margin = 0.05  # by how much a candidate may be worse than the released model on any stage's held-out rows, in units of its metric (0.05 accuracy = 5 points)
    c.margins = ()  # of sets by name in its place, stages or protected: ((name, margin), …); a protected set has its own tolerance otherwise
    c.decide = "interval"  # what must be no worse than -margin: interval (the lower end of the paired difference: non-inferiority) | estimate (the difference itself)
    c.force = ""  # a written reason to release what the gate refuses; the ledger keeps it
    c.rollback = -1  # make this release the current one again, and train nothing; 0 = the base; -1 = none
    c.drift_rows = 200  # training rows drawn of each side to compare new data with old; 0 = do not compare
    c.drift_permutations = 1000  # behind the p of the embeddings' test
    c.drift_alpha = 0.05  # a shift is told as such below this p, corrected for the number of tests (Holm)
    c.embedder = ""  # model whose mean-pooled states stand for a text, by URI; "" = the base's own
    return c


SECTIONS = {
    "protect": protect,
    "retain": retain,
    "distill": distill,
    "self_distill": self_distill,
    "merge": merge,
    "frontier": frontier,
    "lineage": lineage,  # of the verb `update`; a ConfigDict has a method of that name
}
