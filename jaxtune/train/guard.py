"""What is looked at while a run trains, beside its loss: what it costs the model it starts from, and whether that ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtune.config import ConfigDict
from jaxtune.train.state import Params


class Seen(NamedTuple):
    """What a look found: metrics to log, the names of broken sets, and lines for the terminal."""

    metrics: dict[str, float]
    broken: tuple[str, ...]
    told: tuple[str, ...]


class Guard(NamedTuple):
    """How a run is looked at. The functions take all parameters of the model; None = not looked at.

    `sets(steps, params)` measures the protected sets; `kl(steps, params)` is forward KL from the first weights, nats per token.
    """

    sets: Callable[[int, Params], Seen] | None = None
    kl: Callable[[int, Params], float] | None = None

    def due(self, config: ConfigDict, done: int, validated: bool) -> tuple[bool, bool]:
        """Whether the sets, and the KL, are to be measured after `done` steps."""
        protect = config.protect
        kl = validated if not protect.kl_every_steps else done % protect.kl_every_steps == 0
        sets = bool(protect.every_steps) and done % protect.every_steps == 0
        return sets and self.sets is not None, kl and self.kl is not None

    def look(self, due: tuple[bool, bool], done: int, params: Params, tracker: Any, progress: Any) -> None:
        """Measures what is `due`, logs it, and keeps in `progress` since when a set was broken, and when last none was."""
        if due[1] and self.kl is not None:
            tracker.log(done - 1, {"base_kl": self.kl(done, params)})
        if not due[0] or self.sets is None:
            return
        seen = self.sets(done, params)
        tracker.log(done - 1, seen.metrics)
        for line in seen.told:
            tracker.say(line)
        if not seen.broken:
            progress.within_step = done
        elif not progress.broken_step:
            progress.broken_step, progress.broken_sets = done, list(seen.broken)


def stops(config: ConfigDict, progress: Any) -> bool:
    """Whether a broken set ends the run."""
    return bool(progress.broken_step) and config.protect.on_broken != "report"


def kept(config: ConfigDict, progress: Any) -> int:
    """The step whose checkpoint a broken set would roll the run back to; 0 = none."""
    return int(progress.within_step) if config.protect.on_broken == "rollback" else 0


def stopped(config: ConfigDict, progress: Any, done: int) -> str:
    """The notice of a run that a broken set has ended."""
    return (
        f"Stopped after step {done} of {config.train.steps}, for there it broke a protected set beyond its tolerance: "
        f"{', '.join(progress.broken_sets)} (protect.on_broken={config.protect.on_broken!r})."
    )
