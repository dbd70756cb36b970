"""What sharing a pair's prompt saves: a DPO step whose answers share it beside one where each answer has its own.

    python benchmarks/shared_prompts.py [--steps 6] [--prompt 480] [--answer 32] [--no-record]

SmolLM2-135M's shape, random weights, LoRA r16, float32, the reference with the adapter off; `--rows` pairs a step, each of a
prompt of 480 tokens and two answers of 32. The two steps run in turn, so that both are measured under the same load; the
ratio is of their fastest. Loss and gradient norm must be the same to 1e-5.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np
import table

TOLERANCE = 1e-5


def rows(share: bool, options: argparse.Namespace) -> Any:
    """The same random pairs, laid out either way."""
    from collections import Counter

    from jaxtune.data import preferences
    from jaxtune.data.readers import Reader

    rng, made = np.random.default_rng(0), []
    for _ in range(options.rows):
        prompt, *answers = (
            rng.integers(5, 40000, n).astype(np.int32) for n in (options.prompt, options.answer, options.answer)
        )
        weights = tuple(np.ones(len(one), np.float32) for one in answers)
        made.append(preferences.Answers(prompt, (1, 2), tuple(answers), weights))
    names = [str(i) for i in range(options.rows)]
    return preferences.rows_of(made, names, [0.0] * options.rows, Counter(), Reader("pairs", share=share))


class Side:
    """A compiled DPO step on one resident batch."""

    def __init__(self, share: bool, options: argparse.Namespace):
        import jax

        from jaxtune import sharding
        from jaxtune.config import base
        from jaxtune.data.batches import stack
        from jaxtune.train import random_weights, state, step
        from jaxtune.weights.source import hf_preset

        data, config = rows(share, options), base()
        config.train.objective, config.train.batch_size, config.train.steps = "dpo", options.rows, 100
        config.data.max_length, config.tune.dropout, config.train.remat = int(data.lengths.max()), 0.0, "none"
        config.preference.share_prompts, config.mesh.fsdp = "always" if share else "never", 1
        self.row_tokens, mesh = config.data.max_length, sharding.make_mesh(config, jax.devices()[:1])
        self._program = state.abstract(config, hf_preset("smollm2_135m"), mesh, 100)
        batch = stack(data, [(i,) for i in range(options.rows)], config.data.max_length, 0)
        names = step.fields(config, self._program)
        self._batch = sharding.to_global({name: batch[name] for name in names}, mesh, options.rows)
        self._state, self._frozen = state.create(self._program, random_weights.random_base(self._program, 0), 0)
        self._run = step.make(config, self._program)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self._state, metrics = self._run(self._state, self._frozen, self._batch)
        self.losses.append(float(metrics["loss"]))
        self.seconds.append(time.perf_counter() - began)
        self.norms.append(float(metrics["grad_norm"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 6), ("prompt", 480), ("answer", 32), ("rows", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-record", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    shared, plain = Side(True, options), Side(False, options)
    for _ in range(options.steps):
        shared.step()
        plain.step()
    quickest = [min(side.seconds[1:]) for side in (shared, plain)]  # the first compiles
    apart = max(np.abs(np.subtract(shared.losses, plain.losses)).max(), abs(shared.norms[0] / plain.norms[0] - 1))
    ratio = quickest[1] / quickest[0]
    print(
        f"shared: {shared.row_tokens} tokens a pair, {quickest[0]:.2f} s a step; plain: {plain.row_tokens}, {quickest[1]:.2f} s"
    )
    print(f"{ratio:.2f} x as fast; losses and first gradient norm at most {apart:.1e} apart")
    if not options.no_record:
        cells = [
            f"{options.prompt} + 2 x {options.answer}",
            f"{quickest[0]:.2f} s",
            f"{quickest[1]:.2f} s",
            f"{ratio:.2f}",
            f"{apart:.0e}",
        ]
        table.append("shared_prompts.py", [*table.origin("jax"), *cells])
    return 0 if apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
