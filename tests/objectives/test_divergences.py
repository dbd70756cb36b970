"""Divergences against float64 NumPy by hand, finite differences, and whole logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import divergences
from jaxtune.objectives.divergences import Form
from jaxtune.objectives.ops import Head, cross_entropy

B, T, D, V = 2, 7, 6, 11
RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.normal(size=(B, T, D)), RNG.normal(size=(D, V))
TEACHER_HIDDEN, TEACHER_KERNEL = RNG.normal(size=(B, T, D + 2)), RNG.normal(size=(D + 2, V))
TARGETS = RNG.integers(0, V, (B, T))
WEIGHTS = RNG.uniform(0.5, 2, (B, T)) * (RNG.random((B, T)) < 0.6)
FORMS = [
    Form("forward"),
    Form("reverse", temperature=2.0),
    Form("js", mix=0.3),
    Form("js", temperature=1.5, mix=0.7, top_k=4),
    Form("js", mix=0.0),
    Form("js", mix=1.0),
    Form("skew_forward", mix=0.1),
    Form("skew_reverse", mix=0.1, top_k=3, non_target=True),
    Form("forward", temperature=0.7, top_k=3),
    Form("reverse", non_target=True),
    Form("forward", top_k=V),
]


def distributions(
    logits_V: np.ndarray, teacher_V: np.ndarray, target: int, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """P and Q of one token by definition: target left out, cooled, cut to the teacher's likeliest and a bucket."""
    kept = np.delete(np.arange(V), target) if form.non_target else np.arange(V)
    p, q = (np.exp(x[kept] / form.temperature) for x in (teacher_V, logits_V))
    p, q = p / p.sum(), q / q.sum()
    if form.top_k and form.top_k < len(p):
        order = np.argsort(-p)
        p, q = (np.append(x[order[: form.top_k]], x[order[form.top_k :]].sum()) for x in (p, q))
    return p, q


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def apart(p: np.ndarray, q: np.ndarray, kind: str, mix: float) -> float:
    """The formulas of the papers, p the teacher."""
    if kind == "forward" or (kind == "js" and mix == 0):
        return kl(p, q)
    if kind == "reverse" or (kind == "js" and mix == 1):
        return kl(q, p)
    m = mix * p + (1 - mix) * q
    if kind == "js":
        return mix * kl(p, m) + (1 - mix) * kl(q, m)
    return kl(p, m) if kind == "skew_forward" else kl(q, (1 - mix) * p + mix * q)


def by_hand(hidden: np.ndarray, kernel: np.ndarray, form: Form) -> float:
    total = 0.0
    for b, t in np.ndindex(B, T):
        p, q = distributions(hidden[b, t] @ kernel, TEACHER_HIDDEN[b, t] @ TEACHER_KERNEL, TARGETS[b, t], form)
        total += WEIGHTS[b, t] * apart(p, q, form.kind, form.mix) * form.temperature**2
    return total


def head(kernel: jax.Array, chunk: int = 3) -> Head:
    return Head(kernel, _project, chunk)


def _project(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ kernel


def given() -> tuple[jax.Array, ...]:
    teacher = head(jnp.asarray(TEACHER_KERNEL, jnp.float32)), jnp.asarray(TEACHER_HIDDEN, jnp.float32)
    return (*teacher, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS, jnp.float32))  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_value_and_gradient_are_those_by_hand(form: Form) -> None:
    """The value in float64 by definition; the gradients of hidden states and head by central differences along directions."""
    given_arrays = given()

    def of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return divergences.token_divergence(head(kernel), hidden, *given_arrays, form)

    at = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    value, grads = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(*at)
    np.testing.assert_allclose(value, by_hand(HIDDEN, KERNEL, form), rtol=2e-5)
    step = 1e-5
    for which, (point, grad) in enumerate(zip((HIDDEN, KERNEL), grads, strict=True)):
        along = np.random.default_rng(which).normal(size=point.shape)
        ends = []
        for sign in (1, -1):
            moved = [HIDDEN, KERNEL]
            moved[which] = point + sign * step * along
            ends.append(by_hand(moved[0], moved[1], form))
        np.testing.assert_allclose(
            np.sum(np.asarray(grad, np.float64) * along), (ends[0] - ends[1]) / (2 * step), rtol=1e-3
        )


