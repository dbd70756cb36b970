"""Sections of the config that say what a run may cost the model it starts from; `config.base` puts them beside the others."""

from __future__ import annotations

from ml_collections import ConfigDict


def protect() -> ConfigDict:
    return ConfigDict()


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
