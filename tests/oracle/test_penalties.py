"""The Fisher information and EWC's penalty with its gradient, as torch's autograd has them, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.objectives import penalties
from jaxtune.train import beside, fisher, rows
from jaxtune.weights import hf, source

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compile")]


def silent(items: Any, total: Any = None, label: str = "") -> Any:
    return items


def test_fisher_and_ewc_are_torchs(tiny_config: ConfigDict, from_folder: Any, ours: Any, tmp_path: Path) -> None:
    import torch

    config = tiny_config
    config.tune.method = "full"
    config.retain.penalties, config.retain.fisher_labels = (("ewc", 1.0),), "data"
    config.retain.fisher_data = (("data.train", config.data.train), ("data.limit", 6))
    mine = ours(config)
    tokenizer = source.find_tokenizer(config, mine.model)
    args = (config, tmp_path, mine.model, tokenizer, mine.program, mine.state.params, mine.frozen, silent)
    found = fisher.information(*args)
    theirs = from_folder(Path(config.model.source))
    data = rows.aside(beside.with_data(config, config.retain.fisher_data), tokenizer, silent, "", rows.readers.NEXT)[1]
    assert len(data) == 6
    sums = {name: torch.zeros_like(value) for name, value in theirs.named_parameters()}
    for start, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        ids = torch.as_tensor(data.tokens[start:end], dtype=torch.long)[None]
        weights = torch.as_tensor(data.weights[start + 1 : end])
        logps = torch.log_softmax(theirs(input_ids=ids).logits[0, :-1], dim=-1)
        theirs.zero_grad()
        (logps.gather(1, ids[0, 1:, None])[:, 0] * weights).sum().backward()
        for name, value in theirs.named_parameters():
            sums[name] += value.grad**2 / len(data)
    family, parsed = mine.program.family, mine.program.model_config
    named = dict(hf.tensors(family, parsed, {path: jax.numpy.asarray(value) for path, value in found.items()}))
    for name, value in sums.items():
        np.testing.assert_allclose(named[name], value.numpy(), rtol=2e-3, atol=1e-5 * float(value.max()), err_msg=name)

    rng = np.random.default_rng(0)
    then = {path: np.asarray(value) for path, value in mine.state.params.items()}
    now = {path: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for path, value in then.items()}
    value, grads = jax.value_and_grad(penalties.ewc)(now, then, found)
    leaves = {path: torch.tensor(array, requires_grad=True) for path, array in now.items()}
    wanted = sum((torch.tensor(found[p]) * (leaves[p] - torch.tensor(then[p])) ** 2).sum() for p in now) / 2
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(grads[path], leaf.grad.numpy(), rtol=1e-5, atol=1e-9, err_msg=path)
