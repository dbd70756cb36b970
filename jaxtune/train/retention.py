"""What holds a run near what it started from: the penalties of `retain.penalties`, and the arrays they compare with.

Those arrays are frozen parameters of the program beside the model's own, under paths "retain/…" that no model has:

    retain/start/PATH     what PATH was when training began (l2_start, ewc, kl_base where no adapter can be switched off)
    retain/fisher/PATH    its Fisher information, float32 (ewc)
    retain/earlier/PATH   the A of earlier adapters, side by side (orthogonal)

A penalty on weights is added once to the gradient of a step, after its sums were divided. One on tokens is summed over
micro-batches as a loss is, and divided by the trained tokens of the whole batch. So neither changes with accumulation or mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import fetch, optim, sharding
from jaxtune.adapters import lora
from jaxtune.config import ConfigDict
from jaxtune.models import transformer
from jaxtune.objectives import penalties
from jaxtune.objectives.divergences import Form, token_divergence
from jaxtune.objectives.ops import Policy
from jaxtune.types import UserError
from jaxtune.weights import peft_read

Params = dict[str, Any]
Arrays = dict[str, jax.Array]
_START, _FISHER, _EARLIER = "retain/start/", "retain/fisher/", "retain/earlier/"


def weights(config: ConfigDict) -> dict[str, float]:
    """The weight of each penalty, by its name."""
    return {name: float(weight) for name, weight in config.retain.penalties if weight}


def check(config: ConfigDict, objective: str, fields: tuple[str, ...], task: str) -> None:
    """Refuses a penalty on tokens for an objective that has none, or whose head says no words; `task` is that of the model's head.

    Raises:
      UserError: with the penalties that do work.
    """
    hold = on_tokens(config)
    if hold and (task in _NO_WORDS or not {"targets_BT", "weights_BT"} <= set(fields)):
        raise UserError(
            f"retain.penalties has 'kl_base', which compares words that a base expects, and train.objective={objective!r} on this model has "
            "no head of words that could be compared: l2_start, ewc and orthogonal work here"
        )


_NO_WORDS = ("ForSequenceClassification", "ForTokenClassification", "Model")


# ---- a penalty on tokens ----


class OnTokens(NamedTuple):
    """How far what the model says of each trained token is from what a base says; `adapter_off`: the base is the model without it."""

    weight: float
    form: Form
    adapter_off: bool

    def base(self, program: Any, params: Params, chunk_tokens: int, policy: Any, reference: Any) -> Policy:
        """The base, without gradient: `step.reference`, or the `step.policy` of the starting weights."""
        if self.adapter_off:
            found: Policy = reference(program, params, chunk_tokens)
            return found
        then = jax.tree.map(jax.lax.stop_gradient, {**params, **_own(params, _START)})
        found = policy(program, then, chunk_tokens)
        return found

    def apart(
        self, seen: Policy, base: Policy, batch: Arrays, passes: list[tuple[Any, jax.Array]], key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of w times the divergence, sum of w) over the tokens of a batch; the objective's own pass over it is used again."""
        mine = [hidden_BTD for tokens_BT, hidden_BTD in passes if tokens_BT is batch["tokens_BT"]]
        hidden_BTD = mine[0] if mine else seen.hidden(batch, key)
        found = (seen.head, hidden_BTD, base.head, base.hidden(batch, None), batch["targets_BT"], batch["weights_BT"])
        return token_divergence(*found, self.form), jnp.sum(batch["weights_BT"])


def on_tokens(config: ConfigDict) -> OnTokens | None:
    """The penalty on tokens that a config has, if it has one."""
    retain, weight = config.retain, weights(config).get("kl_base")
    if weight is None:
        return None
    form = Form(retain.kl_direction, retain.kl_temperature, retain.kl_mix, non_target=retain.kl_non_target)
    return OnTokens(weight, form, config.tune.method == "lora" and retain.kl_to == "base")


