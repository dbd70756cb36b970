"""Stage 3 of three: sums of two numbers, answered in an equation (configs/self_training_sums.py). See reviews.py.

jaxtune update --config=configs/stages/sums.py
"""

import runpy
from pathlib import Path

stage = runpy.run_path(str(Path(__file__).with_name("shared.py")))["stage"]


def get_config():
    config = stage("self_training_sums.py", steps=40, batch_size=8, rate=1e-3, eval_rows=100)
    config.name = "sums"
    config.data.limit = 0
    return config
