"""SmolLM2-135M-Instruct, every weight trained, on the quickstart's reviews: the same data, another method, side by side.

python -m jaxtune.launch --config=configs/smollm2_full.py
"""

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location("quickstart", Path(__file__).with_name("quickstart.py"))
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    config = quickstart.get_config()
    config.name = "smollm2_full"
    config.tune.method = "full"
    config.optim.learning_rate = 2e-5
    config.optim.weight_decay = 0.01
    return config
