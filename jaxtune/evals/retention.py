"""What one run costs the model it starts from: its protected sets and its KL from the base, before, on the way and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxtune import tracking
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, protected, tasks
from jaxtune.evals.protected import Protected, Verdict
from jaxtune.train import base_kl
from jaxtune.train import rows as rows_lib
from jaxtune.train.guard import Guard, Seen
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

Results = dict[str, tasks.Result]


class Retention:
    """Measures it, says so, and holds what was found; without protected sets and KL every method does nothing.

    `before`, `after` and `verdicts` are by set, of the exported weights; `base_kl` in nats per token; `alerts` are what is broken, in
    words; `refused` says why there is nothing to export.
    """

    def __init__(self, config: ConfigDict, sets: list[Protected], tokenizer: Tokenizer, show: Any):
        self._config, self._sets, self._tokenizer, self._show = config, sets, tokenizer, show
        self._program: Program  # given with the first parameters
        self.before: Results = {}
        self.after: Results = {}
        self.verdicts: dict[str, Verdict] = {}
        self.base_kl: float | None = None
        self.alerts: list[str] = []
        self.notices: list[str] = []
        self.refused = ""
        self._kl: Callable[[Params], float] | None = None
        self._last: tuple[int, Results] = (-1, {})
        self._looked: set[tuple[str, int]] = set()  # what was logged on the way: ("sets" or "kl", after how many steps)
        self._exported = 0  # the step whose weights are

    def begin(self, workdir: Path, data: rows_lib.Rows, program: Program, params: Params) -> None:
        """Measures the model as training starts; a run that resumes takes what it had measured, where it asks the same."""
        self._kl = base_kl.prepare(self._config, data, self._tokenizer, program, params)
        self.measure_base(workdir, program, params, again=not self._config.checkpoint.resume)

    def measure_base(self, workdir: Path, program: Program, params: Params, again: bool = False) -> None:
        """Measures the sets on the weights that training starts from, or, unless `again`, takes what a run has kept in `workdir`."""
        self._program = program
        protected.check(self._sets, self._tokenizer, program)
        if not self._sets:
            return
        file = workdir / "protected_before.json"
        asked = {one.name: measure.asked(one.config, one.held) for one in self._sets}
        known_file = not again and jax.process_count() == 1 and file.exists()  # hosts may not see the same files
        saved = json.loads(file.read_text("utf-8")) if known_file else {}
        found = {name: tasks.from_json(saved[name], how) for name, how in asked.items() if name in saved}
        missing = [one for one in self._sets if found.get(one.name) is None]
        made = self._scores(missing, params, "before") if missing else {}
        known = {name: result for name, result in found.items() if result is not None} | made
        self.before = {one.name: known[one.name] for one in self._sets}
        if jax.process_index() == 0 and made:
            texts = {name: tasks.to_json(result, asked[name]) for name, result in self.before.items()}
            write_whole(file, json.dumps(texts))

    def measure_tuned(self, params: Params) -> None:
        """Measures the sets on these weights, and judges them."""
        if self._sets:
            self._take(None, params)

    def log_before(self, tracker: Any, first_step: int) -> None:
        """Logs the scores before as of step -1, once in a run."""
        if self.before and first_step == 0:
            tracker.log(-1, _metrics(self.before))

    def guard(self) -> Guard:
        """How the loop looks at it."""
        return Guard(self._look if self._sets else None, self._look_kl if self._kl else None)

    def _look_kl(self, steps: int, params: Params) -> float:
        assert self._kl is not None
        self._looked.add(("kl", steps))
        return self._kl(params)

    def _look(self, steps: int, params: Params) -> Seen:
        results, verdicts = self._measured(params, f"step {steps}")
        self._last = (steps, results)
        self._looked.add(("sets", steps))
        broken = tuple(name for name, verdict in verdicts.items() if verdict.broken)
        return Seen(_metrics(results), broken, tuple(_lines(verdicts, f"step {steps}", sys.stderr)))

    def _measured(self, params: Params, what: str) -> tuple[Results, dict[str, Verdict]]:
        results = self._scores(self._sets, params, what)
        return results, protected.judge(self._sets, self.before, results, self._config.protect.judge_by)

    def _scores(self, sets: list[Protected], params: Params, what: str) -> Results:
        return protected.measure(sets, self._tokenizer, self._program, params, self._show, what)

    def choose(self, checkpoints: Checkpoints, frozen: Params, outcome: Any, trained: Callable[..., Params]) -> Params:
        """Measures the trained weights that are to be exported; returns them, or those that the run is rolled back to.

        Args:
          frozen: the parameters that do not train; `outcome` is the loop's.
          trained: the trained parameters: `trained()` with the lowest validation loss, `trained(step=N)` of a checkpoint.
        """
        params, within = trained(), outcome.progress.within_step
        self._exported = outcome.progress.best_step or outcome.steps
        if self._sets:
            # The last look saw the very weights that are to be exported, unless another step has a better validation loss.
            is_seen = self._last[0] == outcome.steps and outcome.progress.best_step in (0, outcome.steps)
            self._take(self._last[1] if is_seen else None, {**frozen, **params})
            broken = [name for name, verdict in self.verdicts.items() if verdict.broken]
            back = bool(broken) and self._config.protect.on_broken == "rollback"
            if back and within:
                params, self._exported = trained(step=within), within
                self._take(None, {**frozen, **params})
                self.notices.append(
                    f"Rolled back to step {within}, the last that was measured with every protected set within its tolerance: "
                    f"what was trained beyond it broke {', '.join(broken)}."
                )
            elif back:
                self.refused = (
                    f"nothing is exported: every measured checkpoint breaks a protected set beyond its tolerance ({', '.join(broken)}); "
                    "measure more often (protect.every_steps), train more gently, or allow a larger tolerance, in another --workdir"
                )
            checkpoints.roll_back(within if back else None)
        self.base_kl = self._kl({**frozen, **params}) if self._kl else None
        self._tell(outcome.progress)
        return params

    def _take(self, seen: Results | None, params: Params) -> None:
        self.after = self._measured(params, "after")[0] if seen is None else seen
        self.verdicts = protected.judge(self._sets, self.before, self.after, self._config.protect.judge_by)

    def _tell(self, progress: Any) -> None:
        broken = {name: verdict for name, verdict in self.verdicts.items() if verdict.broken}
        self.alerts = [f"Protected set {name} is broken: {verdict.told()}." for name, verdict in broken.items()]
        if self.refused:
            self.alerts.append(self.refused[:1].upper() + self.refused[1:] + ".")
        if progress.broken_step and self._config.protect.on_broken == "report":
            sets = ", ".join(progress.broken_sets)
            self.notices.append(
                f"The first protected set was beyond its tolerance at step {progress.broken_step}: {sets}."
            )
        if self._kl is None and base_kl.wanted(self._config):
            self.notices.append("base_kl was not measured: no row of the task has an answer to be read.")

    def log_after(self, tracker: Any) -> None:
        """Logs the scores of the exported weights with their step, unless the loop has done so on the way."""
        if self.after and ("sets", self._exported) not in self._looked:
            tracker.log(self._exported - 1, _metrics(self.after))
        if self.base_kl is not None and ("kl", self._exported) not in self._looked:
            tracker.log(self._exported - 1, {"base_kl": self.base_kl})

    def facts(self) -> dict[str, Any]:
        """What report.json says."""
        told = {"protected": protected.account(self.verdicts, self.before, self.after)} if self.verdicts else {}
        return told if self.base_kl is None else told | {"base_kl": self.base_kl}

    def lines(self) -> list[str]:
        """The verdicts for the terminal, a line a set."""
        return _lines(self.verdicts, "after", sys.stdout)

    def end(self) -> None:
        """Ends a run that has nothing to export.

        Raises:
          UserError: saying why.
        """
        if self.refused:
            raise UserError(self.refused)


def _metrics(results: Results) -> dict[str, float]:
    return {
        f"protected/{name}/{metric}": e.value
        for name, result in results.items()
        for metric, e in result.metrics.items()
    }


def _lines(verdicts: dict[str, Verdict], when: str, stream: TextIO) -> list[str]:
    """A line a set for this stream, red where it is broken."""
    lines = []
    for name, verdict in verdicts.items():
        line = f"protected {name}, {when}: {verdict.told()}"
        lines.append(tracking.red(f"{line}: BROKEN", stream) if verdict.broken else line)
    return lines
