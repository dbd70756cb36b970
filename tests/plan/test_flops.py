"""FLOPs counted on the jaxpr equal a count by hand and XLA's own, scans multiplied out, LoRA as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune import sharding
from jaxtune.models.attention import Rule, attend
from jaxtune.models.layers import Runtime
from jaxtune.plan import compile as plan_compile
from jaxtune.plan import flops, hlo
from jaxtune.types import UserError
from jaxtune.weights.source import hf_preset

# llama_tiny: D model, N heads and K key/value heads of H, F feed-forward, V vocabulary, L layers; B rows of T tokens
D, N, K, H, F, V, L, B, T, R = 64, 4, 2, 16, 128, 256, 2, 8, 64, 4
LINEARS = {
    "q": (D, N * H),
    "k": (D, K * H),
    "v": (D, K * H),
    "o": (N * H, D),
    "gate": (D, F),
    "up": (D, F),
    "down": (F, D),
}
SCORES = 2 * B * T * T * N * H * L  # of q k^T, and as much of the weighted sum of values
HEAD = 2 * B * T * D * V


def layers(rows: float = 1.0) -> float:
    return rows * 2 * B * T * L * sum(i * o for i, o in LINEARS.values())


def factors() -> float:
    return 2 * B * T * L * sum(R * (i + o) for i, o in LINEARS.values())


@pytest.fixture
def config() -> ConfigDict:
    config = config_lib.base()
    config.data.max_length, config.train.batch_size, config.train.steps = T, B, 10
    config.train.loss_chunk_tokens, config.tune.rank, config.tune.dropout = 128, R, 0.0
    config.tune.targets = r"layers\..*"
    return config


def counts(config: ConfigDict, num_devices: int = 1) -> tuple[float, float]:
    program = plan_compile.program_of(config, hf_preset("llama_tiny"), None, jax.devices()[:num_devices])
    _, hardware, model = plan_compile.counted(config, program)
    return flops.total(hardware), flops.total(model)


def test_full_fine_tuning_is_three_forward_passes(config: ConfigDict) -> None:
    config.tune.method, config.train.remat = "full", "none"
    hardware, model = counts(config)
    assert model == 3 * (layers() + 2 * SCORES + HEAD)
    assert hardware == model + SCORES  # attention makes its scores again; nothing else is done twice


def test_remat_counts_what_is_done_again(config: ConfigDict) -> None:
    config.tune.method, config.train.remat = "full", "block"
    hardware, model = counts(config)
    down = 2 * B * T * L * F * D  # the last product of a block: nothing in the backward pass needs it
    assert model == 3 * (layers() + 2 * SCORES + HEAD)
    assert hardware == model + layers() - down + 2 * SCORES


def test_lora_trains_no_frozen_weight(config: ConfigDict) -> None:
    config.train.remat = "none"
    hardware, model = counts(config)
    assert model == 2 * layers() + 3 * factors() + 3 * 2 * SCORES + 2 * HEAD
    assert hardware == model + SCORES


@pytest.mark.parametrize("change", ["accumulation", "fsdp", "tensor"])
def test_accumulation_and_the_mesh_change_nothing(config: ConfigDict, change: str) -> None:
    alone = counts(config)
    if change == "accumulation":
        config.train.accumulation = 4
        assert counts(config) == alone
    else:
        config.mesh.fsdp = -1 if change == "fsdp" else 4
        config.mesh.tensor = 1 if change == "fsdp" else 2
        assert counts(config, 8) == alone


def test_equals_xla_on_an_unrolled_program() -> None:
    """XLA counts a scanned body once; unrolled, it counts what the scan does."""
    w = jnp.ones((5, 48, 48))

    def unrolled(x: jax.Array) -> jax.Array:
        for i in range(5):
            x = x @ w[i]
        return x

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x = jnp.ones((32, 48))
    by_xla = jax.jit(unrolled).lower(x).compile().cost_analysis()["flops"]
    found = [flops.total(flops.hardware(jax.jit(f).trace(x))) for f in (unrolled, scanned)]
    assert found == [by_xla, by_xla] == [5 * 2 * 32 * 48 * 48] * 2
    assert jax.jit(scanned).lower(x).compile().cost_analysis()["flops"] < by_xla / 2


def test_equals_the_compiled_step(config: ConfigDict) -> None:
    """Every multiplication of the jaxpr is in the compiled program, loops multiplied out, and no other."""
    program = plan_compile.program_of(config, hf_preset("llama_tiny"), None, jax.devices()[:1])
    traced, hardware, _ = plan_compile.counted(config, program)
    assert hlo.traffic(traced.lower().compile().as_text()).dot_flops == flops.total(hardware)


def test_conditions_kernels_and_shard_map() -> None:
    mesh = Mesh(jax.devices(), ("x",))

    def branches(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    x = jnp.ones((16, 16))
    assert flops.total(flops.hardware(jax.jit(branches).trace(x))) == 2 * 2 * 16**3
    assert flops.total(flops.hardware(jax.jit(split).trace(x))) == 8 * 2 * 2 * 2 * 16


def test_ragged_and_convolution() -> None:
    tokens, experts, sizes = jnp.ones((12, 8)), jnp.ones((3, 8, 5)), jnp.asarray([4, 4, 4], jnp.int32)
    ragged = flops.hardware(jax.jit(jax.lax.ragged_dot).trace(tokens, experts, sizes))
    assert flops.total(ragged) == 2 * 12 * 8 * 5  # each token by one expert's weight
    image, kernel = jnp.ones((2, 3, 10, 10)), jnp.ones((7, 3, 3, 3))
    conv = flops.hardware(jax.jit(lambda i, k: jax.lax.conv(i, k, (1, 1), "VALID")).trace(image, kernel))
    assert flops.total(conv) == 2 * 2 * 7 * 8 * 8 * 3 * 9


def test_a_loop_of_unknown_length_is_refused() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(UserError, match="while loop"):
        flops.hardware(jax.jit(loop).trace(jnp.ones((4, 4))))


@pytest.mark.parametrize(("causal", "share"), [(True, 1 / 2), (False, 1)])
def test_flash_attention_counts_the_rounds_of_its_loops(causal: bool, share: float) -> None:
    """Up to the diagonal, whose blocks count whole: forward 128 x 64, backward 32 x 32."""
    tokens, heads, dim = 512, 4, 16
    mesh = sharding.make_mesh(config_lib.base(), jax.devices()[:1])
    run = Runtime(attention="flash", mesh=mesh, spec=sharding.spec)
    segments = jnp.ones((1, tokens), jnp.int32)

    def loss(q: jax.Array, kv: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, kv, kv, segments, segments, Rule(0.1, causal=causal), run))

    given = jnp.ones((1, tokens, heads, dim)), jnp.ones((1, tokens, 2, dim))
    product = 2 * tokens * tokens * heads * dim

    def of(block: int) -> float:  # the share of the scores in blocks that are computed
        return share + (block / tokens / 2 if causal else 0)

    assert flops.total(flops.model(jax.jit(loss).trace(*given), 1)) == 3 * 2 * product * of(128)
    backward = (4 + 3) * product * of(32)  # keys and values, then queries: each makes the scores again
    assert flops.total(flops.hardware(jax.jit(jax.grad(loss)).trace(*given))) == 2 * product * of(128) + backward


def test_splash_attention_counts_the_blocks_of_its_mask(config: ConfigDict) -> None:
    """Two by two blocks of 1024: of a causal mask one is empty."""
    config.data.max_length, config.model.attention, config.train.remat = 2048, "splash", "none"
    hf = hf_preset("llama_tiny") | {"max_position_embeddings": 4096, "head_dim": 128}
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    program = plan_compile.program_of(config, hf, None, list(mesh.devices.flat))
    _, hardware, model = plan_compile.counted(config, program)
    kernels = flops.total({dot: n for dot, n in model.items() if dot.kind == "kernel"})
    assert kernels == 3 * 3 / 4 * 2 * 2 * B * 2048 * 2048 * N * 128 * L
    assert flops.by_dtype(hardware).keys() >= {"float32"}
