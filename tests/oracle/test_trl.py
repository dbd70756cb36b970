"""Thirty steps of fine-tuning, jaxtune's and TRL's: the same adapter, the same rows in the same order, the same losses.

TRL gets rows that jaxtune tokenised, labels included, so that exactly the same tokens train; its own packing would choose
bins of its own, so packed rows reach it as jaxtune laid them out. Everything else is TRL's: its padding-free collator makes
restarting `position_ids` and no attention mask, and from those transformers builds a block-diagonal mask for its "sdpa" and
"eager" attention on a CPU too (`masking_utils.find_packed_sequence_indices`), so TRL's packed rows stay apart without flash
attention, and no 4D mask needs to be made by hand. A control run below trains without boundaries, and its losses differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.data import pipeline
from jaxtune.data.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    # PEFT 0.21 and TRL 1.16 speak to transformers 5.23 by old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
]

STEPS, BATCH, RANK, RATE = 30, 8, 4, 5e-3
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "dora_rslora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, from_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of adapters that PEFT made, with B away from 0, so that A has a gradient from the first step on."""

    def make(name: str) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        folder = tmp_path_factory.mktemp("adapter") / name
        options = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=8, lora_dropout=0.0, **ADAPTERS[name])
        model = get_peft_model(from_folder(tiny_model), options)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.normal_(0.0, 0.05)
        model.save_pretrained(folder)
        return folder

    return make


def configure(
    config: ConfigDict, folder: Path, packed: bool, accumulation: int, schedule: str, steps: int = STEPS
) -> ConfigDict:
    config.tune.adapter, config.tune.dropout = str(folder), 0.0
    config.data.packing, config.data.shuffle, config.data.validation_fraction = packed, False, 0.0
    config.data.max_length = 64
    config.train.steps, config.train.batch_size, config.train.accumulation = steps, BATCH * accumulation, accumulation
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_steps = RATE, schedule, 0
    config.optim.weight_decay, config.optim.clip_norm, config.optim.eps = 0.0, 1.0, 1e-8
    return config


def our_losses(config: ConfigDict) -> np.ndarray:
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([line["loss"] for line in lines if "loss" in line])


def same_rows(config: ConfigDict) -> list[dict[str, list[int]]]:
    """jaxtune's batch rows of all steps, in order, as TRL takes them: a row of a packed batch is several sequences."""
    tokenizer, data = Tokenizer.load(config.model.source), config.data
    splits = pipeline.load(data, {"train": Path(data.train)}, tokenizer)
    rows = pipeline.tokenize(splits.train, tokenizer, data)
    source = pipeline.BatchSource(
        rows, data.max_length, data.packing, data.shuffle, 0, config.train.batch_size, tokenizer.pad_id
    )
    lengths, labels = rows.lengths, np.where(rows.weights != 0, rows.tokens, -100)

    def of_bin(bin_rows: list[int]) -> dict[str, list[int]]:
        where = np.concatenate([np.arange(rows.offsets[r], rows.offsets[r + 1]) for r in bin_rows])
        sequences = [int(lengths[r]) for r in bin_rows]
        return {"input_ids": rows.tokens[where].tolist(), "labels": labels[where].tolist(), "seq_lengths": sequences}

    made = []
    for step in range(config.train.steps):
        for row_ids in source[step]["row_ids_BT"]:
            made.append(of_bin([int(r) for r in dict.fromkeys(row_ids) if r >= 0]))
    return made


def their_losses(
    config: ConfigDict, rows: list[dict[str, list[int]]], folder: Path, from_folder: Any, output: Path, attention: str
) -> np.ndarray:
    """TRL's own training; each step's loss unrounded, summed over its micro-batches as TRL adds them up."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base = from_folder(Path(config.model.source))
    base.set_attn_implementation(attention)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    accumulation = config.train.accumulation
    options = SFTConfig(
        output_dir=str(output), max_steps=config.train.steps, learning_rate=RATE, lr_scheduler_type=config.optim.schedule,
        warmup_steps=0, per_device_train_batch_size=BATCH, gradient_accumulation_steps=accumulation,
        max_length=config.data.max_length, packing=config.data.packing, packing_strategy="bfd",
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential", optim="adamw_torch",
        weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    micro: list[float] = []

    class Recording(SFTTrainer):
        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            micro.append(loss.item())
            return loss

    columns = rows if config.data.packing else [{k: v for k, v in r.items() if k != "seq_lengths"} for r in rows]
    tokenizer = AutoTokenizer.from_pretrained(config.model.source)
    trainer = Recording(model, options, train_dataset=Dataset.from_list(columns), processing_class=tokenizer)
    trainer.train()
    assert len(micro) == config.train.steps * accumulation
    losses = np.asarray(micro).reshape(-1, accumulation).sum(axis=1)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(losses, logged, atol=1e-3)  # what was recorded is what TRL shows its users
    return losses


@pytest.mark.parametrize(
    ("packed", "accumulation", "schedule", "name", "attention"),
    [
        (False, 1, "cosine", "lora", "sdpa"),
        (True, 1, "cosine", "lora", "sdpa"),
        (False, 2, "constant", "lora", "sdpa"),
        (True, 2, "linear", "dora_rslora", "eager"),
    ],
)
def test_thirty_losses_are_trls(
    tiny_config: ConfigDict, adapter: Any, from_folder: Any, tmp_path: Path, packed: bool, accumulation: int,
    schedule: str, name: str, attention: str, record_property: Any,
) -> None:  # fmt: skip
    folder = adapter(name)
    config = configure(tiny_config, folder, packed, accumulation, schedule)
    rows = same_rows(config)
    assert (max(len(row["seq_lengths"]) for row in rows) > 1) == packed
    ours = our_losses(config)
    theirs = their_losses(config, rows, folder, from_folder, tmp_path / "trl", attention)
    worst = float(np.abs(ours - theirs).max())
    record_property("max_loss_difference", worst)
    print(
        f"packed={packed} accumulation={accumulation} {name}: max |Δ loss| {worst:.1e} of 30; {ours[0]:.3f} → {ours[-1]:.3f}"
    )
    assert ours.shape == theirs.shape == (STEPS,)
    assert ours[0] - ours[-1] > 0.3, "nothing was learnt: the comparison would be empty"
    assert worst <= 1e-3


def test_packing_without_boundaries_would_show(
    tiny_config: ConfigDict, adapter: Any, from_folder: Any, tmp_path: Path
) -> None:
    """The control: told that each packed row is one sequence, TRL reports other losses than jaxtune."""
    folder = adapter("lora")
    config = configure(tiny_config, folder, True, 1, "cosine", steps=3)
    rows = [row | {"seq_lengths": [sum(row["seq_lengths"])]} for row in same_rows(config)]
    theirs = their_losses(config, rows, folder, from_folder, tmp_path / "trl", "sdpa")
    assert np.abs(our_losses(config) - theirs).max() > 1e-2
