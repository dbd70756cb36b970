"""Stage 2 of three: spam or ham, from a mail's subject and first words (the mails of configs/service_mail.py). See reviews.py.

jaxtune update --config=configs/stages/mail.py
"""

import runpy
from pathlib import Path

HERE = Path(__file__)
stage = runpy.run_path(str(HERE.with_name("shared.py")))["stage"]
service = runpy.run_path(str(HERE.parents[1] / "service_mail.py"))


def first_words(row):
    """What configs/service_mail.py reads of a mail, cut to its first 300 characters."""
    mail = service["subject_and_text"](row)
    return mail and {**mail, "text": mail["text"][:300]}


def get_config():
    config = stage("quickstart.py", steps=40, batch_size=4, rate=1e-3, eval_rows=150)
    config.name = "mail"
    config.data.train = service["MAIL"]
    config.data.files = "*/*.json"
    config.data.prepare = f"{HERE}:first_words"
    config.data.columns = ()
    config.data.system = "Is this mail spam or ham? Answer in a word."
    config.data.label_column, config.data.label_bins = "label", ()
    config.data.split_key, config.data.split_regex = "text", ""  # copies of a mail stay together
    config.data.limit = 1500
    config.data.max_length = 224
    config.eval.labels = ("ham", "spam")
    return config
