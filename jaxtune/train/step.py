"""One optimizer step: pure, jitted, donated, sharded by the program it is made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune import optim, registry, sharding
from jaxtune.config import ConfigDict, lookup
from jaxtune.data import pairs
from jaxtune.models import reading
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.ops import CLASSING, Metrics, Objective, divisor
from jaxtune.train import guests, meta, preferences, retention, routers
from jaxtune.train.beside import beside, prefix
from jaxtune.train.policies import FROZEN
from jaxtune.train.policies import policy as policy
from jaxtune.train.policies import reference as reference
from jaxtune.train.state import Params, Program, State, shardings
from jaxtune.types import BATCH_FIELDS, UserError

Arrays = dict[str, jax.Array]
_MEAN_DECAY = 0.9  # of the running mean of the loss
_MEAN_STEPS = 10  # updates before an explosion can be told from a start


def objective(config: ConfigDict, hf_config: dict[str, Any]) -> Objective:
    """What `train.objective` names, for what this model's scores mean; its loss with the options it takes.

    Raises:
      UserError: an unknown name, an option that it does not take, or accumulation for an objective that compares the rows of
        a whole batch.
    """
    found: Objective = registry.load("objective", config.train.objective, OBJECTIVES).OBJECTIVE
    found = preferences.with_reference(config, found.problems.get(reading.problem(hf_config), found))
    found = guests.with_teacher(config, found)
    if found.whole_batch and config.train.accumulation > 1:
        raise UserError(
            f"train.objective={config.train.objective!r} compares all rows of a batch, and train.accumulation="
            f"{config.train.accumulation} would compare those of each part: set train.accumulation=1 (train.remat='block' saves memory)"
        )
    if found.whole_batch and config.train.batch_size < 2:
        raise UserError(
            f"train.objective={config.train.objective!r} compares rows of a batch; expected train.batch_size of 2 or more"
        )
    for name in CLASSING:
        if config.train[name] and name not in found.options:
            raise UserError(
                f"train.{name}={config.train[name]!r} is nothing that train.objective={config.train.objective!r} takes: leave it out"
            )
    return found._replace(
        loss=partial(found.loss, **{name.rpartition(".")[2]: _option(config, name) for name in found.options})
    )


def _option(config: ConfigDict, name: str) -> Any:
    return lookup(config, name if "." in name else f"train.{name}")


class Part(NamedTuple):
    """One of the objectives that a step sums: the sum of its loss over its own weight counts `share` times."""

    name: str  # in metrics
    objective: Objective
    share: float
    prefix: str  # of its fields in the batch
    config: ConfigDict  # its own: rows and objective


def parts(config: ConfigDict, hf_config: dict[str, Any]) -> list[Part]:
    """`train.objective`, then those of `train.beside`.

    Raises:
      UserError: one beside needs a reference that only the main objective's rows get.
    """
    alone = beside(config)
    for one in alone:
        if preferences.is_precomputed(one):
            raise UserError(
                f"train.beside has {one.train.objective!r}, whose reference would have to be computed before training "
                "(preference.reference), which is done for train.objective alone: make it train.objective, or train a new adapter"
            )
    names = [config.train.objective] + [one.train.objective for one in alone]
    shares = [1.0] + [one[1] for one in config.train.beside]
    return [
        Part(name if names.count(name) == 1 else f"{name}_{at}", objective(own, hf_config), share, prefix(at), own)
        for at, (name, own, share) in enumerate(zip(names, [config, *alone], shares, strict=True))
    ]


def mean(config: ConfigDict, values: Any, weights: Any) -> float:
    """The loss of summed-up NumPy (values, weights), () or (objectives,): each over its own weight, times its share."""
    shares = np.asarray([1.0] + [one[1] for one in config.train.beside])
    return float(np.sum(shares * values / np.where(weights > 0, weights, 1.0)))


def fields(config: ConfigDict, program: Program) -> tuple[str, ...]:
    """The batch fields that go to the devices; the others stay on the host."""
    return tuple(part.prefix + name for part in parts(config, program.hf_config) for name in part.objective.fields)


def abstract_batch(config: ConfigDict, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch as shapes, of each field the objectives read: a field's name ends in its dims."""
    head, where = program.model_config.head, batch_shardings(config, program)
    shapes = {}
    for part in parts(config, program.hf_config):
        data = part.config.data
        sizes = {"B": config.train.batch_size, "T": data.max_length, "C": head.out_dim if head else 0}
        sizes |= {"U": data.max_passage_length, "Q": pairs.num_passages(data), "J": config.distill.top_k + 1}
        for name in part.objective.fields:
            shape, field = tuple(sizes[dim] for dim in name.rsplit("_", 1)[1]), part.prefix + name
            shapes[field] = jax.ShapeDtypeStruct(shape, BATCH_FIELDS[name], sharding=where[field])
    return shapes


