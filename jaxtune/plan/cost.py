"""How long a step takes by the roofs of its chips, and what a run costs; and what a hosted service would charge.

The roofline (doi:10.1145/1498765.1498785): each resource alone would need

    compute  FLOPs of a device / its peak, dtype by dtype
    hbm      bytes through HBM / its bandwidth
    ici      bytes sent inside a slice / the one-way bandwidth of the links that the slice's shape uses
    dcn      bytes sent between slices / a chip's share of the network

and on a TPU, where these overlap, the step takes as long as the slowest of them, divided by `plan.efficiency`: the share of
that roof which real steps reach. On a CPU nothing overlaps: measured times of the step's own matmuls and of what it moves
are added. Hours are those of `train.steps` steps: start-up, evaluation and checkpoints come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxtune.chips import Slice
from jaxtune.config import ConfigDict
from jaxtune.types import UserError

_HOUR = 3600.0


class Work(NamedTuple):
    """What a step asks for. FLOPs are over all devices, bytes are a device's."""

    flops_by_dtype: Mapping[str, float]
    model_flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float
    tokens: int
    dot_seconds: float | None = None  # of a CPU: the step's matmuls, measured


class Forecast(NamedTuple):
    """`seconds_by_resource` is what each alone would need for a step. Dollars are None where no price is known. `not_counted`:
    resources that the step uses and whose speed the table of chips lacks."""

    limited_by: str
    seconds_by_resource: dict[str, float]
    efficiency: float
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_chip: float
    model_flops_utilisation: float
    hours: float
    usd_per_chip_hour: float | None
    usd_per_million_tokens: float | None
    training_usd: float | None
    not_counted: tuple[str, ...]


def work_of(plan: Any, dot_seconds: float | None = None) -> Work:
    """What a compiled plan asks for."""
    ici, dcn = (sum(found[key] for found in plan.collectives.values()) for key in ("bytes", "dcn_bytes"))
    by_dtype, model, moved = plan.hardware_flops_by_dtype, plan.model_flops, plan.hbm_traffic_bytes
    if dot_seconds is not None:  # what multiplications move is in their measured time
        moved -= plan.dot_traffic_bytes
    return Work(by_dtype, model, moved, ici, dcn, plan.tokens_per_step, dot_seconds)


def forecast(work: Work, place: Slice, steps: int, efficiency: float) -> Forecast:
    """Time and price of `steps` steps of this work on this slice."""
    chip, count = place.chip, place.num_devices
    compute = sum(found / place.num_chips / chip.peak(dtype) for dtype, found in work.flops_by_dtype.items())
    sent = {
        "ici": (work.ici_bytes, place.ici_bytes_per_second),
        "dcn": (work.dcn_bytes, chip.dcn_bytes_per_second / chip.devices),
    }
    seconds = {
        "compute": compute if work.dot_seconds is None else work.dot_seconds,
        "hbm": work.hbm_bytes / (chip.hbm_bytes_per_second / chip.devices),
        **{name: num_bytes / rate if rate else 0.0 for name, (num_bytes, rate) in sent.items()},
    }
    limit = max(seconds, key=lambda name: seconds[name])
    step = seconds[limit] / efficiency if chip.overlaps else sum(seconds.values())
    hours = step * steps / _HOUR
    price = chip.usd_per_chip_hour
    usd = None if price is None else hours * price * place.num_chips
    each = None if price is None else step * price * place.num_chips / _HOUR / work.tokens * 1e6
    peak = chip.peak(max(work.flops_by_dtype, key=lambda dtype: work.flops_by_dtype[dtype], default="bfloat16"))
    return Forecast(
        limited_by=limit,
        seconds_by_resource=seconds,
        efficiency=efficiency if chip.overlaps else 1.0,
        step_seconds=step,
        tokens_per_second=work.tokens / step,
        tokens_per_second_per_chip=work.tokens / step / place.num_chips,
        model_flops_utilisation=work.model_flops / step / (peak * count / chip.devices),
        hours=hours,
        usd_per_chip_hour=price,
        usd_per_million_tokens=each,
        training_usd=usd,
        not_counted=tuple(
            name for name, (num_bytes, rate) in sent.items() if num_bytes and not rate and place.num_chips > 1
        ),
    )


# ---- a hosted service ----

Range = tuple[Fraction, Fraction]


def wants_api(config: ConfigDict) -> bool:
    """Whether a hosted service is to be priced: anything that only its price needs is given."""
    p = config.plan
    training = p.api_training_usd_per_1k_tokens or p.api_training_tokens
    return bool(training or p.api_inference_usd_per_1k_tokens or p.monthly_requests or p.tokens_per_request)


def api(config: ConfigDict, training_tokens: int | None) -> dict[str, Any]:
    """What a hosted service charges: training tokens x price, and a month's requests x tokens x price; exact.

    `training_tokens` counts where the config does not. A range in any of them gives [low, high].

    Raises:
      UserError: a price for training and nothing to train on, or the other way round; a price for inference without requests and tokens, or the other
        way round.
    """
    p = config.plan
    found: dict[str, Any] = {}
    if p.api_training_tokens and not p.api_training_usd_per_1k_tokens:
        raise UserError(
            f"plan.api_training_tokens={p.api_training_tokens} has no price: set plan.api_training_usd_per_1k_tokens"
        )
    if p.api_training_usd_per_1k_tokens:
        tokens = _range(p.api_training_tokens) if p.api_training_tokens else (Fraction(training_tokens or 0),) * 2
        if not tokens[1]:
            raise UserError(
                "plan.api_training_usd_per_1k_tokens needs tokens: set plan.api_training_tokens, data.train or train.steps"
            )
        found["training_tokens"] = _plain(tokens)
        found["training_usd"] = _plain(_times(tokens, _range(p.api_training_usd_per_1k_tokens), Fraction(1, 1000)))
    given = [p.api_inference_usd_per_1k_tokens, p.monthly_requests, p.tokens_per_request]
    if any(given) and not all(given):
        raise UserError(
            "a month of inference needs all of plan.api_inference_usd_per_1k_tokens, plan.monthly_requests and "
            f"plan.tokens_per_request; got {given[0]}, {given[1]} and {given[2]}"
        )
    if all(given):
        price, requests, each = map(_range, given)
        found["monthly_tokens"] = _plain(_times(requests, each))
        found["monthly_inference_usd"] = _plain(_times(_times(requests, each), price, Fraction(1, 1000)))
    return found


def _range(values: Sequence[Any]) -> Range:
    """() of a config never comes here; one number is a range of itself. Read as written, so that 0.04 is 4/100."""
    numbers = [Fraction(str(value)) for value in values]
    return numbers[0], numbers[-1]


def _times(a: Range, b: Range, scale: Fraction = Fraction(1)) -> Range:
    return a[0] * b[0] * scale, a[1] * b[1] * scale


def _plain(found: Range) -> float | int | list[float | int]:
    low, high = (int(v) if v.denominator == 1 else float(v) for v in found)
    return low if found[0] == found[1] else [low, high]
