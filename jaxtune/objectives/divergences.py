"""How far a student's next-token distribution is from a teacher's: the divergences of distillation, and of penalties that hold a model.

P is the teacher's distribution, Q the student's, both at temperature T: softmax(logits / T).

    forward       KL(P || Q) = sum P (log P - log Q)                                     arXiv:1503.02531: covers all that P does
    reverse       KL(Q || P)                                                             arXiv:2306.08543 (MiniLLM): keeps to P's modes
    js            b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q                 arXiv:2306.13649 (GKD), equation 1
                  b = 0 and b = 1 mean forward and reverse, its limits, as in TRL's GKD
    skew_forward  KL(P || a P + (1 - a) Q)                                               arXiv:2402.03898 (DistiLLM), equation 4
    skew_reverse  KL(Q || (1 - a) P + a Q)                                               likewise, equation 5

b and a are `Form.mix`. Every divergence is multiplied by T^2, as the first of these papers does, so that its gradient keeps its
size when T changes and a weight beside cross-entropy means the same; TRL's GKD leaves that factor out.

`top_k` keeps the teacher's k likeliest words, and puts all others into one bucket, of both distributions: k + 1 outcomes. Their
divergence is a lower bound of the whole one (data processing inequality), and a student that spreads words over the
bucket still pays for it, which distributions renormalised over the k would not see.

`non_target` leaves the token's target out of both, renormalised: NCKD of decoupled knowledge distillation (arXiv:2203.08679, equation 5).
What the data itself teaches, how likely the target is, is then not held against the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.objectives.ops import Head, by_chunks

KINDS = ("forward", "reverse", "js", "skew_forward", "skew_reverse")
_NEVER = -1e30  # a logit of what cannot be; no infinity, for 0 x infinity is no number


class Form(NamedTuple):
    """A divergence, as above. `top_k` 0: all words."""

    kind: str = "forward"
    temperature: float = 1.0
    mix: float = 0.5
    top_k: int = 0
    non_target: bool = False


class Likeliest(NamedTuple):
    """A teacher's distribution as `likeliest` cuts it: `logps` float32 (B, T, J), the last of its bucket; `ids` int32, there -1."""

    logps_BTJ: jax.Array
    ids_BTJ: jax.Array


def divergence(student_V: jax.Array, teacher_V: jax.Array, targets: jax.Array, form: Form) -> jax.Array:
    """The divergence (nats, times T^2) of logits (…, V) of both, whose targets are (…); float32 (…)."""
    return _of_likeliest(student_V, cut(teacher_V, targets, form, student_V.shape[-1]), targets, form)


def cut(logits_V: jax.Array, targets: jax.Array, form: Form, num_words: int) -> Likeliest:
    """A teacher's log-probabilities as `form` compares them: of all words (`ids` is then of no use), or of its likeliest.

    Of its words the first `num_words`, the student's: what a vocabulary has beyond its tokenizer's words is padding.
    """
    logps_V = jax.nn.log_softmax(_scaled(logits_V[..., :num_words], targets, form), axis=-1)
    if not form.top_k:
        return Likeliest(logps_V, jnp.zeros((*targets.shape, 0), jnp.int32))
    ids_J = jax.lax.top_k(logps_V, form.top_k)[1]
    last = jnp.full_like(ids_J[..., :1], -1)
    return Likeliest(_gathered(logps_V, ids_J), jnp.concatenate([ids_J, last], axis=-1))


def _scaled(logits_V: jax.Array, targets: jax.Array, form: Form) -> jax.Array:
    if form.non_target:
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits_V.shape, logits_V.ndim - 1) == targets[..., None]
        logits_V = jnp.where(is_target, _NEVER, logits_V)
    return logits_V / form.temperature


def _gathered(logps_V: jax.Array, ids_J: jax.Array) -> jax.Array:
    """Log-probabilities of some words, and of all others together, (…, J + 1)."""
    rest_V = jnp.put_along_axis(logps_V, ids_J, _NEVER, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(rest_V, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logps_V, ids_J, axis=-1), rest], axis=-1)


def _of_likeliest(student_V: jax.Array, teacher: Likeliest, targets: jax.Array, form: Form) -> jax.Array:
    num_words = None if form.top_k else teacher.logps_BTJ.shape[-1]
    q_J = jax.nn.log_softmax(_scaled(student_V[..., :num_words], targets, form), axis=-1)
    if form.top_k:
        q_J = _gathered(q_J, teacher.ids_BTJ[..., :-1])
    return _between(jax.lax.stop_gradient(teacher.logps_BTJ), q_J, form) * form.temperature**2


