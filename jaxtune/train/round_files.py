"""Rounds as files: what a round's completions are and are worth, whole or not there, so that a run goes on in mid-round."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune import checkpoint, tracking
from jaxtune.config import ConfigDict


class Round(NamedTuple):
    """N completions of P prompts, K tokens of theirs end to end.

    `prompts_N`: number of each one's prompt; `lengths_N`; `ended_N`: by a stop token; `rewards_N`: NaN where rewards failed;
    `learned_N`: which are learned from; `tokens_K`; `old_logps_K`: of each when it was drawn; `reference_logps_K`; `advantages_K`; `values_K` and
    `returns_K`, where there is a critic; `told`: the round's metrics.
    """

    prompts_N: np.ndarray
    lengths_N: np.ndarray
    ended_N: np.ndarray
    rewards_N: np.ndarray
    learned_N: np.ndarray
    tokens_K: np.ndarray
    old_logps_K: np.ndarray
    reference_logps_K: np.ndarray
    advantages_K: np.ndarray
    values_K: np.ndarray | None
    returns_K: np.ndarray | None
    told: dict[str, float]

    @property
    def completions(self) -> list[np.ndarray]:
        """The tokens of each completion."""
        return np.split(self.tokens_K, np.cumsum(self.lengths_N)[:-1])


class RoundFiles:
    """The rounds of one workdir; those of another config, or of other prompts and rows (`rows`, a hash), are not read.

    Each process has files of its own. With `rl.keep_rounds`, only so many stay.
    """

    def __init__(self, folder: Path, config: ConfigDict, rows: str):
        self._folder, self._config, self._rows, self._keep = folder, config, rows, config.rl.keep_rounds

    def read(self, number: int) -> Round | None:
        """The round, or None where some process lacks it, or has another's."""
        found = self._read(self._path(number))
        if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.asarray(found is not None))):
            return None
        return found

    def write(self, number: int, one: Round) -> None:
        """Keeps the round, whole or not at all.

        Raises:
          UserError: the disk is full.
        """
        path = self._path(number)
        partial = path.with_name(path.name + ".partial")
        arrays = {name: value for name, value in one._asdict().items() if value is not None and name != "told"}
        about = {"config": self._config.to_dict(), "rows": self._rows}
        texts = {"told": np.asarray(json.dumps(one.told)), "about": np.asarray(json.dumps(about, default=list))}
        with tracking.writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays, **texts)  # type: ignore[arg-type]
            partial.replace(path)
        if self._keep and number >= self._keep:
            self._path(number - self._keep).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
        return self._folder / f"round_{number:06d}{host}.npz"

    def _read(self, path: Path) -> Round | None:
        try:
            with path.open("rb") as opened, np.load(opened) as saved:
                found: dict[str, Any] = {name: saved[name] for name in saved.files}
        except (OSError, ValueError, EOFError, BadZipFile):  # not there, or cut short
            return None
        about = json.loads(str(found.pop("about", "{}")))
        # Not by a hash of the whole config: a later jaxtune has fields that this round's did not have.
        if about.get("rows") != self._rows or checkpoint.first_change(
            about["config"], self._config, checkpoint.free(self._config)
        ):
            return None
        found["told"] = json.loads(str(found["told"]))
        return Round(**{"values_K": None, "returns_K": None} | found)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a JSON Lines file, if it is there, with the lines that are `wanted`, without one torn by a crash; whole or as it was."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            kept += [line] if wanted(json.loads(line)) else []
        except ValueError:
            continue
    partial = path.with_name(path.name + ".partial")
    with tracking.writing(path):
        partial.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        partial.replace(path)


def add_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Adds to a JSON Lines file."""
    with tracking.writing(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
