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
    c.enabled = False  # personal data are looked for in every row that is read, before a model or a person sees it (extra: privacy)
    # What is looked for, and what becomes of it: keep (found and counted, left as it is) | mask ("[EMAIL]") | pseudonym (a surrogate of
    # the same kind, always the same one for the same person). Also url, and Presidio's entities of many countries: uk_nhs, de_tax_id, …
    c.kinds = (
        ("email", "mask"), ("phone", "mask"), ("credit_card", "mask"), ("iban", "mask"), ("ip", "mask"), ("us_ssn", "mask"), ("name", "mask"),
    )  # fmt: skip
    c.names = ()  # people by name; spellings of one person, an address or number of theirs too, between semicolons: ("Jane Doe; J. Doe",)
    c.names_file = ""  # the same in a file, by URI, a person a line
    c.patterns = ()  # kinds of your own: ((kind, regex), …); group 1 counts where there is one; masked unless `kinds` says otherwise
    c.phone_regions = ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR")  # whose numbers are known without country code
    c.min_score = (
        0.4  # how sure a recognizer must be, 0 to 1: what has a checksum is 1, an SSN 0.5, nine digits alone 0.05
    )
    c.skip_columns = ()  # columns that are left as they are, such as a label's
    c.key_file = ""  # pseudonym: file with the key of the surrogates, made if absent; share it within a project, keep it out of version control
    c.key_variable = "JAXTUNE_PRIVACY_KEY"  # pseudonym: environment variable with the key; wins over the file
    return c


def card() -> ConfigDict:
    c = ConfigDict()
    c.enabled = True  # README.md of an exported adapter or model is a model card: data, results, what was forgotten, personal data, bias, guidance
    c.base_model = ""  # the base's name on the Hugging Face hub; "" = as model.source names it
    c.license = ""  # of the weights, e.g. "apache-2.0"; "" = as the base's own README says, if it does
    c.language = ()  # of the texts, e.g. ("en",)
    c.intended_use = ""  # what the model is for, in Markdown
    c.limitations = ""  # what it is not for, in Markdown
    c.audit = ""  # audit.json of the verb `audit`, or its folder; "" = none
    c.guidance = ""  # a round's folder of the verb `guide`, or a report.json of what experts said; "" = none
    return c


def audit() -> ConfigDict:
    c = ConfigDict()
    return c


SECTIONS = {"review": review, "guide": guide, "judging": judging, "privacy": privacy, "card": card, "audit": audit}
