"""New rows beside the old ones of a lineage: drawn, embedded, and tested for drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.data import pairs
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import retrieval
from jaxtune.lineage import drift
from jaxtune.lineage.drift import Shift
from jaxtune.lineage.stages import Stage
from jaxtune.rewards.scoring import prompt_of
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source

Embed = Callable[[list[str]], np.ndarray]
_UNLIKE = 50  # rows that are listed as the most unlike the old ones


class Drift(NamedTuple):
    """The tests by name, and the new rows that are most unlike the old ones, the strangest first."""

    shifts: dict[str, Shift]
    unlike: list[dict[str, Any]]


def compare(config: ConfigDict, new: Stage, earlier: Sequence[Stage], tokenizer: Tokenizer, embed: Embed) -> Drift:
    """Tests whether a stage's training rows differ from those of all earlier stages together, by what is asked in them.

    Of each side `lineage.drift_rows` rows are drawn; labels are compared where all stages have a label column.
    """
    options, rng = config.lineage, np.random.default_rng(config.train.seed)
    old = _drawn([example for stage in earlier for example in stage.splits.train], options.drift_rows, rng)
    fresh = _drawn(new.splits.train, options.drift_rows, rng)
    if min(len(old), len(fresh)) < 2:
        return Drift({}, [])
    texts = [[prompt_of(example) for example in side] for side in (old, fresh)]
    vectors_MD = embed([*texts[0], *texts[1]])
    sides_MD = vectors_MD[: len(old)], vectors_MD[len(old) :]
    meaning, likeness_M = drift.mmd(*sides_MD, options.drift_permutations, config.train.seed)
    shifts = {"meaning": meaning}
    if all(stage.config.data.label_column for stage in (*earlier, new)):
        shifts["labels"] = drift.labels(
            *([str(example.answer or example.labels) for example in side] for side in (old, fresh))
        )
    shifts["length"] = drift.lengths(*([len(tokenizer.encode(text)) for text in side] for side in texts))
    strangest = np.argsort(likeness_M, kind="stable")[:_UNLIKE]
    unlike = [
        {"row_id": fresh[i].row_id, "likeness": float(likeness_M[i]), "prompt": texts[1][i], "answer": fresh[i].answer}
        for i in strangest.tolist()
    ]
    return Drift(drift.holm(shifts), unlike)


def _drawn(examples: Sequence[Example], num: int, rng: np.random.Generator) -> list[Example]:
    chosen = rng.choice(len(examples), min(num, len(examples)), replace=False)
    return [examples[i] for i in np.sort(chosen).tolist()]


def embedder(config: ConfigDict, show: Any) -> Embed:
    """What embeds texts: the base's own last states, or those of the model that `lineage.embedder` names, mean-pooled.

    Raises:
      UserError: the model is not to be had.
    """
    own, named = config.copy_and_resolve_references(), config.lineage.embedder
    if named:
        own.model, own.tune = config_lib.base().model, config_lib.base().tune
        own.model.source, own.train.objective = named, "sft"
    try:
        model = source.find(own)
        tokenizer = source.find_tokenizer(own, model)
        program, values = start.program(own, model)
        state, frozen = start.load(own, model, program, values, show)
    except UserError as error:
        raise UserError(f"lineage.embedder={named!r}: {error}" if named else str(error)) from None
    params = {**frozen, **state.params}
    most = min(config.data.max_length, program.model_config.max_positions)

    def embed(texts: list[str]) -> np.ndarray:
        tokens = [pairs.encode(text, tokenizer, most)[0] or [tokenizer.pad_id] for text in texts]
        options = (tokenizer.pad_id, config.eval.batch_size, show, "comparing new rows with old")
        return retrieval.embed(program.inference, params, "mean", tokens, *options)

    return embed
