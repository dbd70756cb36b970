"""The config: one locked `ConfigDict` that holds every field jaxtune reads, each with a default, a unit and a comment.

A run is a file in `configs/` with `get_config()`: it calls `base()`, changes fields, returns it. The command line
overrides (`--config.train.steps=100`; a tuple of words as `--config.eval.labels=good,bad`). A key that is not below does not exist: misspelling one is an error that names
the nearest keys.
"""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict as ConfigDict

from jaxtune import config_methods, config_retention, config_review
from jaxtune.types import UserError, nearest


def _model() -> ConfigDict:
    c = ConfigDict()
    c.source = ""  # base weights: a Hugging Face folder or a GGUF file, by URI; or "preset:NAME" for random weights
    c.tokenizer = ""  # URI of a tokenizer folder; "" = the one beside the weights
    c.chat_template = ""  # path of a Jinja file that replaces the tokenizer's own template; "" = the tokenizer's own
    c.head = ""  # what stands on the last hidden state: "" = as the model has it | lm | sequence | token | none; a new one starts random and trains
    c.labels = ()  # classes of a sequence or token head, in their order; () = those of the model's id2label
    c.problem_type = ""  # what a sequence head's scores mean: single_label_classification | multi_label_classification | regression; "" = as the model's config says, else single (one label: regression)
    c.pooling = ""  # which state stands for a whole text in an embedding: first (CLS) | mean | last; "" = as the model's folder says, else mean (encoders), last (decoders)
    c.param_dtype = "float32"  # storage of frozen weights: float32 | bfloat16
    c.compute_dtype = "float32"  # activations and matmuls: float32 | bfloat16 (norms, softmax and loss stay float32)
    c.attention = "auto"  # auto (splash on TPU, flash on GPU, else xla) | xla | splash | flash; what a kernel cannot say runs as xla: slopes and two-way windows (both), soft caps, windows, sinks, `mesh.context`, odd or wide heads (flash); on GPUs before compute capability 8.0 all of it
    c.quantize = ""  # storage of the frozen weights of linear layers: "" (param_dtype) | int8 | int4 | nf4 (QLoRA, arXiv:2305.14314)
    c.quantize_block = 64  # inputs that share a scale (fewer where it does not divide them); 0 = all of an output's
    c.quantize_targets = r"layers\.(?!.*\brouter\b).*"  # regex, full match, over the paths of linear layers; none but those of blocks are quantised
    c.keep_layers = ()  # a student of some layers: their numbers in the base, from 0, ascending, e.g. (0, 3, 6, 9); () = all
    return c


