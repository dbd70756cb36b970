"""The optimizer: an optax chain, one group per label, the learning-rate schedule, and an average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config import ConfigDict
from jaxtune.moments import scale_by_adam8bit

_MATRICES = ("kernel", "table", "lora_a", "lora_b")
Depths = Callable[[str], np.ndarray]


def schedule(optim: ConfigDict, num_steps: int, low: float = 0.0) -> optax.Schedule:
    """Linear warm-up from `low` to the peak, then cosine, linear, constant or wsd. `warmup_steps` below 1 is a share of all steps.

    wsd (warm-up, stable, decay; arXiv:2404.06395) stays at the peak for `stable_share` of the steps after the warm-up, then
    falls to `final_ratio` of it: linearly, as half a cosine, exponentially, or as 1 - sqrt (arXiv:2405.18392).
    """
    warmup = optim.warmup_steps if optim.warmup_steps >= 1 else round(optim.warmup_steps * num_steps)
    warmup, peak = int(warmup), optim.learning_rate
    rest = max(num_steps - warmup, 1)
    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=optim.final_ratio)
    elif optim.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optim.final_ratio, rest)
    elif optim.schedule == "wsd":
        stable = round(optim.stable_share * rest)
        after = optax.join_schedules([optax.constant_schedule(peak), _decay(optim, max(rest - stable, 1))], [stable])
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(low, peak, warmup), after], [warmup]) if warmup else after


def _decay(optim: ConfigDict, num_steps: int) -> optax.Schedule:
    """From the peak to its final share in `num_steps`, by `decay_shape`."""
    low = optim.final_ratio
    shapes: dict[str, Callable[[Any], Any]] = {  # of the share x of the decay: 1 at 0, `low` at 1
        "linear": lambda x: 1 - (1 - low) * x,
        "cosine": lambda x: low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * x)),
        "exponential": lambda x: low**x,
        "sqrt": lambda x: 1 - (1 - low) * jnp.sqrt(x),
    }
    shape = shapes[optim.decay_shape]
    return lambda step: optim.learning_rate * shape(jnp.clip(step / num_steps, 0, 1))


def make(
    config: ConfigDict, labels: Mapping[str, str], num_steps: int, depths: Depths | None = None, rate: optax.Schedule | None = None
) -> optax.GradientTransformation:  # fmt: skip
    """Clips by the global norm, then runs the optimizer of `optim.name` on each label's group; LoRA+ gives B a rate of its own.

    Args:
      labels: of every parameter, by its path.
      depths: how deep a parameter lies, by its path: 0 (embeddings) to n + 1, one number or one for each stacked layer;
        for `optim.layer_decay`.
      rate: in place of the config's schedule.
    """
    optim, rate = config.optim, rate or schedule(config.optim, num_steps, config.retain.rewarm)
    trained = {path: name for path, name in labels.items() if name != "frozen"}
    if optim.name == "muon":
        trained = {path: f"{name}:matrix" if _is_hidden_matrix(path) else name for path, name in trained.items()}

    def group(name: str) -> optax.GradientTransformation:
        label, _, kind = name.partition(":")
        ratio = config.tune.lora_plus_ratio if label == "lora_b" else 1.0
        return _GROUPS[kind or ("adamw" if optim.name == "muon" else optim.name)](
            optim, (lambda step: rate(step) * ratio) if ratio != 1.0 else rate
        )

    layers = config.tune.train_layers
    assert depths is not None or not (layers or optim.layer_decay != 1), (
        "what layers have of their own needs their depths"
    )
    groups = {name: group(name) for name in sorted(set(trained.values()))}
    chain = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    chain.append(optax.partition(groups, trained))
    of_path = {path: depths(path) for path in labels} if depths else {}
    kept = {path: layers_of(path, layers, depths) for path in trained} if depths else {}
    some = {path: mine for path, mine in kept.items() if mine is not None}
    if optim.layer_decay != 1:
        chain.append(_by_depth(optim.layer_decay, of_path, some))
    whole = of_layers(optax.chain(*chain), some) if some else optax.chain(*chain)
    return optax.chain(whole, average(optim.ema_decay)) if optim.ema_decay else whole


def _adamw(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay, mask=_decaying)


def _adam8bit(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return _decayed(scale_by_adam8bit(optim.b1, optim.b2, optim.eps, optim.moment_block), optim, rate)


def _sgd(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(optim.weight_decay, _decaying), optax.sgd(rate))


def _lion(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, optim.b1, optim.b2, weight_decay=optim.weight_decay, mask=_decaying)


def _adafactor(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """arXiv:1804.04235, each layer's matrix by itself; the rate is absolute, or with `scale_by_weights` relative as there."""
    parts = [optax.scale_by_factored_rms(min_dim_size_to_factor=optim.min_factored_dim), optax.clip_by_block_rms(1.0)]
    parts += [optax.scale_by_param_block_rms()] if optim.scale_by_weights else []
    return _decayed(each_layer(optax.chain(*parts)), optim, rate)


def _muon(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Momentum made orthogonal, each layer's (and expert's) matrix by itself; updates as large as AdamW's (arXiv:2502.16982)."""
    last_two = optax.contrib.MuonDimensionNumbers(-2, -1)
    orthogonal = optax.contrib.scale_by_muon(beta=optim.muon_momentum, weight_dimension_numbers=last_two)
    sized = optax.stateless(lambda update, _: update * (optim.muon_rms * max(update.shape[-2:]) ** 0.5))
    return _decayed(each_layer(optax.chain(orthogonal, sized)), optim, rate)


