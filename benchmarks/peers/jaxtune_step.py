"""Our own step, compiled by `plan.compile.compile_step`; run by hbm_vs_peers.py under the interpreter it is given."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import measure

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama3_8b_lora.py"


def config_of(work: dict[str, Any]) -> Any:
    """`configs/llama3_8b_lora.py` for this work; `settings` come last."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.plan.topology, config.train.batch_size = work["topology"], work["num_rows"]
    config.data.max_length, config.tune.rank, config.tune.alpha = work["row_tokens"], work["rank"], 2.0 * work["rank"]
    if work["method"] == "full":
        config.tune.method, config.tune.dtype = "full", "bfloat16"
    quantized = {"model.quantize": work["quantize"]} if work["method"] == "qlora" else {}
    config.update_from_flattened_dict(quantized | work["settings"])
    return config


def main() -> None:
    work = measure.work()
    from jaxtune.plan import compile as plan_compile
    from jaxtune.types import UserError
    from jaxtune.weights import source

    config = config_of(work)
    hf_config = source.find(config).hf_config | {"num_hidden_layers": work["num_layers"]}
    began = time.perf_counter()
    found: dict[str, Any]
    try:
        made = plan_compile.compile_step(config, hf_config)
    except UserError as error:
        if "does not fit" not in str(error):
            raise
        found = {"fits": False, "says": str(error)}
    else:
        parts = ("argument_bytes", "temporary_bytes", "program_bytes")
        found = {part: getattr(made, part) for part in parts} | {
            "new_output_bytes": made.output_bytes - made.alias_bytes, "peak_bytes": made.peak_hbm_bytes, "fits": True,
        }  # fmt: skip
    measure.emit(found, began, ("flax",))


if __name__ == "__main__":
    main()