def remembered(seen: Policy) -> tuple[Policy, list[tuple[Any, jax.Array]]]:
    """The same policy, and (tokens, hidden states) of each pass that is asked of it from now on."""
    passes: list[tuple[Any, jax.Array]] = []

    def hidden(batch: Arrays, key: jax.Array | None) -> jax.Array:
        found = seen.hidden(batch, key)
        passes.append((batch["tokens_BT"], found))
        return found

    def layers(batch: Arrays, key: jax.Array | None, numbers: tuple[int, ...]) -> tuple[jax.Array, Any]:
        assert seen.layers is not None
        found, taps = seen.layers(batch, key, numbers)
        passes.append((batch["tokens_BT"], found))
        return found, taps

    return seen._replace(hidden=hidden, layers=layers if seen.layers else None), passes


# ---- penalties on weights ----


def on_weights(config: ConfigDict, program: Any) -> Callable[[Params, Params, Params], tuple[Params, Arrays]]:
    """Returns (gradients, trained parameters, frozen ones) -> (gradients with those of the penalties, each penalty's metric).

    Gradients of layers that do not train are 0.
    """
    wanted = weights(config)
    wanted.pop("kl_base", None)

    def values(params: Params, frozen: Params) -> Arrays:
        start = _own(frozen, _START)
        known: dict[str, Callable[[], jax.Array]] = {
            "l2_start": lambda: penalties.l2_start(params, frozen, start, _scale(program)),
            "ewc": lambda: penalties.ewc(params, start, _own(frozen, _FISHER)),
            "orthogonal": lambda: penalties.orthogonal(params, _own(frozen, _EARLIER)),
        }
        return {name: known[name]() for name in wanted}

    def total(params: Params, frozen: Params) -> tuple[jax.Array, Arrays]:
        found = values(params, frozen)
        return jnp.sum(jnp.stack([wanted[name] * value for name, value in found.items()])), found

    def added(grads: Params, params: Params, frozen: Params) -> tuple[Params, Arrays]:
        told: Arrays = {}
        if wanted:
            more, found = jax.grad(total, has_aux=True)(params, frozen)
            grads = jax.tree.map(lambda g, m: g + m.astype(g.dtype), grads, more)
            told = {f"penalty/{name}": value for name, value in found.items()}
        return masked(config, program, grads), told

    return added


def masked(config: ConfigDict, program: Any, grads: Params) -> Params:
    """Gradients, 0 in layers that `tune.train_layers` leaves out."""
    if not config.tune.train_layers:
        return grads

    def one(path: str, grad: jax.Array) -> jax.Array:
        mine = optim.layers_of(path, config.tune.train_layers, partial(transformer.depths, program.model_config))
        return grad if mine is None else jnp.zeros_like(grad).at[mine].set(grad[mine])

    return {path: one(path, grad) for path, grad in grads.items()}


def _scale(program: Any) -> Callable[[str], float]:
    return program.lora.scale if program.lora else lambda path: 1.0


def _own(params: Mapping[str, Any], prefix: str) -> Params:
    return {path.removeprefix(prefix): value for path, value in params.items() if path.startswith(prefix)}


# ---- what they compare with ----


def shapes(config: ConfigDict, family: Any, model_config: Any, trainable: Params) -> Params:
    """Frozen parameters that the penalties need, as shapes with shardings: each lies as what it is compared with.

    Raises:
      UserError: an earlier adapter is of another model, or has nothing in common with the one that trains.
    """
    wanted, found = weights(config), Params()
    hold = on_tokens(config)
    if {"l2_start", "ewc"} & set(wanted) or (hold and not hold.adapter_off):
        found |= {_START + path: like for path, like in trainable.items()}
    if "ewc" in wanted:
        found |= {
            _FISHER + path: jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
            for path, like in trainable.items()
        }
    if "orthogonal" in wanted:
        for path, value in _subspaces(config, family, model_config, trainable).items():
            where = sharding.fitting(trainable[path].sharding, value.shape)
            found[_EARLIER + path] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
    return found


