"""Learning to learn: Reptile (arXiv:1803.02999) and first-order MAML (arXiv:1703.03400) over whatever trains.

A batch holds several batches of each of several tasks (`data.tasks.TaskSource`). From the parameters p each task takes
inner steps of its own, batch after batch, to q; the meta-gradient, which the optimizer takes as it takes any, is

    Reptile            mean over tasks of p - q
    first-order MAML   mean over tasks of the gradient at q, of a query batch that the inner steps did not see

With SGD of learning rate e Reptile's step is the published p + e (q - p); an adaptive optimizer takes p - q as a gradient
(2, at its end). Tasks are vmapped and inner steps scanned: one program, on any mesh, whose devices share the rows of every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.objectives.ops import divisor
from jaxtune.train.state import Params
from jaxtune.types import UserError

Arrays = dict[str, jax.Array]
Gradient = Callable[[Params, Arrays, Any], tuple[Params, Any]]  # -> (gradient, (loss sum, weight, metric sums))


def layout(meta: ConfigDict) -> tuple[int, int, int]:
    """(tasks of a step, batches of each, how many of these are query batches)."""
    num_query = int(meta.algorithm == "fomaml")
    return meta.tasks, meta.inner_steps + num_query, num_query


def num_parts(config: ConfigDict) -> int:
    """How many micro-batches a batch is taken apart into: those of all tasks, or of `train.accumulation`."""
    num_tasks, num_batches, _ = layout(config.meta)
    return int(num_tasks * num_batches) if config.meta.algorithm else int(config.train.accumulation)


def check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not divide over the mesh; each of a task's batches lies over all of its devices.

    Raises:
      UserError: with the sizes and the nearest that fits.
    """
    if not config.meta.algorithm:
        return sharding.check_batch(mesh, config.train.batch_size, config.train.accumulation)
    size, shards, parts = config.train.batch_size, sharding.num_batch_shards(mesh), num_parts(config)
    if size % (shards * parts):
        raise UserError(
            f"train.batch_size={size} gives each of the {parts} batches of meta.tasks={config.meta.tasks} {size // parts} rows, which "
            f"do not divide over {shards} devices: use a multiple of {shards * parts}, e.g. {-(-size // (shards * parts)) * shards * parts}"
        )
    return None


def optimizer(meta: ConfigDict) -> optax.GradientTransformation:
    """Of the inner steps; it starts anew with each task. Adam is Reptile's, without momentum."""
    return optax.sgd(meta.inner_rate) if meta.inner_optimizer == "sgd" else optax.adam(meta.inner_rate, b1=0.0)


def adapt(meta: ConfigDict, gradient: Gradient, params: Params, batches: Arrays, key: Any) -> tuple[Params, Any]:
    """Takes an inner step on each batch in turn; each divides by its own loss weight.

    Args:
      gradient: of the summed loss.
      batches: fields (S, …), one batch for each step.
      key: for dropout; None = without.

    Returns:
      the adapted parameters, and of each step, before it was taken, (loss sum, weight, metric sums), each (S,).
    """
    inner = optimizer(meta)
    num_steps = next(iter(batches.values())).shape[0]

    def one(carry: Any, xs: Any) -> tuple[Any, Any]:
        params, state = carry
        index, batch = xs
        grads, told = gradient(params, batch, None if key is None else jax.random.fold_in(key, index))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / divisor(told[1]), grads)
        updates, state = inner.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), told

    start = (params, inner.init(params))
    (adapted, _), told = jax.lax.scan(one, start, (jnp.arange(num_steps), batches))
    return adapted, told


def summed_gradients(
    meta: ConfigDict, gradient: Gradient, params: Params, batch: Arrays, key: jax.Array, accumulation: int
) -> tuple[Params, Any]:
    """Meta-gradients summed over tasks, and (loss sum, tasks, metric sums): what a step divides, once, by its tasks.

    The loss is a task's first, before any inner step. `adapted_loss` is its loss after them: of the query batch, or (Reptile)
    of the last batch, before the step on it. Fields of `batch` are (tasks x batches, rows, …); `accumulation` groups of tasks
    are taken one after the other.
    """
    num_tasks, num_batches, num_query = layout(meta)

    def grouped(x: jax.Array) -> jax.Array:
        x = x if num_tasks * num_batches > 1 else x[None]  # the only batch has no dim of its own
        return x.reshape(accumulation, num_tasks // accumulation, num_batches, *x.shape[1:])

    def of_task(batches: Arrays, key: jax.Array) -> tuple[Params, Any]:
        support = {name: x[: num_batches - num_query] for name, x in batches.items()}
        adapted, told = adapt(meta, gradient, params, support, key)
        if num_query:
            query = {name: x[-1] for name, x in batches.items()}
            grads, last = gradient(adapted, query, jax.random.fold_in(key, num_batches))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / divisor(last[1]), grads)
        else:
            last = jax.tree.map(lambda x: x[-1], told)
            grads = jax.tree.map(lambda old, new: old.astype(jnp.float32) - new.astype(jnp.float32), params, adapted)
        return grads, _told(jax.tree.map(lambda x: x[0], told), last)

    def add(carry: Any, xs: Any) -> tuple[Any, None]:
        found = jax.vmap(of_task)(*xs)
        return jax.tree.map(lambda total, x: total + jnp.sum(x, axis=0), carry, found), None

    keys = jax.random.split(key, num_tasks).reshape(accumulation, num_tasks // accumulation)
    xs = ({name: grouped(x) for name, x in batch.items()}, keys)
    shapes = jax.eval_shape(of_task, *jax.tree.map(lambda x: x[0, 0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, xs)[0]


def _told(first: Any, last: Any) -> Any:
    """(loss, 1, metrics) of one task: means where the step's own are, so that each task counts once."""
    (value, weight, extra), (adapted, its_weight, more) = first, last
    one = jnp.float32(1)
    metrics = extra | {f"adapted_{name}": sums for name, sums in more.items()}
    metrics |= {"adapted_loss": (adapted / divisor(its_weight), one)}
    return value / divisor(weight), one, metrics
