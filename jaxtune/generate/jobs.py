"""The host's side of rollouts: which jobs wait, which prompts are to be prefilled for them, and what has been made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

BUCKET_TOKENS = 32  # prompt and cache lengths are rounded up to this, so that few shapes compile
PREFILL_ROWS = 16
NOBODY = -1  # the job of an idle row

Progress = Callable[[Iterable[int], int, str], Iterator[int]]


class Rollout(NamedTuple):
    """One completion: `prompt` is the number of its prompt; tokens (T,) int32 hold the stop token where it `ended` by one;
    logps (T,) float32 are of the distribution that each token was drawn from, its temperature, top-k, top-p and min-p applied.
    """

    prompt: int
    tokens: np.ndarray
    logps: np.ndarray
    ended: bool


class Queue(NamedTuple):
    """Jobs that wait, in order, each with its prompt's place in the pool; `num` of them are real. `more`: the host has others."""

    jobs_Q: Any
    entries_Q: Any
    num: Any
    more: Any


def rounded(tokens: int) -> int:
    return max(1, -(-tokens // BUCKET_TOKENS)) * BUCKET_TOKENS


class Batch(NamedTuple):
    """Prompts to prefill together, padded to `width`, and their places in the pool; a place past its end is nobody's."""

    prompts: list[int]
    width: int
    entries_R: np.ndarray


class Waiting:
    """The jobs that have not begun: those whose prompt is in the pool, in order, and those whose prompt is not yet.

    Prompts go by length, so that likes are prefilled with likes.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group_size: int, entries: int):
        self._lengths, self._group, self._num_entries = [len(prompt) for prompt in prompts], group_size, entries
        self._prompts = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
        self._ready: deque[tuple[int, int]] = deque()  # (job, place of its prompt in the pool)
        self._free = list(range(entries))
        self.num = len(prompts) * group_size

    def to_prefill(self) -> Iterator[Batch]:
        """Batches of prompts for the free places; few places wait until they are enough for a batch."""
        while self._prompts and len(self._free) >= min(PREFILL_ROWS, len(self._prompts), self._num_entries):
            chosen = [self._prompts.popleft() for _ in range(min(PREFILL_ROWS, len(self._prompts), len(self._free)))]
            places = [self._free.pop() for _ in chosen]
            for prompt, place in zip(chosen, places, strict=True):
                self._ready.extend((prompt * self._group + member, place) for member in range(self._group))
            filling = [chosen[-1]] * (PREFILL_ROWS - len(chosen))
            entries_R = np.asarray(places + [self._num_entries] * len(filling), np.int32)
            yield Batch(chosen + filling, rounded(self._lengths[chosen[0]] - 1), entries_R)

    def queue(self) -> Queue:
        """As many jobs as two fillings of all rows, from those that are ready."""
        first = list(islice(self._ready, 2 * self._num_entries))
        jobs_Q, entries_Q = np.zeros((2, 2 * self._num_entries), np.int32)
        jobs_Q[: len(first)], entries_Q[: len(first)] = zip(*first, strict=True) if first else ((), ())
        return Queue(jobs_Q, entries_Q, np.int32(len(first)), np.bool_(self.num > len(first)))

    def take(self, num: int) -> None:
        """The first `num` jobs have begun: a prompt that none waits for any more leaves its place."""
        self.num -= num
        for _ in range(num):
            _, place = self._ready.popleft()
            if not self._ready or self._ready[0][1] != place:
                self._free.append(place)


class Made:
    """What rows have made so far, by job."""

    def __init__(self, num_jobs: int, stop_ids: tuple[int, ...], max_new_tokens: int, progress: Progress):
        self._stop_ids, self._most = stop_ids, max_new_tokens
        self._parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(num_jobs)]
        self._lengths = np.zeros(num_jobs, np.int64)
        self._bar, self.num = iter(progress(range(num_jobs), num_jobs, "rollouts")), 0

    def add(self, jobs_TB: np.ndarray, tokens_TB: np.ndarray, logps_TB: np.ndarray) -> None:
        """Takes a block of steps."""
        real = jobs_TB != NOBODY
        if not real.any():  # a block may stop before its first step, for fewer rows to go on
            return
        order = np.argsort(jobs_TB[real], kind="stable")  # a row's tokens stay in the order of time
        jobs, tokens, logps = (each[real][order] for each in (jobs_TB, tokens_TB, logps_TB))
        found, starts = np.unique(jobs, return_index=True)
        for job, own, its in zip(found, np.split(tokens, starts[1:]), np.split(logps, starts[1:]), strict=True):
            self._parts[job].append((own, its))
            self._lengths[job] += len(own)
            if own[-1] in self._stop_ids or self._lengths[job] == self._most:
                self.num += 1
                next(self._bar, None)

    def rollouts(self, group_size: int) -> list[Rollout]:
        """All of them, complete."""
        whole = [[np.concatenate(each) for each in zip(*parts, strict=True)] for parts in self._parts]
        return [
            Rollout(job // group_size, tokens, logps, bool(tokens[-1] in self._stop_ids))
            for job, (tokens, logps) in enumerate(whole)
        ]
