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
