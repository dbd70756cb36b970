"""Sections of the config that belong to one way of teaching, or to one verb; `config.base` puts them beside the others."""

from __future__ import annotations

from ml_collections import ConfigDict


def lr_find() -> ConfigDict:
    c = ConfigDict()
    c.low = 1e-7  # learning rate of the first step
    c.high = 1.0  # of the last; in between it grows by the same factor each step (arXiv:1506.01186)
    c.num_steps = 100
    c.smoothing = 0.9  # decay of the running mean of the loss
    c.stop_factor = 4.0  # stops when the running mean exceeds its lowest by so much
    return c


def sweep() -> ConfigDict:
    c = ConfigDict()
    c.axes = ()  # ((key, (value, …)), …), e.g. (("optim.learning_rate", (1e-4, 3e-4)),); random also ("linear" | "log", low, high)
    c.method = "grid"  # grid (every combination) | random (of each axis, independently)
    c.num_runs = 0  # random: how many; grid: the first so many, 0 = all
    c.seed = 0  # of the random choice
    c.metric = "eval/loss"  # runs are compared by this: a name of metrics.jsonl, or of what is measured after training
    c.goal = "min"  # min | max
    return c


def reward() -> ConfigDict:
    c = ConfigDict()
    c.functions = ()  # ((reward, weight), …): exact_answer | choice | json_schema | regex | length, or a function of yours (prompt, completion, row) -> float, "module:function" or "file.py:function"
    c.threshold = 0.5  # weighted sum from which an answer counts as right
    c.timeout_seconds = 10.0  # of one function on one completion; then its process is ended and another started
    c.on_error = (
        "zero"  # a function that raises, hangs or returns no number: zero (its value) | drop (the completion) | stop
    )
    c.workers = 1  # processes that judge
    c.answer_column = "answer"  # exact_answer, choice: the row's column that holds the answer; a row without such a column has its last assistant turn, completion, output or label there
    c.answer_regex = (
        ""  # what of that column is the answer, e.g. r"####\s*(.+)": group 1 counts where there is one; "" = all
    )
    c.completion_regex = (
        ""  # exact_answer, choice: what of a completion is its answer, likewise, the last match; "" = all
    )
    c.choices = ()  # choice: the answers to choose among; () = the completion as a whole is compared
    c.json_schema = ""  # json_schema: file of a JSON schema; "" = each row's column "schema"
    c.regex = ""  # regex: pattern to be found in the completion
    c.length_characters = (1, 1000)  # length: (low, high), characters
    return c


def self_training() -> ConfigDict:
    c = ConfigDict()
    c.method = "star"  # star (arXiv:2203.14465) | rft (arXiv:2308.01825) | rest_em (arXiv:2312.06585) | rewrite (gold answers in its own words, arXiv:2402.13669) | demonstration (its own answers, taught by itself with the gold one in sight, arXiv:2601.19897)
    c.rounds = 3  # of sampling, judging, training and measuring
    c.samples = 4  # answers to each prompt in a round
    c.max_per_prompt = 10  # rft, rest_em: answers kept of a prompt at most; 0 = all
    c.hint = " (Hint: the answer is {answer}.)"  # star: what is added to a prompt without a right answer, a template over columns, before it is asked again; learned from without it; "" = never
    c.with_gold = False  # train on the gold answers too, as RFT's authors do
    c.from_base = True  # each round trains from the first model; False = from the one of the round before
    c.control = True  # train on as many gold answers beside it
    c.temperature = 0.7  # of the answers; those that measure are drawn as `generate` says
    c.top_k = 0  # 0 = off
    c.top_p = 1.0  # 1 = off
    c.max_new_tokens = 256  # of an answer; one that does not end by then is refused
    c.slots = 32  # answers that are made side by side
    c.part_prompts = 64  # prompts whose answers are written together: what a kill costs at most
    c.reward_model = ""  # URI of a reward model's folder or adapter (train.objective="reward"), which judges in place of reward.functions; reward.threshold is then of its score
    return c


def preference() -> ConfigDict:
    c = ConfigDict()
    c.beta = 0.1  # dpo, kto, cpo: how near to the reference; simpo: scale of the reward (its paper: 2 to 10); orpo: weight of the odds ratio
    c.loss_type = "sigmoid"  # dpo, cpo: sigmoid | hinge | ipo | robust (objectives/pairs.py has the formulas)
    c.label_smoothing = 0.0  # share of the pairs taken to be the wrong way round: dpo, cpo (sigmoid and robust), simpo
    c.length_normalised = False  # dpo: log-ratios are means over an answer's tokens, as ipo's always are
    c.rpo_alpha = 0.0  # dpo, simpo: weight of the chosen answers' cross-entropy beside the loss
    c.cpo_alpha = 1.0  # cpo: likewise
    c.simpo_gamma = 0.5  # simpo: margin by which the chosen answer's reward should be the higher
    c.orpo_prompts = True  # orpo: its cross-entropy reads the prompt too, as its authors' code and TRL's; False = the answer alone, as the paper
    c.desirable_weight = 1.0  # kto: weight of desirable answers' losses
    c.undesirable_weight = 1.0  # kto: of undesirable ones'
    c.center_rewards = 0.0  # reward: weight of the squared sum of a pair's scores, which keeps them about 0
    c.margin_scale = 1.0  # reward: a row's margin, or difference of ratings, times this is what its scores should differ by at least; 0 = no margin
    c.reference = "auto"  # dpo, kto: adapter_off (the model without its adapter) | start (the model as training starts, computed once before) | another model's URI, likewise | auto (adapter_off for a new adapter, else start)
    c.share_prompts = "auto"  # a pair's prompt is computed once: auto (where the model can, and no attention kernel of a TPU or GPU is lost by it) | always | never
    return c


