"""Models as objectives see them: the one that trains, it without its adapter, and guests of the step."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxtune.models import layers
from jaxtune.objectives.ops import Head, Policy
from jaxtune.train import guests
from jaxtune.train.state import Params, Program, without_adapter

Arrays = dict[str, jax.Array]
_SEEN = ("tokens_BT", "positions_BT", "segment_ids_BT")  # fields that a model reads


def policy(
    program: Program, params: Params, chunk_tokens: int, reports: list[Arrays] | None = None, graphdef: Any = None
) -> Policy:
    """The model as objectives see it: hidden states of a batch, and the head over them.

    Each pass adds what the model's routers report of it to `reports`. `graphdef` replaces the program's.
    """
    model = layers.bind(graphdef or program.graphdef, params)

    def tapped(batch: Arrays, key: jax.Array | None, numbers: tuple[int, ...]) -> tuple[jax.Array, Any]:
        found, report, taps = model.tapped(*(batch[name] for name in _SEEN), key, numbers)
        if reports is not None:
            reports.append(report)
        return found, taps

    def hidden(batch: Arrays, key: jax.Array | None) -> jax.Array:
        return tapped(batch, key, ())[0]

    head_graphdef, head_params = nnx.split(model.head)
    head = Head(head_params, lambda p, h: nnx.merge(head_graphdef, p)(h), chunk_tokens, program.mesh.shape["context"])
    return Policy(hidden, head, program.pool, model.value_head, tapped, params.get(guests.PROJECTIONS))


def reference(program: Program, params: Params, chunk_tokens: int) -> Policy:
    """The model that training started from: the same weights with the adapter off, and no gradient."""
    base = {path: jax.lax.stop_gradient(value) for path, value in params.items() if ".adapter." not in path}
    return policy(program, base, chunk_tokens, graphdef=without_adapter(program))


def guest(name: str, program: Program, params: Params, chunk_tokens: int) -> Policy:
    """Another model in the step, without gradient."""
    return policy(program.guests[name] or program, guests.own_of(name, program, params), chunk_tokens)


FROZEN = {"reference": reference} | {name: partial(guest, name) for name in guests.NAMES}