def arrays(config: ConfigDict, program: Any, trained: Params, fisher: Callable[[], Mapping[str, np.ndarray]]) -> Params:
    """The arrays of `shapes`, as training begins; `fisher` gives the Fisher information of each trained parameter, if it is asked."""
    like, found = {path: leaf for path, leaf in program.frozen.items() if path.startswith("retain/")}, Params()
    where = {path: leaf.sharding for path, leaf in like.items()}
    # Copies: a step gives away the state that it gets.
    found |= {path: jnp.copy(trained[path.removeprefix(_START)]) for path in like if path.startswith(_START)}
    if any(path.startswith(_FISHER) for path in like):
        found |= _put(_FISHER, fisher(), where)
    if any(path.startswith(_EARLIER) for path in like):
        found |= _put(_EARLIER, _subspaces(config, program.family, program.model_config, trained), where)
    return found


def _put(prefix: str, values: Mapping[str, np.ndarray], where: Mapping[str, Any]) -> Params:
    return sharding.put({prefix + path: value for path, value in values.items()}, where)  # type: ignore[arg-type]


def earlier(
    config: ConfigDict, family: Any, model_config: Any
) -> list[tuple[str, lora.Options, dict[str, np.ndarray]]]:
    """(URI, options, values by our paths) of each of `retain.earlier_adapters`.

    Raises:
      UserError: one is no LoRA adapter, or one of another model.
    """
    found = []
    for uri in config.retain.earlier_adapters:
        options, values = peft_read.load(fetch.local(uri), family, model_config)
        found.append((uri, options, values))
    return found


def _subspaces(config: ConfigDict, family: Any, model_config: Any, trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By path of each A that trains, those of the earlier adapters side by side, float32 (…, in, r_1 + r_2 + …)."""
    found: dict[str, list[np.ndarray]] = {}
    for uri, _, values in earlier(config, family, model_config):
        mine = {path: value for path, value in values.items() if path.endswith(".lora_a") and path in trained}
        for path, value in mine.items():
            if value.shape[:-1] != trained[path].shape[:-1]:
                raise UserError(
                    f"retain.earlier_adapters has {uri!r}, whose {path} has shape {value.shape}; this model's has {trained[path].shape}: "
                    "was it made for another model?"
                )
            found.setdefault(path, []).append(np.asarray(value, np.float32))
        if not mine:
            raise UserError(
                f"retain.earlier_adapters has {uri!r}, which adapts none of the linear layers that this run's LoRA does: nothing could "
                "be orthogonal; set tune.targets to layers of both"
            )
    return {path: np.concatenate(values, axis=-1) for path, values in found.items()}


def with_earlier(config: ConfigDict, program: Any, base: Params) -> Params:
    """Base weights with `retain.earlier_adapters` folded in, one after the other, where `retain.merge_earlier` asks for it.

    Raises:
      UserError: an adapter of another model, or what it adapts is quantised.
    """
    if not config.retain.merge_earlier:
        return base
    fold = jax.jit(lora.merged, static_argnames=("scale", "dtype"))
    base = dict(base)
    for uri, options, values in earlier(config, program.family, program.model_config):
        for linear in sorted({path.split(".adapter.")[0] for path in values if ".adapter." in path}):
            path = f"{linear}.kernel"
            if path not in base:
                raise UserError(
                    f"retain.merge_earlier=True folds {uri!r} into {path}, which model.quantize={config.model.quantize!r} keeps in codes: "
                    "set model.quantize='', or merge the adapter beforehand (export with export.merge=True)"
                )
            a, b, magnitude = (values.get(f"{linear}.adapter.{kind}") for kind in ("lora_a", "lora_b", "magnitude"))
            assert a is not None, path  # `peft_read` refuses half an adapter
            assert b is not None, path
            if (a.shape[-2], b.shape[-1]) != base[path].shape[-2:]:
                raise UserError(
                    f"retain.earlier_adapters has {uri!r}, which makes {path} {a.shape[-2]} x {b.shape[-1]}; this model's is "
                    f"{base[path].shape[-2]} x {base[path].shape[-1]}: was it made for another model?"
                )
            merged = fold(base[path], a, b, magnitude, scale=options.scale(linear))
            base[path] = jax.device_put(merged, program.base[path].sharding)
    return base
