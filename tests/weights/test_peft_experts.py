"""Adapters on experts in PEFT's form and back, without torch: fused, split, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.adapters.lora import Options
from jaxtune.models import mixtral
from jaxtune.types import UserError
from jaxtune.weights import peft, peft_experts, peft_read
from jaxtune.weights.peft_experts import Factors
from tests.families import CASES

E, IN, F = 4, 5, 6


def factors(rank: int, scale: float = 2.0, out: int = F) -> Factors:
    rng = np.random.default_rng(rank)
    return Factors(*(rng.normal(size=(2, E, *shape)).astype(np.float32) for shape in ((IN, rank), (rank, out))), scale)


def update(f: Factors) -> np.ndarray:
    return f.scale * f.a @ f.b


@pytest.mark.parametrize(
    "parts",
    [
        {"gate_proj": factors(3), "up_proj": factors(3)},
        {"gate_proj": factors(3), "up_proj": factors(2, scale=0.5)},
        {"gate_proj": factors(2)},
        {"up_proj": factors(3)},
    ],
    ids=["both", "of different ranks and scales", "gate alone", "up alone"],
)
def test_gate_and_up_are_one_parameter_and_two_again(parts: dict[str, Factors]) -> None:
    fused = peft_experts.fused(parts | {"down_proj": factors(1)})
    assert list(fused) == ["gate_up_proj", "down_proj"], "the inner wrapper first"
    both = fused["gate_up_proj"]
    assert both.rank == sum(part.rank for part in parts.values())
    zero = np.zeros((2, E, IN, F))
    sides = [update(parts[name]) if name in parts else zero for name in ("gate_proj", "up_proj")]
    np.testing.assert_allclose(update(both), np.concatenate(sides, -1), atol=1e-5)
    again = peft_experts.apart(both)
    assert again.keys() == parts.keys()
    for name, part in parts.items():
        np.testing.assert_allclose(update(again[name]), update(part), atol=1e-5)


def test_a_shared_inner_factor_is_copied() -> None:
    both = factors(4, out=2 * F)
    apart = peft_experts.apart(both)
    np.testing.assert_allclose(np.concatenate([update(f) for f in apart.values()], -1), update(both), atol=1e-6)


def test_the_stored_order() -> None:
    """A goes expert by expert, B rank by rank."""
    one = factors(3)
    tensors = peft_experts.stored(one.a[0], one.b[0])
    assert tensors["lora_A.weight"].shape == (E * 3, IN)
    assert tensors["lora_B.weight"].shape == (F, 3 * E)
    np.testing.assert_array_equal(tensors["lora_A.weight"][2 * 3 + 1], one.a[0, 2, :, 1])
    np.testing.assert_array_equal(tensors["lora_B.weight"][:, 1 * E + 2], one.b[0, 2, 1])
    for found, want in zip(peft_experts.read(*tensors.values(), E), (one.a[0], one.b[0]), strict=True):
        np.testing.assert_array_equal(found, want)


def write(folder: Path) -> dict[str, Any]:
    config, options = mixtral.from_hf(CASES["mixtral"]), Options("", rank=2)
    adapter = {
        f"layers.mlp.experts.down_proj.adapter.{kind}": jnp.ones((3, 4, *shape), jnp.float32)
        for kind, shape in (("lora_a", (48, 2)), ("lora_b", (2, 32)))
    }
    peft.save(folder, mixtral, config, adapter, options, "")
    return adapter


def test_an_adapter_of_another_mixture_is_refused(tmp_path: Path) -> None:
    adapter = write(tmp_path)
    _, found = peft_read.load(tmp_path, mixtral, mixtral.from_hf(CASES["mixtral"]))
    assert found.keys() == adapter.keys()
    other = mixtral.from_hf(CASES["mixtral"] | {"num_local_experts": 2})
    with pytest.raises(UserError, match=r"shape \(8, 48\); 2 experts of rank 2 make 4 rows"):
        peft_read.load(tmp_path, mixtral, other)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "lora_B" not in name}, file)
    with pytest.raises(UserError, match=r"only one of lora_A and lora_B for layers.mlp.experts.down_proj"):
        peft_read.load(tmp_path, mixtral, mixtral.from_hf(CASES["mixtral"]))
