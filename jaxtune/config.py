"""The config: one locked `ConfigDict` that holds every field jaxtune reads, each with a default, a unit and a comment.

A run is a file in `configs/` with `get_config()`: it calls `base()`, changes fields, returns it. The command line
overrides (`--config.train.steps=100`; a tuple of words as `--config.eval.labels=good,bad`). A key that is not below does not exist: misspelling one is an error that names
the nearest keys.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ml_collections import ConfigDict as ConfigDict

from jaxtune.types import UserError, nearest


def _model() -> ConfigDict:
    c = ConfigDict()
    c.source = ""  # base weights: a Hugging Face folder or a GGUF file, by URI; or "preset:NAME" for random weights
    c.tokenizer = ""  # URI of a tokenizer folder; "" = the one beside the weights
    c.chat_template = ""  # path of a Jinja file that replaces the tokenizer's own template; "" = the tokenizer's own
    c.head = ""  # what stands on the last hidden state: "" = as the model has it | lm | sequence | token | none; a new one starts random and trains
    c.labels = ()  # classes of a sequence or token head, in their order; () = those of the model's id2label
    c.pooling = ""  # which state stands for a whole text in an embedding: first (CLS) | mean | last; "" = as the model's folder says, else mean (encoders), last (decoders)
    c.param_dtype = "float32"  # storage of frozen weights: float32 | bfloat16
    c.compute_dtype = "float32"  # activations and matmuls: float32 | bfloat16 (norms, softmax and loss stay float32)
    c.attention = "auto"  # auto (by platform) | xla | splash
    return c


def _tune() -> ConfigDict:
    c = ConfigDict()
    c.method = "lora"  # lora | full | head (the output projection alone)
    c.rank = 16  # LoRA rank r
    c.alpha = 32.0  # LoRA alpha: the update is scaled by alpha / r
    c.dropout = 0.05  # dropout probability on the adapter's input
    c.targets = r"layers\..*"  # regex, full match, over the paths of linear layers
    c.use_rslora = False  # scale by alpha / sqrt(r) (arXiv:2312.03732)
    c.use_dora = False  # learn each output's magnitude apart from its direction (arXiv:2402.09353)
    c.lora_plus_ratio = 1.0  # learning rate of B over that of A (LoRA+, arXiv:2402.12354)
    c.dtype = "float32"  # storage of trainable weights
    c.adapter = ""  # PEFT folder to start from, by URI; its rank, alpha and targets win
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    c.train = ""  # training rows, by URI: .jsonl .json .csv .tsv .txt .parquet, each also .gz
    c.eval = ""  # validation rows, by URI; "" = a share of `train`, split off by a stable hash
    c.test = ""  # test rows, by URI; "" = a share of `train`, likewise
    c.validation_fraction = 0.05  # share of `train` held out for validation when `eval` is ""
    c.test_fraction = 0.0  # share of `train` held out for the test when `test` is ""
    c.split_key = ""  # column whose value decides the split; "" = the whole row (equal rows stay together)
    c.split_regex = ""  # part of that value that counts, e.g. r"^[^_]+": group 1 counts where there is one; rows of one group stay on one side
    c.format = "auto"  # auto | messages | sharegpt | alpaca | prompt_completion | text | labelled | pair
    c.columns = ()  # names of the columns of a table without a header row; () = the first row names them
    c.prompt = ""  # labelled: the user's turn, a template over columns, e.g. "Review: {text}\nSentiment:"
    c.passage = ""  # pair: the text that answers, a template likewise, e.g. "passage: {context}"; data.prompt is then the query's; "" = both by column names
    c.negative = ""  # pair: a text that does not answer (a hard negative), a template likewise; "" = none
    c.mined_negatives = 0  # pair: hard negatives per query, the passages that BM25 ranks first and that do not answer it (extra: retrieval)
    c.system = ""  # labelled: the system turn, a template likewise; "" = none
    c.label_column = ""  # labelled: the column that holds the answer
    c.label_bins = ()  # labelled, numeric column: ((low, high, name), …), low <= x < high; rows in no bin are dropped and counted
    c.chat = True  # render alpaca, prompt_completion and labelled rows by the chat template; False = plain text
    c.roles = ("assistant",)  # roles whose tokens are trained
    c.end_of_turn = "turn"  # which end-of-turn tokens train: all | turn (of trained turns) | last | none
    c.max_length = 1024  # tokens of a batch row; pair: of a query
    c.max_passage_length = 256  # pair: tokens of a passage
    c.too_long = "truncate"  # a row longer than max_length (a passage than max_passage_length): truncate | drop | error (always counted)
    c.packing = True  # put several rows in one batch row, kept apart by segment ids (best fit); False = pad; pairs are always padded
    c.shuffle = True  # a new order each epoch, from train.seed
    c.limit = 0  # use at most this many training rows (a stable choice); 0 = all
    c.prefetch_batches = 8  # batches made ahead of the step by reader threads
    return c


def _optim() -> ConfigDict:
    c = ConfigDict()
    c.name = "adamw"  # adamw | sgd
    c.learning_rate = 2e-4  # peak
    c.schedule = "cosine"  # cosine | linear | constant
    c.warmup_steps = 0.03  # steps of linear warm-up; below 1 = a share of all steps
    c.final_ratio = 0.0  # learning rate at the end, over the peak (cosine, linear)
    c.b1 = 0.9
    c.b2 = 0.999
    c.eps = 1e-8
    c.weight_decay = 0.0  # decoupled; matrices only, never norms, biases or magnitudes
    c.clip_norm = 1.0  # global gradient norm is clipped to this; 0 = never
    return c


def _train() -> ConfigDict:
    c = ConfigDict()
    c.objective = "sft"  # a name of jaxtune/objectives
    c.steps = 0  # optimizer steps; 0 = as many as `epochs` need
    c.epochs = 1.0  # passes over the training rows when steps is 0
    c.batch_size = 8  # batch rows per optimizer step, over all devices and accumulation
    c.accumulation = 1  # micro-batches per optimizer step
    c.temperature = 0.05  # contrastive: cosines are divided by this
    c.symmetric = False  # contrastive: also ask which query a passage answers; the loss is the mean of both
    c.seed = 0
    c.remat = "block"  # none | dots (save matmul outputs) | block (save only each block's input)
    c.loss_chunk_tokens = 1024  # tokens per chunk of the output projection; the full logits never exist
    c.eval_every_steps = 0  # validation loss every so many steps; 0 = at the end only
    c.eval_batches = 0  # validation batches per evaluation; 0 = all
    c.patience = 0  # stop after so many evaluations without a better validation loss; 0 = never
    c.on_nonfinite = (
        "stop"  # NaN, infinite or exploding loss: stop (with a dump) | skip (leave the weights as they are)
    )
    c.max_skipped_steps = 20  # on_nonfinite="skip": stop after so many skipped steps in a row; 0 = never
    c.explode_factor = 0.0  # also call a loss exploding above this multiple of its running mean; 0 = non-finite only
    c.log_every_steps = 1  # console line every so many steps where there is no terminal
    return c


def _checkpoint() -> ConfigDict:
    c = ConfigDict()
    c.every_steps = 0  # permanent checkpoint every so many steps; 0 = none but the last
    c.every_seconds = 600.0  # temporary checkpoint at least so often; only the latest is kept
    c.keep = 2  # permanent checkpoints kept, beside the best and the latest
    c.resume = False  # go on from the newest good checkpoint of the workdir
    return c


def _mesh() -> ConfigDict:
    c = ConfigDict()
    c.data = 1  # replicas of the weights; one axis may be -1: all devices left over
    c.fsdp = -1  # weights, gradients and optimizer state are sharded over this axis, batch rows too
    c.expert = 1  # experts of a mixture are sharded over this axis, batch rows too
    c.tensor = 1  # heads and feed-forward dims are sharded over this axis
    c.rules = ()  # overrides: ((regex over parameter paths, (mesh axis or "" per dim, …)), …)
    return c


def _eval() -> ConfigDict:
    c = ConfigDict()
    c.metric = "auto"  # auto | labels (likelihood of each label) | exact_match (of generations) | perplexity | retrieval (contrastive)
    c.labels = ()  # the candidate answers; () = every answer seen in the rows
    c.split = "test"  # rows to measure on: train | validation | test
    c.corpus = "split"  # retrieval: search among the distinct passages of eval.split (split) or of all rows (all)
    c.limit = 500  # rows at most; 0 = all
    c.batch_size = 16  # rows per forward pass
    c.bootstrap_samples = 1000  # resamples behind each interval
    c.confidence = 0.95  # of each interval
    c.before_after = True  # `train` measures the untuned model first, on the same rows
    return c


def _generate() -> ConfigDict:
    c = ConfigDict()
    c.input = ""  # `generate`: file of prompts or messages, by URI
    c.output = ""  # `generate`: where the answers go; "" = WORKDIR/generations.jsonl
    c.max_new_tokens = 256
    c.temperature = 0.0  # 0 = greedy
    c.top_k = 0  # 0 = off
    c.top_p = 1.0  # 1 = off
    c.min_p = 0.0  # 0 = off
    c.stop = ()  # strings that end an answer
    c.seed = 0
    c.batch_size = 8  # prompts per decode
    return c


def _export() -> ConfigDict:
    c = ConfigDict()
    c.merge = False  # True: a Hugging Face folder with the adapter merged in; False: a PEFT adapter folder
    c.dtype = ""  # storage of a merged or full model; "" = as trained
    c.checkpoint = "best"  # best | latest | a step number
    c.output = ""  # folder; "" = WORKDIR/adapter or WORKDIR/model
    return c


def _plan() -> ConfigDict:
    c = ConfigDict()
    c.topology = "v5e:4x4"  # TPU generation and slice shape: v4, v5e, v5p, v6e or tpu7x
    return c


def _tracking() -> ConfigDict:
    c = ConfigDict()
    c.tensorboard = False  # event files in WORKDIR/tensorboard (extra: tensorboard)
    c.wandb = ""  # Weights & Biases project (extra: wandb); "" = off
    c.progress = "auto"  # auto (bar on a terminal, lines elsewhere) | bar | lines | off
    c.report = True  # write report.html and report.json at the end
    return c


def base() -> ConfigDict:
    """Returns the config with every field at its default, locked against new keys."""
    config = ConfigDict()
    config.name = "run"  # shown in the report
    config.workdir = ""  # where everything goes; --workdir wins; "" = runs/NAME
    config.model, config.tune, config.data = _model(), _tune(), _data()
    config.optim, config.train, config.checkpoint = _optim(), _train(), _checkpoint()
    config.mesh, config.eval, config.generate = _mesh(), _eval(), _generate()
    config.export, config.plan, config.tracking = _export(), _plan(), _tracking()
    config.lock()
    return config


CHOICES: dict[str, tuple[str, ...]] = {
    "model.head": ("", "lm", "sequence", "token", "none"),
    "model.pooling": ("", "first", "mean", "last"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "splash"),
    "tune.method": ("lora", "full", "head"),
    "tune.dtype": ("float32", "bfloat16"),
    "data.format": ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "labelled", "pair"),
    "data.end_of_turn": ("all", "turn", "last", "none"),
    "data.too_long": ("truncate", "drop", "error"),
    "optim.name": ("adamw", "sgd"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "train.remat": ("none", "dots", "block"),
    "train.on_nonfinite": ("stop", "skip"),
    "eval.metric": ("auto", "labels", "exact_match", "perplexity", "retrieval"),
    "eval.corpus": ("split", "all"),
    "eval.split": ("train", "validation", "test"),
    "export.dtype": ("", "float32", "bfloat16", "float16"),
    "tracking.progress": ("auto", "bar", "lines", "off"),
}

_AT_LEAST: dict[str, float] = {
    "tune.rank": 1, "data.max_length": 2, "data.max_passage_length": 2, "data.mined_negatives": 0, "train.batch_size": 1, "train.accumulation": 1, "train.steps": 0,
    "train.epochs": 0, "train.loss_chunk_tokens": 1, "optim.learning_rate": 0, "optim.warmup_steps": 0,
    "optim.clip_norm": 0, "eval.batch_size": 1, "eval.bootstrap_samples": 1, "generate.max_new_tokens": 1,
    "generate.temperature": 0, "generate.top_k": 0, "checkpoint.keep": 1, "data.limit": 0, "data.prefetch_batches": 1,
    "tune.lora_plus_ratio": 0, "optim.eps": 0, "optim.weight_decay": 0, "train.seed": 0, "train.eval_every_steps": 0,
    "train.eval_batches": 0, "train.patience": 0, "train.max_skipped_steps": 0, "train.explode_factor": 0, "train.log_every_steps": 1,
    "checkpoint.every_steps": 0, "checkpoint.every_seconds": 0, "eval.limit": 0, "generate.seed": 0, "generate.batch_size": 1,
}  # fmt: skip

_BETWEEN: dict[str, tuple[float, float]] = {
    "tune.dropout": (0, 0.999), "data.validation_fraction": (0, 0.95), "data.test_fraction": (0, 0.95),
    "generate.top_p": (1e-6, 1), "generate.min_p": (0, 1), "eval.confidence": (0.01, 0.999), "optim.final_ratio": (0, 1),
    "optim.b1": (0, 0.999999), "optim.b2": (0, 0.999999), "train.temperature": (1e-3, 100),
}  # fmt: skip


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the dotted path of every field, e.g. "train.batch_size"."""
    found: list[str] = []
    for key, value in config.items():
        found += keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return found


