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
    c.folder = ""  # folder of the rounds, their ledger and (unless review.database is set) review.db; "" = the workdir
    c.round = 1  # the round to begin or to go on with; it needs the one before to be trained
    c.start_from = -1  # round whose result this one starts from; 0 = model.source; -1 = the round before
    c.tasks = ()  # names of the tasks of review.tasks that this round asks; () = all but compare_task
    c.rows = 200  # training rows of data.train that each task asks about, none that a round before asked; 0 = all
    c.answers = "outputs"  # what edit, accept and rate show: outputs (the model's) | rows (the data's own answers)
    c.candidates = 2  # outputs to a prompt that compare shows side by side, and that rate shows one by one
    c.against = ""  # compare: adapter or model, by URI, whose output stands beside the model's; "" = all are its own
    c.temperature = 1.0  # of these outputs
    c.top_p = 1.0  # 1 = off
    c.max_new_tokens = 64  # of an output
    c.slots = 32  # outputs that are made side by side
    c.prelabels = False  # label: the model's likeliest label stands with the item, with its probability; `prelabels` of the task says who sees it
    c.enough = 1.0  # share of the answers wanted from which a round goes on
    c.least_gain = 0.0  # a round is not asked once as many verdicts as the last one brought would surely gain less than this in the held-out score, by a power law through five rounds or more; 0 = ask always
    c.wait = False  # serve the page and wait for answers; False = say how to serve, and end with exit code 75
    c.poll_seconds = 5.0  # wait: between two looks at what was answered
    c.keep_flagged = ()  # types of flags with which an item may still train (bias, privacy, harm, wrong, off_guideline)
    c.edits = "majority"  # several edits of one answer: majority (what more than half wrote) | each (a row for every different text)
    c.pairs_from_edits = True  # an edited text is preferred over the answer that was shown
    c.repeat_agreed = False  # a row is there once for each expert who agreed with it
    c.trust = ()  # weights of people's answers by name, 1 where there is none: (("ann", 0.5), …); 0 = not used
    c.compare_task = ""  # task, of kind compare, that sets this round's model blind beside the one before; "" = none
    c.compare_rows = 50  # held-out prompts of that comparison; answers are made as `generate` says
    c.trace = ""  # print where a trained row comes from, and do nothing else: its id, or file:line
    c.show_names = False  # trace and report: people by their names; False = by a number of the folder's
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


SECTIONS = {"review": review, "guide": guide, "judging": judging, "privacy": privacy, "card": card, "audit": audit}
