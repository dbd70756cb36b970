"""Stage 2 of three: does a privacy policy's sentence answer the question (configs/legal_privacy.py)? See reviews.py.

jaxtune update --config=configs/stages/legal.py
"""

import runpy
from pathlib import Path

stage = runpy.run_path(str(Path(__file__).with_name("shared.py")))["stage"]


def get_config():
    config = stage("legal_privacy.py", steps=24, batch_size=4, rate=5e-4, eval_rows=120)
    config.name = "legal"
    return config
