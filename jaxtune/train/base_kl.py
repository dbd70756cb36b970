"""How far a model has moved from the one it started as, on its own task: forward KL, measured while it trains.

RL's Razor (arXiv:2509.04259) finds that forgetting follows E_x KL(base(. | x) || tuned(. | x)) over the new task's prompts x,
whatever the method, without any data of what is forgotten. By the chain rule the KL of whole completions is a sum over their
tokens: of the KL between the two next-token distributions after (x, y_<t), y drawn from the base. We take the prefixes y_<t from
the task's rows instead, and each token's KL over the whole vocabulary: no sampling, so that the number is the same however
often it is taken, of the same rows before and after, and 0 at the start. It is the mean over the rows' trained tokens.

The base is the model as training starts, `tune.adapter` included, as what is measured before. Its last hidden states of these
rows are computed once and kept in the host's memory, rows x length x D numbers; with the first output head, which is copied only
where it trains, they say all that the base does. So a look costs one pass of the model over the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import sharding
from jaxtune.config import ConfigDict
from jaxtune.data import batches, packing, pipeline
from jaxtune.data.batches import Rows
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.objectives.divergences import Form, token_divergence
from jaxtune.objectives.ops import TOKEN_FIELDS
from jaxtune.train import rows as rows_lib
from jaxtune.train import start, step
from jaxtune.train.state import Params, Program
from jaxtune.types import Batch
from jaxtune.validation_methods import ON_POLICY


def wanted(config: ConfigDict) -> bool:
    """Whether a run measures it: beside protected sets, or where it is asked for; of language models without virtual tokens."""
    asked = bool(config.protect.sets) or bool(config.protect.kl_every_steps)
    language = config.train.objective not in (*start.HEADS, "contrastive")
    return asked and bool(config.protect.kl_rows) and language and config.tune.method != "prompt"


def prepare(
    config: ConfigDict, data: rows_lib.Rows, tokenizer: Tokenizer, program: Program, params: Params
) -> Callable[[Params], float] | None:
    """Returns `all parameters -> base_kl` in nats per token, or None where it is not wanted or no row has tokens to train.

    `params` are all of the model's as training starts; they may be donated later.
    """
    rows = _rows(config, data, tokenizer) if wanted(config) else None
    if rows is None:
        return None
    size, mesh = config.train.batch_size, program.mesh
    chunk, mine = step.chunk_tokens(config, program, size), sharding.host_rows(mesh, size)
    head = step.policy(program, params, chunk).head
    trained = {id(params[path]) for path in program.state.params}
    first_head = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in trained else leaf, head.params)

    @jax.jit
    def hidden(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        return step.policy(program, params, chunk).hidden(batch, None)

    @jax.jit
    def divergence(params: Params, first_head: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        policy = step.policy(program, params, chunk)
        counted_BT = (batch["weights_BT"] != 0).astype(jnp.float32)
        base, now_BTD = policy.head._replace(params=first_head), policy.hidden(batch, None)
        total = token_divergence(
            policy.head, now_BTD, base, batch["base_hidden_BTD"], batch["targets_BT"], counted_BT, Form("forward")
        )
        return total, jnp.sum(counted_BT)

    def placed(batch: Batch) -> dict[str, jax.Array]:
        return sharding.to_global({name: array[mine] for name, array in batch.items()}, mesh, size)

    kept = [{name: batch[name] for name in TOKEN_FIELDS} for batch in _batches(config, rows, tokenizer.pad_id)]
    kept = [batch | {"base_hidden_BTD": sharding.to_host(hidden(params, placed(batch)))} for batch in kept]

    def measure(params: Params) -> float:
        sums = [divergence(params, first_head, placed(batch)) for batch in kept]
        total, count = np.sum([[float(value) for value in pair] for pair in sums], axis=0)
        return float(total / max(count, 1.0))

    return measure


def _rows(config: ConfigDict, data: rows_lib.Rows, tokenizer: Tokenizer) -> Rows | None:
    """The rows of the task: of validation, else of training; where the model writes its own answers, those that have gold ones."""
    if config.train.objective not in ON_POLICY:
        return data.validation if data.validation is not None and len(data.validation) else data.train
    held = next((split for split in data.splits[:3][::-1] if any(one.answer is not None for one in split)), [])
    answered = [one for one in held if one.answer is not None]
    return (
        pipeline.tokenize(pipeline.limited(answered, config.protect.kl_rows), tokenizer, config.data) if held else None
    )


def _batches(config: ConfigDict, rows: Rows, pad_id: int) -> list[Batch]:
    """`protect.kl_rows` of the rows, by a hash of their tokens: other rows do not change the choice."""
    ends = zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    hashes = [hashlib.blake2b(rows.tokens[start:end].tobytes()).digest() for start, end in ends]
    chosen = np.sort(np.asarray(sorted(range(len(rows)), key=hashes.__getitem__)[: config.protect.kl_rows]))
    data, size = config.data, config.train.batch_size
    packed = packing.pack(rows.lengths[chosen], data.max_length) if data.packing else packing.one_per_bin(len(chosen))
    bins = [tuple(int(chosen[row]) for row in one) for one in packed]
    bins += [()] * (-len(bins) % size)
    return [batches.stack(rows, bins[at : at + size], data.max_length, pad_id) for at in range(0, len(bins), size)]
