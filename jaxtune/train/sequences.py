"""Sequence-level distillation (arXiv:1606.07947): a teacher answers the training prompts, and its answers are the rows.

It writes before training, as the section `generate` says, part by part into WORKDIR/teacher: a part is whole or not there, and is
not written twice. Only text passes between the two models, so the teacher may split it into other tokens. An answer that does
not end by itself is left out, and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.config import ConfigDict
from jaxtune.data import templates
from jaxtune.data.formats import Example
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller
from jaxtune.train import guests, start
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import write_whole

_PART_PROMPTS = 64  # what a kill costs at most
Answer = Callable[[Sequence[Example], int], list[tuple[str, bool]]]  # (examples, seed) -> (text, whether it ended)


def taught(config: ConfigDict, workdir: Path, examples: list[Example], show: Any) -> list[Example]:
    """Returns the examples with the teacher's answers, where `distill.mode` is "sequence"; else as they are.

    Raises:
      UserError: a row has no prompt, the teacher is not to be had, or the folder holds another teacher's answers, or to other rows.
    """
    if config.train.objective != "distill" or config.distill.mode != "sequence":
        return examples
    for example in examples:
        if example.messages is None and not example.prompt:
            raise UserError(
                f"{example.row_id}: distill.mode='sequence' has the teacher answer prompts, and this row has none: give it chats or "
                "prompts with answers, or set distill.mode='online'"
            )
    host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
    folder = workdir / f"teacher{host}"
    _check(folder, _about(config, examples))
    answer: Answer | None = None
    found: list[tuple[str, bool]] = []
    starts = range(0, len(examples), _PART_PROMPTS)
    for number, first in enumerate(show(starts, len(starts), "teacher's answers")):
        path = folder / f"answers_{number:04d}.json"
        if not path.exists():
            answer = answer or _teacher(config, show)
            part = examples[first : first + _PART_PROMPTS]
            write_whole(path, json.dumps(answer(part, config.generate.seed + number), ensure_ascii=False))
        found += [(text, bool(ended)) for text, ended in json.loads(path.read_text("utf-8"))]
    kept = [
        _answered(example, text)
        for example, (text, ended) in zip(examples, found, strict=True)
        if ended and text.strip()
    ]
    if not kept:
        raise UserError(
            f"none of the teacher's {len(found)} answers ended within generate.max_new_tokens={config.generate.max_new_tokens}: raise it, "
            "or check that the teacher answers prompts (an instruct model, with its chat template)"
        )
    return kept


def _about(config: ConfigDict, examples: list[Example]) -> str:
    """A hash of what the answers depend on."""
    distill = config.distill
    teacher = [distill.teacher, distill.teacher_adapter, distill.teacher_tokenizer, distill.teacher_quantize]
    if distill.teacher in guests.SELVES:
        teacher += [config.model.source, str(config.model.keep_layers), config.tune.adapter]
    drawn = {
        key: value for key, value in config.generate.to_dict().items() if key not in ("input", "output", "batch_size")
    }
    asked = [[example.messages, example.prompt, example.tools] for example in examples]
    text = json.dumps([teacher, drawn, asked], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(folder: Path, about: str) -> None:
    file = folder / "answers.sha256"
    if file.exists() and file.read_text() != about:
        raise UserError(
            f"{folder} holds answers of another teacher, to other rows, or drawn otherwise: choose another --workdir, or delete that "
            "folder to have them written anew"
        )
    write_whole(file, about)


def _answered(example: Example, text: str) -> Example:
    """The example with this answer in the place of its own."""
    if example.messages is None:
        return example._replace(answer=text)
    last = example.messages[-1]
    before = example.messages[:-1] if last["role"] == "assistant" else example.messages
    said: Any = {"role": "assistant", "content": text}
    return example._replace(messages=(*before, said), answer=text)


def _teacher(config: ConfigDict, show: Any) -> Answer:
    """The teacher with its own tokenizer and chat template, ready to answer."""
    own = guests.config_of(config)
    if config.distill.teacher in guests.SELVES:
        own = config.copy_and_resolve_references()
        own.train.objective, own.train.beside, own.retain.penalties = "sft", (), ()
        own.tune.freeze, own.tune.train_layers = (), ()
        own.tune.adapter = own.tune.adapter if config.distill.teacher == "start" else ""
    own.tune.method = own.tune.method if own.tune.method == "prompt" else "lora"  # so that no optimizer state is made
    if not own.tune.adapter:
        own.tune.method, own.tune.rank, own.tune.use_dora = "lora", 1, False
    model = source.find(own)
    source.check_writes(model)
    tokenizer = source.find_tokenizer(own, model)
    program, values = start.program(own, model)
    state, frozen = start.load(own, model, program, values, show)
    params = {**frozen, **state.params}
    places = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
    roller = Roller(program.inference, *places, config.rl.slots, program.mesh)
    sampling = Sampling.from_config(config.generate)

    def answer(examples: Sequence[Example], seed: int) -> list[tuple[str, bool]]:
        prompts = [templates.prompt_ids(example, tokenizer) for example in examples]
        made = roller(params, prompts, 1, sampling, config.generate.max_new_tokens, seed)
        return [(tokenizer.decode(one.tokens[: len(one.tokens) - one.ended]), bool(one.ended)) for one in made]

    return answer
