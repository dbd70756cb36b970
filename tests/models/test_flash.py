"""The GPU's attention kernel: lowered for CUDA with no GPU at hand, and where it gives way to the plain form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.models import attention
from jaxtune.models.attention import Rule, attend
from jaxtune.models.layers import Runtime

B, T, N, K = 2, 384, 8, 2


class OnGPU(Runtime):
    """A run on GPUs that are only described."""

    platform = "gpu"  # type: ignore[assignment]


def gpus(**sizes: int) -> OnGPU:
    config = config_lib.base()
    config.mesh.update({"fsdp": 1} | sizes)
    real = sharding.make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh: Any = AbstractMesh(real.axis_sizes, real.axis_names, axis_types=real.axis_types, abstract_device=device)
    return OnGPU(attention="flash", mesh=mesh, spec=sharding.spec)


def arrays(tokens: int = T, dim: int = 128, v_dim: int = 0, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    shapes = ((N, dim), (K, dim), (K, v_dim or dim))
    return *(jax.ShapeDtypeStruct((B, tokens, *each), dtype) for each in shapes), np.ones((B, tokens), np.int32)


def test_it_lowers_for_cuda_on_a_mesh() -> None:
    """Forward and backward; grouped keys and values go in as they are, and nowhere are T x T numbers."""
    run = gpus(fsdp=2, tensor=2)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, segments, segments, Rule(0.1), run).astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays()).lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line]
    assert len(kernels) == 3
    for name in ("mha_forward", "mha_preprocess_backward", "mha_backward"):
        assert sum(f'name = "{name}"' in line for line in kernels) == 1
    forward = next(line for line in kernels if '"mha_forward"' in line)
    q, kv = f"tensor<1x{T}x1x4x128xbf16>", f"tensor<1x{T}x1x128xbf16>"
    assert f": ({q}, {kv}, {kv}, tensor<1x{T}xi32>)" in forward
    assert f"{T}x{T}" not in text


def kernels(run: Runtime, rule: Rule, given: tuple[Any, ...], **options: Any) -> int:
    def out(q: Any, k: Any, v: Any, segments: Any) -> jax.Array:
        return attend(q, k, v, segments, segments, rule, run, **options)

    return str(jax.make_jaxpr(out)(*given)).count("pallas_call[")


@pytest.mark.parametrize(
    ("platform", "capability", "taken"),
    [("gpu", "8.0", True), ("gpu", "10.0", True), ("gpu", "7.5", False), ("gpu", "gfx90a", False), ("cpu", "", False)],
)
def test_auto_takes_it_on_gpus_that_have_room(platform: str, capability: str, taken: bool) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    mesh: Any = SimpleNamespace(devices=np.asarray([device], object))
    for kind, wanted in (("auto", taken), ("flash", True), ("xla", False), ("splash", False)):
        assert attention._use_flash(Runtime(attention=kind, mesh=mesh)) == wanted


def test_it_takes_what_it_can_say() -> None:
    assert kernels(gpus(tensor=2), Rule(0.1), arrays()) == 1
    assert kernels(gpus(tensor=2), Rule(0.1, causal=False), arrays(128, 64, dtype=jnp.float32)) == 1


@pytest.mark.parametrize(
    ("rule", "given", "options"),
    [
        (Rule(0.1, softcap=5.0), {}, {}),
        (Rule(0.1, slopes=(0.5,) * N), {}, {}),
        (Rule(0.1, windows=(0, 64)), {}, {"window_index": 1}),
        (Rule(0.1), {}, {"sinks_N": np.zeros(N, np.float32)}),
        (Rule(0.1), {}, {"self_attention": False, "offset": 3}),
        (Rule(0.1), {"tokens": 100}, {}),
        (Rule(0.1), {"dim": 80}, {}),
        (Rule(0.1), {"v_dim": 64}, {}),
        (Rule(0.1), {"dim": 256}, {}),
        (Rule(0.1), {"dtype": jnp.float32}, {}),
    ],
    ids=[
        "soft cap", "slopes", "windows", "sinks", "a cache", "rows of an odd length", "heads of an odd width",
        "values of another width", "wide heads", "wide heads of float32",
    ],
)  # fmt: skip
def test_what_it_cannot_say_is_the_plain_form(rule: Rule, given: dict[str, Any], options: dict[str, Any]) -> None:
    assert kernels(gpus(tensor=2), rule, arrays(**given), **options) == 0


def test_rows_in_shards_are_the_plain_form() -> None:
    mesh = sharding.make_mesh(config_lib.base(), jax.devices()[:1])
    whole = Runtime(attention="flash", mesh=mesh, spec=sharding.spec, constrain=sharding.constrain_on(mesh))
    config = config_lib.base()
    config.mesh.update({"fsdp": 1, "context": 2})
    split = sharding.make_mesh(config, jax.devices()[:2])
    assert kernels(whole, Rule(0.1), arrays()) == 1
    assert kernels(whole._replace(mesh=split, constrain=sharding.constrain_on(split)), Rule(0.1), arrays()) == 0


def test_in_bfloat16_it_errs_as_the_plain_form_does() -> None:
    """Gradients of packed rows with padding, against float32; what is rounded differs: 1.14 to 1.29 times as far off."""
    mesh = sharding.make_mesh(config_lib.base(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(1, 256, n, 16)), jnp.bfloat16) for n in (4, 2, 2)]
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [100, 90, 66], 1), jnp.int32)

    def by(kind: str, dtype: Any) -> list[np.ndarray]:
        run = Runtime(attention=kind, mesh=mesh, spec=sharding.spec)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = attend(q, k, v, segments, segments, Rule(0.3), run).astype(jnp.float32)
            return jnp.sum(jnp.sin(out) * (segments != 0)[..., None, None])

        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in qkv))
        return [np.asarray(x, np.float32) for x in grads]

    for flash, plain, exact in zip(
        by("flash", jnp.bfloat16), by("xla", jnp.bfloat16), by("xla", jnp.float32), strict=True
    ):
        assert np.abs(flash - exact).mean() < 1.5 * np.abs(plain - exact).mean()