def test_teachers_have_no_gradient_and_tokens_without_weight_none() -> None:
    teacher, teacher_hidden, targets, weights = given()

    def of(hidden: jax.Array, kernel: jax.Array, teacher_hidden: jax.Array, teacher_kernel: jax.Array) -> jax.Array:
        return divergences.token_divergence(
            head(kernel), hidden, head(teacher_kernel), teacher_hidden, targets, weights, Form("reverse")
        )

    at = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32), teacher_hidden, teacher.params
    d_hidden, d_kernel, *of_teacher = jax.grad(of, argnums=(0, 1, 2, 3))(*at)
    assert not any(np.any(grad) for grad in of_teacher)
    assert np.any(d_kernel)
    np.testing.assert_array_equal(np.any(d_hidden, axis=-1), WEIGHTS != 0)


def test_kept_likeliest_words_teach_as_their_teacher() -> None:
    """Value and gradient from what was kept are those with the teacher at hand; likewise with cross-entropy mixed in."""
    teacher, teacher_hidden, targets, weights = given()
    form = Form("js", temperature=2.0, top_k=4, non_target=True)
    kept = divergences.likeliest(teacher, teacher_hidden, targets, form, V)
    assert kept.ids_BTJ.shape == (B, T, 5)
    assert np.all(np.asarray(kept.ids_BTJ)[..., -1] == -1)

    def of(hidden: jax.Array, teacher: Head | None, seen: object) -> jax.Array:
        student = head(jnp.asarray(KERNEL, jnp.float32))
        return divergences.taught(student, hidden, teacher, seen, targets, weights, form, 0.25)[0]

    hidden = jnp.asarray(HIDDEN, jnp.float32)
    for one, other in zip(
        jax.value_and_grad(of)(hidden, teacher, teacher_hidden), jax.value_and_grad(of)(hidden, None, kept), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_share_of_cross_entropy_is_cross_entropy() -> None:
    teacher, teacher_hidden, targets, weights = given()
    hidden = jnp.asarray(HIDDEN, jnp.float32)

    def of(hidden: jax.Array, share: float) -> jax.Array:
        student = head(jnp.asarray(KERNEL, jnp.float32))
        return divergences.taught(student, hidden, teacher, teacher_hidden, targets, weights, Form(), share)[0]

    plain = jax.value_and_grad(lambda h: cross_entropy(head(jnp.asarray(KERNEL, jnp.float32)), h, targets, weights)[0])
    none, whole, mixed = (jax.value_and_grad(of)(hidden, share) for share in (0.0, 1.0, 0.3))
    for found, by_itself, taught in zip(none, plain(hidden), whole, strict=True):
        np.testing.assert_allclose(found, by_itself, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(np.asarray(found - taught))) > 1e-2
    for found, zero, one in zip(mixed, none, whole, strict=True):
        np.testing.assert_allclose(found, 0.7 * zero + 0.3 * one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", ["student", "teacher"])
def test_padding_of_a_vocabulary_is_not_compared(more: str) -> None:
    """Three words more, of either model, change neither value nor gradient."""
    teacher, teacher_hidden, targets, weights = given()
    hidden, kernel, form = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32), Form("reverse")

    def wider(kernel: jax.Array) -> jax.Array:
        return jnp.concatenate([kernel, jnp.ones((len(kernel), 3), jnp.float32)], axis=1)

    def of(hidden: jax.Array, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        return divergences.token_divergence(head(ours), hidden, head(theirs), teacher_hidden, targets, weights, form)

    pair = (wider(kernel), teacher.params) if more == "student" else (kernel, wider(teacher.params))
    for found, expected in zip(
        jax.value_and_grad(of)(hidden, *pair), jax.value_and_grad(of)(hidden, kernel, teacher.params), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