def lookup(config: ConfigDict, path: str) -> Any:
    """Returns the field at a dotted path."""
    node: Any = config
    for part in path.split("."):
        node = node[part]
    return node


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    known = keys(base())
    for key in keys(config):
        if key not in known:
            raise UserError(f"config key {key!r} does not exist{nearest(key, known)}")
    missing = [key for key in known if key not in keys(config)]
    if missing:
        raise UserError(f"config lacks {missing[0]!r}: start get_config() from jaxtune.config.base()")
    for key, allowed in CHOICES.items():
        value = lookup(config, key)
        if value not in allowed:
            raise UserError(
                f"config.{key} is {value!r}; expected one of {', '.join(map(repr, allowed))}{nearest(str(value), allowed)}"
            )
    for key, low in _AT_LEAST.items():
        if not lookup(config, key) >= low:  # said so that NaN is refused too
            raise UserError(f"config.{key} is {lookup(config, key)}; expected at least {low}")
    for key, (low, high) in _BETWEEN.items():
        if not low <= lookup(config, key) <= high:
            raise UserError(f"config.{key} is {lookup(config, key)}; expected {low} to {high}")
    _check_forms(config)
    if not config.tune.alpha > 0:
        raise UserError(f"config.tune.alpha is {config.tune.alpha}; expected above 0, or the adapter changes nothing")
    if config.train.patience and not config.train.eval_every_steps:
        raise UserError(
            f"train.patience={config.train.patience} counts evaluations, and train.eval_every_steps=0 makes none on the way: "
            "set train.eval_every_steps"
        )
    if config.train.batch_size % config.train.accumulation:
        raise UserError(
            f"train.batch_size={config.train.batch_size} does not divide by train.accumulation="
            f"{config.train.accumulation}: choose a multiple"
        )
    if config.export.checkpoint not in ("best", "latest") and not str(config.export.checkpoint).isdecimal():
        raise UserError(
            f"config.export.checkpoint is {config.export.checkpoint!r}; expected 'best', 'latest' or a step number"
        )
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        raise UserError(
            "data.validation_fraction + data.test_fraction leave no training rows: their sum must be below 1"
        )


