"""Stage 1 of three: the sentiment of customer reviews (configs/quickstart.py), as the first release of a lineage.

    for stage in reviews mail sums; do jaxtune update --config=configs/stages/$stage.py; done

Each goes on from the release before, with a quarter of each batch replayed from earlier stages and a pull to the base
(`kl_base`). Without either, in a lineage of its own, whose gate is overruled so that it goes on and is measured:

    --config.lineage.folder=runs/stages/plain --config.lineage.replay_share=0 --config.retain.penalties= \
        --config.lineage.force="measured without mitigation"
"""

import runpy
from pathlib import Path

stage = runpy.run_path(str(Path(__file__).with_name("shared.py")))["stage"]


def get_config():
    config = stage("quickstart.py", steps=40, batch_size=8, rate=1e-3, eval_rows=150)
    config.name = "reviews"
    return config
