"""Embeddings: a query lies nearer to the passage that answers it than to every other passage of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Metrics, Objective, Policy, embedding

_NEVER = -1e30  # the score of what is no candidate: finite, so that its gradient is 0 and not NaN


def loss(
    policy: Policy,
    frozen: dict[str, Policy],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    temperature: float,
    symmetric: bool,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """InfoNCE over the whole batch, and the number of its pairs (arXiv:1807.03748; in-batch negatives arXiv:2004.04906).

    With cosines s(q, p) of embeddings, temperature t and C(q) the passages of the batch, hard negatives included:

        sum over pairs (q, p) of -log [ exp(s(q, p) / t) / sum over c in C(q) of exp(s(q, c) / t) ]

    Another row's passage is no candidate where its text is p's, or where its query is q's: it answers q as well. `symmetric`
    takes the mean with the same loss from p over the batch's queries. The batch is the global one, whatever the mesh.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    query_BD = embedding(policy.hidden(batch, keys[0]), batch["segment_ids_BT"], policy.pool)
    B, Q, U = batch["passage_tokens_BQU"].shape
    tokens_WU, segment_ids_WU = (batch[f"passage_{name}_BQU"].reshape(B * Q, U) for name in ("tokens", "segment_ids"))
    positions_WU = jnp.broadcast_to(jnp.arange(U)[None, :], tokens_WU.shape)
    passages = {"tokens_BT": tokens_WU, "segment_ids_BT": segment_ids_WU, "positions_BT": positions_WU}
    passage_WD = embedding(policy.hidden(passages, keys[1]), segment_ids_WU, policy.pool)

    ids_W, own_B, query_ids_B = (
        batch["passage_ids_BQ"].reshape(B * Q),
        batch["passage_ids_BQ"][:, 0],
        batch["query_ids_B"],
    )
    answers_BB = (own_B[:, None] == own_B[None, :]) | (query_ids_B[:, None] == query_ids_B[None, :])
    is_answer_W = jnp.arange(B * Q) % Q == 0  # the others are hard negatives
    answers_BW = (jnp.repeat(answers_BB, Q, axis=1) & is_answer_W[None, :]) | (own_B[:, None] == ids_W[None, :])
    is_own_BW = Q * jnp.arange(B)[:, None] == jnp.arange(B * Q)[None, :]
    scores_BW = jnp.matmul(query_BD, passage_WD.T, precision=jax.lax.Precision.HIGHEST) / temperature
    scores_BW = jnp.where(is_own_BW | (~answers_BW & (ids_W >= 0)[None, :]), scores_BW, _NEVER)

    own_score_B = jnp.sum(jnp.where(is_own_BW, scores_BW, 0), axis=1)
    nll_B = jax.nn.logsumexp(scores_BW, axis=1) - own_score_B
    if symmetric:
        is_row_B1 = (query_ids_B >= 0)[:, None]
        scores_BB = jnp.where(is_row_B1 | jnp.eye(B, dtype=bool), scores_BW[:, ::Q], _NEVER)
        nll_B = 0.5 * (nll_B + jax.nn.logsumexp(scores_BB, axis=0) - own_score_B)
    weight_B = jnp.sum(batch["weights_BT"], axis=1)
    weight = jnp.sum(weight_B)
    correct = jnp.sum(weight_B * (own_score_B >= jnp.max(scores_BW, axis=1)))
    return jnp.sum(weight_B * nll_B), weight, {"accuracy": (correct, weight)}


OBJECTIVE = Objective(
    fields=(
        "tokens_BT", "weights_BT", "segment_ids_BT", "positions_BT",
        "query_ids_B", "passage_tokens_BQU", "passage_segment_ids_BQU", "passage_ids_BQ",
    ),
    loss=loss,
    options=("temperature", "symmetric"),
    whole_batch=True,
    reads_head=False,
)  # fmt: skip