def _tune() -> ConfigDict:
    c = ConfigDict()
    c.method = "lora"  # lora | full | head (the output projection alone) | prompt (virtual tokens in front of each text, arXiv:2104.08691)
    c.rank = 16  # LoRA rank r
    c.alpha = 32.0  # LoRA alpha: the update is scaled by alpha / r
    c.dropout = 0.05  # dropout probability on the adapter's input; experts' adapters have none, as in PEFT
    c.targets = r"layers\.(?!.*\b(experts|router)\b).*"  # regex, full match, over the paths of linear layers; r"layers\..*" = experts and their routers too
    c.use_rslora = False  # scale by alpha / sqrt(r) (arXiv:2312.03732)
    c.use_dora = False  # learn each output's magnitude apart from its direction (arXiv:2402.09353)
    c.lora_plus_ratio = 1.0  # learning rate of B over that of A (LoRA+, arXiv:2402.12354)
    c.dtype = "float32"  # storage of trainable weights
    c.adapter = (
        ""  # PEFT folder to start from, by URI; its rank, alpha and targets win, or its number of virtual tokens
    )
    c.virtual_tokens = 20  # prompt: virtual tokens in front of each text; data.max_length counts them
    c.virtual_init = "vocabulary"  # prompt: where their vectors start: vocabulary (tokens drawn from it) | text | random (its spread)
    c.virtual_text = (
        ""  # prompt: the text whose tokens virtual_init="text" takes, again and again until there are enough
    )
    c.init = "auto"  # which LoRA factor starts at 0: b_zero (A uniform, as PEFT) | a_zero (B Gaussian: Adam's first step is then no matter of rounding) | auto (a_zero where the objective has a reference)
    c.freeze = ()  # regexes, full match, over the paths of parameters that would train otherwise, e.g. (r"embed\..*",)
    c.train_layers = ()  # numbers of the layers that train, from 0; () = all. What is in no layer (embeddings, norm, head) is not theirs
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
    c.format = "auto"  # auto | messages | sharegpt | alpaca | prompt_completion | text | labelled | tagged (words and a tag for each) | pair (a query and its passage) | preference (a chosen and a rejected answer) | rated (answers with scores)
    c.files = ""  # where a URI names a folder: which of its files hold rows, a pattern such as "*/*.json"; "" = all data files
    c.prepare = ""  # a function of yours, "module:function" or "file.py:function": row -> row, or None to drop it
    c.columns = ()  # names of the columns of a table without a header row; () = the first row names them
    c.prompt = ""  # labelled: the user's turn, a template over columns, e.g. "Review: {text}\nSentiment:"
    c.passage = ""  # pair: the text that answers, a template likewise, e.g. "passage: {context}"; data.prompt is then the query's; "" = both by column names
    c.negative = ""  # pair: a text that does not answer (a hard negative), a template likewise; "" = none
    c.mined_negatives = 0  # pair: hard negatives per query, the passages that BM25 ranks first and that do not answer it (extra: retrieval)
    c.system = ""  # labelled: the system turn, a template likewise; "" = none
    c.label_column = ""  # labelled: the column that holds the answer; tagged: the tags, "" = tags, ner_tags or labels
    c.label_separator = ""  # labelled: what stands between a text's labels, e.g. ";"; "" = one label (a JSON list holds several all the same)
    c.label_bins = ()  # labelled, numeric column: ((low, high, name), …), low <= x < high; rows in no bin are dropped and counted
    c.chat = True  # render alpaca, prompt_completion and labelled rows by the chat template; False = plain text
    c.roles = ("assistant",)  # roles whose tokens are trained
    c.end_of_turn = "turn"  # which end-of-turn tokens train: all | turn (of trained turns) | last | none
    c.tag_subwords = "first"  # tagged: which sub-words of a word train: first | all
    c.mask_fraction = 0.15  # mlm: share of a text's tokens to be predicted, special ones apart (arXiv:1810.04805, 3.1)
    c.mask_token_share = 0.8  # mlm: share of those that the mask token replaces
    c.mask_random_share = 0.1  # mlm: share of those that a random token replaces; the rest stay as they are
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
    c.name = "adamw"  # adamw | adam8bit (moments of a byte each) | adafactor | lion | muon (matrices of layers; AdamW for the rest) | sgd
    c.learning_rate = 2e-4  # peak
    c.schedule = "cosine"  # cosine | linear | constant | wsd (stays at the peak, then decays; arXiv:2404.06395)
    c.warmup_steps = 0.03  # steps of linear warm-up; below 1 = a share of all steps
    c.final_ratio = 0.0  # learning rate at the end, over the peak (cosine, linear, wsd)
    c.b1 = 0.9
    c.b2 = 0.999  # lion's authors take 0.99
    c.eps = 1e-8
    c.weight_decay = 0.0  # decoupled; matrices only, never norms, biases or magnitudes
    c.clip_norm = 1.0  # global gradient norm is clipped to this; 0 = never
    c.stable_share = 0.9  # wsd: share of the steps after the warm-up that stay at the peak
    c.decay_shape = (
        "linear"  # wsd: how the rest falls: linear | cosine | exponential | sqrt (1 - sqrt, arXiv:2405.18392)
    )
    c.layer_decay = 1.0  # each layer's learning rate over that of the layer above; embeddings' is the lowest (arXiv:2003.10555); 1 = all alike
    c.moment_block = 256  # adam8bit: numbers that share a scale, at most (arXiv:2110.02861)
    c.min_factored_dim = 128  # adafactor: matrices with both dims of so many or more keep factored moments
    c.scale_by_weights = False  # adafactor: the learning rate is relative to the RMS of each matrix
    c.muon_momentum = 0.95  # muon: of the gradients that are made orthogonal
    c.muon_rms = (
        0.2  # muon: RMS of an update over the learning rate; about AdamW's, so that its rates serve (arXiv:2502.16982)
    )
    c.ema_decay = 0.0  # of a moving average of the weights, e.g. 0.999; 0 = none
    c.use_ema = (
        True  # where there is an average, it is what is validated, measured and exported; False = the last weights
    )
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
    c.save = ()  # what else of each block is saved, by name: qkv | attention (its kernel is not run again) | mixed (what attention adds) | mlp (what down_proj reads)
    c.offload = ()  # the same, moved to the host's memory until the backward pass needs it; block_input: even what is always saved
    c.loss_chunk_tokens = 1024  # tokens per chunk of the output projection; the full logits never exist
    c.eval_every_steps = 0  # validation loss every so many steps; 0 = at the end only
    c.eval_batches = 0  # validation batches per evaluation; 0 = all
    c.patience = 0  # stop after so many evaluations without a better validation loss; 0 = never
    c.on_nonfinite = (
        "stop"  # NaN, infinite or exploding loss: stop (with a dump) | skip (leave the weights as they are)
    )
    c.max_skipped_steps = 20  # on_nonfinite="skip": stop after so many skipped steps in a row; 0 = never
    c.router_balance_weight = (
        0.0  # of the experts' load balance loss (1 = even load), per layer; transformers' coefficient times top_k
    )
    c.router_z_weight = 0.0  # of the routers' z-loss: mean squared log-partition of their logits
    c.explode_factor = 0.0  # also call a loss exploding above this multiple of its running mean; 0 = non-finite only
    c.mlp_block_tokens = 0  # a feed-forward layer takes so many tokens of a device at a time, each block rematerialised on its own; 0 = all
    c.log_every_steps = 1  # console line every so many steps where there is no terminal
    c.neftune_noise_alpha = 0.0  # noise on the embeddings in training, e.g. 5 (NEFTune, arXiv:2310.05914); 0 = none
    c.label_smoothing = (
        0.0  # share of each target that is spread over all classes or words; as torch's CrossEntropyLoss
    )
    c.z_loss_weight = 0.0  # of the squared log-partition of the logits, e.g. 1e-4 (arXiv:2204.02311)
    c.focal_gamma = (
        0.0  # targets that are sure already weigh less: (1 - p)^gamma, e.g. 2 (arXiv:1708.02002); 0 = cross-entropy
    )
    c.class_weights = ()  # classify, token_classify: loss weight of each label, in the order of the model's labels; () = all alike
    c.beside = ()  # objectives beside `objective`, added to it: ((name, weight), …), or (name, weight, URI) with training rows of its own
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
    c.context = 1  # tokens of a row are sharded over this axis, weights too: for rows too long for one device
    c.dcn_data = 1  # between slices, joined by the data centre's network, as data is within one; one of these may be -1
    c.dcn_fsdp = 1  # likewise: weights are gathered over that network
    c.dcn_expert = 1  # likewise
    c.dcn_tensor = 1  # likewise: slow
    c.dcn_context = 1  # likewise: slow
    c.auto = True  # where none of the sizes above was changed, choose them from model, batch and topology
    c.max_unsharded = (
        0.02  # share of the parameters that may stay whole on every device unasked, vectors and adapters apart
    )
    c.heartbeat_seconds = 100  # a process that is silent for so long is lost, and ends the others
    return c


