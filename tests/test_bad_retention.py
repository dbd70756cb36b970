"""Mistakes in what is to hold a run near its start: each ends in one line that says what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from jaxtune import sharding, validation
from jaxtune.train import references, sequences, start, state
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.weights import source

KL, L2, EWC, APART = (((name, 0.1),) for name in ("kl_base", "l2_start", "ewc", "orthogonal"))
SELF_TAUGHT = {"self_training.method": "demonstration", "self_training.from_base": False}

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"retain.penalties": (("kl_bass", 0.1),)}, "'kl_bass'.*did you mean 'kl_base'"),
    ({"retain.penalties": (("l2_start", -1.0),)}, "'l2_start' the weight -1.0; expected 0 or more"),
    ({"retain.penalties": (("l2_start", float("nan")),)}, "weight nan"),
    ({"retain.penalties": ("kl_base", 0.1)}, r"has 'kl_base'; expected \(penalty, weight\)"),
    ({"retain.penalties": KL + KL}, "'kl_base' twice"),
    ({"retain.penalties": EWC}, "neither retain.fisher_data nor retain.fisher"),
    ({"retain.penalties": EWC, "retain.fisher_data": (("data.limit", 3),)}, "fisher_data lacks 'data.train'"),
    ({"retain.penalties": EWC, "retain.fisher_data": (("data.trian", "x"),)}, "'data.trian'.*did you mean 'data.train'"),
    ({"retain.fisher_data": (("data.limit", "many"),)}, "'data.limit' = 'many'; expected a int"),
    ({"retain.penalties": KL, "tune.method": "prompt"}, "set retain.kl_to='start'"),
    ({"retain.penalties": KL, "meta.algorithm": "reptile", "train.batch_size": 16}, "does not go with meta.algorithm='reptile'"),
    ({"retain.penalties": APART}, "name PEFT folders of earlier tasks"),
    ({"retain.earlier_adapters": ("a",)}, "changes nothing by itself"),
    ({"retain.merge_earlier": True, "retain.earlier_adapters": ("a",)}, "set export.merge=True"),
    ({"retain.rewarm": 1.0}, "expected at most the former"),
    ({"retain.rewarm": 1e-4, "optim.warmup_steps": 0}, "and a warm-up"),
    ({"retain.replay": (("x.jsonl", 0.0, ()),)}, "the share 0.0; expected above 0 and below 1"),
    ({"retain.replay": (("x.jsonl", 1.0, ()),)}, "the share 1.0"),
    ({"retain.replay": (("x.jsonl", 0.5, ()), ("y.jsonl", 0.5, ()))}, "sum to 1, which leaves no room"),
    ({"retain.replay": (("x.jsonl", 0.45, ()), ("y.jsonl", 0.45, ())), "train.batch_size": 1}, "need up to 2 rows"),
    ({"retain.replay": (("x.jsonl", 0.5),)}, r"expected \(URI, share, settings\)"),
    ({"retain.replay": (("x.jsonl", 0.5, (("data.packing", False),)),)}, "'data.packing', which is the batch's"),
    ({"retain.replay": (("x.jsonl", 0.5, ()),), "train.objective": "contrastive"}, "train.objective='contrastive'"),
    ({"retain.replay": (("x.jsonl", 0.5, None),)}, r"of 'x.jsonl' has None; expected \(\(key of data, value\), …\)"),
    ({"retain.replay": (("x.jsonl", 0.5, (("data.limit", -1),)),)}, "retain.replay of 'x.jsonl': config.data.limit is -1"),
    ({"retain.fisher_data": (("data.train", "x"), ("data.format", "txt"))}, "retain.fisher_data: .*'txt'.*did you mean 'text'"),
    ({**SELF_TAUGHT, "retain.replay": (("x.jsonl", 0.5, ()),)}, "no rows of retain.replay: set it to"),
    ({**SELF_TAUGHT, "train.beside": (("sft", 0.5),)}, "no rows of train.beside: set it to"),
    ({"retain.kl_temperature": 0.0}, "retain.kl_temperature is 0.0"),
    ({"retain.kl_direction": "backward"}, "'backward'"),
    ({"tune.freeze": ("(",)}, "not a regular expression"),
    ({"tune.train_layers": (1, -1)}, "tune.train_layers is .*expected numbers of layers from 0"),
    ({"tune.train_layers": (1,), "tune.method": "prompt"}, "tune.method='prompt'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), SETTINGS, ids=[says[:40] for _, says in SETTINGS])
def test_a_config_is_refused(tiny_config: ConfigDict, changes: dict[str, Any], says: str) -> None:
    validation.validate(tiny_config)
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says) as refused:
        validation.validate(tiny_config)
    assert "\n" not in str(refused.value)


def made(config: ConfigDict) -> state.Program:
    model = source.find(config)
    start.check_head(config, model)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    return state.abstract(config, model.hf_config, mesh, 1, start.adapter(config, model)[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tune.freeze": (".*",)}, "leave nothing to train"),
        ({"tune.freeze": (r"layers\.att\..*",)}, r"'layers\\\\.att.*matches no parameter"),
        ({"tune.train_layers": (2,)}, "has 2; this model's 2 layers are 0 to 1"),
        ({"tune.train_layers": (0,), "tune.freeze": (r"layers\..*",)}, "leave nothing to train"),
    ],
)
def test_a_model_with_nothing_like_it_is_refused(tiny_config: ConfigDict, changes: dict[str, Any], says: str) -> None:
    tiny_config.mesh.fsdp = 1
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says):
        made(tiny_config)


def test_words_are_compared_where_there_are_words(tiny_config: ConfigDict) -> None:
    config = tiny_config
    config.mesh.fsdp, config.retain.penalties = 1, KL
    config.train.objective, config.model.head, config.model.labels = "classify", "sequence", ("good", "bad")
    with pytest.raises(UserError, match="no head of words.*l2_start, ewc and orthogonal work here"):
        made(config)
    config.retain.penalties = L2
    made(config)


def test_penalties_are_of_the_main_objective(tiny_config: ConfigDict) -> None:
    """One beside it, of pairs that say no words, is no reason to refuse what is compared on the main one's."""
    tiny_config.retain.penalties, tiny_config.train.beside = KL, (("contrastive", 0.5, "pairs.jsonl"),)
    model = source.find(tiny_config)
    tokenizer = source.find_tokenizer(tiny_config, model)
    assert [one.train.objective for one, _ in start.beside(tiny_config, model, tokenizer)] == ["contrastive"]
    tiny_config.train.objective, tiny_config.train.beside = "contrastive", ()
    with pytest.raises(UserError, match="no head of words"):
        start.reader(tiny_config, model, tokenizer)


