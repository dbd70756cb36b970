"""Bytes and collectives of compiled programs whose traffic is known; and forms that only TPU programs have."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.plan import hlo
from jaxtune.plan.hlo_text import array_bytes, parse

ROUNDS, ROWS, COLUMNS = 5, 64, 32
HEAD = "HloModule m\n\n"


@pytest.fixture(scope="module")
def program() -> str:
    """A loop of five rounds over two by four devices: a gather over four, a sum over two, a swap and a permute over eight."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))

    def body(x: jax.Array) -> jax.Array:  # (ROWS / 8, COLUMNS) a device
        def one(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = lax.all_gather(x, "b", axis=0, tiled=True)
            x = x + lax.psum(jnp.sin(whole[: x.shape[0]]), "a")
            x = lax.all_to_all(x, ("a", "b"), 0, 0, tiled=True)
            return lax.ppermute(jnp.cos(x), ("a", "b"), [(i, (i + 1) % 8) for i in range(8)]), None

        return lax.scan(one, x, None, length=ROUNDS)[0]

    split = jax.shard_map(
        body, mesh=mesh, in_specs=PartitionSpec(("a", "b")), out_specs=PartitionSpec(("a", "b")), check_vma=False
    )
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("a", "b"))))
    return jax.jit(split).lower(x).compile().as_text()


def test_collectives_count_bytes_times_rounds(program: str) -> None:
    shard = ROWS // 8 * COLUMNS * 4
    found = hlo.traffic(program, [0] * 8).collectives
    assert {kind: c.times for kind, c in found.items()} == dict.fromkeys(
        ("all-gather", "all-reduce", "all-to-all", "collective-permute"), ROUNDS
    )
    assert found["all-gather"].bytes == ROUNDS * 4 * shard * 3 / 4
    assert found["all-reduce"].bytes == ROUNDS * 2 * shard * 1 / 2
    assert found["all-to-all"].bytes == ROUNDS * shard * 7 / 8
    assert found["collective-permute"].bytes == ROUNDS * shard
    assert all(c.dcn_bytes == 0 for c in found.values())


def test_what_crosses_slices_is_told_apart(program: str) -> None:
    """Axis "a" is the one between two slices: the sum crosses whole, the gather over "b" not at all."""
    shard = ROWS // 8 * COLUMNS * 4
    found = hlo.traffic(program, [0] * 4 + [1] * 4).collectives
    assert found["all-reduce"].dcn_bytes == ROUNDS * 2 * shard / 2
    assert found["all-reduce"].bytes == 0
    assert found["all-gather"].dcn_bytes == 0
    assert found["collective-permute"].dcn_bytes == ROUNDS * shard


def test_hbm_bytes_of_a_loop_count_slices_as_themselves() -> None:
    """Each round reads one row of the stack and the carry, and writes the carry: not the whole stack."""
    rounds, size = 50, 4096

    def f(x: jax.Array, stack: jax.Array) -> jax.Array:
        return lax.scan(lambda x, row: (x * row, None), x, stack)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size,), (rounds, size))]
    found = hlo.traffic(jax.jit(f).lower(*shapes).compile().as_text()).hbm_bytes
    assert 3 * rounds * size * 4 <= found <= 5 * rounds * size * 4


TPU = (
    HEAD
    + """%piece (p0: bf16[1,16], p1: bf16[4,16]) -> bf16[4,16] {
  %p0 = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %all-gather.1 = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p0), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%cond (c: (u32[], bf16[1,16])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %c = (u32[]{:T(128)}, bf16[1,16]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (u32[], bf16[1,16])) -> (u32[], bf16[1,16]) {
  %one = u32[]{:T(128)} constant(1)
  %b = (u32[]{:T(128)}, bf16[1,16]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[1,16]{1,0} get-tuple-element(%b), index=1
  %buffer = bf16[4,16]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %f.1 = bf16[4,16]{1,0:S(1)} fusion(%x, %buffer), kind=kCustom, calls=%piece
  %f.2 = bf16[4,16]{1,0:S(1)} fusion(%x, %f.1), kind=kCustom, calls=%piece
  %i.2 = u32[]{:T(128)} add(%i.1, %one)
  %i.3 = u32[]{:T(128)} add(%i.2, %one)
  ROOT %t = (u32[]{:T(128)}, bf16[1,16]{1,0}) tuple(%i.3, %x)
}

ENTRY %main (a: bf16[1,16]) -> bf16[1,16] {
  %a = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, bf16[1,16]{1,0}) tuple(%zero, %a)
  %loop = (u32[]{:T(128)}, bf16[1,16]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %out = bf16[1,16]{1,0} get-tuple-element(%loop), index=1
}
"""
)


def test_an_unrolled_loop_and_a_chain_of_pieces() -> None:
    """Eight by steps of two are four rounds; two pieces of one channel are one collective; groups over a named axis."""
    found = hlo.traffic(TPU, [0] * 8).collectives
    assert found == {"all-gather": hlo.Collective(4, 4 * 4 * 16 * 2 * 3 / 4, 0)}
    crossing = hlo.traffic(TPU, [0, 0, 1, 1] * 2).collectives["all-gather"]
    assert crossing.dcn_bytes == 4 * 4 * 16 * 2 / 2 / 2  # half of it from the other slice, shared by two of this one
    assert crossing.bytes + crossing.dcn_bytes == found["all-gather"].bytes


def test_elements_of_tuples_in_their_short_form() -> None:
    """JAX 0.12 writes %b#1 where 0.10 has an instruction; nested ones, too."""
    short = TPU
    for name, whole, index in re.findall(r"  %(\S+) = \S+ get-tuple-element\(%(\S+)\), index=(\d+)\n", TPU):
        line = next(line for line in short.splitlines() if line.startswith(f"  %{name} = "))
        short = short.replace(f"{line}\n", "")
        short = re.sub(rf"%{re.escape(name)}(?![\w.])", f"%{whole}#{index}", short)
    assert short.count("get-tuple-element") == 1  # the root's
    assert hlo.traffic(short, [0] * 8) == hlo.traffic(TPU, [0] * 8)
    nested = "%f (p: (f32[2], (s32[3], /*index=1*/bf16[4]))) -> bf16[4] {\n  ROOT %r = bf16[4] copy(%p#1#1)\n}\n"
    nested = nested.replace("ROOT", "%p = (f32[2]{0}, (s32[3]{0}, /*index=1*/bf16[4]{0})) parameter(0)\n  ROOT")
    found = parse(nested)[0]["f"]
    assert [(one.name, one.opcode) for one in found[1:3]] == [
        ("p#1", "get-tuple-element"),
        ("p#1#1", "get-tuple-element"),
    ]
    assert array_bytes(found[2].type) == 8


def test_sizes_and_memories() -> None:
    assert array_bytes("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == 12
    assert array_bytes("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", hbm_only=True) == 0
    assert array_bytes("(f32[], s4[3]{0}, pred[5], f8e4m3fn[4], token[])") == 4 + 2 + 5 + 4  # nibbles are rounded up
    computations, entry = parse(TPU)
    assert entry == "main"
    assert [i.opcode for i in computations["cond"]] == ["constant", "parameter", "get-tuple-element", "compare"]
