"""Shaped cross-entropy against torch's: value and gradients."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from jaxtune.objectives import ops
from tests.objectives.test_shaped import HIDDEN_BTD, KERNEL_DV, TARGETS_BT, B, T, V, head


def test_label_smoothing_and_class_weights_are_torchs() -> None:
    hidden_BTD, kernel_DV = (torch.tensor(x, requires_grad=True) for x in (HIDDEN_BTD, KERNEL_DV))
    logits, targets = (hidden_BTD @ kernel_DV).flatten(0, 1), torch.tensor(TARGETS_BT, dtype=torch.long).flatten()
    batch = {"targets_BT": TARGETS_BT, "weights_BT": np.ones((B, T), np.float32)}
    class_weights = tuple(range(1, V + 1))
    for options, theirs in (
        ({"label_smoothing": 0.2}, torch.nn.CrossEntropyLoss(label_smoothing=0.2)),
        ({"class_weights": class_weights}, torch.nn.CrossEntropyLoss(torch.tensor(class_weights, dtype=torch.float32))),
    ):

        def ours(hidden: Any, kernel: Any, options: Any = options) -> jax.Array:
            total, weight, _ = ops.classed(head(kernel), hidden, batch, **options)
            return total / weight

        value, grads = jax.value_and_grad(ours, (0, 1))(HIDDEN_BTD, KERNEL_DV)
        loss = theirs(logits, targets)
        wanted = torch.autograd.grad(loss, (hidden_BTD, kernel_DV), retain_graph=True)
        np.testing.assert_allclose(float(value), loss.item(), rtol=1e-6)
        for one, other in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-6)