class _Asked(Exception):
    """What a program was asked for."""


def _asked(config: ConfigDict, *_: Any) -> Any:
    raise _Asked(config)


@pytest.mark.parametrize("teacher", ["start", "reference"])
def test_a_model_that_only_speaks_is_asked_for_no_more(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """This model as a writer of answers, another as a reference: neither has guests, penalties or frozen layers of the run's."""
    config = tiny_config
    config.tune.method, config.tune.freeze, config.tune.train_layers = "full", (r"embed\..*",), (1,)
    config.retain.penalties, config.train.beside = L2, (("distill", 0.5),)
    config.distill.teacher, config.preference.reference = "start", config.model.source
    monkeypatch.setattr(start, "program", _asked)
    tokenizer = source.find_tokenizer(config, source.find(config))
    ask = sequences._teacher if teacher == "start" else lambda config, show: references._other(config, tokenizer, show)
    with pytest.raises(_Asked) as found:
        ask(config, None)
    (asked,) = found.value.args
    assert (asked.tune.freeze, asked.tune.train_layers, asked.retain.penalties, asked.train.beside) == ((), (), (), ())
    made(asked)  # it exists, though nothing of it trains as in the run


def test_an_earlier_adapter_of_another_model_is_refused(
    tiny_config: ConfigDict, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config
    config.mesh.fsdp = 1
    other = config.copy_and_resolve_references()
    other.model.source, other.workdir = str(make_model(tmp_path / "other", hidden_size=32)), str(tmp_path / "elsewhere")
    program = made(other)
    values = {path: jnp.ones(like.shape) for path, like in program.adapter.items()}
    model = source.find(other)
    folder = start.write_result(other, tmp_path / "elsewhere", model, None, program, values, {})
    config.retain.penalties, config.retain.earlier_adapters = APART, (str(folder),)
    with pytest.raises(UserError, match="was it made for another model"):
        made(config)
    config.model.source, config.tune.targets = other.model.source, r"layers\.mlp\.up_proj"
    made(config)
    config.tune.targets = r"lm_head"
    with pytest.raises(UserError, match="adapts none of the linear layers"):
        made(config)


def test_replay_without_rows_says_which(tiny_config: ConfigDict, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    tiny_config.retain.replay = ((str(empty), 0.5, ()),)
    model = source.find(tiny_config)
    with pytest.raises(UserError, match=r"retain\.replay '.*empty\.jsonl'"):
        rows_lib.read(tiny_config, source.find_tokenizer(tiny_config, model), lambda items, *_: items)
