"""A local model as a judge of two answers: how much likelier it finds the letter A than B as its reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxtune.config import ConfigDict, base
from jaxtune.data import pipeline, templates
from jaxtune.data.formats import Example
from jaxtune.evals import likelihood
from jaxtune.train import guests, start
from jaxtune.weights import source


def load(
    config: ConfigDict, uri: str, progress: pipeline.Progress = pipeline.silent
) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns `judge(questions) -> (M,)` log-odds of A over B; NaN for a question that is longer than the model knows.

    Args:
      uri: a decoder; "" = the config's own, with its adapter.
    """
    own = guests.none(config)
    own.optim, own.retain, own.train.objective = base().optim, base().retain, "sft"
    if uri:
        own.model.source, own.model.tokenizer, own.tune.adapter, own.model.keep_layers = uri, "", "", ()
    model = source.find(own)
    source.check_writes(model)
    tokenizer = source.find_tokenizer(own, model)
    program, values = start.program(own, model)
    state, frozen = start.load(own, model, program, values, pipeline.silent)  # type: ignore[arg-type]
    params = {**frozen, **state.params}
    score = likelihood.label_scorer(
        program.inference, params, tokenizer.pad_id, config.eval.batch_size, progress, "judging"
    )

    def judge(questions: Sequence[str]) -> np.ndarray:
        logits_M = np.full(len(questions), np.nan)
        fits, prompts, options = [], [], []
        for at, text in enumerate(questions):
            plain = text.replace("<|", "< |")  # an answer's text must open no turn of its own
            chat = ({"role": "user", "content": plain},)
            example = (
                Example("", chat, answer="A") if config.data.chat else Example("", prompt=plain + "\n", answer="A")
            )
            prompt, letters = templates.continuations(example, ("A", "B"), tokenizer)
            letters = [one[:1] for one in letters] if letters[0][:1] != letters[1][:1] else letters  # no end of turn
            if len(prompt) + max(map(len, letters)) <= program.model_config.max_positions:
                fits.append(at)
                prompts.append(prompt)
                options.append(letters)
        if fits:
            scores_M2 = score(prompts, options)
            logits_M[fits] = scores_M2[:, 0] - scores_M2[:, 1]
        return logits_M

    return judge
