"""Runs whose batches the model writes itself: exact after a kill, honest about rewards that fail or say nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import checkpoint, run, validation
from jaxtune import config as config_lib
from jaxtune.data.prompts import PromptSource
from jaxtune.train import references, round_files
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.weights import source
from tests.conftest import WORDS
from tests.train.test_exactness import finished, launched, logged, write_config

pytestmark = pytest.mark.usefixtures("quick_compile")

REWARDS = """
import time

def long(prompt, completion, row):
    return min(len(completion), 40) / 40

def same(prompt, completion, row):
    return 1.0

def broken(prompt, completion, row):
    if len(completion) % 3 == 0:
        raise ValueError("no")
    return float("nan") if len(completion) % 3 == 1 else 1.0
"""


@pytest.fixture
def rl_config(tiny_config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """Two rounds of four steps (two minibatches, twice each) of 4 x 4 completions of up to 12 tokens."""
    rng, config = np.random.default_rng(1), tiny_config
    (tmp_path / "rewards.py").write_text(REWARDS)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(2, 5))) for _ in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config.train.objective, config.data.train = "grpo", str(tmp_path / "prompts.jsonl")
    config.data.chat, config.data.format = False, "prompt_completion"
    config.data.validation_fraction, config.mesh.fsdp, config.mesh.tensor = 0.0, 4, 2
    config.reward.functions = ((f"{tmp_path / 'rewards.py'}:long", 1.0),)
    config.rl.update({"prompts_per_round": 4, "group_size": 4, "minibatches": 2, "passes": 2, "slots": 16})
    config.rl.update({"max_prompt_length": 20, "max_new_tokens": 12, "beta": 0.05})
    config.train.steps, config.train.batch_size, config.data.max_length = 8, 4, 64
    return config


def reward(config: ConfigDict, name: str) -> str:
    return config.reward.functions[0][0].rpartition(":")[0] + f":{name}"


def lines(workdir: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()]


@pytest.mark.slow
def test_killed_in_mid_round_and_resumed_is_never_killed(
    rl_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the midst of two rounds: every loss to the bit, the adapter's every byte, and every sample once."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the time of such runs is all compiling
    rl_config.train.steps, rl_config.checkpoint.every_steps = 12, 1
    rl_config.mesh.fsdp = rl_config.mesh.tensor = 1
    path, whole, broken = write_config(rl_config, tmp_path), tmp_path / "whole", tmp_path / "broken"
    finished(launched(path, whole))
    rng = random.Random(0)
    for target in (2, 7):  # steps done: a round has four
        process = launched(path, broken, "--config.checkpoint.resume=True")
        file = broken / "metrics.jsonl"
        while not file.exists() or file.read_text().count('"loss"') < target:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)  # anywhere within a step or its save
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    finished(launched(path, broken, "--config.checkpoint.resume=True"))
    for key in ("loss", "grad_norm", "reward", "kl_at_start", "trained_tokens"):
        assert logged(broken, key) == logged(whole, key)
    assert len(logged(whole, "reward")) == 3  # once a round
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lines(broken, "samples.jsonl") == lines(whole, "samples.jsonl")


def test_ppo_learns_values_and_says_what_it_did(rl_config: ConfigDict) -> None:
    """On a mesh; the critic's loss falls, the first step's ratios are 1, and the value head is in the checkpoint alone."""
    from safetensors import safe_open

    config, workdir = rl_config, Path(rl_config.workdir)
    config.train.objective, config.train.steps, config.checkpoint.every_steps = "ppo", 16, 8
    config.rl.kl_in = "reward"
    config.optim.learning_rate, config.optim.schedule = 3e-2, "constant"
    config.rl.value_clip, config.rl.value_weight = 0.0, 1.0
    config.reward.functions = ((reward(config, "same"), 1.0), (reward(config, "long"), 0.5))
    run.train(config, workdir)
    told = [line for line in lines(workdir) if "loss" in line]
    assert told[0]["clip_share"] == 0
    assert told[0]["kl_old"] < 1e-6
    assert told[3]["kl_old"] > 1e-5
    assert told[0]["value"] == 0  # where a critic begins
    assert told[-1]["value"] > 0.05  # on its way to the return, which is above 1
    assert told[-1]["value_loss"] < 0.9 * told[0]["value_loss"]
    assert {
        "rewards/same",
        "rewards/long",
        "entropy",
        "completion_tokens",
        "truncated_share",
        "zero_advantage_share",
    } < set(told[4])
    assert told[4]["rewards/same"] == 1
    assert told[4]["reward"] == pytest.approx(1 + 0.5 * told[4]["rewards/long"], abs=1e-6)
    assert all(0 < line["entropy"] < np.log(400) for line in told)
    with safe_open(workdir / "adapter" / "adapter_model.safetensors", "np") as saved:
        assert not [name for name in saved.keys() if "value" in name]  # noqa: SIM118
    samples = lines(workdir, "samples.jsonl")
    assert [line["round"] for line in samples] == list(np.repeat(range(4), config.rl.samples))
    assert {"prompt", "completion", "reward", "advantage", "ended"} < set(samples[0])


def test_a_batch_of_one_reward_changes_nothing_and_is_counted(rl_config: ConfigDict) -> None:
    config, workdir = rl_config, Path(rl_config.workdir)
    config.reward.functions, config.rl.beta, config.train.steps = ((reward(config, "same"), 1.0),), 0.0, 4
    config.rl.resample = 2  # and no prompt that takes another's place is any better
    run.train(config, workdir)
    told = [line for line in lines(workdir) if "loss" in line]
    assert [line["nothing_to_learn"] for line in told] == [1, 1, 1, 1]
    assert told[0]["zero_advantage_share"] == 1
    assert told[0]["resampled_prompts"] == 8
    assert told[-1]["loss"] == told[-1]["grad_norm"] == 0
    from safetensors.numpy import load_file

    adapter = load_file(workdir / "adapter" / "adapter_model.safetensors")
    factors = [value for name, value in adapter.items() if "lora_B" in name]
    assert factors
    assert not any(value.any() for value in factors)


def test_rewards_that_fail_cost_their_completions_and_not_the_run(rl_config: ConfigDict) -> None:
    config, workdir = rl_config, Path(rl_config.workdir)
    config.reward.functions, config.reward.on_error, config.train.steps = ((reward(config, "broken"), 1.0),), "drop", 4
    run.train(config, workdir)
    first = lines(workdir)[0]
    errors = {kind: first[f"reward_errors/broken: {kind}"] for kind in ("raised", "not_a_number")}
    assert first["dropped_completions"] == sum(errors.values()) > 0
    assert first["reward"] == 1
    config.reward.on_error, config.workdir = "stop", f"{config.workdir}_stop"
    with pytest.raises(UserError, match=r"reward broken.*reward\.on_error"):
        run.train(config, Path(config.workdir))


def read(config: ConfigDict) -> rows_lib.Rows:
    model = source.find(config)
    return rows_lib.read(config, source.find_tokenizer(config, model), lambda items, *_: items)


def test_prompts_over_the_window_are_dropped_and_counted(rl_config: ConfigDict) -> None:
    whole = read(rl_config)
    lengths = whole.train.lengths
    rl_config.rl.max_prompt_length = int(np.median(lengths))
    cut, long = read(rl_config), int((lengths > np.median(lengths)).sum())
    assert long > 0
    assert len(cut.train) == len(whole.train) - long
    assert f"{long} too long" in rows_lib.summary(rl_config, cut)
    assert (cut.batches[0]["weights_BT"] == 0).all()  # what a dry run shows: prompts alone
    rl_config.rl.max_prompt_length = 1
    with pytest.raises(UserError, match=r"all 12 prompts are longer than rl\.max_prompt_length=1"):
        read(rl_config)


def test_what_cannot_be_is_refused_when_the_config_is_read(rl_config: ConfigDict) -> None:
    config = rl_config
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "no rewards": ({"reward.functions": ()}, "reward.functions is empty"),
        "no reference": ({"tune.method": "full"}, r"rl\.beta=0\.05 .* has no adapter"),
        "no group": ({"rl.group_size": 1, "rl.minibatches": 1}, r"rl\.group_size=1.*expected 2"),
        "no room": ({"rl.max_new_tokens": 60}, "hold 0 of that length"),
        "no parts": ({"rl.minibatches": 3}, "does not divide"),
        "dropout": ({"tune.dropout": 0.1}, r"tune\.dropout=0\.1"),
        "no validation": ({"train.eval_every_steps": 2}, "no validation loss"),
        "noise": ({"train.neftune_noise_alpha": 5.0}, r"train\.neftune_noise_alpha=5\.0.*another model's"),
        "explosion": ({"train.explode_factor": 3.0}, r"train\.explode_factor=3\.0: the loss of .* is about 0"),
        "beside": (
            {"train.objective": "sft", "train.beside": (("grpo", 1.0),)},
            "'grpo', which writes its own batches",
        ),
        "bound": ({"rl.delta": 1.1}, r"rl\.delta=1\.1; expected above"),
    }
    validation.validate(config)
    for values, message in changes.values():
        changed = config.copy_and_resolve_references()
        for key, value in values.items():
            section, name = key.split(".")
            changed[section][name] = value
        with pytest.raises(UserError, match=message):
            validation.validate(changed)


def test_a_reward_that_is_not_there_is_told_before_weights_are_loaded(
    rl_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.start, "load", lambda *_: pytest.fail("loads weights"))
    rl_config.reward.functions = ((reward(rl_config, "lon"), 1.0),)
    with pytest.raises(UserError, match="has no function 'lon'; did you mean 'long'"):
        run.train(rl_config, Path(rl_config.workdir))


def test_a_file_cut_short_is_as_if_it_were_not_there(rl_config: ConfigDict, tmp_path: Path) -> None:
    files, numbers = round_files.RoundFiles(tmp_path / "rollouts", rl_config, "rows"), np.zeros(4, np.float32)
    flags, ones = np.ones(4, bool), np.ones(4, np.int64)
    files.write(0, round_files.Round(ones, ones, flags, numbers, flags, ones, *[numbers] * 3, None, None, {}))
    assert files.read(0) is not None
    references._write(tmp_path / "reference.npz", "asked", {"train": numbers})
    assert references._read(tmp_path / "reference.npz", "asked") is not None
    for path in (tmp_path / "rollouts" / "round_000000.npz", tmp_path / "reference.npz"):
        whole = path.read_bytes()
        for size in (0, 2, len(whole) // 2, len(whole) - 4):
            path.write_bytes(whole[:size])
            assert files.read(0) is None if path.name.startswith("round") else references._read(path, "asked") is None


def test_rounds_take_prompts_by_their_number_alone(rl_config: ConfigDict) -> None:
    found = read(rl_config).batches
    assert isinstance(found, PromptSource)
    epochs = np.concatenate([found.of_round(number) for number in range(6)]).reshape(2, 12)
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert (epochs[0] != epochs[1]).any()
    others = found.others(1)
    assert sorted([*others, *found.of_round(1)]) == list(range(12))
    assert (others == found.others(1)).all()
    assert (others[:4] != np.sort(others)[:4]).any()


def test_other_rewards_are_another_run_where_they_are_learned_from() -> None:
    for objective, changed in (("grpo", "reward.functions"), ("sft", None)):
        config = config_lib.base()
        config.train.objective = objective
        saved = json.loads(config_lib.to_json(config))
        config.reward.functions = (("length", 1.0),)
        found = checkpoint.first_change(saved, config, checkpoint.free(config))
        assert (found and found[0]) == changed