def _eval() -> ConfigDict:
    c = ConfigDict()
    c.metric = "auto"  # auto (reward where that is what trains) | labels (likelihood of each label) | exact_match (of generations) | perplexity | reward (of generations, by the section reward) | retrieval (contrastive); heads for labels, tags or masked words have metrics of their own
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
    c.topology = "v5e:4x4"  # what to plan for: TPU generation and slice shape (v4, v5e, v5p, v6e, tpu7x), or a name such as v5e-16; cpu or cpu:N = this machine, measured; "" = the hosted service's price alone
    c.num_slices = 1  # so many slices of that shape, joined by the data centre's network
    c.topologies = ()  # rank these slices by dollars per million tokens instead; ("all",) = one of each generation (--topologies)
    c.search = False  # find the mesh, accumulation and remat that train fastest of those that fit; writes WORKDIR/planned.py (--search)
    c.confirm = (
        4  # at most so many candidates are compiled: of a search, the best; of a ranking, the cheapest until one fits
    )
    c.efficiency = 0.6  # share of the limiting roof that real steps reach on a TPU (MaxText publishes 0.5 to 0.7 of peak FLOP/s for v5e and v5p)
    c.prices = ""  # TOML file of yours that overrides jaxtune/chips.toml: prices, and any other figure of a chip
    # A hosted service, beside or (with topology "" or no model) instead: each one number, or (low, high).
    c.api_training_usd_per_1k_tokens = ()  # price of 1,000 training tokens; () = none
    c.api_training_tokens = ()  # tokens that are trained on; () = those of data.train times epochs, else of all steps
    c.api_inference_usd_per_1k_tokens = ()  # price of 1,000 tokens of inference; () = none
    c.monthly_requests = ()  # requests a month
    c.tokens_per_request = ()  # tokens of a request, prompt and answer
    return c


