"""Encoders, and heads on decoders, against transformers: scores and hidden states with padding, gradients, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import layers
from jaxtune.train import start
from jaxtune.weights import hf
from tests.families import TASKS, VOCAB

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compile")]
LENGTHS = (24, 17)
TOKENS = np.random.default_rng(0).integers(5, VOCAB, (2, 24))
REAL = np.arange(24)[None, :] < np.asarray(LENGTHS)[:, None]


def outputs_of_torch(model: Any, pad_id: int) -> dict[str, Any]:
    import torch

    ids, mask = torch.as_tensor(np.where(REAL, TOKENS, pad_id)), torch.as_tensor(REAL.astype(np.int64))
    out = model(input_ids=ids, attention_mask=mask)
    return {
        name: out[name]
        for name in ("logits", "last_hidden_state", "pooler_output")
        if name in out and out[name] is not None
    }


@pytest.mark.parametrize("name", sorted(TASKS))
def test_scores_and_gradients_agree(name: str, tmp_path: Path, ours: Any, config_of: Any) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {k: v for k, v in TASKS[name].items() if k not in ("model_type", "architectures")}
    model_class = getattr(transformers, name.split(" ")[0])
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.normal_(1.0 if "norm" in key.lower() or ".ln" in key or "scal" in key else 0.0, 0.15)
    model.save_pretrained(tmp_path / "model")
    objective = next((o for o, (task, _) in start.HEADS.items() if name.split(" ")[0].endswith(task)), "sft")
    mine = ours(config_of(tmp_path / "model", {"tune.method": "full", "train.objective": objective}))
    program, pad_id = mine.program, settings["pad_token_id"]
    head = program.model_config.head
    positions = np.broadcast_to(np.arange(24), TOKENS.shape)
    expected = outputs_of_torch(model, pad_id)

    def outputs(params: Any) -> dict[str, jax.Array]:
        bound = layers.bind(program.inference, params)
        hidden = bound(jnp.asarray(np.where(REAL, TOKENS, pad_id)), positions, jnp.asarray(REAL, jnp.int32))[0]
        if "last_hidden_state" in expected:
            return {"last_hidden_state": hidden, **({"pooler_output": bound.head(hidden[:, 0])} if head.dense else {})}
        if head is not None and head.pool:
            hidden = hidden[:, 0] if head.pool == "first" else hidden[np.arange(2), np.asarray(LENGTHS) - 1]
        return {"logits": bound.head(hidden)}

    rng = np.random.default_rng(1)
    weigh = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in expected.items()}
    for value in weigh.values():
        if value.shape[:2] == REAL.shape:
            value[~REAL] = 0  # what stands on padding means nothing

    @jax.jit
    def both(params: Any) -> Any:
        def total(params: Any) -> Any:
            found = outputs(params)
            return sum(jnp.mean(found[key] * weigh[key]) for key in weigh), found

        (_, found), grads = jax.value_and_grad(total, has_aux=True)(params)
        return found, grads

    found, grads = both(mine.params)
    for key, value in expected.items():
        got, want = np.asarray(found[key]), value.detach().numpy()
        kept = REAL if got.shape[:2] == REAL.shape else slice(None)
        worst = np.abs(got[kept] - want[kept]).max()
        print(f"{name} {key}: max |Δ| {worst:.1e} of {np.abs(want).max():.1f}")
        assert worst <= 1e-4
    sum((expected[key] * torch.as_tensor(weigh[key])).mean() for key in weigh).backward()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    model.save_pretrained(tmp_path / "gradients")
    saved = hf.Folder(tmp_path / "gradients")
    for key, value in hf.tensors(program.family, program.model_config, grads):
        want = saved.read(key)
        # A bias that softmax cancels, as a key's without rotation, has no gradient but rounding: 5e-9, or 1.1e-8 as the tests' XLA sums it.
        assert np.abs(value - want).max() <= 1e-3 * np.abs(want).max() + 2e-8, key
    hf.save(tmp_path / "again", program.hf_config, hf.tensors(program.family, program.model_config, mine.params))
    again, info = model_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in outputs_of_torch(again.eval(), pad_id).items():
        np.testing.assert_allclose(value.detach().numpy(), expected[key].detach().numpy(), atol=1e-6)
