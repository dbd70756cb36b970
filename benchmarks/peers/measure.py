"""What each side's program does in its own environment: compile for a TPU that is not here, and print the bytes.

Runs under the side's own interpreter, so it imports nothing of jaxtune's.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax


def work() -> dict[str, Any]:
    """The work that the parent asks for, and an environment in which no TPU is looked for."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return json.loads(sys.argv[1])


def devices(topology: str) -> list[Any]:
    """The devices of a TPU topology, described by libtpu."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def num_chips(topology: str) -> int:
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


def report(make: Callable[[], Any], packages: tuple[str, ...]) -> None:
    """Prints what the program that `make` compiles needs, in bytes of one device, or that it does not fit.

    Peak = arguments + temporaries + outputs that are not donated arguments + the program: `plan.compile`'s rule.
    """
    began = time.perf_counter()
    found: dict[str, Any]
    try:
        memory = make().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "hbm" in line.lower()]
        found = {"fits": False, "says": (lines or str(error).splitlines())[0][:300]}
    else:
        parts = {
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "new_output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "program_bytes": memory.generated_code_size_in_bytes,
        }
        own = memory.peak_memory_in_bytes - memory.host_temp_size_in_bytes  # XLA's figure counts the host's memory, too
        found = parts | {"fits": True, "peak_bytes": max(sum(parts.values()), own)}
    emit(found, began, packages)


def emit(found: dict[str, Any], began: float, packages: tuple[str, ...]) -> None:
    """Prints a result as one line of JSON, with the seconds since `began` and the versions."""
    versions = {name: version(name) for name in ("jax", "libtpu", *packages)}
    print(json.dumps(found | {"seconds": round(time.perf_counter() - began), "versions": versions}), flush=True)