def _tracking() -> ConfigDict:
    c = ConfigDict()
    c.tensorboard = False  # event files in WORKDIR/tensorboard (extra: tensorboard)
    c.wandb = ""  # Weights & Biases project (extra: wandb); "" = off
    c.progress = "auto"  # auto (bar on a terminal, lines elsewhere) | bar | lines | off
    c.report = True  # write report.html and report.json at the end
    c.profile_steps = 0  # steps to trace for xprof, into WORKDIR/profile; 0 = none
    c.profile_start_step = (
        5  # first of them, as metrics.jsonl counts; a resumed run traces what of them is still to come
    )
    c.peak_tflops = 0.0  # of one device in the compute dtype, 1e12 FLOP/s, for model FLOPs utilisation; 0 = by its kind, where that is a TPU's
    c.profile_all_processes = False  # trace on every process of a multi-host run; False = on the first alone
    return c


def base() -> ConfigDict:
    """Returns the config with every field at its default, locked against new keys."""
    config = ConfigDict()
    config.name = "run"  # shown in the report
    config.workdir = ""  # where everything goes; --workdir wins; "" = runs/NAME
    config.compile_cache = ""  # folder (or gs://bucket/path) that keeps compiled programs for the next run; "" = as JAX_COMPILATION_CACHE_DIR says, else compiled/ beside what was fetched; "off" = none
    config.compile_cache_gib = (
        4.0  # GiB of it at most, the longest unused go first; a folder in Cloud Storage has no limit
    )
    config.model, config.tune, config.data = _model(), _tune(), _data()
    config.optim, config.train, config.checkpoint = _optim(), _train(), _checkpoint()
    config.mesh, config.eval, config.generate = _mesh(), _eval(), _generate()
    config.export, config.plan, config.tracking = _export(), _plan(), _tracking()
    for name, section in (config_methods.SECTIONS | config_retention.SECTIONS | config_review.SECTIONS).items():
        config[name] = section()
    config.lock()
    return config


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