def _decayed(
    scaled: optax.GradientTransformation, optim: ConfigDict, rate: optax.Schedule
) -> optax.GradientTransformation:
    """With decoupled weight decay and the learning rate, as AdamW's."""
    decay = optax.add_decayed_weights(optim.weight_decay, _decaying)
    return optax.chain(scaled, decay, optax.scale_by_learning_rate(rate))


_GROUPS: dict[str, Callable[[ConfigDict, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw, "adam8bit": _adam8bit, "sgd": _sgd, "lion": _lion, "adafactor": _adafactor, "matrix": _muon,
}  # fmt: skip


def _is_hidden_matrix(path: str) -> bool:
    """Muon is for what maps hidden states to hidden states; embeddings, heads and vectors take AdamW."""
    return path.startswith("layers.") and path.rsplit(".", 1)[-1] in ("kernel", "lora_a", "lora_b")


def _decaying(params: Any) -> Any:
    """Weight decay falls on matrices only: not on norms, biases or DoRA magnitudes."""

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key.rsplit(".", 1)[-1] in _MATRICES

    return jax.tree_util.tree_map_with_path(one, params)


def _by_depth(
    decay: float, depths: Mapping[str, np.ndarray], some: Mapping[str, np.ndarray]
) -> optax.GradientTransformation:
    """Updates times decay^(n + 1 - depth): the head's whole, the last layer's `decay`, the embeddings' least (arXiv:2003.10555).

    `some` says of a stack which of its layers updates have, where they have not all.
    """
    top = max(int(depth.max()) for depth in depths.values())

    def one(path: str, update: jax.Array) -> jax.Array:
        factors = np.asarray(decay, np.float64) ** (top - depths[path][some.get(path, ...)])
        return update * factors.reshape(factors.shape + (1,) * (update.ndim - factors.ndim)).astype(update.dtype)

    return optax.stateless(lambda updates, _: {path: one(path, update) for path, update in updates.items()})


def layers_of(path: str, layers: Sequence[int], depths: Depths) -> np.ndarray | None:
    """Where in its stack the layers lie that train, ascending; None where all of a parameter trains."""
    numbers = depths(path) - 1
    if not layers or not numbers.ndim:
        return None
    mine: np.ndarray = np.flatnonzero(np.isin(numbers, np.asarray(layers)))
    return None if len(mine) == len(numbers) else mine


def of_layers(inner: optax.GradientTransformation, some: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """`inner` on some layers of stacked parameters, by their path; it sees no others, keeps no state of them, and they stay as they are."""

    def cut(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {path: leaf[some[path]] if path in some else leaf for path, leaf in tree.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        found, state = inner.update(cut(updates), state, None if params is None else cut(params))
        whole = {path: jnp.zeros_like(updates[path]).at[mine].set(found[path]) for path, mine in some.items()}
        return {**found, **whole}, state

    return optax.GradientTransformation(lambda params: inner.init(cut(params)), update)


def each_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on each parameter by itself, and on each layer of stacked ones as if it stood alone, one after the other.

    The state is a dictionary by path; what `inner` keeps of a layer has the layers' dim in front, counters are shared.
    """

    def is_stacked(path: str) -> bool:
        return path.startswith("layers.")

    def kept(state: Any, alike: Any) -> Any:
        """The states of all layers: what has no dim is the same for each."""
        return jax.tree.map(lambda leaf, like: leaf if like.ndim else leaf[0], state, alike)

    def init(params: Any) -> Any:
        def one(path: str, param: jax.Array) -> Any:
            if not is_stacked(path):
                return inner.init(param)
            return kept(jax.vmap(inner.init)(param), jax.eval_shape(inner.init, param[0]))

        return {path: one(path, param) for path, param in _present(params).items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        made, found = dict(updates), {}
        for path, grad in _present(updates).items():
            if not is_stacked(path):
                made[path], found[path] = inner.update(grad, state[path], params[path])
                continue
            alike = jax.eval_shape(inner.init, params[path][0])
            spread = jax.tree.map(
                lambda leaf, like, num=grad.shape[0]: leaf if like.ndim else jnp.broadcast_to(leaf, (num,)),
                state[path],
                alike,
            )
            made[path], states = jax.lax.map(lambda each: inner.update(*each), (grad, spread, params[path]))
            found[path] = kept(states, alike)
        return made, found

    return optax.GradientTransformation(init, update)


def _present(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without what another group has."""
    return {path: leaf for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


class Average(NamedTuple):
    """`ema`: float32, as the trained parameters lie."""

    count: jax.Array  # type: ignore[assignment]  # optax finds it by this name
    ema: Any


def average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the weights, last in a chain; updates pass as they are.

    ema <- d ema + (1 - d) weights after the step, from the starting weights on, with d = min(decay, (1 + t) / (10 + t)) in
    step t, so that the start is soon forgotten.
    """

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        t = state.count.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        after = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: d * e + (1 - d) * p.astype(jnp.float32), state.ema, after)
        return updates, Average(optax.safe_increment(state.count), ema)

    return optax.GradientTransformation(init, update)


def in_use(optim: ConfigDict, state: Any) -> dict[str, Any]:
    """Of a training state, what is validated, measured and exported: the trained parameters, or their average where there is one.

    `optim.use_ema` off asks for the last parameters all the same.
    """
    params: dict[str, Any] = state.params
    if not (optim.ema_decay and optim.use_ema):
        return params
    ema = optax.tree.get(state.opt_state, "ema")
    return {path: ema[path].astype(param.dtype) for path, param in params.items()}
