"""Llama-3.1-8B, LoRA on all linear layers, 8192-token rows, for a TPU slice; `plan` needs no weights.

    python -m jaxtune.launch plan --config=configs/llama3_8b_lora.py
    python -m jaxtune.launch --config=configs/llama3_8b_lora.py --config.data.train=my_chats.jsonl \
        --config.model.source=hf:meta-llama/Llama-3.1-8B-Instruct --workdir=gs://my-bucket/run1
"""

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "llama3_8b_lora"
    config.model.source = "preset:llama3_1_8b"  # shapes with random weights; set an hf: or local folder to train
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.tune.rank = 16
    config.tune.alpha = 32.0
    config.tune.dropout = 0.0  # dropout masks cost 0.8 GiB a chip at this length
    config.data.max_length = 8192
    config.train.batch_size = 16
    config.train.steps = 1000
    config.train.remat = "block"
    config.train.loss_chunk_tokens = 256  # of each chip, projected onto the vocabulary at a time
    config.train.mlp_block_tokens = 1024  # of each chip, in a feed-forward layer at a time
    config.optim.learning_rate = 2e-4
    config.checkpoint.every_steps = 200
    config.plan.topology = "v5e:4x4"
    return config
