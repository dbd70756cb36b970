"""Tunix's `PeftTrainer` step on its Llama 3, compiled ahead of time; run by hbm_vs_peers.py in the peers' environment.

Set as its own command line sets it up (qwix's LoRA on every linear layer, the causal mask and positions from the padding
mask, the optimizer donated), with each decoder layer recomputed: its leanest setting. Its Llama has no flash attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import measure

LINEAR = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
QUANTIZED = {"weight_qtype": "nf4", "tile_size": 128}  # of a QLoRA base, by qwix


def main() -> None:
    work = measure.work()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer, utils

    devices = measure.devices(work["topology"])
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    config = dataclasses.replace(
        llama.ModelConfig.llama3p1_8b(), num_layers=work["num_layers"], remat_config=llama.RematConfig.DECODER
    )

    def model_input(batch: Any) -> dict[str, Any]:
        mask = batch.input_tokens != 0
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    held = {}

    def build() -> tuple[Any, Any]:
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        if work["method"] != "full":
            quantized = QUANTIZED if work["method"] == "qlora" else {}
            provider = qwix.LoraProvider(module_path=LINEAR, rank=work["rank"], alpha=2.0 * work["rank"], **quantized)
            model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(1))
        options = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4), options).with_gen_model_input_fn(model_input)
        held["trainer"] = trainer
        return trainer.model, trainer.optimizer

    def placed(module: Any) -> Any:
        graph, state = nnx.split(module)
        specs = nnx.get_partition_spec(state)
        return nnx.merge(
            graph,
            jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), state, specs
            ),
        )

    def compile_step() -> Any:
        built = nnx.eval_shape(build)
        model, optimizer = placed(built)
        trainer = held["trainer"]
        trainer.model, trainer.optimizer = model, optimizer
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=False)
        rows = jax.ShapeDtypeStruct(
            (work["num_rows"], work["row_tokens"]), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
        )
        batch = peft_trainer.TrainingInput(input_tokens=rows, input_mask=rows)
        # its layers leave out their activations' shardings where jax.devices() are CPUs
        with mesh, mock.patch.object(jax, "devices", return_value=devices):
            lowered = step.func.lower(*step.args, batch)
        return lowered.compile()

    measure.report(compile_step, ("google-tunix", "qwix", "flax"))


if __name__ == "__main__":
    main()