def _between(p_J: jax.Array, q_J: jax.Array, form: Form) -> jax.Array:
    """The divergence of two distributions' log-probabilities (…, J)."""
    kind, mix = form.kind, form.mix
    kind = {0.0: "forward", 1.0: "reverse"}.get(mix, kind) if kind == "js" else kind
    if kind == "forward":
        return _kl(p_J, q_J)
    if kind == "reverse":
        return _kl(q_J, p_J)
    if kind == "skew_forward":
        return _kl(p_J, _mixed(p_J, q_J, mix))
    if kind == "skew_reverse":
        return _kl(q_J, _mixed(p_J, q_J, 1 - mix))
    m_J = _mixed(p_J, q_J, mix)
    return mix * _kl(p_J, m_J) + (1 - mix) * _kl(q_J, m_J)


def _kl(p_J: jax.Array, q_J: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p_J) * (p_J - q_J), axis=-1)


def _mixed(p_J: jax.Array, q_J: jax.Array, share: float) -> jax.Array:
    """log(share P + (1 - share) Q)."""
    if share in (0.0, 1.0):
        return p_J if share else q_J
    return jnp.logaddexp(p_J + jnp.log(share), q_J + jnp.log1p(-share))


class _Form(NamedTuple):
    """What is summed over a chunk's tokens: share x divergence + (1 - share) x -log p(target), that where the target is gold; then each
    of the two, and what was right."""

    apply: Callable[[Any, jax.Array], jax.Array]
    teach: Callable[[Any, jax.Array], jax.Array] | None  # of a teacher whose hidden states are at hand
    form: Form
    share: float

    @property
    def num_sums(self) -> int:
        return 4

    def sums(
        self, logits_V: jax.Array, known: Any, weights: jax.Array, aside: Any
    ) -> tuple[tuple[jax.Array, ...], None]:
        targets, seen, gold = known
        teacher = cut(self.teach(aside, seen), targets, self.form, logits_V.shape[-1]) if self.teach else seen
        apart = jnp.sum(_of_likeliest(logits_V, teacher, targets, self.form) * weights)
        target_logits = jnp.take_along_axis(logits_V, targets[..., None], axis=-1, mode="clip")[..., 0]
        each = (jax.nn.logsumexp(logits_V, axis=-1) - target_logits) * weights
        nll = jnp.sum(each)
        learned = nll if gold is None else jnp.sum(each * gold)
        right = jnp.sum((target_logits >= jnp.max(logits_V, axis=-1)) * weights)
        return (self.share * apart + (1 - self.share) * learned, apart, nll, right), None

    def d_logits(self, logits_V: jax.Array, kept: None, known: Any, weights: jax.Array, aside: Any) -> jax.Array:
        return jax.grad(lambda logits: self.sums(logits, known, weights, aside)[0][0])(logits_V)


def token_divergence(
    student: Head,
    student_hidden_BTD: jax.Array,
    teacher: Head,
    teacher_hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    form: Form,
) -> jax.Array:
    """Sum over tokens of w * the divergence, float32 scalar; only the student's head and hidden states have a gradient.

    The teacher may have another D; its words are the student's, but for padding that one of them has more of. By chunks, as `ops.cross_entropy`: full logits of neither
    exist, and chunks where nothing trains are skipped.
    """
    return taught(student, student_hidden_BTD, teacher, teacher_hidden_BTD, targets_BT, weights_BT, form)[0]


def taught(
    student: Head,
    student_hidden_BTD: jax.Array,
    teacher: Head | None,
    seen: Any,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    form: Form,
    share: float = 1.0,
    gold_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums over tokens of w * (share * divergence + (1 - share) * -log p(target)); and of w times the divergence, times
    -log p(target), times [argmax = target]. The first alone has a gradient; all from one pass over the student's words.

    With `gold`, cross-entropy counts in the first where it is 1. `seen` is what the teacher's head reads, (B, T, D), or with no `teacher` the `Likeliest` that were kept of it.
    """
    what = _Form(student.apply, teacher.apply if teacher else None, form, share)
    known = jax.lax.stop_gradient((targets_BT, seen, gold_BT))
    aside = jax.lax.stop_gradient(teacher.params) if teacher else None
    loss, apart, nll, right = by_chunks(what, student, student_hidden_BTD, known, weights_BT, aside)
    return loss, apart, nll, right


def likeliest(teacher: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, form: Form, num_words: int) -> Likeliest:
    """What of a teacher's distribution `form`, with a `top_k`, compares: to be kept, and given to `taught` as `seen`."""
    B, T, D = hidden_BTD.shape
    chunk = min(teacher.chunk_tokens, T)
    pad = -T % chunk

    def chunks(x: jax.Array) -> jax.Array:  # (B, T, …) -> (chunks, B, chunk, …)
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, (T + pad) // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(xs: tuple[jax.Array, jax.Array]) -> Likeliest:
        return cut(teacher.apply(teacher.params, xs[0]), xs[1], form, num_words)

    found = jax.lax.map(one, (chunks(hidden_BTD), chunks(targets_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T + pad, -1)[:, :T], found)