def batch_shardings(config: ConfigDict, program: Program) -> dict[str, Any]:
    """Where each batch field that goes to the devices lies."""
    return {name: sharding.batch_sharding(program.mesh, name) for name in fields(config, program)}


def capacity_tokens(config: ConfigDict, program: Program) -> int:
    """How many tokens a batch has room for."""
    batch = abstract_batch(config, program)
    return sum(ids.size for name, ids in batch.items() if "segment_ids_" in name)


def chunk_tokens(config: ConfigDict, program: Program, num_rows: int) -> int:
    """Tokens of a row that the head projects at a time, so that each device handles `train.loss_chunk_tokens`."""
    rows_per_device = max(1, num_rows // sharding.num_batch_shards(program.mesh))
    return max(1, config.train.loss_chunk_tokens // rows_per_device)


def _loss(
    config: ConfigDict, program: Program, num_rows: int, held: bool = True
) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns `total(params, batch, key, scales, per_token) -> (what to differentiate, (loss sum, weight, metric sums))`.

    What is differentiated is the loss sum and, in a mixture of experts, the weighted losses of its routers. These are means
    over the batch at hand, so they count as often as its loss weight, by which the step divides. With objectives beside the
    main one, sums and weights are (objectives,). `scales` is what each sum is multiplied by, its share over its weight in the
    whole batch, and `per_token` what a penalty on tokens is, unless not `held`.
    """
    wanted, chunk = parts(config, program.hf_config), chunk_tokens(config, program, num_rows)
    hold = retention.on_tokens(config) if held else None

    def total(
        params: Params, batch: Arrays, key: jax.Array | None, scales: Any = None, per_token: Any = 1.0
    ) -> tuple[jax.Array, Any]:
        reports: list[Arrays] = []
        seen = policy(program, params, chunk, reports)
        seen, passes = retention.remembered(seen) if hold else (seen, [])
        values: list[jax.Array] = []
        weights: list[jax.Array] = []
        extra: Metrics = {}
        for at, part in enumerate(wanted):
            frozen = {name: FROZEN[name](program, params, chunk) for name in part.objective.frozen}
            own_key = jax.random.fold_in(key, at) if at and key is not None else key
            value, weight, told = part.objective.loss(seen, frozen, _own(part, batch), own_key)
            values, weights = [*values, value], [*weights, weight]
            extra |= {f"{part.name}/{name}" if at else name: sums for name, sums in told.items()}
            if len(wanted) > 1:
                extra[f"loss/{part.name}"] = (value, weight)
        found, times = routers.means(reports), jax.lax.stop_gradient(weights[0])
        extra |= {name: (mean * times, times) for name, mean in found.items()}
        beyond = routers.loss(config.train, found) * times
        sums = (values[0], weights[0]) if len(wanted) == 1 else (jnp.stack(values), jnp.stack(weights))
        whole = sums[0] if scales is None else scales * sums[0]
        beyond = beyond if scales is None else jnp.ravel(scales)[0] * beyond
        if hold:
            base = hold.base(program, params, chunk, policy, reference)
            extra["penalty/kl_base"] = apart = hold.apart(seen, base, _own(wanted[0], batch), passes, key)
            beyond += hold.weight * per_token * apart[0]
        return jnp.sum(whole) + beyond, (*sums, extra)

    return total


def _own(part: Part, batch: Arrays) -> Arrays:
    """The fields of one objective, by their own names."""
    mine = {name: x for name, x in batch.items() if name.rpartition("/")[0] + "/" * ("/" in name) == part.prefix}
    return {name.removeprefix(part.prefix): x for name, x in mine.items()}


def _counted(wanted: list[Part], batch: Arrays) -> Arrays:
    """The batch with what only the whole of it knows."""
    for part in wanted:
        if part.objective.counted:
            more = part.objective.counted(_own(part, batch))
            batch = batch | {part.prefix + name: x for name, x in more.items()}
    return batch


def make(config: ConfigDict, program: Program) -> Any:
    """Returns the jitted `step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    Gradients are summed over micro-batches and shards and divided once, by the whole batch's loss weight. A step whose
    loss or gradient is not finite, or whose loss exploded, changes nothing but its counter: `metrics["ok"]` is 0. Nor does
    a batch without any loss weight, which is no failure.
    """
    num_parts = meta.num_parts(config)
    summed = partial(_gradients_of_tasks, config) if config.meta.algorithm else _summed_gradients
    total = _loss(config, program, config.train.batch_size // num_parts)
    shares = _shares(config, program, config.train.batch_size // num_parts)
    wanted = parts(config, program.hf_config)
    rate = optim.schedule(config.optim, max(1, config.train.steps), config.retain.rewarm)
    hold = retention.on_weights(config, program)

    def step(state: State, frozen: Params, batch: Arrays) -> tuple[State, Arrays]:
        key = jax.random.fold_in(state.key, state.step)
        # Steps that changed the weights, as the optimizer counts them: skipped ones move neither its rate nor the mean.
        updated = optax.tree.get_all_with_path(state.opt_state, "count")[0][1]
        batch = _counted(wanted, batch)
        micro = _micro_batches(batch, num_parts, program)
        if shares:
            scales, per_token = shares({**frozen, **state.params}, batch)
            given = partial(total, scales=scales, per_token=per_token)
            grads, (value, weight, extra) = _summed_gradients(given, state.params, frozen, micro, key)
            loss = jnp.sum(value * scales)
        else:
            grads, (value, weight, extra) = summed(total, state.params, frozen, micro, key)
            scale = 1.0 / divisor(weight)
            grads = jax.tree.map(lambda g: g * scale, grads)
            loss = value * scale
        grads, held = hold(grads, state.params, frozen)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        if config.train.explode_factor:
            ok &= (loss <= config.train.explode_factor * state.loss_mean) | (updated < _MEAN_STEPS)
        params, opt_state, mean = _updated(program, state, grads, loss, updated, ok & jnp.any(weight > 0))
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(updated), jnp.float32),
            "trained_tokens": sum(jnp.sum(x != 0) for name, x in batch.items() if name.endswith("weights_BT")),
            "tokens": sum(jnp.sum(ids != 0) for name, ids in batch.items() if "segment_ids_" in name),
            "ok": ok,
            **{name: value / divisor(w) for name, (value, w) in extra.items()},
            **held,
        }
        return State(state.step + 1, params, opt_state, state.key, mean), metrics

    where = shardings(program.state)
    return jax.jit(
        step,
        in_shardings=(where, shardings(program.frozen), batch_shardings(config, program)),
        out_shardings=(where, sharding.replicated(program.mesh)),
        donate_argnums=0,
    )


def _updated(program: Program, state: State, grads: Params, loss: jax.Array, updated: jax.Array, ok: jax.Array) -> Any:
    """(params, optimizer state, running mean of the loss) after the step; as they were where it is not `ok`."""
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    mean = jnp.where(updated == 0, loss, _MEAN_DECAY * state.loss_mean + (1 - _MEAN_DECAY) * loss)
    # In the dtype that it had: optax makes AdamW's first moment float32, as the gradients are, where weights are bfloat16.
    return jax.tree.map(
        lambda new, old: jnp.where(ok, new, old).astype(old.dtype),
        (params, opt_state, mean),
        (state.params, state.opt_state, state.loss_mean),
    )


def _shares(config: ConfigDict, program: Program, num_rows: int) -> Callable[[Params, Arrays], Any] | None:
    """Returns (parameters, batch) -> what each objective's sum and each token's penalty is multiplied by, so that a step needs
    not divide; None where there is one objective, and no penalty on tokens.
    """
    if not config.train.beside and not retention.on_tokens(config):
        return None
    total, wanted = _loss(config, program, num_rows, held=False), parts(config, program.hf_config)
    shares = np.asarray([part.share for part in wanted], np.float32) if len(wanted) > 1 else 1.0

    def found(params: Params, batch: Arrays) -> Any:
        # Each is divided by its own weight in the whole batch. Weights are the data's: the compiler drops this pass.
        weights = total(params, batch, None)[1][1]
        tokens = jnp.sum(batch["weights_BT"]) if retention.on_tokens(config) else jnp.float32(1)
        return shares / divisor(weights), 1.0 / divisor(tokens)

    return found


def _micro_batches(batch: Arrays, accumulation: int, program: Program) -> Arrays:
    """(B, …) -> (A, B / A, …). Row i goes to micro-batch i mod A, so every device keeps its own rows."""

    def one(name: str, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return program.run.constrain(x, (None, *sharding.batch_axes(name)))

    return {name: one(name, x) for name, x in batch.items()} if accumulation > 1 else batch


def _gradient(total: Callable[..., Any], frozen: Params) -> meta.Gradient:
    """Returns `gradient(trainable params, batch, key) -> (gradient of the loss sum, (loss sum, weight, metric sums))`."""

    def of_trained(params: Params, batch: Arrays, key: Any) -> tuple[jax.Array, Any]:
        return total({**frozen, **params}, batch, key)

    found: meta.Gradient = jax.grad(of_trained, has_aux=True)
    return found


def _gradients_of_tasks(
    config: ConfigDict, total: Callable[..., Any], params: Params, frozen: Params, batch: Arrays, key: jax.Array
) -> tuple[Params, Any]:
    """As `_summed_gradients`, of tasks that each take steps of their own."""
    return meta.summed_gradients(config.meta, _gradient(total, frozen), params, batch, key, config.train.accumulation)


def _summed_gradients(
    total: Callable[..., Any], params: Params, frozen: Params, batch: Arrays, key: jax.Array
) -> tuple[Params, Any]:
    """Gradients of `total` for trainable leaves only, and (loss sum, weight, metric sums); float32."""
    accumulation = batch["tokens_BT"].shape[0] if batch["tokens_BT"].ndim == 3 else 1
    gradient = _gradient(total, frozen)
    if accumulation == 1:
        grads, sums = gradient(params, batch, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    def add(carry: Any, xs: Any) -> tuple[Any, None]:
        index, micro = xs
        more = gradient(params, micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, more), None

    first = {name: x[0] for name, x in batch.items()}
    shapes = jax.eval_shape(gradient, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulation), batch))[0]


def make_adapt(config: ConfigDict, program: Program, num_rows: int) -> Any:
    """Returns the jitted `adapt(params, frozen, batch) -> params`: `meta.adapt_steps` inner steps, all on this batch of `num_rows`.

    No dropout. The parameters that came stay as they are.
    """
    options, total = config.meta.copy_and_resolve_references(), _loss(config, program, num_rows, held=False)
    options.inner_rate = options.adapt_rate or options.inner_rate

    def adapt(params: Params, frozen: Params, batch: Arrays) -> Params:
        batches = {name: jnp.broadcast_to(x, (options.adapt_steps, *x.shape)) for name, x in batch.items()}
        return meta.adapt(options, _gradient(total, frozen), params, batches, None)[0]

    where = shardings(program.state.params)
    return jax.jit(
        adapt,
        in_shardings=(where, shardings(program.frozen), batch_shardings(config, program)),
        out_shardings=where,
    )


def make_eval(config: ConfigDict, program: Program) -> Any:
    """Returns the jitted `evaluate(params, frozen, batch) -> (loss sum, weight, metric sums)`; no dropout, no gradient."""
    total, wanted = _loss(config, program, config.train.batch_size), parts(config, program.hf_config)

    def evaluate(params: Params, frozen: Params, batch: Arrays) -> Any:
        return total({**frozen, **params}, _counted(wanted, batch), None)[1]

    return jax.jit(
        evaluate,
        in_shardings=(shardings(program.state.params), shardings(program.frozen), batch_shardings(config, program)),
        out_shardings=sharding.replicated(program.mesh),
    )