def rl() -> ConfigDict:
    c = ConfigDict()
    c.prompts_per_round = 8  # prompts that are answered before weights change
    c.group_size = 8  # completions of each
    c.minibatches = 1  # parts of a round's completions, an optimizer step each
    c.passes = 1  # times that each of them is trained on
    c.temperature = 1.0  # that completions are drawn with, and their probabilities are taken at
    c.top_k = 0  # 0 = off
    c.top_p = 1.0  # 1 = off
    c.min_p = 0.0  # 0 = off
    c.max_prompt_length = 256  # tokens; longer prompts are dropped, and counted
    c.max_new_tokens = 256  # of a completion
    c.slots = 64  # completions that are written side by side
    c.loss_type = "dapo"  # how tokens are averaged: grpo | dr_grpo | bnpo | dapo (objectives/surrogate.py has the formulas); rloo has its own
    c.importance_level = "token"  # what the ratio is of: token | sequence (GSPO); rloo has its own
    c.clip_low = 0.2  # ratios count from 1 - clip_low
    c.clip_high = 0.2  # to 1 + clip_high (DAPO: 0.28)
    c.delta = 0.0  # upper bound of the ratio where the advantage is negative, above 1 + clip_high; 0 = none
    c.beta = 0.0  # weight of the KL divergence to the model with its adapter off; 0 = none
    c.kl_estimator = "k3"  # k1 | k2 | k3 (objectives/surrogate.py has the formulas)
    c.kl_unbiased = True  # in the loss, times the ratio, so that its gradient is the divergence's own (arXiv:2512.02556); False = as GRPO's paper has it
    c.kl_in = "loss"  # the divergence is a part of the loss (loss) or of the reward (reward)
    c.entropy_weight = 0.0  # of the mean entropy of a token, which is added to what is maximised
    c.scale_rewards = "group"  # grpo: advantages are divided by the standard deviation of the group | of the round (batch) | by 1 (none, Dr. GRPO)
    c.old_logps = "auto"  # a token's probability when it was drawn: sampler (what the sampler said) | policy (by a pass of the training model) | auto (policy where top_k, top_p or min_p cut the distribution)
    c.mask_truncated = False  # do not learn from completions that ran into max_new_tokens (DAPO)
    c.resample = 0  # replace prompts whose completions all have one reward, at most so many times a round (DAPO's dynamic sampling); 0 = never
    c.gamma = 1.0  # ppo: discount of what comes later
    c.gae_lambda = 0.95  # ppo: GAE's lambda
    c.value_weight = 0.1  # ppo: weight of the value loss
    c.value_clip = 0.2  # ppo: values count so far from what they were; 0 = however far
    c.keep_rounds = 0  # rounds kept in WORKDIR/rollouts, from which a resumed run goes on in mid-round; 0 = all
    c.samples = 4  # completions of each round written to WORKDIR/samples.jsonl
    return c


def meta() -> ConfigDict:
    c = ConfigDict()
    c.task_column = ""  # the column that names a row's task; "" = the file that it stands in
    c.held_out = ()  # tasks never trained on: eval.split="test" measures them alone
    c.demonstrations = 0  # sft: so many answered rows of its task before each question, which alone trains (MetaICL, arXiv:2110.15943); 0 = none
    c.contexts = 0  # such questions to train on, each drawn anew, all tasks equally often; 0 = as many as rows
    c.algorithm = ""  # reptile (arXiv:1803.02999) | fomaml (first-order MAML, arXiv:1703.03400); "" = none: all tasks' rows together
    c.tasks = 4  # tasks of a step; train.batch_size is shared out among their batches, of which each has inner_steps, and fomaml one more
    c.inner_steps = 4  # steps that each task takes from the parameters to its own, one batch each
    c.inner_rate = 1e-3  # learning rate of these steps
    c.inner_optimizer = "adam"  # of these steps, anew for each task: adam (without momentum, as Reptile's) | sgd
    c.shots = ()  # `evaluate`: answered rows of a held-out task that are shown, or adapted to, before its test rows, e.g. (0, 1, 2, 4, 8)
    c.ways = ("shown", "adapted")  # `evaluate`: what is done with these rows
    c.draws = 3  # `evaluate`: times that these rows are drawn, for each task
    c.adapt_steps = 8  # `evaluate`: steps of inner_optimizer on these rows, all at once
    c.adapt_rate = 0.0  # `evaluate`: learning rate of these steps; 0 = inner_rate
    return c


SECTIONS = {
    "lr_find": lr_find,
    "sweep": sweep,
    "reward": reward,
    "self_training": self_training,
    "preference": preference,
    "rl": rl,
    "meta": meta,
}
