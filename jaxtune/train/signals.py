"""What a run is asked to do by signals: to save, and to end."""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
    """Notices SIGTERM, which clouds send before they take a machine, and a first Ctrl-C; all processes agree on the step."""

    def __init__(self) -> None:
        self._asked, self.by = False, "SIGTERM"
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if jax.process_count() == 1:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup, nor in the background
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._asked = True
        if number == signal.SIGINT:
            self.by = "Ctrl-C"
            signal.signal(number, self._previous[number])
            # Not by print: this may have interrupted one.
            os.write(2, b"\nsaving after this step; Ctrl-C once more stops at once, and loses what is not saved\n")

    def now(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._asked
