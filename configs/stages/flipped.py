"""A stage that was made bad on purpose: reviews whose labels are swapped, learnt fast, with nothing that holds it. The gate refuses it.

jaxtune update --config=configs/stages/flipped.py
"""

import runpy
from pathlib import Path

stage = runpy.run_path(str(Path(__file__).with_name("shared.py")))["stage"]


def get_config():
    config = stage("quickstart.py", steps=40, batch_size=8, rate=1e-3, eval_rows=150)
    config.name = "flipped"
    config.data.label_bins = ((-4.0, -0.5, "positive"), (-0.5, 0.5, "neutral"), (0.5, 4.1, "negative"))
    config.lineage.replay_share, config.retain.penalties = 0.0, ()
    return config
