"""SmolLM2-135M-Instruct with a head of three scores instead of words: a decoder as a classifier, by LoRA, on two CPU cores.

    python -m jaxtune.launch --config=configs/smollm2_classifier.py

The quickstart's reviews, instruction and held-out rows; there the model writes the label, here the head reads the last
token of the chat. The head is new, trains whole, and is saved beside the adapter.
"""

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location("quickstart", Path(__file__).with_name("quickstart.py"))
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    config = quickstart.get_config()
    config.name = "smollm2_classifier"
    config.model.head = "sequence"
    config.model.labels = config.eval.labels
    config.train.objective = "classify"
    config.eval.metric = "auto"  # a head's own: accuracy, macro-F1, label NLL
    config.optim.learning_rate = 5e-4
    config.train.steps = 200  # of 8 x 128 tokens, about 16 sentences: one pass
    config.train.eval_every_steps = 50
    return config