def _check_forms(config: ConfigDict) -> None:
    """The fields that are patterns or nested tuples."""
    rules, bins = config.mesh.rules, config.data.label_bins
    for rule in rules:
        if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], tuple | list):
            raise UserError(f"config.mesh.rules has {rule!r}; expected (regex, (mesh axis or '' per dim, …))")
        axes = [axis for axis in rule[1] if axis]
        if len(set(axes)) < len(axes):
            raise UserError(f"config.mesh.rules has {rule!r}; expected each mesh axis once at most")
    for one in bins:
        if isinstance(one, str) or len(one) != 3 or not all(isinstance(bound, int | float) for bound in one[:2]):
            raise UserError(f"config.data.label_bins has {one!r}; expected (low, high, name) with two numbers")
    for key, pattern in [("data.split_regex", config.data.split_regex), *(("mesh.rules", rule[0]) for rule in rules)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.{key} has {pattern!r}, which is not a regular expression: {error}") from None


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as indented JSON, in the order of `base()`."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def from_json(text: str) -> ConfigDict:
    """Returns a locked config from `to_json`'s text; fields added to `base()` since keep their defaults."""
    config = base()

    def fill(node: ConfigDict, values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if key not in node:
                raise UserError(
                    f"saved config has {prefix + key!r}, which this jaxtune does not know{nearest(prefix + key, keys(base()))}"
                )
            if isinstance(node[key], ConfigDict):
                if not isinstance(value, dict):
                    raise UserError(
                        f"saved config has {prefix + key!r} = {value!r:.60}; expected an object, its section"
                    )
                fill(node[key], value, f"{prefix}{key}.")
                continue
            try:
                node[key] = _tupled(value) if isinstance(node[key], tuple) else value
            except (TypeError, ValueError):
                expected = type(node[key]).__name__
                raise UserError(f"saved config has {prefix + key!r} = {value!r:.60}; expected a {expected}") from None

    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg}, line {error.lineno})") from None
    if not isinstance(values, dict):
        raise UserError(f"holds a JSON {type(values).__name__}; expected an object, as in a run's config.json")
    fill(config, values, "")
    return config


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
