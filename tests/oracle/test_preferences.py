"""Twenty steps of every preference objective, jaxtune's and TRL's: one adapter, the same rows, the same losses and gradient norms.

TRL gets rows that jaxtune tokenised, so that the same tokens train; jaxtune shares each pair's prompt and TRL does not. TRL's
reference for an adapter that it goes on training is a copy of that adapter; ours is computed once, before the first step.
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
from jaxtune.data import formats, preferences
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from tests.conftest import WORDS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    # PEFT 0.21 and TRL 1.16 speak to transformers 5.23 by old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
]

STEPS, BATCH, RANK, RATE = 20, 4, 4, 2e-3
SHARED: dict[str, Any] = {
    "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "per_device_train_batch_size": BATCH, "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_epsilon": 1e-8,
    "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 96,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of many lengths, in the order in which they train."""
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    made = [
        {"prompt": words(2, 14), "chosen": words(1, 8), "rejected": words(1, 8), "margin": round(rng.random(), 2)}
        for _ in range(STEPS * BATCH)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def judged(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers judged alone: every third undesirable."""
    path = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    made = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 != 0} for i, r in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """(folder of an adapter that PEFT made with B away from 0, its torch model), for a task type of PEFT's."""
    folders: dict[str, Path] = {}

    def make(task: str) -> tuple[Path, Any]:
        import torch
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        torch.set_num_threads(1)
        auto, more = {
            "CAUSAL_LM": (AutoModelForCausalLM, {}),
            "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
        }[task]

        def base() -> Any:
            torch.manual_seed(7)
            return auto.from_pretrained(tiny_model, dtype=torch.float32, pad_token_id=0, **more)

        if task not in folders:
            options = LoraConfig(
                task_type=task, r=RANK, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]
            )
            model = get_peft_model(base(), options)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    if "lora_B" in key:
                        value.normal_(0.0, 0.05)
            folders[task] = tmp_path_factory.mktemp("adapter") / task
            model.save_pretrained(folders[task])
        return folders[task], PeftModel.from_pretrained(base(), folders[task], is_trainable=True)

    return make


def ours(config: ConfigDict, path: Path, folder: Path, objective: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(losses, gradient norms) of jaxtune's run."""
    config.train.objective, config.data.train, config.tune.adapter = objective, str(path), str(folder)
    config.data.packing, config.data.shuffle, config.data.validation_fraction = False, False, 0.0
    config.data.max_length, config.train.steps, config.train.batch_size = 96, STEPS, BATCH
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_steps = RATE, "constant", 0
    config.preference.update(options)
    config.model.head = "sequence" if objective == "reward" else ""
    config.mesh.fsdp, config.mesh.tensor = BATCH, 2
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return np.asarray([line["loss"] for line in lines]), np.asarray([line["grad_norm"] for line in lines])


def answers(config: ConfigDict, path: Path, kind: str) -> list[preferences.Answers]:
    """The rows as jaxtune tokenises them."""
    tokenizer = Tokenizer.load(config.model.source)
    examples, _ = formats.read_examples(path, config.data)
    found = [preferences.encode(one, Reader(kind), tokenizer, config.data) for one in examples]
    return [one for one in found if isinstance(one, preferences.Answers)]


def recorded(trainer_class: Any, prepared: bool = True) -> tuple[Any, list[float]]:
    """The trainer as it is, less its tokenising; and the list that its losses go to, unrounded."""
    losses: list[float] = []

    class Recording(trainer_class):
        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            losses.append(loss.item())
            return loss

        if prepared:

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

    return Recording, losses


def trained(trainer: Any, losses: list[float]) -> tuple[np.ndarray, np.ndarray]:
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return np.asarray(losses), np.asarray(norms, np.float64)


def compare(ours: Any, theirs: Any, what: str, record_property: Any) -> None:
    """Losses to 1e-4 absolute, gradient norms to 1e-4 of themselves: they differ by orders of magnitude between methods."""
    apart = np.abs(ours[0] - theirs[0])
    norms = np.abs(ours[1] - theirs[1]) / np.maximum(theirs[1], 1.0)
    record_property("differences", f"{what}: {apart[0]:.1e} {apart.max():.1e} {norms[0]:.1e} {norms.max():.1e}")
    print(
        f"\n{what}: first loss {ours[0][0]:.6f} vs {theirs[0][0]:.6f}; max |Δ loss| first {apart[0]:.1e}, all {apart.max():.1e}; "
        f"gradient norm {ours[1][0]:.5f} vs {theirs[1][0]:.5f}, apart {norms[0]:.1e}, all {norms.max():.1e}"
    )
    assert ours[0].shape == theirs[0].shape == (STEPS,)
    assert np.ptp(ours[0]) > 1e-2, "nothing moved: the comparison would be empty"
    assert apart.max() <= 1e-4
    assert norms.max() <= 1e-4


DPO = {
    "sigmoid": ({}, {"loss_type": "sigmoid"}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": "ipo"}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": "hinge"}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "sigmoid, length-normalised": (
        {"length_normalised": True, "beta": 2.0},
        {"loss_type": "sigmoid_norm", "beta": 2.0},
    ),
    "sigmoid and 0.5 x SFT": ({"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.mark.parametrize("kind", DPO)
def test_dpo(
    tiny_config: ConfigDict, rows: Path, adapted: Any, tmp_path: Path, kind: str, record_property: Any
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder, model = adapted("CAUSAL_LM")
    trainer_class, losses = recorded(DPOTrainer)
    columns = [
        {
            "prompt_ids": a.prompt.tolist(),
            "chosen_ids": a.completions[0].tolist(),
            "rejected_ids": a.completions[1].tolist(),
        }
        for a in answers(tiny_config, rows, "pairs")
    ]
    options = DPOConfig(output_dir=str(tmp_path / "trl"), **SHARED, **DPO[kind][1])
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.source)
    trainer = trainer_class(model, args=options, train_dataset=Dataset.from_list(columns), processing_class=tokenizer)
    theirs = trained(trainer, losses)
    compare(ours(tiny_config, rows, folder, "dpo", **DPO[kind][0]), theirs, f"DPO {kind}", record_property)


REFERENCE_FREE = {
    "cpo": ({}, {}),
    "simpo": (
        {"beta": 2.0, "simpo_gamma": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "orpo": ({"beta": 0.3}, {"beta": 0.3}),
}


@pytest.mark.parametrize("objective", REFERENCE_FREE)
def test_reference_free(
    tiny_config: ConfigDict, rows: Path, adapted: Any, tmp_path: Path, objective: str, record_property: Any
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    folder, model = adapted("CAUSAL_LM")
    found = answers(tiny_config, rows, "pairs")
    config_class, base = (ORPOConfig, ORPOTrainer) if objective == "orpo" else (CPOConfig, CPOTrainer)
    recording, losses = recorded(base, prepared=False)

    class Tokenised(recording):
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, list[int]]:
            row = found[int(feature["prompt"])]
            made = {"prompt_input_ids": row.prompt.tolist(), "prompt_attention_mask": [1] * len(row.prompt)}
            for name, completion in zip(("chosen", "rejected"), row.completions, strict=True):
                ids = [*row.prompt.tolist(), *completion.tolist()]
                made |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids)}
                made |= {f"{name}_labels": [-100] * len(row.prompt) + completion.tolist()}
            return made

    columns = [{"prompt": str(i), "chosen": "yes", "rejected": "no"} for i in range(len(found))]
    options = config_class(output_dir=str(tmp_path / "trl"), **SHARED, **REFERENCE_FREE[objective][1])
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.source)
    trainer = Tokenised(model, args=options, train_dataset=Dataset.from_list(columns), processing_class=tokenizer)
    theirs = trained(trainer, losses)
    compare(
        ours(tiny_config, rows, folder, objective, **REFERENCE_FREE[objective][0]), theirs, objective, record_property
    )


def test_kto(tiny_config: ConfigDict, judged: Path, adapted: Any, tmp_path: Path, record_property: Any) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    folder, model = adapted("CAUSAL_LM")
    found = answers(tiny_config, judged, "judged")
    completions = [one.completions[0].tolist() for one in found]
    before = [
        completions[i - 1 if i % BATCH else i + BATCH - 1] for i in range(len(found))
    ]  # rotated within each batch
    columns = [
        {
            "prompt_ids": a.prompt.tolist(),
            "completion_ids": mine,
            "KL_completion_ids": other,
            "label": a.branches == (1,),
        }
        for a, mine, other in zip(found, completions, before, strict=True)
    ]
    recording, losses = recorded(KTOTrainer)
    options = KTOConfig(
        output_dir=str(tmp_path / "trl"), **SHARED, beta=0.2, desirable_weight=1.0, undesirable_weight=1.5
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.source)
    theirs = trained(
        recording(model, args=options, train_dataset=Dataset.from_list(columns), processing_class=tokenizer), losses
    )
    mine = ours(tiny_config, judged, folder, "kto", beta=0.2, undesirable_weight=1.5)
    compare(mine, theirs, "KTO", record_property)


def test_reward(tiny_config: ConfigDict, rows: Path, adapted: Any, tmp_path: Path, record_property: Any) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    folder, model = adapted("SEQ_CLS")
    margins = [json.loads(line)["margin"] for line in rows.read_text().splitlines()]
    columns = [
        {"chosen_ids": [*a.prompt.tolist(), *a.completions[0].tolist()], "rejected_ids": [*a.prompt.tolist(), *a.completions[1].tolist()], "margin": m}
        for a, m in zip(answers(tiny_config, rows, "rewards"), margins, strict=True)
    ]  # fmt: skip
    recording, losses = recorded(RewardTrainer)
    options = RewardConfig(output_dir=str(tmp_path / "trl"), **SHARED, center_rewards_coefficient=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.source)
    theirs = trained(
        recording(model, args=options, train_dataset=Dataset.from_list(columns), processing_class=tokenizer), losses
    )
    mine = ours(tiny_config, rows, folder, "reward", center_rewards=0.01)
    compare(mine, theirs, "reward", record_property)
