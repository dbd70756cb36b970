"""What training holds: first as shapes and shardings (`abstract`), then as arrays (`create`).

`abstract(config, hf_config, mesh)` takes any mesh, one of real devices or one of a TPU topology that is not here, so the
plan compiles exactly what training runs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxtune import optim, registry, sharding
from jaxtune.adapters import kinds, lora, partition, prompt
from jaxtune.config import ConfigDict
from jaxtune.models import FAMILIES, layers, quantised, spec, transformer
from jaxtune.models.layers import Runtime
from jaxtune.objectives import OBJECTIVES
from jaxtune.train import guests, preferences, retention, routers
from jaxtune.types import UserError

# Up to so many tokens per word of the vocabulary, moving hidden states costs little beside the step, and gathering the whole
# output head would often be its peak of memory; with more tokens (and so more devices) the head is the cheaper to move.
_SPREAD_HEAD = 4
Params = dict[str, Any]  # dotted path -> array, or its shape with dtype and sharding


class State(NamedTuple):
    """What a step changes: arrays, or their shapes. `step` () int32; `params` the trainable leaves only; `key` for dropout; `loss_mean` () float32."""

    step: Any
    params: Params
    opt_state: Any
    key: Any
    loss_mean: Any  # running mean of the loss, against which an explosion is measured


class Program(NamedTuple):
    """A model and its training, without values: all that compiling needs."""

    family: ModuleType
    hf_config: dict[str, Any]
    model_config: Any
    graphdef: nnx.GraphDef  # as trained: rematerialised, activations pinned to the mesh
    inference: nnx.GraphDef  # the same model over the same parameters, free of both: any batch, any length
    run: Runtime
    mesh: Mesh
    lora: lora.Options | None
    labels: dict[str, str]
    base: Params  # every parameter of the base model: jax.ShapeDtypeStruct with sharding
    adapter: Params  # every parameter of the adapter
    state: State
    frozen: Params
    pool: str  # which state stands for a whole text: first | last | mean
    optimizer: optax.GradientTransformation
    quantised: quantised.Base | None  # which kernels are kept in codes, where any are
    prompt: prompt.Options | None = None  # of virtual tokens
    guests: Mapping[str, Any] = MappingProxyType(
        {}
    )  # name -> the program of a model that is in the step and does not train (`guests.py`)
    layout: str = ""  # why the mesh is as it is, in words, and which weights lie on it otherwise than the rules say


def runtime(config: ConfigDict, mesh: Mesh, model_config: Any) -> Runtime:
    """How this config runs a model on this mesh."""
    per_step = config.train.batch_size // config.train.accumulation * config.data.max_length
    gathered_tokens = per_step // (mesh.shape["data"] * mesh.shape["expert"] * mesh.shape["context"])
    return Runtime(
        param_dtype=jnp.dtype(config.model.param_dtype),
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.train.remat,
        save=tuple(config.train.save),
        offload=tuple(config.train.offload),
        attention=config.model.attention,
        router_loss=routers.wanted(config.train),
        spread_head=mesh.shape["fsdp"] > 1 and gathered_tokens <= _SPREAD_HEAD * model_config.vocab_size,
        mlp_blocks=_mlp_blocks(config, mesh),
        neftune_alpha=config.train.neftune_noise_alpha,
        branches=preferences.shares_prompts(config, model_config, str(mesh.devices.flat[0].platform)),
        mesh=mesh,
        spec=sharding.spec,
        constrain=sharding.constrain_on(mesh),
    )


def _free(run: Runtime) -> Runtime:
    """The same without what only a training step of its batch and mesh may ask for."""
    lean: dict[str, Any] = {"remat": "none", "save": (), "offload": (), "mlp_blocks": 1, "spread_head": False}
    return run._replace(attention="xla", constrain=layers.unconstrained, **lean)


def _mlp_blocks(config: ConfigDict, mesh: Mesh) -> int:
    """In how many blocks of a row's tokens the feed-forward layers work, for `train.mlp_block_tokens` on each device."""
    train, length = config.train, config.data.max_length // mesh.shape["context"]
    if not train.mlp_block_tokens:
        return 1
    rows = max(1, train.batch_size // train.accumulation // sharding.num_batch_shards(mesh))
    wanted = -(-rows * length // train.mlp_block_tokens)
    return next(blocks for blocks in range(min(wanted, length), length + 1) if length % blocks == 0)


def abstract(
    config: ConfigDict, hf_config: dict[str, Any], mesh: Mesh, num_steps: int, adapter: kinds.Options | None = None,
    pooling: str = "", trains: bool = True,
) -> Program:  # fmt: skip
    """Builds the whole training program as shapes, dtypes and shardings; allocates nothing.

    `adapter` replaces the config's options of one (a run that starts from a PEFT folder takes its); `pooling` is the folder's.
    What does not train, a guest, is frozen as a whole.

    Raises:
      UserError: unsupported architecture or attribute, a mesh that does not fit, a LoRA target that matches nothing.
    """
    family = registry.load("model_type", str(hf_config.get("model_type")), FAMILIES)
    model_config = preferences.with_values(config, family.from_hf(hf_config))
    run = runtime(config, mesh, model_config)
    routers.check(config.train, model_config)
    _check_dims(mesh, model_config)
    options = kinds.from_config(config.tune, adapter, preferences.starts_at_a_zero(config))
    quantize = quantised.Options.from_config(config.model)
    graphdef, variables = _shapes(family, model_config, run, options, quantize)
    inference, _ = _shapes(family, model_config, _free(run), options, quantize)
    labels = _labels(config, model_config, variables) if trains else dict.fromkeys(variables, "frozen")
    sharding.check_rules(config.mesh.rules, sorted({quantised.kernel_of(path) or path for path in variables}))
    params = _placed(config, mesh, variables, labels)
    kept = _quantised(quantize, params, run, mesh)
    learned = guests.projections(config, model_config, mesh) if trains else {}
    labels |= dict.fromkeys(learned, "full")
    trainable, frozen = partition.split(params | learned, labels)
    optimizer = optim.make(config, labels, num_steps, partial(transformer.depths, model_config))
    made = Program(
        family=family,
        hf_config=hf_config,
        model_config=model_config,
        graphdef=graphdef,
        inference=inference,
        run=run,
        mesh=mesh,
        lora=options if isinstance(options, lora.Options) else None,
        prompt=options if isinstance(options, prompt.Options) else None,
        labels=labels,
        base={path: value for path, value in params.items() if ".adapter." not in path},
        adapter={path: value for path, value in params.items() if ".adapter." in path},
        state=_state_shapes(optimizer, trainable, sharding.replicated(mesh)),
        frozen=frozen | (retention.shapes(config, family, model_config, trainable) if trains else {}),
        pool=_pool(config, model_config, pooling),
        optimizer=optimizer,
        quantised=kept,
        layout=_check_sharding(config, mesh, variables, params, kept),
    )
    return guests.invited(config, made, abstract) if trains else made


def _placed(config: ConfigDict, mesh: Mesh, variables: Mapping[str, Any], labels: Mapping[str, str]) -> Params:
    """Every parameter's shape, dtype and sharding."""
    trained_dtype = jnp.dtype(config.tune.dtype)

    def shape(path: str, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        kernel, axes = quantised.kernel_of(path), variable.get_metadata()["axes"]
        like = variables[f"{kernel}.codes"] if kernel else variable
        where = sharding.param_sharding(kernel or path, like.shape, axes, mesh, config.mesh.rules)
        if kernel:
            _check_frozen(config, kernel, labels[path])
            where = sharding.fitting(where, variable.shape)
        return jax.ShapeDtypeStruct(
            variable.shape, variable.dtype if labels[path] == "frozen" else trained_dtype, sharding=where
        )

    return {path: shape(path, variable) for path, variable in variables.items()}


def _check_dims(mesh: Mesh, model_config: Any) -> None:
    sharding.check_dims(mesh, attention_heads=model_config.num_heads, kv_heads=model_config.num_kv_heads)
    if mesh.shape["context"] > 1 and any(isinstance(block.attention, spec.Delta) for block, _ in model_config.blocks):
        raise UserError(
            f"mesh.context={mesh.shape['context']} splits the tokens of a row, which this model's gated delta rule reads one after the "
            "other: set mesh.context=1, and give the devices to mesh.fsdp or mesh.tensor"
        )


def _check_sharding(
    config: ConfigDict, mesh: Mesh, variables: Mapping[str, Any], params: Params, kept: quantised.Base | None
) -> str:
    """Refuses too many whole weights; returns, in words, which weights another dim than the rules' is split of."""
    kernels = kept.kernels if kept else {}  # counted, and named by mesh.rules, as if they were not quantised
    whole = {path: value for path, value in params.items() if not quantised.kernel_of(path)} | kernels
    base = {path: value for path, value in whole.items() if ".adapter." not in path}
    axes = {path: variables[path + ".codes" * (path in kernels)].get_metadata()["axes"] for path in base}
    matrices = {path: value for path, value in base.items() if len(axes[path]) > 1}
    sharding.check_sharded(matrices, num_params(base), mesh, config.mesh)
    asked = [pattern for pattern, _ in config.mesh.rules]
    moved = [
        path
        for path, value in matrices.items()
        if not any(re.fullmatch(pattern, path) for pattern in asked)
        and sharding.moved(value.shape, axes[path], mesh, value.sharding)
    ]
    named = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
    return f"split along another dim, for the mesh does not divide the usual one: {named}" if moved else ""


def _check_frozen(config: ConfigDict, kernel: str, label: str) -> None:
    if label != "frozen":
        raise UserError(
            f"tune.method={config.tune.method!r} trains {kernel}, which model.quantize={config.model.quantize!r} keeps in codes that "
            "have no gradient: set tune.method='lora', or model.quantize=''"
        )


def _quantised(options: quantised.Options | None, params: Params, run: Runtime, mesh: Mesh) -> quantised.Base | None:
    """Which kernels are quantised, each as if it were not.

    Raises:
      UserError: a tensor axis would cut through the blocks of an expert's weights, which each device dequantises for itself.
    """
    if options is None:
        return None
    kernels = {}
    for path in params:
        kernel = quantised.kernel_of(path)
        if kernel is None or kernel in kernels:
            continue
        packed, where = quantised.collect(params, kernel, options.kind), params[f"{kernel}.codes"].sharding
        kernels[kernel] = jax.ShapeDtypeStruct(packed.shape, run.param_dtype, sharding=where)
        blocks = packed.scales.shape[-2]
        if "experts" in kernel and where.spec[-2] and blocks % mesh.shape["tensor"]:
            raise UserError(
                f"mesh.tensor={mesh.shape['tensor']} does not divide the {blocks} blocks of {packed.shape[-2] // blocks} inputs of {kernel}: "
                f"lower model.quantize_block, or mesh.tensor"
            )
    return quantised.Base(options, kernels)


def _labels(config: ConfigDict, model_config: Any, variables: Mapping[str, Any]) -> dict[str, str]:
    """What trains; no head where the objective reads none."""
    objectives = [config.train.objective, *(one[0] for one in config.train.beside)]
    reads_head = any(registry.load("objective", name, OBJECTIVES).OBJECTIVE.reads_head for name in objectives)
    head = model_config.head  # one of labels is new to the model's task, and so is one that was asked for
    has_task = head is not None and (head.scores_labels or (head.tied and bool(config.model.head)))
    labels = partition.label(variables, config.tune.method, has_task, headless=not reads_head)
    depths = partial(transformer.depths, model_config)
    return partition.restricted(labels, config.tune.freeze, config.tune.train_layers, model_config.num_layers, depths)


def _pool(config: ConfigDict, model_config: Any, of_folder: str) -> str:
    """The pooling of a classification head, which is a part of it; of an embedding that of the config, else the folder's."""
    head = model_config.head
    if head is not None and head.scores_labels and head.pool:
        return str(head.pool)
    causal = getattr(model_config.blocks[0][0].attention, "causal", True)
    return config.model.pooling or of_folder or ("last" if causal else "mean")


def _shapes(
    family: ModuleType,
    model_config: Any,
    run: Runtime,
    options: kinds.Options | None,
    quantize: quantised.Options | None,
) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    def build() -> nnx.Module:
        model = family.Model(model_config, run, nnx.Rngs(0))
        if quantize is not None:
            quantised.attach(lora.linears(model), quantize)
        kinds.attach(model, options)
        return model

    return layers.flatten(nnx.eval_shape(build))


def without_adapter(program: Program) -> nnx.GraphDef:
    """The structure of the model as trained, with no adapter on it."""
    quantize = program.quantised.options if program.quantised else None
    run = program.run._replace(neftune_alpha=0.0)
    return _shapes(program.family, program.model_config, run, None, quantize)[0]


def _state_shapes(optimizer: optax.GradientTransformation, trainable: Params, whole: NamedSharding) -> State:
    scalar = partial(jax.ShapeDtypeStruct, (), sharding=whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return State(
        step=scalar(jnp.int32),
        params=trainable,
        opt_state=_optimizer_shapes(optimizer, trainable, whole),
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        loss_mean=scalar(jnp.float32),
    )


def _optimizer_shapes(optimizer: optax.GradientTransformation, params: Params, whole: NamedSharding) -> Any:
    """Optimizer slots lie where their parameter lies; counters are everywhere."""

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in params]
        # Blocks' scales have their parameter's dims, one of them shorter.
        likes = [params[name].sharding for name in names if len(params[name].shape) == len(leaf.shape)]
        where = sharding.fitting(likes[-1], leaf.shape) if likes else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def shardings(shapes: Any) -> Any:
    """The shardings of a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def create(
    program: Program, base: Params, seed: int, adapter: Mapping[str, np.ndarray] | None = None
) -> tuple[State, Params]:
    """Returns (state, frozen params) for the first step. `adapter` holds starting values from a PEFT folder.

    Base arrays that train are taken over by the state.

    Raises:
      UserError: the adapter's shapes are not this model's.
    """
    if adapter:
        shapes = {
            path: {**program.base, **program.adapter}[path] for path in adapter
        }  # a head is kept beside its adapter
        values = {path: np.asarray(value, shapes[path].dtype) for path, value in adapter.items()}
        for path, value in values.items():
            if value.shape != shapes[path].shape:
                raise UserError(
                    f"the adapter's {path} has shape {value.shape}; this model makes it {shapes[path].shape}: "
                    f"was the adapter made for another model?"
                )
        started: Params = sharding.put(values, {path: like.sharding for path, like in shapes.items()})
    else:
        started = _initial_adapter(program, base, seed)
    started = {**started, **guests.initial_projections(program, seed)}
    trainable, frozen = partition.split({**base, **started}, program.labels)
    where = shardings(program.state)

    def rest() -> tuple[Any, ...]:
        return jnp.int32(0), jax.random.key(seed), jnp.float32(0)

    step, key, mean = jax.jit(rest, out_shardings=(where.step, where.key, where.loss_mean))()
    opt_state = jax.jit(program.optimizer.init, out_shardings=where.opt_state)(trainable)
    return State(step, trainable, opt_state, key, mean), frozen


def _initial_adapter(program: Program, base: Params, seed: int) -> Params:
    def make(key: jax.Array, kernels: Params) -> Params:
        def one(path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            zero = program.lora.zero if program.lora else "b"
            return kinds.initial(
                program.prompt, path, like, own, kernels.get(path), program.model_config.embed_scale, zero
            )

        return {path: one(path, like) for path, like in program.adapter.items()}

    def kernel(linear: str) -> Any:
        path = f"{linear}.kernel"
        return base[path] if path in base or not program.quantised else program.quantised.packed(base, path)

    needed = {path: kernel(path.split(".adapter.")[0]) for path in program.adapter if path.endswith(".magnitude")}
    needed |= {prompt.PATH: base["embed.table"]} if program.prompt else {}
    return jax.jit(make, out_shardings=shardings(program.adapter))(jax.random.key(seed), needed)


def num_params(shapes: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in shapes.values())


def num_base_params(program: Program) -> int:
    """Weights of the base model, however they are kept."""
    return program.quantised.num_params(program.base) if program.quantised else num_params(program.base)
