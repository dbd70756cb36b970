"""Is the quickstart's model better than its base? Held-out review sentences, labels side by side, judged blind.

jaxtune train  --config=configs/quickstart.py
jaxtune judge  --config=configs/judge_reviews.py      # writes the items; again at any time: reads the verdicts
jaxtune review --config=configs/judge_reviews.py      # the page on which experts judge
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.name = "judge_reviews"
    config.review.tasks = (
        (
            "better",
            (
                ("kind", "compare"),
                ("title", "Which label is right?"),
                ("question", "A review sentence and two labels of its sentiment: which one is right?"),
            ),
        ),
    )
    config.judging.first = ""  # the base
    config.judging.second = "runs/quickstart"
    config.judging.names = ("base", "tuned")
    config.judging.limit = 200
    config.judging.margin = 0.1
    config.generate.max_new_tokens = 8
    config.generate.batch_size = 16
    return config
