"""The config's sections about people: the experts' page, rounds of guidance, judging two models, privacy, and the audit for bias."""

from __future__ import annotations

from ml_collections import ConfigDict


def review() -> ConfigDict:
    c = ConfigDict()
    c.action = "serve"  # what `review` does: serve | invite | import | export | report
    c.database = ""  # file (SQLite), or URL (postgresql://user@host/name); "" = review.db in the workdir
    c.round = 1  # the round whose items are asked
    c.tasks = ()  # what experts do: ((name, (("kind", "label"), ("labels", ("yes", "no")), …)), …); keys in review/tasks.py
    c.host = (
        "127.0.0.1"  # address to listen on; another one lets other machines in, and then needs tls_cert or behind_proxy
    )
    c.port = 8765
    c.tls_cert = ""  # PEM file of a certificate
    c.tls_key = ""  # PEM file of its key
    return c


def guide() -> ConfigDict:
    c = ConfigDict()
    return c


def judging() -> ConfigDict:
    c = ConfigDict()
    return c


def privacy() -> ConfigDict:
    c = ConfigDict()
    return c


def audit() -> ConfigDict:
    c = ConfigDict()
    c.models = ()  # what is audited: ((name, what), …), the others compared with the first; what: "" (the config's model and adapter) | base (without the adapter) | a run's workdir, a PEFT or model folder, by URI; () = the config's own alone
    c.groups = ()  # who is exchanged for whom: ((axis, ((group, (word, …)), (group, (word, …)))), …); words at the same place stand for each other; with a capital: a name
    c.axes = ()  # which of these axes; () = all
    c.templates = ()  # frames that rows are put into: ((column, "{names} writes: {text}"), …): {text} is the column, the other slot an axis
    c.columns = ()  # columns whose words are swapped; () = all texts but data.label_column and data.split_key
    c.split = ""  # rows to probe: train | validation | test | all; "" = eval.split
    c.rows = 300  # rows probed at most, of each two groups and of each frame; 0 = all
    c.score_label = ""  # the label whose probability is a row's score; "" = the last
    c.worst_rows = 10  # rows listed, those that a swap changes most
    c.bbq = ""  # BBQ's .jsonl, or their folder, by URI; "" = none
    c.bbq_metadata = ""  # its additional_metadata.csv, which says what answer is biased, by URI; "" = by the rows' own groups, where they tell
    c.bbq_categories = ()  # categories asked, e.g. ("Age", "Religion"); () = all
    c.bbq_rows = 300  # questions at most, alike over categories and contexts; 0 = all
    c.bbq_prompt = "{context}\n{question}\nAnswer with one of: {answers}."  # the user's turn, a template over context, question, answers, ans0, ans1, ans2
    c.bbq_per_token = False  # compare answers by the log-likelihood of a token in place of the whole answer
    c.crows = ""  # CrowS-Pairs' .csv, by URI; "" = none
    c.crows_types = ()  # bias types asked; () = all
    c.crows_rows = 300  # pairs at most, alike over types; 0 = all
    c.augment = ()  # also write the data with counterfactual rows, WORKDIR/augmented/*.jsonl: swaps | templates, or both
    return c


SECTIONS = {"review": review, "guide": guide, "judging": judging, "privacy": privacy, "audit": audit}
