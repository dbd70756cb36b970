"""The mathematics that objectives share, and what an objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight), divided once by the step


class Head(NamedTuple):
    """An output projection: `apply(params, hidden (..., D)) -> float32 logits (..., V)`.

    `chunk_tokens` is how many tokens of each row are projected at a time, of each of the `num_shards` shards in which a
    row's tokens lie on the mesh.
    """

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    chunk_tokens: int
    num_shards: int = 1


class Policy(NamedTuple):
    """A model as an objective sees it: `hidden(batch, key) -> (B, T, D)`, and the head over it.

    `hidden` may be called several times, though not inside another scan: the step collects what routers say of each pass.

    `pool` says which hidden state stands for a whole text: first | last | mean. `value(hidden (B, T, D)) -> (B, T)` float32 is
    what a critic's head says, where there is one. `layers(batch, key, numbers)` is `hidden`, and what the layers with these
    numbers made (`models.taps.Tap`, by number). `projections`: matrices from hidden states to a teacher's, where some are learned.
    """

    hidden: Callable[[dict[str, jax.Array], jax.Array | None], jax.Array]
    head: Head
    pool: str = ""
    value: Callable[[jax.Array], jax.Array] | None = None
    layers: Callable[..., tuple[jax.Array, Mapping[int, Any]]] | None = None
    projections: jax.Array | None = None


LossFn = Callable[
    [Policy, dict[str, Policy], dict[str, jax.Array], jax.Array | None], tuple[jax.Array, jax.Array, Metrics]
]
CollectFn = Callable[[Any, Any], Any]  # (`data.advantages.Judged`, config.rl) -> `data.advantages.Worth`


class Objective(NamedTuple):
    """What is optimised. `loss` is pure and returns an unreduced (sum, weight, metrics); the step divides, once.

    `problems` are what takes its place on models with another of Hugging Face's `problem_type`s.
    `options` names what of the config `loss` takes as keywords, of its `train` section unless dotted ("preference.beta").
    `frozen` names models that do not train: "reference", this one with its adapter off; "teacher" and "start", guests of the
    step (`train/guests.py`). `whole_batch`: rows are compared with each other, so a batch cannot be accumulated from parts.
    `reads_head` False: hidden states are all it reads.
    `counted` adds to a batch what only the whole of it knows, as fields (B,), before it is cut into micro-batches.
    `collect` makes an objective on-policy: the model writes its batches itself, and this says what each token of them is worth.
    `has_values`: a head of one value on each hidden state trains beside the model.
    """

    fields: tuple[str, ...]
    loss: Callable[..., tuple[jax.Array, jax.Array, Metrics]]  # a `LossFn`, once it has its options
    frozen: tuple[str, ...] = ()
    collect: CollectFn | None = None
    problems: Mapping[str, Objective] = MappingProxyType({})
    options: tuple[str, ...] = ()
    whole_batch: bool = False
    reads_head: bool = True
    counted: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None = None
    has_values: bool = False


def divisor(weight: jax.Array) -> jax.Array:
    """What a sum is divided by for its mean: its weight, however small; 1 where nothing has any."""
    return jnp.where(weight > 0, weight, 1.0)


TOKEN_FIELDS = ("tokens_BT", "targets_BT", "weights_BT", "segment_ids_BT", "positions_BT")


class Shape(NamedTuple):
    """What a token's loss is beside -log p(target), n for short; with softmax p over C classes and Z = sum exp(logits).

    label_smoothing e: (1 - e) n + e mean over classes of -log p (arXiv:1512.00567, torch's). focal_gamma g: (1 - p(target))^g n
    (arXiv:1708.02002), not together with e. z_weight adds z (log Z)^2 (arXiv:2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_weight: float = 0.0
    focal_gamma: float = 0.0

    def value(self, nll: jax.Array, log_total: jax.Array, mean_logit: jax.Array) -> jax.Array:
        """Of tokens whose logits have this logsumexp and this mean."""
        e, g = self.label_smoothing, self.focal_gamma
        shaped = (1 - e) * nll + e * (log_total - mean_logit) if e else nll
        if g:
            shaped = (-jnp.expm1(-nll)) ** g * nll
        return shaped + self.z_weight * log_total**2 if self.z_weight else shaped

    def slope(self, nll: jax.Array) -> jax.Array:
        """The derivative of the focal loss by n; 1 where there is none."""
        if not self.focal_gamma:
            return jnp.ones_like(nll)
        miss = -jnp.expm1(-nll)  # 1 - p(target); n / miss tends to 1 with it
        over = jnp.where(miss > 0, nll / jnp.where(miss > 0, miss, 1), 1)
        return miss**self.focal_gamma * (1 + self.focal_gamma * (1 - miss) * over)


PLAIN = Shape()
SHAPING = ("label_smoothing", "z_loss_weight", "focal_gamma")  # options of `token_loss`
CLASSING = (*SHAPING, "class_weights")  # where targets are classes, and not words


def token_loss(
    policy: Policy, frozen: dict[str, Policy], batch: dict[str, jax.Array], key: jax.Array | None, **shaping: Any
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum over tokens of w_t * -log p(target_t), and the sum of w_t: the data say what a token's target is.

    `shaping` are the options `CLASSING`; none of them set leaves this formula as it is.
    """
    return classed(policy.head, policy.hidden(batch, key), batch, **shaping)


def classed(
    head: Head, hidden_BTD: jax.Array, batch: dict[str, jax.Array], *, label_smoothing: float = 0.0, z_loss_weight: float = 0.0,
    focal_gamma: float = 0.0, class_weights: tuple[float, ...] = (),
) -> tuple[jax.Array, jax.Array, Metrics]:  # fmt: skip
    """Returns (sum of w * loss, sum of w, metrics) of the batch's targets; the loss is cross-entropy, or as `Shape` has it.

    With `class_weights` w is the data's times that of the target's class, as in torch's `CrossEntropyLoss(weight=…)`; what label
    smoothing spreads counts as the target does (torch weighs each class's share by the class's own). The
    metric `nll` is what cross-entropy would have been, where the loss is another.
    """
    targets_BT, weights_BT = batch["targets_BT"], batch["weights_BT"]
    if class_weights:
        weights_BT = weights_BT * jnp.asarray(class_weights, jnp.float32)[targets_BT]
    weight, shape = jnp.sum(weights_BT), Shape(label_smoothing, z_loss_weight, focal_gamma)
    if shape == PLAIN:
        nll, correct = cross_entropy(head, hidden_BTD, targets_BT, weights_BT)
        return nll, weight, {"accuracy": (correct, weight)}
    loss, correct, nll = shaped_cross_entropy(head, hidden_BTD, targets_BT, weights_BT, shape)
    return loss, weight, {"accuracy": (correct, weight), "nll": (nll, weight)}


def cross_entropy(
    head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of w * -log p(target), sum of w * [argmax = target]), both float32 scalars.

    A target beyond the vocabulary (a virtual token) has weight 0.

    The full logits (B, T, V) never exist. Tokens that train come first in each row, the projection runs chunk by chunk,
    and a chunk in which nothing trains is skipped: masked tokens pay nothing for the vocabulary. The gradient of each
    chunk, w * (softmax - onehot) pulled back through the head, is taken while its logits are at hand, so the backward
    pass recomputes nothing; it exists for the head's parameters only where they train.
    """
    nll, correct = _by_chunks(head, hidden_BTD, targets_BT, weights_BT, PLAIN)
    return nll, correct


def shaped_cross_entropy(
    head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `cross_entropy`, (sum of w * loss as `shape` has it, sum of w * [argmax = target], sum of w * -log p(target)).

    The first alone has a gradient.
    """
    loss, correct, nll = _by_chunks(head, hidden_BTD, targets_BT, weights_BT, shape)
    return loss, correct, nll


def _by_chunks(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, shape: Shape) -> Any:
    return by_chunks(_Form(head.apply, shape), head, hidden_BTD, targets_BT, weights_BT)


def by_chunks(
    form: Any, head: Head, hidden_BTD: jax.Array, known: Any, weights_BT: jax.Array, aside: Any = None
) -> Any:
    """Sums over a batch's tokens of what `form` makes of their logits, the first of which has a gradient: as `cross_entropy`.

    `known` is what is known of each token, any tree of (B, T, …); `aside` what is known of all, arrays as they are. Neither has a
    gradient. `form`, which is hashable, has `apply`, the head's; `num_sums`; `sums(logits_V, known, weights, aside) -> (the sums,
    anything)`; and `d_logits(logits_V, that, known, weights, aside)`, the gradient of the first sum.
    """
    hidden_BTD, known, weights_BT = jax.tree.map(partial(shards_as_rows, head), (hidden_BTD, known, weights_BT))
    order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order_BT.reshape(*order_BT.shape, *[1] * (x.ndim - 2)), axis=1)

    hidden_BTD, known, weights_BT = jax.tree.map(ordered, (hidden_BTD, known, weights_BT))
    static = _Chunks(form, min(head.chunk_tokens, weights_BT.shape[1]))
    return _chunked(static, head.params, aside, hidden_BTD, known, weights_BT)


class _Chunks(NamedTuple):
    """What is static of a sum by chunks: what is summed, and how many tokens of a row a chunk has."""

    form: Any
    chunk: int


class _Form(NamedTuple):
    """Cross-entropy, of the logits of a chunk of tokens."""

    apply: Callable[[Any, jax.Array], jax.Array]
    shape: Shape

    @property
    def num_sums(self) -> int:
        return 2 if self.shape == PLAIN else 3

    def sums(
        self, logits_V: jax.Array, targets: jax.Array, weights: jax.Array, aside: None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """(loss, correct, and where the loss is another the plain nll), and the logits' logsumexp."""
        log_total = jax.nn.logsumexp(logits_V, axis=-1)
        target_logits = jnp.take_along_axis(logits_V, targets[..., None], axis=-1, mode="clip")[..., 0]
        nll = jnp.sum((log_total - target_logits) * weights)
        correct = jnp.sum((target_logits >= jnp.max(logits_V, axis=-1)) * weights)
        if self.shape == PLAIN:
            return (nll, correct), log_total
        value = self.shape.value(log_total - target_logits, log_total, jnp.mean(logits_V, axis=-1))
        return (jnp.sum(value * weights), correct, nll), log_total

    def d_logits(
        self, logits_V: jax.Array, log_total: jax.Array, targets: jax.Array, weights: jax.Array, aside: None
    ) -> jax.Array:
        """The gradient of the loss's sum with respect to the logits."""
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits_V.shape, logits_V.ndim - 1) == targets[..., None]
        shape, p_V = self.shape, jnp.exp(logits_V - log_total[..., None])
        if shape == PLAIN:
            return (p_V - is_target) * weights[..., None]
        target_logits = jnp.take_along_axis(logits_V, targets[..., None], axis=-1, mode="clip")
        slope, e = shape.slope(log_total[..., None] - target_logits), shape.label_smoothing
        wanted_V = (1 - e) * is_target + e / logits_V.shape[-1]
        return (slope * (p_V - wanted_V) + 2 * shape.z_weight * log_total[..., None] * p_V) * weights[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static: _Chunks, params: Any, aside: Any, hidden_BTD: jax.Array, known: Any, weights_BT: jax.Array) -> Any:
    sums, _, _ = _scan_chunks(static, params, aside, hidden_BTD, known, weights_BT, False, False)
    return sums


def _scan_chunks(
    static: _Chunks,
    params: Any,
    aside: Any,
    hidden_BTD: Any,
    known: Any,
    weights_BT: Any,
    want_hidden: bool,
    want_params: bool,
) -> tuple[tuple[jax.Array, ...], jax.Array | None, Any]:
    """Sums over chunks, and the gradients asked for: with respect to hidden (B, T, D) and to the head's parameters."""
    B, T, D = hidden_BTD.shape
    form, chunk, pad = static.form, static.chunk, -T % static.chunk

    def chunks(x: jax.Array) -> jax.Array:  # (B, T, …) -> (chunks, B, chunk, …)
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, (T + pad) // chunk, chunk, *x.shape[2:]), 1, 0)

    def value_and_pulls(hidden: jax.Array, known: Any, weights: jax.Array) -> Any:
        apply = form.apply
        logits_V, pull = jax.vjp(apply, params, hidden) if want_hidden or want_params else (apply(params, hidden), None)
        sums, kept = form.sums(logits_V, known, weights, aside)
        if pull is None:
            return sums, None, None
        d_params, d_hidden = pull(form.d_logits(logits_V, kept, known, weights, aside))
        return sums, d_hidden if want_hidden else None, d_params if want_params else None

    def one(carry: Any, xs: Any) -> Any:
        sums, d_params = carry
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_pulls, *xs))
        more = jax.lax.cond(jnp.any(xs[2] != 0), value_and_pulls, lambda *_: zeros, *xs)
        d_params = (
            jax.tree.map(lambda total, new: total + new.astype(total.dtype), d_params, more[2]) if want_params else None
        )
        return (tuple(total + new for total, new in zip(sums, more[0], strict=True)), d_params), more[1]

    d_params = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) if want_params else None
    start = ((jnp.float32(0),) * form.num_sums, d_params)
    (sums, d_params), d_hidden = jax.lax.scan(one, start, jax.tree.map(chunks, (hidden_BTD, known, weights_BT)))
    if want_hidden:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, T + pad, D)[:, :T]
    return sums, d_hidden, d_params


def _chunked_fwd(static: _Chunks, params: Any, aside: Any, hidden: Any, known: Any, weights: Any) -> Any:
    is_primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
    values, aside, known = jax.tree.map(lambda leaf: leaf.value, (params, aside, known), is_leaf=is_primal)
    trains = any(leaf.perturbed for leaf in jax.tree.leaves(params, is_leaf=is_primal))
    sums, d_hidden, d_params = _scan_chunks(
        static, values, aside, hidden.value, known, weights.value, hidden.perturbed, trains
    )
    dtypes = jax.tree.map(lambda p: jnp.zeros((), p.dtype), values)
    return sums, (d_hidden, d_params, dtypes)


def _chunked_bwd(static: _Chunks, saved: Any, cotangents: Any) -> Any:
    d_hidden, d_params, dtypes = saved
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    if d_hidden is not None:
        d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    if d_params is not None:
        d_params = jax.tree.map(lambda g, like: (g * scale).astype(like.dtype), d_params, dtypes)
    return d_params, None, d_hidden, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


def shards_as_rows(head: Head, x: jax.Array) -> jax.Array:
    """(B, T, …) -> (shards x B, T / shards, …): what lies on other devices is another row, so no token has to move."""
    B, T, C = *x.shape[:2], head.num_shards
    return x if C == 1 else x.reshape(B, C, T // C, *x.shape[2:]).swapaxes(0, 1).reshape(C * B, T // C, *x.shape[2:])


def token_nll(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) of every token, float32 (B, T), a chunk of the projection at a time."""
    shape, num_shards = targets_BT.shape, head.num_shards
    hidden_BTD, targets_BT = shards_as_rows(head, hidden_BTD), shards_as_rows(head, targets_BT)
    T = targets_BT.shape[1]
    chunk = min(head.chunk_tokens, T)
    pad = -T % chunk

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], (T + pad) // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = xs
        logits_V = head.apply(head.params, hidden)
        target_logits = jnp.take_along_axis(logits_V, targets[..., None], axis=-1, mode="clip")[..., 0]
        return jax.nn.logsumexp(logits_V, axis=-1) - target_logits

    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(one), (chunks(hidden_BTD), chunks(targets_BT))), 0, 1)
    out = out.reshape(out.shape[0], T + pad)[:, :T]
    return out if num_shards == 1 else out.reshape(num_shards, shape[0], T).swapaxes(0, 1).reshape(shape)


def segment_mean(hidden_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """At every token the mean over its own segment, (B, T, D); 0 on padding."""
    same_BTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & (segment_ids_BT != 0)[:, None, :]
    share_BTS = same_BTS / jnp.maximum(jnp.sum(same_BTS, axis=-1, keepdims=True), 1)
    return jnp.einsum("bts,bsd->btd", share_BTS.astype(hidden_BTD.dtype), hidden_BTD)


def embedding(hidden_BTD: jax.Array, segment_ids_BT: jax.Array, pool: str) -> jax.Array:
    """One vector of length 1 for the one text of each row, float32 (B, D); 0 for a row of padding.

    `pool`: the state of the first token (CLS), of the last, or the mean over all.
    """
    hidden_BTD, real_BT = hidden_BTD.astype(jnp.float32), (segment_ids_BT != 0).astype(jnp.float32)
    length_B1 = jnp.sum(real_BT, axis=1, keepdims=True)
    index_BT = jax.lax.broadcasted_iota(jnp.float32, real_BT.shape, 1)
    if pool == "mean":
        share_BT = real_BT / jnp.maximum(length_B1, 1)
    else:
        share_BT = real_BT * (index_BT == (0 if pool == "first" else length_B1 - 1))
    pooled_BD = jnp.einsum("bt,btd->bd", share_BT, hidden_BTD, precision=jax.lax.Precision.HIGHEST)
    return pooled_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(pooled_BD**2, axis=1, keepdims=True), 1e-24))
