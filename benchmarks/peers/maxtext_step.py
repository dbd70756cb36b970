"""MaxText's supervised step on Llama 3.1, compiled ahead of time; run by hbm_vs_peers.py in the peers' environment.

LoRA and QLoRA: the step of its SFT trainer, which is Tunix's `PeftTrainer` around MaxText's model and loss. Full
fine-tuning: `train_compile`, its own ahead-of-time tool, for its native SFT step ("full") or the trainer's ("full_sft").
(That tool with LoRA switched on builds no LoRA parameters.) At its leanest: full remat, flash attention, scanned layers,
vocabulary tiling down to 256 tokens of a chip.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from typing import Any
from unittest import mock

import measure

TILE_TOKENS = 256


def config_of(work: dict[str, Any]) -> Any:
    """MaxText's config: bfloat16 weights and compute, pure FSDP."""
    from maxtext.configs import pyconfig
    from maxtext.utils.globals import MAXTEXT_PKG_DIR

    chips = measure.num_chips(work["topology"])
    rows, length = work["num_rows"], work["row_tokens"]
    settings = {
        "run_name": "hbm", "base_output_directory": tempfile.gettempdir(), "model_name": "llama3.1-8b", "override_model_config": True,
        "base_num_decoder_layers": work["num_layers"], "per_device_batch_size": rows // chips,
        "max_target_length": length, "weight_dtype": "bfloat16", "dtype": "bfloat16", "scan_layers": True,
        "remat_policy": "full", "attention": "autoselected", "num_vocab_tiling": max(1, rows // chips * length // TILE_TOKENS),
        "ici_fsdp_parallelism": -1, "opt_type": "adamw", "mu_dtype": "bfloat16", "packing": True, "log_config": False,
        "internal_compile": True, "internal_compile_num_devices": chips, "compile_topology": work["topology"],
        "compile_topology_num_slices": 1, "skip_jax_distributed_system": True, "enable_checkpointing": False,
        "use_tunix_gradient_accumulation": False, "hardware": "tpu",
    }  # fmt: skip
    if "lora" in work["method"]:
        settings |= {"lora.enable_lora": True, "lora.lora_rank": work["rank"], "lora.lora_alpha": 2.0 * work["rank"]}
    if work["method"] == "qlora":
        settings |= {"lora.lora_weight_qtype": "nf4", "lora.lora_tile_size": 128}
    sft = os.path.join(MAXTEXT_PKG_DIR, "configs", "post_train", "sft.yml")
    return pyconfig.initialize(["", sft, *[f"{name}={str(value).lower()}" for name, value in settings.items()]])


def native(config: Any, mesh: Any) -> Any:
    """The compiled step of `train_compile`."""
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    args, kwargs, shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    data = sharding.get_input_data_sharding(config, mesh)
    step = maxtext_utils.get_functional_train_with_signature(train.train_step, data, shardings, model, config, params)
    function, into, out, static, donated = step
    return train_compile.jit_and_compile(
        function, args, kwargs, mesh, into, out, static, donated, config, logical_axis_rules(config.logical_axis_rules)
    )


def trainer_step(config: Any, mesh: Any) -> Any:
    """The compiled step of the SFT trainer, with the shardings that its set-up gives: the adapters replicated."""
    import jax
    import optax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.optimizers import optimizers
    from maxtext.trainers.post_train.sft import train_sft
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils, sharding

    rules = functools.partial(logical_axis_rules, config.logical_axis_rules)
    create, _ = model_creation_utils.create_nnx_abstract_model(config, mesh)
    held = {}

    def build() -> tuple[Any, Any]:
        model = create()
        if config.lora.enable_lora:
            model = lora_utils.apply_lora_to_model(model, None, config)  # the mesh would place what is no array yet
        schedule = maxtext_utils.create_learning_rate_schedule(config)
        optimizer = optimizers.get_optimizer(config, schedule, model)
        if config.gradient_clipping_threshold > 0:
            optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), optimizer)
        nnx.pop(model, nnx.Intermediate)
        trainer = train_sft.MaxTextPeftTrainer(model, optimizer, train_sft.get_tunix_config(config))
        held["trainer"] = train_sft.use_maxtext_loss_function(trainer, config)
        return trainer.model, trainer.optimizer

    def placed(module: Any) -> Any:
        graph, state = nnx.split(module)
        places = sharding.nnx_construct_named_sharding(state, mesh)
        return nnx.merge(
            graph, jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
        )

    tried = lora_utils._prepare_dummy_inputs(mesh)  # a batch that the mesh divides, to find the layers with
    with rules(), mock.patch.object(lora_utils, "_prepare_dummy_inputs", return_value=tried):
        built = nnx.eval_shape(build)
        model, optimizer = placed(built)
    trainer = held["trainer"]
    trainer.model, trainer.optimizer = model, optimizer
    data = sharding.get_input_data_sharding(config, mesh)
    batch = maxtext_utils.get_shaped_batch(config, batch_sharding=data)
    with jax.set_mesh(mesh), rules():
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=False)
        lowered = step.func.lower(*step.args, batch)
    trainer.metrics_logger.close()
    return lowered.compile()


def main() -> None:
    work = measure.work()
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText's switch for "without Google Cloud's clients"
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile sets them
    import jax

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    from maxtext.trainers.pre_train import train_compile

    sys.argv = sys.argv[:1]
    config = config_of(work)
    mesh = train_compile.get_topology_mesh(config)
    make = native if work["method"] == "full" else trainer_step
    measure.report(lambda: make(config, mesh), ("maxtext", "google-tunix", "qwix", "flax"))


if __name__ == "__main__":
    main()
