"""The config's sections about people: the experts' page, rounds of guidance, judging two models, privacy, and the audit for bias."""

from __future__ import annotations

from ml_collections import ConfigDict


def review() -> ConfigDict:
    c = ConfigDict()
    c.action = "serve"  # what `review` does: serve | invite | import | export | report
    c.database = ""  # file (SQLite), or URL (postgresql://user@host/name); "" = review.db in the workdir
    c.round = 1  # the round whose items are asked
    c.tasks = ()  # what experts do: ((name, (("kind", "label"), ("labels", ("yes", "no")), …)), …); keys in review/tasks.py
    c.host = "127.0.0.1"  # address to listen on; another one lets other machines in: needs tls_cert or behind_proxy
    c.port = 8765
    c.tls_cert = ""  # PEM file of a certificate
    c.tls_key = ""  # PEM file of its key
    c.behind_proxy = False  # a proxy of this machine ends TLS: its X-Forwarded-For and -Proto are believed
    c.passwords = (
        True  # invited people choose a password; False: an invite link starts one session, the next needs a new link
    )
    c.session_hours = 12.0  # after which a session ends, whatever is done in it
    c.lease_seconds = 600.0  # for which an item is one expert's; an open page renews it
    c.requests_per_second = 20.0  # of one person on average, ten times that of one address; five seconds' worth at once
    c.address = ""  # how experts reach the page, for the links that are printed, such as "https://review.example.org"; "" = host and port
    c.person = ""  # invite: name of the person; one who has an account gets a new link
    c.role = "expert"  # invite: expert | senior | owner
    c.skills = ()  # invite: groups whose items they may be asked, as tasks name them by `skill`
    c.invite_days = 7.0  # for which an invite is good, once
    c.file = ""  # import: what is read, a path or URI; export: where it is written, "" = in the workdir
    c.format = "jsonl"  # import, export: jsonl | label_studio | argilla
    c.task = ""  # import: task of records that name none, "" = the only one; export: of which task, "" = all
    c.columns = ()  # import: how the file names what a task shows: ((ours, theirs), …), such as (("text", "review"),)
    c.everything = False  # export: all rounds and tasks, not review.round and review.task alone
    c.pseudonyms = (
        True  # export: people by pseudonyms, the same in each export of a database; False = by their ids and names
    )
    return c


def guide() -> ConfigDict:
    c = ConfigDict()
    return c


def judging() -> ConfigDict:
    c = ConfigDict()
    c.task = ""  # task of kind compare in review.tasks whose form is filled in; "" = the only one
    c.first = ""  # what is compared: a file of outputs (lines as `generate` writes), a run's workdir, an adapter's folder, or a model by URI; "" = model.source
    c.second = ""  # what it is compared with, likewise; win rates are this one's
    c.names = ("first", "second")  # what the two are called in reports; no expert sees them
    c.prompts = ""  # file of prompts or messages, by URI; "" = the column `prompt` of the files of outputs, or where a side is none the rows of eval.split
    c.limit = 0  # prompts at most (a stable choice); 0 = all
    c.alpha = 0.05  # a wrong decision, ever, has at most this probability, however often one looks
    c.margin = 0.0  # also stop, with "no difference", once the win rate is known to lie within 0.5 ± this; 0 = never
    c.follow_seconds = 0.0  # look at the verdicts again every so many seconds until there is a decision or nothing left to ask; 0 = once
    c.judge = ""  # a model that fills in the form too: "" (people alone) | local | an OpenAI-compatible endpoint, e.g. "https://host/v1"
    c.judge_model = ""  # endpoint: the model's name there; local: a model by URI, "" = model.source
    c.key_variable = ""  # environment variable that holds the endpoint's key; "" = no key
    c.question = ""  # file with the judge's question, in which {prompt}, {first}, {second} and {guideline} are filled in; "" = the one in review/model_judge.py
    c.trust = 0.7  # the judge counts once the lower end of its agreement with people exceeds this (and that of kappa exceeds 0)
    c.parallel = 4  # questions to the endpoint at once
    c.timeout_seconds = 60.0  # of one request
    c.retries = 4  # of a request that the endpoint does not answer, at ever longer intervals
    return c


def privacy() -> ConfigDict:
    c = ConfigDict()
    return c


def audit() -> ConfigDict:
    c = ConfigDict()
    return c


SECTIONS = {"review": review, "guide": guide, "judging": judging, "privacy": privacy, "audit": audit}
