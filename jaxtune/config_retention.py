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
    return ConfigDict()


def self_distill() -> ConfigDict:
    return ConfigDict()


def merge() -> ConfigDict:
    return ConfigDict()


def frontier() -> ConfigDict:
    return ConfigDict()


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
