"""Tasks: rows that ask alike. Which of them are never trained on, demonstrations before a question, and batches of one task each.

Everything drawn is a pure function of a seed and a number (of a context, a step, a draw), so a run resumes by its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import packing
from jaxtune.data.batches import BatchSource, Rows, stack
from jaxtune.data.formats import Example
from jaxtune.data.pipeline import Splits
from jaxtune.types import Batch, UserError, nearest


def wanted(meta: ConfigDict) -> bool:
    """Whether a run asks of a row what its task is."""
    return bool(meta.demonstrations or meta.algorithm or meta.held_out or meta.shots)


def by_name(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Task -> its examples in their order, tasks by name."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    return dict(sorted(found.items()))


def arrange(splits: Splits, meta: ConfigDict, seed: int) -> Splits:
    """Takes held-out tasks out of training and validation, then puts demonstrations before what is trained on.

    Test rows are then those of held-out tasks alone, and `support` what their training rows were: demonstrations, and rows
    to adapt to.

    Raises:
      UserError: a held-out task that no row has, none left to train on, or a task with too few rows for its demonstrations.
    """
    if not wanted(meta):
        return splits
    known = sorted({example.task for split in (splits.train, splits.validation, splits.test) for example in split})
    for name in meta.held_out:
        if name not in known:
            raise UserError(f"meta.held_out has {name!r}{nearest(name, known)}; tasks of the rows: {', '.join(known)}")
    held = set(meta.held_out)

    def of(split: list[Example], is_held: bool) -> list[Example]:
        return [example for example in split if (example.task in held) == is_held]

    train, validation = of(splits.train, False), of(splits.validation, False)
    if not train:
        raise UserError(f"meta.held_out={tuple(meta.held_out)} leaves no task to train on; tasks: {', '.join(known)}")
    test = of(splits.test, True) if held else splits.test
    support = of(splits.train, True) if held else splits.train
    counts = splits.counts | {"train": len(train), "validation": len(validation), "test": len(test)}
    counts |= {"rows_of_held_out_tasks": len(support)} if held else {}
    if meta.demonstrations:
        number = meta.contexts or len(train)
        rows, train = train, contexts(train, meta.demonstrations, number, seed)
        validation = contexts(validation, meta.demonstrations, len(validation), seed, rows) if validation else []
    return Splits(train, validation, test, counts, support)


def contexts(
    examples: Sequence[Example], num_demonstrations: int, number: int, seed: int, shown: Sequence[Example] = ()
) -> list[Example]:
    """Returns `number` questions, each after so many demonstrations of its own task (MetaICL, arXiv:2110.15943, 3.1).

    Context i draws its task, all being equally likely, and its rows, all different, from (seed, i). Demonstrations are of the
    task's rows in `shown`, as few questions may be held out; where it has none there, they are of `examples` too.

    Raises:
      UserError: a task has too few rows.
    """
    tasks, pools, made = by_name(examples), by_name(shown), []
    for name, of_task in tasks.items():
        if len(pools.get(name, of_task[1:])) < num_demonstrations:
            raise UserError(
                f"task {name!r} has {len(pools.get(name, of_task))} rows; expected more than meta.demonstrations={num_demonstrations}: lower "
                "it, or leave the task out"
            )
    for index in range(number):
        bits = np.random.Philox(key=[seed % 2**64, index])
        name = list(tasks)[int(bits.random_raw(1)[0] % len(tasks))]
        questions, pool = tasks[name], pools.get(name, tasks[name])
        rows = np.argsort(bits.random_raw(len(pool)), kind="stable")[: num_demonstrations + 1]
        if name in pools:
            question = questions[int(bits.random_raw(1)[0] % len(questions))]
            demonstrations = [pool[row] for row in rows[:num_demonstrations]]
        else:
            *demonstrations, question = [pool[row] for row in rows]
        made.append(demonstrated(demonstrations, question))
    return made


def demonstrated(demonstrations: Sequence[Example], question: Example) -> Example:
    """Returns the question after its demonstrations: earlier turns of a chat, or text above; they are read, not trained.

    Raises:
      UserError: a row without a prompt and an answer.
    """
    for example in (*demonstrations, question):
        if example.answer is None or example.text is not None or example.words is not None:
            raise UserError(
                f"{example.row_id}: a demonstration is a prompt with its answer; this row is a text without one"
            )
    if question.messages is None:
        shown = "".join(f"{example.prompt}{example.answer}\n\n" for example in demonstrations)
        return question._replace(prompt=shown + question.prompt)
    first = sum(message["role"] == "system" for message in question.messages[:1])
    turns = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for example in demonstrations
        for message in example.messages or ()
        if message["role"] != "system"
    ]
    return question._replace(messages=(*question.messages[:first], *turns, *question.messages[first:]))


def drawn(examples: Sequence[Example], number: int, seed: int, draw: int) -> list[Example]:
    """Returns the first `number` of an order of the examples that (seed, draw) fixes, answers taking turns.

    The first k of two numbers are the same: a curve over k adds examples, and takes none away.
    """
    bits = np.random.Philox(key=[seed % 2**64, draw]).random_raw(len(examples))
    order = np.argsort(bits, kind="stable")
    seen: dict[str | None, int] = {}
    turns = []
    for place, row in enumerate(order):
        answer = examples[row].answer
        seen[answer] = seen.get(answer, 0) + 1
        turns.append((seen[answer], place))
    return [examples[order[place]] for _, place in sorted(turns)[:number]]


class TaskSource(BatchSource):
    """Batches for learning to learn: some tasks at a time, for each several batches of its own rows.

    Row b of a batch belongs to micro-batch b mod (tasks x batches), the batches of a task adjacent, as `train.step` takes
    them apart. Step s draws different tasks, as far as there are, and of each different bins, as far as there are, from
    (seed, s); a query batch (`num_query` 1, the last of each task) shares no bin with the others.
    """

    def __init__(
        self, rows: Rows, tasks: Sequence[str], max_length: int, packed: bool, seed: int, batch_size: int, pad_id: int,
        num_tasks: int, num_batches: int, num_query: int = 0,
    ) -> None:  # fmt: skip
        """`tasks`: the task of each row; `num_batches` of each of `num_tasks` in a batch, query batches included.

        Raises:
          UserError: a task has too few rows for a query batch and one more.
        """
        super().__init__(rows, max_length, packed, True, seed, batch_size, pad_id)
        self.names, self._num = sorted(set(tasks)), (num_tasks, num_batches, num_query)
        self._rows_each = batch_size // (num_tasks * num_batches)
        numbers = np.asarray([self.names.index(task) for task in tasks])
        self._bins_of = [_bins(rows, np.flatnonzero(numbers == n), max_length, packed) for n in range(len(self.names))]
        self.bins = [one for bins in self._bins_of for one in bins]
        for name, bins in zip(self.names, self._bins_of, strict=True):
            if len(bins) <= self._rows_each * num_query:
                raise UserError(
                    f"task {name!r} fills {len(bins)} batch rows; expected more than the {self._rows_each} of its query batch: lower "
                    "train.batch_size, add rows, or leave the task out"
                )

    def local(self, step: int, batch_rows: np.ndarray) -> Batch:
        """Returns some rows of the global batch of a step, by number."""
        num_tasks, num_batches, num_query = self._num
        of_step = self._order_of(step, 0, len(self.names))
        made = []
        for row in batch_rows:
            at, group = divmod(int(row), num_tasks * num_batches)
            slot, batch = divmod(group, num_batches)
            bins = self._bins_of[of_step[slot % len(of_step)]]
            order, held = self._order_of(step, slot + 1, len(bins)), self._rows_each * num_query
            support = order[held:]
            is_query = batch >= num_batches - num_query
            made.append(bins[order[at] if is_query else support[(batch * self._rows_each + at) % len(support)]])
        return stack(self.rows, made, self.max_length, self.pad_id)

    def _order_of(self, step: int, stream: int, number: int) -> np.ndarray:
        bits = np.random.Philox(key=[self.seed % 2**64, step], counter=[0, stream, 0, 0]).random_raw(number)
        return np.argsort(bits, kind="stable")


def _bins(rows: Rows, of_task: np.ndarray, max_length: int, packed: bool) -> packing.Bins:
    """Bins that hold rows of one task alone, by their numbers among all."""
    lengths = rows.lengths[of_task]
    bins = packing.pack(lengths, max_length) if packed else packing.one_per_bin(len(of_task))
    return [tuple(int(of_task[row]) for row in one) for one in bins]
