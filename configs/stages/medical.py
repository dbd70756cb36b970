"""Stage 3 of three: yes, no or maybe from a study's abstract (configs/medical_pubmed.py). See reviews.py.

jaxtune update --config=configs/stages/medical.py
"""

import runpy
from pathlib import Path

stage = runpy.run_path(str(Path(__file__).with_name("shared.py")))["stage"]


def get_config():
    config = stage("medical_pubmed.py", steps=18, batch_size=2, rate=5e-4, eval_rows=60)
    config.name = "medical"
    return config
