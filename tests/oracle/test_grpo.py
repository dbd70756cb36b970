"""Two optimizer steps on given completions, jaxtune's and TRL's: the same adapter, rewards by the same function, the same losses and
gradient norms. The second step is off-policy, so ratios, clips and bounds are at work.

TRL's whole pipeline runs but for its sampling: rewards, advantages, old and reference log-probabilities are its own. For KL its
reference is the base, as ours: the copy that it makes of an adapter which it goes on training is taken away.
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
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.rollout import Rollout
from jaxtune.train import rounds
from tests.conftest import WORDS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    # PEFT 0.21 and TRL 1.16 speak to transformers 5.23 by old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'rollout_func':UserWarning"),
]

PROMPTS, GROUP, STEPS, RATE, MOST = 4, 4, 2, 2e-2, 10
REWARD = "def reward(prompt, completion, row):\n    return (37 * len(completion) % 11) / 10\n"


@pytest.fixture(scope="module")
def given(tiny_model: Path) -> dict[str, list[list[int]]]:
    """Prompts, and the tokens of their completions: of many lengths, every other one ended by a stop token."""
    tokenizer, rng = Tokenizer.load(str(tiny_model)), np.random.default_rng(5)
    found = {}
    for _ in range(PROMPTS):
        prompt = " ".join(rng.choice(WORDS, rng.integers(2, 6)))
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(GROUP)]
        ids = [tokenizer.encode(text)[: MOST - 1] for text in texts]
        found[prompt] = [one + list(tokenizer.stop_ids[:1]) * (i % 2) for i, one in enumerate(ids)]
    return found


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[], Any]]:
    """The folder of an adapter that PEFT made with B away from 0; and what makes its torch model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, pad_token_id=0)

    torch.manual_seed(7)
    options = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = get_peft_model(base(), options)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(0.0, 0.05)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(folder)
    return folder, lambda: PeftModel.from_pretrained(base(), folder, is_trainable=True)


def ours(
    config: ConfigDict, given: dict[str, list[list[int]]], folder: Path, objective: str, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> np.ndarray:  # fmt: skip
    """(steps, 2): losses and gradient norms of jaxtune's run."""
    tokenizer = Tokenizer.load(config.model.source)

    class Given:
        def __init__(self, *_: Any):
            pass

        def __call__(self, params: Any, prompts: list[list[int]], group: int, *_: Any) -> list[Rollout]:
            made = []
            for number, prompt in enumerate(prompts):
                for tokens in given[tokenizer.decode(prompt)]:
                    ended = tokens[-1] in tokenizer.stop_ids
                    made.append(Rollout(number, np.asarray(tokens, np.int32), np.zeros(len(tokens), np.float32), ended))
            return made

    monkeypatch.setattr(rounds, "Roller", Given)
    place = Path(config.workdir).parent
    (place / "reward.py").write_text(REWARD)
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in given))
    config.train.objective, config.tune.adapter = objective, str(folder)
    config.data.train, config.data.chat, config.data.format = str(place / "prompts.jsonl"), False, "prompt_completion"
    config.data.validation_fraction = 0.0
    config.reward.functions = ((f"{place / 'reward.py'}:reward", 1.0),)
    config.rl.update({"prompts_per_round": PROMPTS, "group_size": GROUP, "passes": STEPS, "old_logps": "policy"})
    config.rl.update({"max_prompt_length": 20, "max_new_tokens": MOST, **options})
    config.train.steps, config.train.batch_size, config.data.max_length = STEPS, 8, 64
    config.optim.learning_rate, config.optim.schedule, config.optim.warmup_steps = RATE, "constant", 0
    run.train(config, Path(config.workdir))
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])


def theirs(
    given: dict[str, list[list[int]]], model: Any, folder: Path, source: Path, kind: str, options: dict[str, Any]
) -> np.ndarray:
    """The same of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    tokenizer, plain = AutoTokenizer.from_pretrained(source), Tokenizer.load(str(source))
    trainer_class, config_class = (RLOOTrainer, RLOOConfig) if kind == "rloo" else (GRPOTrainer, GRPOConfig)
    losses: list[float] = []

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            self.asked = list(prompts)
            return [plain.encode(prompt) for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            seen = dict.fromkeys(given, 0)
            made = []
            for prompt in self.asked:
                made.append(given[prompt][seen[prompt]])
                seen[prompt] += 1
            return made if kind == "rloo" else (made, None)

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            losses.append(loss.item())
            return loss

    settings = config_class(
        output_dir=str(folder / kind), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0,
        per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, num_iterations=STEPS, max_completion_length=MOST,
        optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    judge: dict[str, Any] = {}
    exec(REWARD, judge)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [judge["reward"](p, c, {}) for p, c in zip(prompts, completions, strict=True)]

    data = Dataset.from_list([{"prompt": prompt} for prompt in given])
    trainer = Recording(model=model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=tokenizer)
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return np.asarray([losses, norms]).T


# name -> (objective, our `rl`, TRL's options)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {"loss_type": "grpo", "beta": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (
        "grpo",
        {"loss_type": "dapo", "clip_high": 0.28, "temperature": 0.7, "mask_truncated": True},
        {"loss_type": "dapo", "epsilon_high": 0.28, "temperature": 0.7, "mask_truncated_completions": True},
    ),
    "bnpo": (
        "grpo",
        {"loss_type": "bnpo", "delta": 1.3, "scale_rewards": "batch", "entropy_weight": 0.05, "beta": 0.1, "kl_unbiased": False},
        {"loss_type": "bnpo", "delta": 1.3, "scale_rewards": "batch", "entropy_coef": 0.05, "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "sequence": (
        "grpo",
        {"loss_type": "grpo", "importance_level": "sequence", "clip_low": 0.02, "clip_high": 0.03, "entropy_weight": 0.05},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03, "entropy_coef": 0.05},
    ),
    "rloo": ("rloo", {"beta": 0.05, "kl_in": "reward", "kl_estimator": "k1"}, {"beta": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_an_update_on_given_completions(
    name: str, tiny_config: ConfigDict, given: dict[str, list[list[int]]], adapter: tuple[Path, Callable[[], Any]],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    objective, options, their_options = VARIANTS[name]
    found = ours(tiny_config, given, adapter[0], objective, options, monkeypatch)
    expected = theirs(given, adapter[1](), tmp_path, Path(tiny_config.model.source), objective, their_options)
    print(f"\n{name}: losses {expected[:, 0]}, apart by {np.abs(found - expected).max(axis=0)} (loss, gradient norm)")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert abs(found[1, 0] - found[0, 0]) > 1e-3  # the weights did move
